"""Deep prompts: what they do to the LM, exactly, and when one becomes a second opinion."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import CAUSAL, SENTENCES, tiny
from scipy.special import log_softmax
from torch import Tensor

import verbtune.deep
from verbtune import Backbone, BackboneError, PromptClassifier
from verbtune.baselines import ZeroShot
from verbtune.calibration import Calibration
from verbtune.compiled import CompiledTask, compile_task
from verbtune.deep import FOLDS, LENGTH, SecondOpinion, second_opinion
from verbtune.first_opinion import FirstOpinion
from verbtune.labelled import Labelled
from verbtune.prompt import DeepPrompt
from verbtune.rows import HeldOut
from verbtune.task import Task
from verbtune.tuning import History, TuningError
from verbtune.verbalizer import LabelWords, Verbalizer

ROWS = [{"text": text} for text in [*SENTENCES, "Bad.", "Good good good good film, and so was the music! 🙂"]]
WORDS = {"negative": ["bad", "dreadful"], "positive": ["good", "not bad at all"]}
TONE = {
    "task": "tone",
    "template": "{text} It was {answer}.",
    "verbalizer": {"negative": ["bad"], "positive": ["good"]},
}
LABELS = ["positive", "negative", "positive", "negative", "negative", "positive", "negative"]
ABLE = ["bert", "roberta", "modernbert", "distilbert", *CAUSAL]
# These let keys and values be given as a cache, the plain way, and see it from everywhere.
WITH_CACHE = ["bert", "roberta", *(a for a in CAUSAL if a not in ("mistral", "modernbert-decoder"))]
close = torch.testing.assert_close


def compiled(architecture: str, words: dict[str, list[str]] | None = None) -> CompiledTask:
    return compile_task(Task.from_dict(TONE | {"verbalizer": words or TONE["verbalizer"]}), tiny(architecture))


def deep_prompts(backbone: Backbone, n: int = 1) -> Tensor:
    """Some (n, L, 2, A, D + 2, E) that change what the LM says."""
    generator = torch.Generator().manual_seed(0)
    table = backbone.embedding_table()
    made = []
    for _ in range(n):
        start = backbone.keys_and_values(table[torch.randint(5, 50, (3,), generator=generator)])
        prompt = DeepPrompt(start)
        prompt.theta.data = torch.randn(prompt.theta.shape, generator=generator)
        made.append(prompt())
    return torch.cat(made).detach()


def plain_logits(backbone: Backbone, ids: list[int], deep: Tensor) -> Tensor:
    """Logits (T, V) with a deep prompt (1, L, 2, A, D + 2, E), as a cache and an attention; positions count from 0."""
    before, factors, shifts = deep[0].split([deep.shape[4] - 2, 1, 1], dim=3)
    n_before, layers = before.shape[3], iter(zip(factors, shifts, strict=True))

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Any:
        (key_factor, value_factor), (query_shift, value_shift) = next(layers)
        query = query + query_shift.repeat_interleave(query.shape[1] // len(query_shift), dim=0)
        key = torch.cat([key[:, :, :n_before], key[:, :, n_before:] * key_factor], dim=2)
        value = torch.cat([value[:, :, :n_before], value[:, :, n_before:] * value_factor + value_shift], dim=2)
        return tf.integrations.sdpa_attention.sdpa_attention_forward(module, query, key, value, *args, **named)

    with torch.no_grad(), mock.patch.dict(tf.AttentionInterface._global_mapping, {"sdpa": attend}):
        logits: Tensor = backbone.model(
            input_ids=torch.tensor([ids]),
            past_key_values=tf.DynamicCache([(layer[0][None], layer[1][None]) for layer in before]),
            position_ids=positions(backbone, len(ids)),
            attention_mask=torch.ones(1, n_before + len(ids), dtype=torch.long),
        ).logits[0]
    return logits


def positions(backbone: Backbone, n: int) -> Tensor:
    padding = backbone.model.config.pad_token_id if backbone.model.config.model_type == "roberta" else -1
    return torch.arange(n)[None] + padding + 1


# -- on the LM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", WITH_CACHE)
def test_a_deep_prompt_is_keys_and_values_that_take_no_positions(architecture: str) -> None:
    made = compiled(architecture)
    deep = deep_prompts(made.backbone)
    scores, _ = made.infer(ROWS, deep=deep)
    rows = [pieces[0] for pieces in made.words.pieces]
    plain = torch.stack([plain_logits(made.backbone, e.ids, deep)[e.answer, rows] for e in made.encode(ROWS)])
    close(scores, plain, rtol=0, atol=2e-5)
    assert (scores - made.infer(ROWS)[0]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", [a for a in WITH_CACHE if a in CAUSAL and a != "opt"])
def test_words_of_several_pieces_hear_it_too(architecture: str) -> None:
    made = compiled(architecture, WORDS)
    deep = deep_prompts(made.backbone)
    assert made.words.longest > 1
    scores, _ = made.infer(ROWS, deep=deep)
    for i, example in enumerate(made.encode(ROWS)):
        for w, pieces in enumerate(made.words.pieces):
            logs = plain_logits(made.backbone, [*example.ids, *pieces], deep).log_softmax(-1)[len(example.ids) - 1 :]
            assert float(scores[i, w]) == pytest.approx(float(sum(logs[j, p] for j, p in enumerate(pieces))), abs=1e-4)


@pytest.mark.parametrize("words", [None, WORDS], ids=["single", "several"])
@pytest.mark.parametrize("architecture", ABLE)
def test_examples_of_a_batch_may_have_deep_prompts_of_their_own(
    architecture: str, words: dict[str, list[str]] | None
) -> None:
    made = compiled(architecture, None if architecture == "opt" else words)
    deep = deep_prompts(made.backbone, 3)
    examples = [dataclasses.replace(e, deep=i % 3) for i, e in enumerate(made.encode(ROWS))]
    mixed = made.backbone.infer(examples, made.words, deep=deep)
    for i, row in enumerate(ROWS):
        alone = made.infer([row], deep=deep[i % 3 : i % 3 + 1])
        for both, one in zip(mixed, alone, strict=True):
            close(both[i], one[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_what_all_examples_start_with_is_read_once_behind_it(architecture: str) -> None:
    task = Task.from_dict(TONE | {"template": "A film, as they say: {text} It was {answer}."})
    made = compile_task(task, tiny(architecture))
    deep = deep_prompts(made.backbone)
    assert made.layout.n_prefix > 3
    for shared, whole in zip(
        made.infer(ROWS, deep=deep), made.backbone.infer(made.encode(ROWS), made.words, deep=deep), strict=True
    ):
        close(shared, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ABLE)
def test_its_gradient_is_that_of_finite_differences(architecture: str) -> None:
    made = compiled(architecture)
    prompt = DeepPrompt(made.backbone.keys_and_values(made.backbone.embedding_table()[5:8]))
    examples = made.encode(ROWS[:3])

    def value() -> Tensor:
        scores: Tensor = made.backbone.word_scores(examples, made.words, deep=prompt())[0]
        return (scores[:, 1] - scores[:, 0]).sum()

    value().backward()
    assert prompt.theta.grad is not None
    direction = prompt.theta.grad / prompt.theta.grad.norm()
    slope, step = float((prompt.theta.grad * direction).sum()), 0.05
    with torch.no_grad():
        prompt.theta += step * direction
        above = float(value())
        prompt.theta -= 2 * step * direction
        below = float(value())
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02, abs=2e-4)
    assert all(p.grad is None for p in made.backbone.model.parameters())


def test_it_starts_as_what_the_lm_makes_of_tokens() -> None:
    backbone = tiny("gpt2")
    ids = torch.tensor([[7, 9, 30]])
    cache = tf.DynamicCache()
    with torch.no_grad():
        backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
    wanted = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    before, factor, shift = (
        DeepPrompt(backbone.keys_and_values(backbone.embed(ids[0])))()[0].detach().split([3, 1, 1], 3)
    )
    close(before, wanted)
    assert (factor == 1).all()
    assert (shift == 0).all()


def test_attention_that_is_not_pytorchs_is_refused_in_one_line() -> None:
    backbone = tiny("deberta-v2")
    with pytest.raises(BackboneError) as error:
        backbone.keys_and_values(backbone.embedding_table()[5:8])
    assert "takes no deep prompt" in str(error.value)
    assert "\n" not in str(error.value)


# -- as a second opinion -----------------------------------------------------------------------------------------------


def fitted(architecture: str = "bert", **options: Any) -> PromptClassifier:
    """With an opinion whether it helps or not."""
    with mock.patch.object(verbtune.deep, "FEW", 0):
        return PromptClassifier(TONE, model=tiny(architecture), **options).fit(SENTENCES, LABELS)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_all_opinions_are_added(architecture: str) -> None:
    clf = fitted(architecture)
    opinion = clf.second_opinion_
    assert opinion is not None
    rows = [{"text": text} for text in SENTENCES]
    first = clf.verbalizer_(*clf.compiled_.infer(rows, clf.prompt_)).detach().double().numpy()
    behind = [clf.compiled_.infer(rows, deep=deep) for deep in opinion.deep.split(1)]  # words of one piece each
    (words, states), (_, others) = behind
    heard = Verbalizer(clf.compiled_.words, states.shape[1])(words, states).double().numpy()
    read = (others[:, clf.compiled_.backbone.width :] @ opinion.rows.T).double().numpy()
    np.testing.assert_allclose(
        clf.class_scores(SENTENCES), first + opinion.weight * heard + read + opinion.bias, rtol=1e-5, atol=1e-5
    )
    assert (opinion.deep[0] - opinion.deep[1]).abs().max() > 0.01
    assert len(clf.history_.steps) == 2 * len(SENTENCES) + 1
    assert clf.history_.steps[-1].loss < clf.history_.steps[1].loss
    n_rows = sum(p.numel() for p in clf.verbalizer_.parameters())
    assert clf.trained_parameters_ == n_rows + opinion.deep.numel() + opinion.rows.numel() + 2
    assert opinion.deep.shape[4] == LENGTH + 2


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_saved_and_read_back_it_says_the_same(architecture: str, tmp_path: Path) -> None:
    clf = fitted(architecture)
    clf.save_pretrained(tmp_path / "tone")
    again = PromptClassifier.from_pretrained(tmp_path / "tone", model=tiny(architecture))
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES))
    assert again.trained_parameters_ == clf.trained_parameters_


def test_texts_that_were_held_out_once_may_be_few_of_each_class() -> None:
    y = np.arange(len(ROWS) * 4) % 2
    index = np.array([0, 1])
    *_, calibration = opinion_of(np.zeros((len(y), 2)), y, index, in_turn=False)
    assert len(calibration.right) + len(calibration.wrong) == 2


def test_one_seed_is_one_opinion() -> None:
    one, same, other = (fitted(random_state=seed).predict_proba(SENTENCES) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-4


def opinion_of(
    rows: np.ndarray, y: np.ndarray, index: np.ndarray | None = None, *, in_turn: bool = True
) -> tuple[CompiledTask, SecondOpinion, Calibration]:
    """What is made of `ROWS`, four times over, beside given class scores of all or some."""
    made = compiled("bert")
    index = np.arange(len(y)) if index is None else index
    texts = Labelled(made.encode(ROWS * 4), y, np.ones(len(y)))
    first = FirstOpinion(
        strength=1.0,
        calibration=Calibration.none(2),
        against=np.zeros(2),
        manual=np.zeros((len(y), 2)),
        center=np.zeros(made.backbone.state_width),
        held_out=HeldOut(index, rows[index], in_turn=in_turn),
        last=False,
    )
    judged = second_opinion(made, texts, first, aggregate="mean", seed=0)
    assert judged.opinion is not None
    assert (judged.rows, judged.manual) == (1, 0)
    return made, judged.opinion, judged.calibration


def added(made: CompiledTask, opinion: SecondOpinion) -> np.ndarray:
    """What the opinion adds for `ROWS`, four times over."""
    verbalizer = Verbalizer(made.words, made.backbone.state_width)
    return opinion.scores(verbalizer, [asked.infer(ROWS * 4, deep=deep) for deep, asked in opinion.asked(made)])


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_with_very_few_texts_the_manual_prompt_is_heard_as_far_as_it_is_believed(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logs(belief: float) -> np.ndarray:
        monkeypatch.setattr(verbtune.deep, "_belief", lambda *_: belief)
        clf = PromptClassifier(TONE, model=tiny(architecture)).fit(SENTENCES, LABELS)
        assert (clf.second_opinion_ is None) == (belief == 0)
        return np.log(clf.predict_proba(SENTENCES))

    learned, manual = logs(1.0), logs(0.0)
    words = ZeroShot(TONE, model=tiny(architecture), calibration="batch").fit(SENTENCES).predict_proba(SENTENCES)
    odds = [np.diff(found)[:, 0] for found in (manual, np.log(words))]
    np.testing.assert_allclose(np.corrcoef(*odds)[0, 1], 1, atol=1e-6)  # at another temperature
    np.testing.assert_allclose(logs(0.7), log_softmax(0.7 * learned + 0.3 * manual, axis=1), atol=1e-4)


@pytest.mark.parametrize(("better", "belief"), [(0.0, 0), (9.0, 1)])
def test_what_very_few_texts_say_of_the_manual_prompt(better: float, belief: float) -> None:
    y = np.arange(8) % 2
    manual, learned = (scale * (np.eye(2)[y] - 0.5) for scale in (0.1, better))
    assert verbtune.deep._belief(learned, manual, y, np.ones(8)) == pytest.approx(belief, abs=0.05)


def test_it_is_heard_where_rows_say_nothing() -> None:
    """Labels that the LM's own words give away."""
    words, _ = compiled("bert").infer(ROWS * 4)
    y = (words[:, 1] - words[:, 0] > (words[:, 1] - words[:, 0]).median()).long().numpy()
    made, opinion, calibration = opinion_of(np.zeros((len(y), 2)), y)
    assert len(calibration.right) + len(calibration.wrong) == len(y)
    scores = calibration.apply(added(made, opinion))
    assert log_softmax(scores, axis=1)[np.arange(len(y)), y].mean() > np.log(0.5) + 0.1


def test_what_tells_held_out_texts_nothing_weighs_little() -> None:
    y = np.random.default_rng(0).permutation(np.arange(len(ROWS) * 4) % 2)  # no text says it
    rows = 2.0 * np.eye(2)[y]
    made, opinion, _ = opinion_of(rows, y)
    both = rows + added(made, opinion)
    assert (both.argmax(axis=1) == y).all()


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"steps": 0}, LABELS),
        ({}, ["positive", *["negative"] * 6]),
    ],
    ids=["no steps", "a class of one text"],
)
def test_where_there_is_none(options: dict[str, Any], labels: list[str]) -> None:
    clf = PromptClassifier(TONE, model=tiny("bert"), **options).fit(SENTENCES, labels)
    assert clf.second_opinion_ is None
    assert clf.history_.best_step == 0


@pytest.mark.parametrize(("extra", "there"), [(0, True), (1, False)])
def test_fewer_texts_of_every_class_than_it_takes_are_left_to_the_rows(
    extra: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbtune.deep, "FOLDS", max(map(LABELS.count, set(LABELS))) + extra)
    assert (fitted().second_opinion_ is not None) == there


def tuned_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each tuning is given, as it goes."""
    found: list[int] = []
    learn = verbtune.deep._Pupil.by_states
    monkeypatch.setattr(
        verbtune.deep._Pupil,
        "by_states",
        lambda pupil, inside, before=None: found.append(len(inside)) or learn(pupil, inside, before),
    )
    return found


def test_few_texts_are_held_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, y = tuned_on(monkeypatch), np.arange(len(ROWS) * 4) % 2
    *_, calibration = opinion_of(np.zeros((len(y), 2)), y)
    assert sizes == [len(y) * (FOLDS - 1) // FOLDS] * FOLDS + [len(y)]
    assert len(calibration.right) + len(calibration.wrong) == len(y)


@pytest.mark.parametrize("how", ["not finite", "higher in the end"])
def test_a_tuning_that_is_lost_begins_anew_with_smaller_steps(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = 1e30 if how == "not finite" else 0.2

    def tune(*args: Any, **named: Any) -> History:
        found = verbtune.tuning.tune(*args, **named)
        if named["learning_rate"] == first:
            found.steps[1:] = found.steps[:0:-1]
        return found

    monkeypatch.setattr(verbtune.deep, "tune", tune)
    y = np.arange(len(ROWS) * 4) % 2
    opinions = []
    for rates in ((first, 0.1), (0.1,)):
        monkeypatch.setattr(verbtune.deep, "RATES", rates)
        opinions.append(opinion_of(np.zeros((len(y), 2)), y)[1])
    after, at_once = opinions
    close(after.deep, at_once.deep, rtol=0, atol=0)
    close(after.rows, at_once.rows, rtol=0, atol=0)


def test_a_tuning_that_no_rate_helps_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbtune.deep, "RATES", (1e31, 1e30))
    with pytest.raises(
        TuningError, match=r"^deep prompts: even at a rate of 1e\+30 .+; use dtype=.float32., or steps=0"
    ):
        opinion_of(np.zeros((len(ROWS) * 4, 2)), np.arange(len(ROWS) * 4) % 2)


def test_a_tuning_that_goes_on_from_another_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def tune(*args: Any, **named: Any) -> History:
        found = verbtune.tuning.tune(*args, **named)
        if named["steps"] == verbtune.deep.STEPS_ON:
            rates.append(named["learning_rate"])
            found.steps[1:] = sorted(found.steps[1:], key=lambda step: step.loss)
        return found

    monkeypatch.setattr(verbtune.deep, "tune", tune)
    monkeypatch.setattr(verbtune.deep, "MANY_CLASSES", 1)
    opinion_of(np.zeros((len(ROWS) * 4, 2)), np.arange(len(ROWS) * 4) % 2)
    assert rates == [verbtune.deep.RATES[0]]


def test_of_more_texts_one_fold_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = mock.Mock(wraps=verbtune.deep.tune)
    monkeypatch.setattr(verbtune.deep, "tune", tune)
    monkeypatch.setattr(verbtune.deep, "MANY", 35)
    sizes, y = tuned_on(monkeypatch), np.arange(len(ROWS) * 4) % 2
    *_, calibration = opinion_of(np.zeros((len(y), 2)), y)
    assert sizes == [len(y) - len(y) // FOLDS, len(y)]
    assert {call.kwargs["learning_rate"] for call in tune.call_args_list} == {verbtune.deep.RATES[1]}
    assert tune.call_args.kwargs["steps"] == 2 * verbtune.deep._steps(len(y))
    assert len(calibration.right) + len(calibration.wrong) == len(y) // FOLDS


def test_texts_that_the_rows_held_out_once_are_held_out_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class scores of other texts are of rows that saw them, and must not be asked."""
    sizes, y = tuned_on(monkeypatch), np.arange(len(ROWS) * 4) % 2
    index = np.array([30, 1, 12, 5, 8])
    rows = np.full((len(y), 2), np.nan)
    rows[index] = 2.0 * np.eye(2)[y[index]]
    _, opinion, calibration = opinion_of(rows, y, index, in_turn=False)
    assert sizes == [len(y) - 5, len(y)]
    assert np.isfinite(opinion.weight)
    assert len(calibration.right) + len(calibration.wrong) == 5


def test_texts_that_the_rows_could_not_hold_out_are_always_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, y = tuned_on(monkeypatch), np.arange(len(ROWS) * 4) % 2
    index = np.delete(np.arange(len(y)), [4, 9, 20])
    rows = np.full((len(y), 2), np.nan)
    rows[index] = np.eye(2)[y[index]]
    _, opinion, calibration = opinion_of(rows, y, index)
    assert sizes == [len(y) - len(index) // FOLDS] * FOLDS + [len(y)]
    assert np.isfinite(opinion.weight)
    assert len(calibration.right) + len(calibration.wrong) == len(index)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes are many."""
    monkeypatch.setattr(verbtune.deep, "MANY_CLASSES", 1)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("words", [TONE["verbalizer"], {"negative": ["dreadful"], "positive": ["not bad at all"]}])
def test_of_many_classes_rows_read_the_text_behind_the_deep_prompt(
    architecture: str, words: dict[str, list[str]], many: None, tmp_path: Path
) -> None:
    clf = PromptClassifier(TONE | {"verbalizer": words}, model=tiny(architecture)).fit(SENTENCES * 2, LABELS * 2)
    opinion = clf.second_opinion_
    assert opinion is not None
    assert opinion.weight == 0
    rows = [{"text": text} for text in ["Good.", "Not a film."]]
    first = clf.verbalizer_(*clf.compiled_.infer(rows)).detach().double().numpy()
    _, states = clf.compiled_.infer(rows, deep=opinion.deep)
    text = states[:, clf.compiled_.backbone.width :]
    second = (text @ opinion.rows.T).double().numpy() + opinion.bias
    np.testing.assert_allclose(clf.class_scores([row["text"] for row in rows]), first + second, rtol=1e-4, atol=1e-4)
    n_rows = sum(p.numel() for p in clf.verbalizer_.parameters())
    assert clf.trained_parameters_ == n_rows + opinion.deep.numel() + 2 + 2 * text.shape[1]
    clf.save_pretrained(tmp_path / "tone")
    again = PromptClassifier.from_pretrained(tmp_path / "tone", model=tiny(architecture))
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES))


def test_of_many_classes_one_fold_is_held_out_and_its_tuning_goes_on_with_all_texts(
    many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, y = tuned_on(monkeypatch), np.arange(len(ROWS) * 4) % 2
    steps, tune = [], verbtune.deep.tune

    def watched(parts: Any, *arguments: Any, **options: Any) -> Any:
        before = parts.deep.theta.norm().item()
        history = tune(parts, *arguments, **options)
        steps.append((len(history.steps) - 1, before, parts.deep.theta.norm().item()))
        return history

    monkeypatch.setattr(verbtune.deep, "tune", watched)
    opinion_of(np.zeros((len(y), 2)), y)
    assert sizes == [len(y) - len(y) // FOLDS, len(y)]
    (first, start, end), (second, onward, _) = steps
    assert (first, second) == (verbtune.deep.STEPS_OF_MANY_CLASSES, verbtune.deep.STEPS_ON)
    assert start == 0
    assert onward == pytest.approx(end, rel=0.01)  # as saved, in float16


def test_texts_of_many_classes_are_drawn_apart(many: None) -> None:
    """Those of a class are nearer to each other behind the deep prompt than without it."""
    made, y = compiled("bert"), np.arange(len(ROWS) * 4) % len(ROWS) % 2
    _, opinion, _ = opinion_of(np.zeros((len(y), 2)), y)

    def apart(deep: Tensor | None) -> float:
        _, states = made.infer(ROWS, deep=deep)
        text = states[:, made.backbone.width :].double().numpy()
        means = [text[y[: len(ROWS)] == c].mean(axis=0) for c in (0, 1)]
        within = np.mean([np.linalg.norm(t - means[c]) for t, c in zip(text, y, strict=False)])
        return float(np.linalg.norm(means[0] - means[1]) / within)

    assert apart(opinion.deep) > 2 * apart(None)


def test_classes_of_one_text_are_among_many(many: None) -> None:
    y = np.array([0, 0, 0, 0, *[1] * 5, 2, 3])
    texts = [row["text"] for row in ROWS + ROWS][: len(y)]
    task = TONE | {"verbalizer": {name: [name] for name in ("bad", "film", "good", "music")}}
    clf = PromptClassifier(task, model=tiny("bert")).fit(texts, y)
    assert np.isfinite(clf.predict_proba(texts)).all()


def test_an_lm_that_takes_none_learns_its_rows_and_says_so() -> None:
    with pytest.warns(UserWarning, match="takes no deep prompt.*only the rows are learned"):
        clf = fitted("deberta-v2")
    assert clf.second_opinion_ is None
    np.testing.assert_allclose(clf.predict_proba(SENTENCES), fitted("deberta-v2", steps=0).predict_proba(SENTENCES))


@pytest.mark.parametrize("at", ["the first fold", "the last tuning"])
def test_an_interrupted_tuning_leaves_the_rows(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fitted(steps=0)
    tune, calls = verbtune.deep.tune, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        history = tune(*arguments, **options | {"steps": 2})
        history.interrupted = at == "the first fold" or len(calls) > 2 * FOLDS
        return history

    monkeypatch.setattr(verbtune.deep, "tune", stopped)
    with pytest.warns(UserWarning, match="tuning was interrupted; only the rows are learned"):
        clf = fitted()
    assert clf.second_opinion_ is None
    assert clf.history_.interrupted
    np.testing.assert_array_equal(clf.predict_proba(SENTENCES), plain.predict_proba(SENTENCES))


def test_the_lm_is_left_as_it_was() -> None:
    backbone = tiny("bert")
    before = copy.deepcopy(backbone.model.state_dict())
    fitted()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_words_of_several_pieces_are_heard_by_their_beginnings_in_one_pass_each(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"negative": ["bad", "dreadful"], "positive": ["good", "marvellous"]}
    made = compiled(architecture, words)
    assert made.words.longest > 1
    assert made.words.beginnings.longest == 1
    spec = TONE | {"verbalizer": words}
    clf = PromptClassifier(spec, model=tiny(architecture)).fit(SENTENCES * 2, LABELS * 2)
    clf.verbalizer_.word_scale.zero_()  # so that the rows need one pass as well
    passes: list[int] = []
    run = made.backbone._run
    monkeypatch.setattr(made.backbone, "_run", lambda *a, **k: passes.append(1) or run(*a, **k))
    clf.class_scores(SENTENCES)
    assert len(passes) == 3


@pytest.mark.parametrize(
    ("pieces", "heard"),
    [
        ([[1, 2], [3, 4], [3, 5]], [1, 3, 3]),  # words of one class may share a piece
        ([[1, 2], [1, 3], [4]], [2, 3, 4]),
        ([[1], [1, 3], [1, 4, 5]], [1, 3, 4]),  # one begins another
        ([[1, 2], [1, 3], [2]], None),
        ([[1, 2, 3], [1, 4, 2], [1, 4, 5]], [2, 4, 4]),
    ],
)
def test_a_word_is_heard_where_it_leaves_those_of_other_classes(
    pieces: list[list[int]], heard: list[int] | None
) -> None:
    words = LabelWords(("a", "b"), ("x", "y", "z"), tuple(map(tuple, pieces)), (0, 1, 1), (1.0, 1.0, 1.0))
    assert words.beginnings.pieces == (words.pieces if heard is None else tuple((piece,) for piece in heard))
