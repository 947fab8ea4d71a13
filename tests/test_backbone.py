"""The frozen LM on twelve architectures: exact scores, nothing changed, nothing left behind, clear refusals."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sklearn.base
import torch
import torch.nn.functional as F
import transformers as tf
from conftest import ARCHITECTURES, CAUSAL, MASKED, OTHERS, SENTENCES, tiny
from torch import Tensor

import verbtune.backbone
import verbtune.batch
import verbtune.text_cache
from verbtune import Backbone, BackboneError
from verbtune.attention import AroundAttention, quick_gradients
from verbtune.compiled import CompiledTask, compile_task
from verbtune.encode import Example, tokenize
from verbtune.task import Task
from verbtune.text_cache import TextCache, frozen_length

ROWS = [{"text": text} for text in [*SENTENCES, "Bad.", "Good good good good film, and so was the music! 🙂", "\0 x"]]
SINGLE = Task.from_dict(
    {
        "task": "single",
        "template": "{text} It was {answer}.",
        "verbalizer": {"negative": ["bad", "terrible"], "positive": ["good", "great"]},
    }
)
SEVERAL = Task.from_dict(
    {
        "task": "several",
        "template": "{text} It was {answer}.",
        "verbalizer": {"negative": ["bad", "dreadful"], "positive": ["good", "not bad at all"]},
    }
)
close = torch.testing.assert_close


def plain_logits(backbone: Backbone, ids: list[int]) -> Tensor:
    """The full logits (T, V), asked for the way everybody does."""
    with torch.no_grad():
        logits: Tensor = backbone.model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def compiled(backbone: Backbone, task: Task = SINGLE, **options: Any) -> tuple[CompiledTask, list[Example]]:
    made = compile_task(task, backbone, **options)
    return made, made.encode(ROWS)


def soft(backbone: Backbone, task: Task = SINGLE, **options: Any) -> tuple[CompiledTask, list[Example], Tensor]:
    made, examples = compiled(backbone, task, soft=True, **options)
    noise = torch.randn(
        len(made.layout.slot_tokens), backbone.embedding_table().shape[1], generator=torch.Generator().manual_seed(1)
    )
    return made, examples, noise


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_word_scores_are_the_rows_of_the_full_logits(backbone: Backbone) -> None:
    made, examples = compiled(backbone, multi_token="refuse")
    scores, _ = made.infer(ROWS)
    rows = [pieces[0] for pieces in made.words.pieces]
    close(scores, torch.stack([plain_logits(backbone, e.ids)[e.answer, rows] for e in examples]), rtol=0, atol=1e-5)
    assert scores.std() > 0.1  # or the comparison would say little


def test_the_state_times_the_output_matrix_is_the_score(backbone: Backbone) -> None:
    made, _ = compiled(backbone)
    scores, states = made.infer(ROWS)
    output = backbone.model.get_output_embeddings()
    rows = [pieces[0] for pieces in made.words.pieces]
    bias = 0 if output.bias is None else output.bias[rows]
    close(states[:, : backbone.width] @ output.weight[rows].T + bias, scores, rtol=0, atol=1e-5)


def test_beside_it_stands_the_mean_state_of_the_text(backbone: Backbone) -> None:
    """At five sixths of the depth (of two layers, behind the first) or behind the last one, side by side in a batch."""
    task = Task.from_dict(
        {
            "task": "pair",
            "template": "{b} and {a}: {answer}, {b}",
            "template_causal": "{b} and {a}, {b}: {answer}",
            "verbalizer": SINGLE.to_dict()["verbalizer"],
        }
    )
    made = compile_task(task, backbone)
    rows = [{"a": a["text"], "b": b["text"]} for a, b in zip(ROWS[:5], ROWS[3:], strict=False)]
    examples = [dataclasses.replace(e, last=i % 2 == 1) for i, e in enumerate(made.encode(rows))]
    _, states = backbone.infer(examples, made.words)
    model = copy.deepcopy(backbone.model)  # being asked for hidden states leaves hooks in it
    for row, state, example in zip(rows, states, examples, strict=True):
        with torch.no_grad():
            output = model.base_model(input_ids=torch.tensor([example.ids]), output_hidden_states=True)
        at = [i for start, stop in example.texts for i in range(start, stop)]
        assert len(example.texts) == 3
        lead = [ids for name in ("b", "a", "b") for ids in tokenize(backbone.tokenizer, [row[name]], lead=True)]
        assert [example.ids[i] for i in at[-len(lead[2]) :]] == lead[2]
        layer = output.last_hidden_state if example.last else output.hidden_states[1]
        wanted = layer[0, at].mean(0)  # OPT's last state has fewer numbers
        close(
            state[backbone.width :], F.pad(wanted, (0, len(state) - backbone.width - len(wanted))), rtol=1e-5, atol=1e-5
        )


def _another_head() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "true_hidden_size": 16, "embedding_size": 16, "intra_bottleneck_size": 16}
    return tf.MobileBertForMaskedLM(tf.MobileBertConfig(vocab_size=300, num_hidden_layers=2, **sizes))


def _seen_from_both_sides() -> tf.PreTrainedModel:
    return tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=300, emb_dim=32, n_layers=2, n_heads=4))


@pytest.mark.parametrize("build", [_another_head, _seen_from_both_sides])
def test_a_model_that_says_otherwise_than_as_a_whole_is_refused(build: Callable[[], tf.PreTrainedModel]) -> None:
    made = compile_task(SINGLE, Backbone(build(), tiny("bert").tokenizer))
    with pytest.raises(BackboneError, match="this architecture is not supported, use another model"):
        made.infer(ROWS)


def test_a_model_whose_scores_are_no_numbers_is_refused() -> None:
    model = tiny("bert").copy_of_model()
    model.get_input_embeddings().weight.data.fill_(torch.inf)
    made = compile_task(SINGLE, Backbone(model, tiny("bert").tokenizer))
    with pytest.raises(BackboneError, match=r"its scores, in torch\.float32, are not finite; load it with dtype="):
        made.infer(ROWS)


def test_words_of_several_pieces_are_the_sum_of_their_log_softmax_terms(backbone: Backbone) -> None:
    made, examples = compiled(backbone, SEVERAL)
    assert {len(pieces) for pieces in made.words.pieces} > {1}
    close(made.infer(ROWS)[0], one_word_at_a_time(made, examples), rtol=1e-5, atol=1e-5)


def one_word_at_a_time(made: CompiledTask, examples: list[Example]) -> Tensor:
    """Log-probabilities (N, W) of the words, the plain way."""
    backbone = made.backbone
    naive = torch.empty(len(examples), len(made.words.words))
    for i, e in enumerate(examples):
        for w, pieces in enumerate(made.words.pieces):
            if backbone.kind == "causal":
                logs = plain_logits(backbone, [*e.ids, *pieces]).log_softmax(-1)[len(e.ids) - 1 :]
            else:
                masks = [backbone.tokenizer.mask_token_id] * len(pieces)
                ids = [*e.ids[: e.answer], *masks, *e.ids[e.answer + 1 :]]
                logs = plain_logits(backbone, ids).log_softmax(-1)[e.answer :]
            naive[i, w] = sum(logs[j, piece] for j, piece in enumerate(pieces))
    return naive


WITHOUT_DEEP = {"bloom", "gemma2", "gpt-neo", "mpnet", "roformer"}


@pytest.mark.parametrize("architecture", OTHERS)
def test_many_more_architectures_are_read_as_they_are(architecture: str) -> None:
    backbone = tiny(architecture)
    made, examples = compiled(backbone, SINGLE if architecture == "bloom" else SEVERAL)
    scores, _ = made.infer(ROWS)
    plain = one_word_at_a_time(made, examples)
    if made.words.longest == 1:  # the scores are up to a constant
        scores, plain = scores - scores[:, :1], plain - plain[:, :1]
    close(scores, plain, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        start = backbone.encode_start(examples, [e.answer for e in examples])
        assert (start is None) == (backbone.kind == "masked")
        close(
            backbone.word_scores(examples, made.words, start=start)[0],
            backbone.word_scores(examples, made.words)[0],
            rtol=1e-5,
            atol=1e-5,
        )
    takes_deep = contextlib.nullcontext()
    with pytest.raises(BackboneError, match="no deep prompt") if architecture in WITHOUT_DEEP else takes_deep:
        assert backbone.keys_and_values(backbone.embedding_table()[:3]).isfinite().all()


def test_continuations_in_chunks_are_the_same(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = compiled(backbone, SEVERAL)
    whole = made.infer(ROWS)[0]
    monkeypatch.setattr(verbtune.backbone, "LOGITS_PER_CHUNK", 1)
    close(made.infer(ROWS)[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
def test_a_ragged_batch_equals_one_by_one(backbone: Backbone, task: Task) -> None:
    made, examples = compiled(backbone, task)
    assert len({len(e.ids) for e in examples}) > 3
    with torch.no_grad():
        together = backbone.word_scores(examples, made.words)
        alone = [backbone.word_scores([e], made.words) for e in examples]
    for k in range(2):
        close(together[k], torch.cat([a[k] for a in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("budget", [1, 70, 10**9])
def test_order_and_batch_size_change_nothing(
    backbone: Backbone, task: Task, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = compiled(backbone, task)
    expected = made.infer(ROWS)
    monkeypatch.setattr(verbtune.batch, "TOKENS_PER_BATCH", budget)
    order = [3, 0, 8, 1, 9, 2, 7, 4, 6, 5]
    for found, wanted in zip(made.infer([ROWS[i] for i in order]), expected, strict=True):
        close(found, wanted[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
def test_a_cached_prefix_changes_nothing(architecture: str, task: Task) -> None:
    backbone = tiny(architecture)
    made, examples, prompt = soft(backbone, task, prompt_length=5, tune_template=True)
    examples = [dataclasses.replace(e, last=i > 3) for i, e in enumerate(examples)]
    assert made.layout.n_prefix >= 5
    for length in (1, made.layout.n_prefix):
        with torch.no_grad():
            start = backbone.encode_start(examples[:1], [length], prompt)
            assert start is not None
            cached = backbone.word_scores(examples, made.words, prompt, start=start)
            again = backbone.word_scores(examples[:3], made.words, prompt, start=start)  # the start is as it was
            uncached = backbone.word_scores(examples, made.words, prompt)
        for found, more, wanted in zip(cached, again, uncached, strict=True):
            close(found, wanted, rtol=1e-5, atol=1e-5)
            close(more, wanted[:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["memory", "disk"])
def test_texts_read_once_change_nothing(
    architecture: str, task: Task, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny(architecture)
    monkeypatch.setattr(verbtune.text_cache, "MEMORY_BYTES", memory)
    made, examples, prompt = soft(backbone, task, tune_template=True)
    examples = [dataclasses.replace(e, last=i > 3) for i, e in enumerate(examples)]
    lengths = [frozen_length(e) for e in examples]
    assert min(lengths) > made.layout.n_prefix
    texts = TextCache(backbone, examples, lengths)
    index = [4, 0, 7, 2, 2]
    with torch.no_grad():
        batch = [examples[i] for i in index]
        cached = backbone.word_scores(batch, made.words, prompt, start=texts.start(index))
        uncached = backbone.word_scores(batch, made.words, prompt)
    for found, wanted in zip(cached, uncached, strict=True):
        close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_all_but_the_answer_may_be_read_before(architecture: str, task: Task) -> None:
    backbone = tiny(architecture)
    made, examples = compiled(backbone, task)
    with torch.no_grad():
        start = backbone.encode_start(examples, [e.answer for e in examples])
        cached = backbone.word_scores(examples, made.words, start=start)
        for found, wanted in zip(cached, backbone.word_scores(examples, made.words), strict=True):
            close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_gradients_through_a_cached_prefix_are_the_gradients(architecture: str) -> None:
    backbone = tiny(architecture)
    made, examples, prompt = soft(backbone, prompt_length=3)
    gradients = []
    for cached in (True, False):
        vectors = prompt.clone().requires_grad_()
        start = backbone.encode_start(examples[:1], [made.layout.n_prefix], vectors) if cached else None
        backbone.word_scores(examples, made.words, vectors, start=start)[0].square().sum().backward()
        gradients.append(vectors.grad)
    close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0].norm(dim=1).min() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_16_bits_are_those_of_float32_rounded(architecture: str) -> None:
    whole = tiny(architecture)
    half = Backbone(copy.deepcopy(whole.model).bfloat16(), whole.tokenizer)
    gradients = []
    for backbone in (whole, half):
        made, examples, prompt = soft(backbone, prompt_length=3)
        vectors = prompt.float().clone().requires_grad_()
        backbone.word_scores(examples, made.words, vectors)[0].square().sum().backward()
        assert vectors.grad is not None
        gradients.append(vectors.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_whose_gradient_is_wanted_is_computed_in_float32(autocast: bool) -> None:
    query = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    mask = torch.randn(2, 1, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), quick_gradients(torch.device("cpu")):
        found = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    wanted = F.scaled_dot_product_attention(query.float(), query.float(), query.float(), attn_mask=mask.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    with torch.no_grad():
        assert quick_gradients(torch.device("cpu")).__enter__() is None


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_padding_after_a_long_start_has_positions_too(architecture: str) -> None:
    """gpt2 and opt look positions up in a table, which what follows a long start would leave."""
    backbone = tiny(architecture)
    word = backbone.tokenizer("good", add_special_tokens=False)["input_ids"][:1]
    limit = backbone.model.config.max_position_embeddings
    examples = [Example(word * n, [-1] * n, n - 1) for n in (limit, limit // 2)]
    words = compiled(backbone)[0].words
    whole = [backbone.word_scores([e], words)[0] for e in examples]
    start = backbone.encode_start(examples, [limit - 1, 1])
    close(backbone.word_scores(examples, words, start=start)[0], torch.cat(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", MASKED)
def test_a_masked_lm_has_no_start_to_keep(architecture: str) -> None:
    made, examples = compiled(tiny(architecture))
    assert made.backbone.encode_start(examples[:1], [1]) is None


def test_soft_vectors_that_are_the_tokens_embeddings_change_nothing(backbone: Backbone) -> None:
    made, _ = compiled(backbone)
    tuned, _, _ = soft(backbone, tune_template=True)
    embeddings = backbone.embed(torch.tensor(tuned.layout.slot_tokens))
    close(tuned.infer(ROWS, embeddings)[0], made.infer(ROWS)[0], rtol=0, atol=1e-5)


def test_every_soft_vector_matters(backbone: Backbone) -> None:
    made, examples, prompt = soft(backbone, prompt_length=2, tune_template=True)
    vectors = prompt.requires_grad_()
    backbone.word_scores(examples, made.words, vectors)[0].square().sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
def test_a_text_that_fills_the_model_is_read(backbone: Backbone, task: Task) -> None:
    """Exactly `max_length` positions, and room for the further pieces of a label word."""
    made = compile_task(task, backbone)
    rows = [{"text": "film " * 400}]
    (example,) = made.encode(rows)
    assert len(example.ids) + made.words.longest - 1 == backbone.max_length
    assert torch.isfinite(made.infer(rows)[0]).all()


def test_nothing_to_infer_is_no_rows(backbone: Backbone) -> None:
    made, _ = compiled(backbone)
    scores, states = made.infer([])
    assert scores.shape == (0, 4)
    assert states.shape == (0, backbone.state_width)


def test_states_alone_are_the_states(backbone: Backbone) -> None:
    made, _ = compiled(backbone, SEVERAL)
    close(made.for_states.infer(ROWS)[1], compiled(backbone)[0].infer(ROWS)[1], rtol=1e-5, atol=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_batch_too_large_for_the_memory_is_halved(masked: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = compiled(masked)
    expected = made.infer(ROWS)[0]
    sizes, original = [], Backbone.word_scores

    def cramped(self: Backbone, examples: list[Example], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(examples))
        if len(examples) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return original(self, examples, *args, **options)

    monkeypatch.setattr(Backbone, "word_scores", cramped)
    close(made.infer(ROWS)[0], expected, rtol=1e-5, atol=1e-5)
    assert sizes[0] == len(ROWS)
    assert min(sizes) <= 2


@pytest.mark.parametrize("message", ["out of memory", "some other trouble"])
def test_what_halving_cannot_help_is_raised(masked: Backbone, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    made, _ = compiled(masked)

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(Backbone, "word_scores", broken)
    with pytest.raises(RuntimeError, match=message):
        made.infer(ROWS)


# -- what nobody reads is not computed ---------------------------------------------------------------------------------


def without_sparing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbtune.backbone, "only_at", lambda layer, answers: contextlib.nullcontext())


def test_behind_its_attention_the_last_layer_takes_the_answers_only(backbone: Backbone) -> None:
    if "Deberta" in type(backbone.model).__name__:  # attention of its own
        assert not backbone._last_is_apart
        return
    made, examples = compiled(backbone)
    sizes: list[int] = []
    last = [m for m in backbone._layers[-1].modules() if m._parameters]
    hooks = [m.register_forward_hook(lambda module, args, output: sizes.append(args[0].numel())) for m in last]
    try:
        with torch.no_grad():
            backbone.word_scores(examples, made.words)
    finally:
        for hook in hooks:
            hook.remove()
    widest = max(size for m in last for weight in m._parameters.values() if weight is not None for size in weight.shape)
    longest = max(len(e.ids) for e in examples)
    assert max(sizes) >= len(examples) * longest * backbone.width  # what leads to keys and values
    assert sizes[-1] <= len(examples) * widest


@pytest.mark.parametrize("options", [{}, {"prompt_length": 3}], ids=["manual", "soft"])
def test_it_says_the_same_as_whole(
    backbone: Backbone, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, states and gradient; padded, and behind a start that all examples share."""

    def asked() -> list[Tensor]:
        made, examples, prompt = soft(backbone, **options)
        prompt = prompt.detach().requires_grad_()
        scores, states = backbone.word_scores(examples, made.words, prompt)
        (scores.log_softmax(1)[:, 0].sum() + states.square().mean()).backward()
        gradient = torch.zeros(0) if prompt.grad is None else prompt.grad
        return [scores, states, gradient, *backbone.infer(examples, made.words, prompt, n_prefix=made.layout.n_prefix)]

    found = asked()
    without_sparing(monkeypatch)
    for a, b in zip(found, asked(), strict=True):
        close(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_of_one_layer_is_read_whole() -> None:
    config = tf.BertConfig(
        vocab_size=len(tiny("bert").tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    backbone = Backbone(tf.BertForMaskedLM(config), tiny("bert").tokenizer)
    made, examples = compiled(backbone)
    ids = made.encode(ROWS[:1])[0]
    masked = list(ids.ids)
    masked[ids.answer] = backbone.tokenizer.mask_token_id
    rows = [pieces[0] for pieces in made.words.pieces]
    close(backbone.infer(examples, made.words)[0][0], plain_logits(backbone, masked)[ids.answer, rows])


# -- nothing changed, nothing left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [SINGLE, SEVERAL], ids=["single", "several"])
def test_the_model_is_as_before_a_call(backbone: Backbone, task: Task) -> None:
    model = backbone.model
    head, bits = model.get_output_embeddings(), {k: v.clone() for k, v in model.state_dict().items()}
    ids = [5, 6, 7, 8]
    before = plain_logits(backbone, ids)
    made, examples, prompt = soft(backbone, task, prompt_length=2)
    backbone.word_scores(examples, made.words, prompt.requires_grad_())[0].sum().backward()
    assert model.get_output_embeddings() is head
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(plain_logits(backbone, ids), before)
    assert model.state_dict().keys() == bits.keys()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("at", [0, -1], ids=["the first layer", "the last layer"])
def test_the_model_is_as_before_after_an_exception(backbone: Backbone, at: int) -> None:
    made, _ = compiled(backbone)
    head = backbone.model.get_output_embeddings()
    expected = made.infer(ROWS)[0]

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = list(backbone._layers[at].modules())[-1].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            made.infer(ROWS)
    finally:
        hook.remove()
    assert backbone.model.get_output_embeddings() is head
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())
    assert torch._C._len_torch_function_stack() == 0  # no attention is replaced
    assert torch.equal(made.infer(ROWS)[0], expected)


def test_tied_embeddings_stay_tied(backbone: Backbone) -> None:
    def tied() -> bool:
        model = backbone.model
        return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)

    before = tied()
    compiled(backbone)[0].infer(ROWS)
    assert tied() == before


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_threads_do_not_disturb_each_other(architecture: str) -> None:
    backbone = tiny(architecture)
    single, several = compiled(backbone)[0], compiled(backbone, SEVERAL)[0]
    expected = [single.infer(ROWS)[0], several.infer(ROWS)[0]] * 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda made: made.infer(ROWS)[0], [single, several] * 4))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_copies_and_clones_are_the_same_object(backbone: Backbone) -> None:
    assert copy.deepcopy(backbone) is backbone
    assert copy.deepcopy([backbone])[0] is backbone
    assert sklearn.base.clone(backbone) is backbone


def test_a_pickled_backbone_in_memory_carries_its_weights(backbone: Backbone) -> None:
    restored = pickle.loads(pickle.dumps(backbone))
    assert restored is not backbone
    assert (restored.kind, restored.fingerprint) == (backbone.kind, backbone.fingerprint)
    assert torch.equal(compile_task(SINGLE, restored).infer(ROWS)[0], compiled(backbone)[0].infer(ROWS)[0])


def save(backbone: Backbone, folder: Path) -> Path:
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_is_loaded_once_and_pickled_as_its_name(architecture: str, tmp_path: Path) -> None:
    folder = save(tiny(architecture), tmp_path / "model")
    kind = "causal" if architecture == "bert-causal" else None
    loaded = Backbone.load(folder, kind=kind, dtype="float32")
    assert Backbone.load(str(folder), kind=kind, dtype="float32") is loaded
    assert Backbone.load(loaded) is loaded
    assert loaded.kind == tiny(architecture).kind
    assert loaded.fingerprint == tiny(architecture).fingerprint
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 1000
    assert pickle.loads(pickled) is loaded
    weights = tiny(architecture).model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.model.state_dict().items())
    # Not to the last bit: weights mapped from a file are not aligned, which some processors' products feel.
    scores, expected = (made.infer(ROWS)[0] for made in (compile_task(SINGLE, loaded), compiled(tiny(architecture))[0]))
    close(scores, expected, rtol=1e-5, atol=1e-6)


# -- fingerprint -------------------------------------------------------------------------------------------------------


def fresh() -> Backbone:
    return pickle.loads(pickle.dumps(tiny("bert")))  # type: ignore[no-any-return]


def test_the_fingerprint_tells_a_changed_weight_or_tokenizer() -> None:
    plain, nudged, added = fresh(), fresh(), fresh()
    with torch.no_grad():
        next(nudged.model.parameters()).view(-1)[7] += 1e-2
    added.tokenizer.add_tokens(["brandnew"])
    assert len({plain.fingerprint, nudged.fingerprint, added.fingerprint}) == 3
    assert plain.fingerprint == fresh().fingerprint


def test_the_fingerprint_is_the_files_in_any_precision(tmp_path: Path) -> None:
    """Trained on a GPU in bfloat16, a classifier must be readable on a CPU in float32."""
    folder = save(tiny("bert"), tmp_path / "model")
    half = Backbone.load(folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint == Backbone.load(folder, dtype="float32").fingerprint == tiny("bert").fingerprint
    other_half = Backbone.load(folder, dtype="float16")
    assert other_half.model.dtype == torch.float16
    assert other_half.fingerprint == half.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_positions_are_as_exact_in_16_bits_as_transformers_has_them(dtype: str, tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path / "model")
    ours = Backbone.load(folder, dtype=dtype).model
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert {n: b.dtype for n, b in ours.named_buffers()} == {n: b.dtype for n, b in theirs.named_buffers()}
    assert torch.float32 in {b.dtype for b in ours.buffers()}


def test_what_is_copied_or_pickled_during_a_call_is_the_model_as_it_was() -> None:
    backbone, found = fresh(), []

    def take() -> None:
        found.extend([backbone.copy_of_model(), pickle.loads(pickle.dumps(backbone)).model])

    other = threading.Thread(target=take)

    def meanwhile(attention: Any, *args: Any, **named: Any) -> Tensor:
        if not other.ident:
            other.start()
            other.join(0.2)
        return attention(*args, **named)

    with AroundAttention(meanwhile):
        compiled(backbone)[0].infer(ROWS)
    other.join()
    for model in found:
        assert type(model.get_output_embeddings()) is torch.nn.Linear
        assert not any(module._forward_hooks for module in model.modules())


def test_the_fingerprint_does_not_depend_on_how_the_tokenizer_was_used() -> None:
    """Fast tokenizers keep the padding and truncation of their last call, and of the file they were saved in."""
    used = fresh()
    used.tokenizer(["one", "two words"], padding=True, truncation=True, max_length=7)
    assert used.fingerprint == fresh().fingerprint


# -- refusals ----------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_a_name_that_is_not_cached_is_refused_in_one_line_without_network() -> None:
    with pytest.raises(
        BackboneError, match=r"cannot load the language model 'nobody/nothing'.*Use builtin/masked"
    ) as e:
        Backbone.load("nobody/nothing")
    one_line(e.value)


@pytest.mark.parametrize("name", ["builtin/nothing", "builtin/../../etc"])
def test_an_unknown_built_in_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="builtin/masked, builtin/causal"):
        Backbone.load(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot load the language model") as e:
        Backbone.load(tmp_path)
    assert str(tmp_path) in one_line(e.value)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot load the language model") as e:
        Backbone.load(folder)
    one_line(e.value)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    tiny("distilbert").model.distilbert.save_pretrained(folder)
    tiny("distilbert").tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match="neither a masked nor a causal LM; pass kind='masked'"):
        Backbone.load(folder)
    with pytest.raises(BackboneError, match="so it has no trained LM head; use a checkpoint"):
        Backbone.load(folder, kind="masked")


def test_an_unknown_dtype_is_refused_before_loading() -> None:
    with pytest.raises(BackboneError, match="dtype='float8' is unknown; use auto, float32, bfloat16 or float16"):
        Backbone.load("nobody/nothing", dtype="float8")


def test_a_device_that_holds_no_weights_is_refused() -> None:
    with pytest.raises(BackboneError, match="device='meta' holds no weights; use cpu, cuda, or weights=False"):
        Backbone.load("builtin/masked", device="meta")


def test_a_model_that_is_no_lm_is_refused() -> None:
    config = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(BackboneError, match="BertModel is no masked or causal LM; load it with AutoModelForMaskedLM"):
        Backbone(tf.BertModel(config), tiny("bert").tokenizer)


def test_a_masked_lm_needs_a_mask_token() -> None:
    with pytest.raises(BackboneError, match="my-bert: a masked LM whose tokenizer has no mask token; set mask_token"):
        Backbone(tiny("bert").model, tiny("gpt2").tokenizer, name="my-bert")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"not a fast one; convert it to tokenizer\.json"):
        Backbone(tiny("bert").model, object())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kind_and_the_room_are_read_off_the_model(architecture: str) -> None:
    backbone = tiny(architecture)
    assert backbone.kind == ("masked" if architecture in MASKED else "causal")
    assert backbone.max_length == (158 if architecture == "roberta" else 160)
    assert repr(backbone) == f"Backbone({type(backbone.model).__name__}, {backbone.kind})"


def test_layers_that_count_by_places_see_all_of_them() -> None:
    assert tiny("gpt-neo").max_length == 64 < tiny("gpt-neo").model.config.max_position_embeddings


def test_the_embedding_table_has_real_tokens_only() -> None:
    """Models pad their vocabulary; a soft token must not start at, or be named after, a row that no token has."""
    padded = fresh()
    size = len(padded.tokenizer)
    padded.model.resize_token_embeddings(size + 24)
    close(padded.embedding_table(), tiny("bert").embedding_table(), rtol=0, atol=0)
    assert len(padded.embedding_table()) == size


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_a_cpu_is_quick_in_it(
    able: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    tiny("bert").model.save_pretrained(tmp_path)
    tiny("bert").tokenizer.save_pretrained(tmp_path)
    assert Backbone.load(tmp_path, device="cpu").model.dtype == dtype
