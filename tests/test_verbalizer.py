"""Label words: how they are tokenized, refused, weighed and learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from verbtune.backbone import Backbone
from verbtune.compiled import compile_task
from verbtune.task import Task, TaskError
from verbtune.verbalizer import AGGREGATIONS, LabelWords, Verbalizer, compile_words

WORDS = LabelWords(
    ("a", "b"), tuple("uvwxy"), ((1,), (2,), (3,), (4,), (5,)), (0, 1, 0, 1, 1), (1.0, 2.0, 0.5, 1.0, 3.0)
)


def make(verbalizer: dict[str, Any]) -> Task:
    spec = {"task": "tone", "template": "{text} It was {answer}.", "verbalizer": verbalizer}
    return Task.from_dict(spec, source="tone.yaml")


TONE = make({"positive": {"good": 2, "great": 1}, "negative": ["bad", "terrible"]})

# -- from words to pieces ----------------------------------------------------------------------------------------------


def test_words_follow_the_spec_and_classes_are_sorted(backbone: Backbone) -> None:
    words = compile_words(TONE, backbone.tokenizer, lead=True)
    assert words.classes == ("negative", "positive")
    assert words.words == ("good", "great", "bad", "terrible")
    assert words.owner == (1, 1, 0, 0)
    assert words.weights == (2.0, 1.0, 1.0, 1.0)
    assert words.longest == 1
    tokens = [backbone.tokenizer.decode(list(pieces)).strip() for pieces in words.pieces]
    assert tokens == list(words.words)


def test_the_order_of_the_classes_can_be_chosen_and_some_left_out(masked: Backbone) -> None:
    task = make({"a": ["good"], "b": ["bad"], "c": ["film"]})
    words = compile_words(task, masked.tokenizer, lead=True, classes=["c", "a"])
    assert (words.classes, words.words, words.owner) == (("c", "a"), ("good", "film"), (1, 0))


def test_the_space_before_the_answer_is_part_of_the_word(causal: Backbone) -> None:
    spaced, bare = (compile_words(TONE, causal.tokenizer, lead=lead) for lead in (True, False))
    assert spaced.pieces[0] != bare.pieces[0]
    assert causal.tokenizer.decode(list(spaced.pieces[0])) == " good"
    assert causal.tokenizer.decode(list(bare.pieces[0])) == "good"


def test_a_word_of_several_pieces_is_kept_whole_cut_or_refused(backbone: Backbone) -> None:
    task = make({"n": ["dreadful"], "p": ["good"]})
    whole = compile_words(task, backbone.tokenizer, lead=True)
    first = compile_words(task, backbone.tokenizer, lead=True, multi_token="first")
    assert whole.longest > 1
    assert first.pieces == tuple(pieces[:1] for pieces in whole.pieces)
    with pytest.raises(TaskError, match=r"^tone.yaml: verbalizer: n: 'dreadful' is \d+ tokens \(.+\); use a word that"):
        compile_words(task, backbone.tokenizer, lead=True, multi_token="refuse")


def test_an_unknown_policy_is_refused(masked: Backbone) -> None:
    with pytest.raises(ValueError, match="multi_token='last' is unknown; use one of exact, first, refuse"):
        compile_words(TONE, masked.tokenizer, lead=True, multi_token="last")


def test_words_of_two_classes_that_are_the_same_tokens_are_refused(masked: Backbone) -> None:
    """The tiny BERT is uncased."""
    task = make({"n": ["Good"], "p": ["good"]})
    with pytest.raises(
        TaskError, match=r"'Good' \(n\) and 'good' \(p\) are the same tokens here; choose words that di"
    ):
        compile_words(task, masked.tokenizer, lead=True)
    same = make({"n": ["bad"], "p": ["Good", "good"]})
    assert compile_words(same, masked.tokenizer, lead=True).owner == (0, 1, 1)


def test_a_shared_first_piece_is_refused_where_only_it_counts(backbone: Backbone) -> None:
    task = make({"n": ["not good"], "p": ["not bad"]})
    assert compile_words(task, backbone.tokenizer, lead=True).longest > 1
    with pytest.raises(TaskError, match="are the same tokens here; choose words that differ, or multi_token='exact'"):
        compile_words(task, backbone.tokenizer, lead=True, multi_token="first")


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "deberta-v2"])
def test_a_word_that_the_tokenizer_lacks_is_refused(architecture: str) -> None:
    with pytest.raises(
        TaskError, match=r"^tone.yaml: verbalizer: p: the tokenizer does not know '中'; use another word"
    ):
        compile_words(make({"n": ["bad"], "p": ["中"]}), tiny(architecture).tokenizer, lead=True)


def test_a_special_token_as_a_label_word_is_its_letters(causal: Backbone) -> None:
    words = compile_words(make({"n": ["bad"], "p": ["<|endoftext|>"]}), causal.tokenizer, lead=False)
    assert len(words.pieces[1]) > 1
    assert causal.tokenizer.eos_token_id not in words.pieces[1]


# -- from word scores to class scores ----------------------------------------------------------------------------------


def naive(scores: np.ndarray, aggregate: str) -> np.ndarray:
    """The class scores, one by one."""
    result = np.empty((len(scores), 2))
    for row, values in enumerate(scores):
        for c in range(2):
            own = [(values[i], WORDS.weights[i]) for i in range(5) if WORDS.owner[i] == c]
            if aggregate == "mean":
                result[row, c] = sum(s * w for s, w in own) / sum(w for _, w in own)
            elif aggregate == "max":
                result[row, c] = max(s + np.log(w) for s, w in own)
            else:
                result[row, c] = np.log(sum(w * np.exp(s) for s, w in own))
    return result


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(values=st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_class_scores_are_the_formula(aggregate: str, values: list[list[float]]) -> None:
    scores = Verbalizer(WORDS, 3, aggregate=aggregate)(torch.tensor(values), torch.zeros(len(values), 3))
    np.testing.assert_allclose(scores.numpy(), naive(np.array(values), aggregate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_of_any_size_stay_finite_and_shift_together(aggregate: str, shift: float) -> None:
    verbalizer = Verbalizer(WORDS, 3, aggregate=aggregate)
    values, states = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 3)
    moved = verbalizer(values + shift, states)
    torch.testing.assert_close(moved - shift, verbalizer(values, states), rtol=0, atol=5e-3)


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_gradients_are_the_derivatives(aggregate: str) -> None:
    verbalizer = Verbalizer(WORDS, 3, aggregate=aggregate, learned=True).double()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, dtype=torch.double, generator=generator, requires_grad=True)
    states = torch.randn(4, 3, dtype=torch.double, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(verbalizer, (values, states))
    verbalizer(values, states)[:, 0].sum().backward()
    assert verbalizer.rows.grad is not None
    torch.testing.assert_close(verbalizer.rows.grad[0], states.detach().sum(0))
    assert verbalizer.bias.grad.tolist() == [4.0, 0.0]


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_a_learned_verbalizer_starts_as_the_fixed_one(aggregate: str) -> None:
    values, states = torch.randn(6, 5), torch.randn(6, 3)
    fixed, learned = (Verbalizer(WORDS, 3, aggregate=aggregate, learned=x) for x in (False, True))
    assert torch.equal(fixed(values, states), learned(values, states))
    assert [p.shape for p in learned.parameters()] == [(2, 3), (2,)]
    assert not list(fixed.parameters())


def test_an_unknown_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregate='median' is unknown; use one of mean, max, logsumexp"):
        Verbalizer(WORDS, 3, aggregate="median")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learned_rows_are_changed_rows_of_the_output_matrix(architecture: str) -> None:
    """What the docstring promises of words of one token: the same as adding Δ to the LM's own rows."""
    backbone = tiny(architecture)
    made = compile_task(make({"n": ["bad"], "p": ["good"]}), backbone)
    words, states = made.infer([{"text": s} for s in SENTENCES])
    verbalizer = Verbalizer(made.words, backbone.state_width, learned=True)
    generator = torch.Generator().manual_seed(1)
    delta, beta = torch.randn(2, backbone.width, generator=generator), torch.randn(2, generator=generator)
    with torch.no_grad():
        verbalizer.rows[:, : backbone.width] = delta
        verbalizer.bias.copy_(beta)
        output = backbone.model.get_output_embeddings()
        rows = [made.words.pieces[made.words.words.index(w)][0] for w in ("bad", "good")]
        bias = 0 if output.bias is None else output.bias[rows]
        expected = states[:, : backbone.width] @ (output.weight[rows] + delta).T + bias + beta
        torch.testing.assert_close(verbalizer(words, states), expected, rtol=1e-5, atol=1e-4)


def test_settled_it_says_the_same_by_fewer_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    words = LabelWords(("bad", "good"), ("bad", "good", "great"), ((1,), (2,), (3,)), (0, 1, 1), (1.0, 1.0, 2.0))
    verbalizer = Verbalizer(words, 6, learned=True)
    for tensor in (verbalizer.rows, verbalizer.bias, verbalizer.center, verbalizer.gain, verbalizer.word_scale):
        assert tensor is not None
        tensor.data = torch.randn(tensor.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in verbalizer.state_dict().items()}
    settled = verbalizer.settled()
    asked = torch.randn(5, 3, generator=generator), torch.randn(5, 6, generator=generator)
    torch.testing.assert_close(settled(*asked), verbalizer(*asked).detach(), rtol=0, atol=1e-5)
    assert sum(t.numel() for t in settled.state_dict().values()) == sum(t.numel() for t in before.values()) - 2 * 6 + 2
    torch.testing.assert_close(dict(verbalizer.state_dict()), before, rtol=0, atol=0)
    manual = Verbalizer(words, 6)
    torch.testing.assert_close(manual.settled()(*asked), manual(*asked), rtol=0, atol=0)
