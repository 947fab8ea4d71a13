"""The rows of a learned verbalizer: the convex problem is solved, and what they read is chosen without cheating."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES, tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.special import log_softmax, softmax

import verbtune.rows
from verbtune import PromptClassifier
from verbtune.rows import (
    CANDIDATES,
    FOLDS,
    MOST_CHOOSING,
    OF_MANY,
    STEP,
    UNCHOSEN,
    UNCHOSEN_OF_MANY,
    choose_reading,
    fit_rows,
    in_folds,
)


def problem(n: int = 60, *, answer: float = 0.0, text: float = 0.0, seed: int = 0) -> tuple[Any, ...]:
    """Scores that know nothing, and states of 3 + 4 numbers of which some know the class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    states = rng.normal(0, 1, (n, 7))
    states[:, 0] += answer * (2 * y - 1)
    states[:, 3] += text * (2 * y - 1)
    return rng.normal(0, 0.1, (n, 2)), states, y, np.ones(n)


def nll(base: Any, features: Any, y: Any, rows: Any, bias: Any) -> float:
    return float(-log_softmax(base + features @ rows.T + bias, axis=1)[np.arange(len(y)), y].mean())


def test_the_gradient_is_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    minimize = verbtune.rows.minimize
    monkeypatch.setattr(verbtune.rows, "minimize", lambda f, *a, **k: caught.append(f) or minimize(f, *a, **k))
    base, states, y, _ = problem(20)
    fit_rows(base, states, y, np.linspace(0, 2, 20), strength=0.3)
    for theta in np.random.default_rng(1).normal(0, 1, (3, 16)):
        error = check_grad(lambda t: caught[0](t)[0], lambda t: caught[0](t)[1], theta)
        assert error < 1e-4 * np.linalg.norm(caught[0](theta)[1])


def test_rows_read_what_the_states_know() -> None:
    base, states, y, weight = problem(text=2)
    rows, bias = fit_rows(base, states, y, weight, strength=1.0)
    assert rows.shape == (2, 7)
    assert bias.shape == (2,)
    assert nll(base, states, y, rows, bias) < 0.2 < 0.6 < nll(base, states, y, 0 * rows, 0 * bias)
    assert np.abs(rows).argmax(axis=1).tolist() == [3, 3]


def test_a_strong_pull_leaves_the_manual_prompt() -> None:
    base, states, y, weight = problem(text=2)
    rows, _ = fit_rows(base, states, y, weight, strength=1e6)
    assert np.abs(rows).max() < 1e-3


def test_what_is_not_read_has_no_rows() -> None:
    base, states, y, weight = problem(answer=1, text=1)
    states[:, 3:] = 0
    rows, _ = fit_rows(base, states, y, weight, strength=1.0)
    assert not rows[:, 3:].any()
    assert rows[:, :3].all()


def test_a_weight_of_zero_is_no_row_and_of_two_is_two() -> None:
    base, states, y, _ = problem(30, text=1)
    weight = np.arange(30) % 3
    weighted = fit_rows(base, states, y, weight.astype(float), strength=1.0)
    repeated = fit_rows(*(v.repeat(weight, axis=0) for v in (base, states, y)), np.ones(weight.sum()), strength=1.0)
    for a, b in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(("answer", "text", "known"), [(3.0, 0.0, slice(0, 3)), (0.0, 3.0, slice(3, 7))])
def test_what_knows_the_class_is_read(answer: float, text: float, known: slice) -> None:
    base, states, y, weight = problem(answer=answer, text=text)
    reading, _, held_out = choose_reading(base, states, y, weight, split=3, seed=0)
    assert (reading.gain[known] > 0).all()
    assert (held_out.scores.argmax(axis=1) == y[held_out.index]).mean() > 0.9


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("n_classes", [2, 12])
def test_texts_are_read_in_the_last_layer_where_that_tells_more(known: bool, n_classes: int) -> None:
    base, states, y, weight = problem(text=0.5) if n_classes == 2 else many_classes(6, answer=0, text=0.5)
    split = 3 if n_classes == 2 else 20
    last = states.copy()
    if known:
        last[:, split:] += 3 * np.eye(n_classes)[y] @ np.eye(n_classes, states.shape[1] - split)
    else:
        last[:, split:] = np.random.default_rng(2).normal(size=last[:, split:].shape)
    reading, _, held_out = choose_reading(base, states, y, weight, split=split, seed=0, last=last)
    assert reading.last == known
    read = last if known else states
    np.testing.assert_allclose(reading.center, read.mean(axis=0))
    plain, _, expected = choose_reading(base, read, y, weight, split=split, seed=0)
    np.testing.assert_array_equal(reading.gain, plain.gain)
    np.testing.assert_array_equal(held_out.scores, expected.scores)


def test_a_class_of_many_with_one_text_is_read_in_the_last_layer() -> None:
    base, states, y, weight = many_classes(1, answer=0, text=3)
    assert choose_reading(base, states, y, weight, split=20, seed=0, last=states)[0].last
    assert not choose_reading(base[:2, :2], states[:2], y[:2], weight[:2], split=20, seed=0, last=states[:2])[0].last


def many_classes(per_class: int, *, answer: float, text: float, n_classes: int = 12) -> tuple[Any, Any, Any, Any]:
    """Like `problem`, with states that tell many classes apart."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(n_classes), per_class)
    places = np.random.default_rng(1).normal(0, 1, (n_classes, 40))
    states = rng.normal(0, 1, (len(y), 40))
    states[:, :20] += answer * places[y, :20]
    states[:, 20:] += text * places[y, 20:]
    return rng.normal(0, 0.1, (len(y), n_classes)), states, y, np.ones(len(y))


@pytest.mark.parametrize(("answer", "text"), [(1.0, 1.0), (0.0, 0.7)])
def test_of_many_classes_the_answer_is_read_where_it_tells_them_apart(answer: float, text: float) -> None:
    reading, calibration, held_out = choose_reading(
        *many_classes(6, answer=answer, text=text), split=20, seed=0, costly_words=True
    )
    assert bool(reading.gain[:20].any()) == bool(answer)
    assert reading.gain[20:].all()
    assert reading.word_scale == OF_MANY[0]
    assert len(held_out.index) == len(calibration.right) + len(calibration.wrong) == 72
    assert len(calibration.right) > 36


@pytest.mark.parametrize(("per_class", "strength"), [(1, 0.05), (2, 0.125), (5, 0.05), (200, 0.01)])
def test_of_many_classes_the_pull_is_the_weaker_the_more_texts_a_class_has(per_class: int, strength: float) -> None:
    reading, *_ = choose_reading(*many_classes(per_class, answer=0, text=3), split=20, seed=0)
    assert reading.strength == pytest.approx(strength)
    assert reading.word_scale == (UNCHOSEN_OF_MANY if per_class == 1 else OF_MANY)[0]


@pytest.mark.parametrize(("per_class", "costly", "heard"), [(7, True, True), (8, True, False), (8, False, True)])
def test_enough_texts_of_many_classes_do_without_costly_words(per_class: int, costly: bool, heard: bool) -> None:
    reading, *_ = choose_reading(*many_classes(per_class, answer=0, text=3), split=20, seed=0, costly_words=costly)
    assert (reading.word_scale > 0) == heard


def test_costly_words_of_many_classes_are_left_out_where_nothing_can_be_chosen_as_well() -> None:
    base, states, _, weight = many_classes(8, answer=0, text=3)
    y = np.array([*range(11), *[11] * 85])  # no two classes have two texts
    reading, *_ = choose_reading(base, states, y, weight, split=20, seed=0, costly_words=True)
    assert reading.word_scale == 0


def test_costly_words_that_mislead_are_not_heard() -> None:
    base, states, y, weight = problem(text=3)
    base[np.arange(60), np.random.default_rng(5).integers(0, 2, 60)] += 20
    assert choose_reading(base, states, y, weight, split=3, seed=0, costly_words=True)[0].word_scale == 0
    assert choose_reading(base, states, y, weight, split=3, seed=0)[0].word_scale == min(CANDIDATES)[0]


def test_words_that_know_are_heard() -> None:
    base, states, y, weight = problem()
    base[np.arange(60), y] += 3
    assert choose_reading(base, states, y, weight, split=3, seed=0, costly_words=True)[0].word_scale > 0


def test_what_held_out_texts_cannot_tell_apart_stays_at_the_manual_prompt() -> None:
    base, states, y, weight = problem(8)
    base[np.arange(8), y] += 3
    reading, *_ = choose_reading(base, states, y, weight, split=3, seed=0, costly_words=True)
    assert (reading.word_scale, reading.strength) == CANDIDATES[0]


def test_states_that_know_more_than_the_words_are_read_boldly() -> None:
    base, states, y, weight = problem(400, text=2)
    base += np.random.default_rng(5).normal(0, 3, base.shape)
    reading, *_ = choose_reading(base, states, y, weight, split=3, seed=0)
    assert reading.word_scale == min(CANDIDATES)[0]


@pytest.mark.parametrize("step", [0.0, STEP, 3.0])
@pytest.mark.parametrize(("words", "text"), [(0.0, 0.3), (1.0, 0.3), (1.0, 2.0)])
def test_the_reading_is_the_likeliest_less_what_its_steps_cost(
    words: float, text: float, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, states, y, weight = problem(120, text=text)
    base[np.arange(120), y] += np.random.default_rng(3).normal(words, 2, 120)
    monkeypatch.setattr(verbtune.rows, "STEP", step)
    chosen, *_ = choose_reading(base, states, y, weight, split=3, seed=0)
    worth = []
    for steps, candidate in enumerate(CANDIDATES):
        monkeypatch.setattr(verbtune.rows, "CANDIDATES", (candidate,))
        _, calibration, held_out = choose_reading(base, states, y, weight, split=3, seed=0)
        logs = log_softmax(calibration.apply(held_out.scores), axis=1)[np.arange(120), y[held_out.index]]
        worth.append(logs.sum() - step * steps)
    assert (chosen.word_scale, chosen.strength) == CANDIDATES[int(np.argmax(worth))]


def test_held_out_scores_are_of_rows_that_never_saw_the_text() -> None:
    """Labels that are pure noise can be learned by heart, but not foretold."""
    base, _, y, weight = problem(40)
    states = np.random.default_rng(0).normal(0, 1, (40, 200))
    y = np.random.default_rng(1).integers(0, 2, 40)
    reading, calibration, _ = choose_reading(base, states, y, weight, split=100, seed=0)
    rows, bias = fit_rows(reading.word_scale * base, reading.features(states), y, weight, strength=0.05)
    fitted = reading.word_scale * base + reading.features(states) @ rows.T + bias
    assert (fitted.argmax(axis=1) == y).mean() > 0.95
    assert softmax(fitted, axis=1).max(axis=1).mean() > 0.8
    # Scores of rows that had seen the text would all be right, and sharpened.
    assert calibration.temperature > 1


def test_features_are_centered_and_of_like_size() -> None:
    base, states, y, weight = problem(text=1)
    states = states * [100, 100, 100, 1e-3, 1e-3, 1e-3, 1e-3] + 50
    reading, *_ = choose_reading(base, states, y, weight, split=3, seed=0)
    features = reading.features(states)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-6)
    assert (features**2).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-3)


def test_one_seed_is_one_choice() -> None:
    def choose(seed: int) -> float:
        return choose_reading(*problem(text=0.3), split=3, seed=seed)[1].temperature

    assert choose(1) == choose(1)
    assert choose(1) != choose(2)


def test_a_class_with_one_text_leaves_nothing_to_choose_by() -> None:
    base, states, _, weight = problem(6)
    reading, calibration, held_out = choose_reading(base, states, np.array([0, 0, 0, 0, 0, 1]), weight, split=3, seed=0)
    assert calibration.temperature == 1.0
    assert not len(held_out.index)
    assert (reading.word_scale, reading.strength) == UNCHOSEN


def test_the_only_text_of_a_class_is_always_learned_and_the_others_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    base, states, y, weight = problem(answer=1)
    base, y = np.hstack([base, np.zeros((60, 1))]), y.copy()
    y[7] = 2
    seen: list[bool] = []
    fit = fit_rows

    def counted(base: Any, features: Any, y: Any, *rest: Any, **named: Any) -> Any:
        seen.append(2 in y)
        return fit(base, features, y, *rest, **named)

    monkeypatch.setattr(verbtune.rows, "fit_rows", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading, calibration, held_out = choose_reading(base, states, y, weight, split=3, seed=0)
    assert len(seen) == len(CANDIDATES) * FOLDS
    assert all(seen)
    assert sorted(held_out.index) == [i for i in range(60) if i != 7]
    assert held_out.in_turn
    assert len(calibration.right) + len(calibration.wrong) == 59
    assert (reading.word_scale, reading.strength) in CANDIDATES


@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_folds_hold_every_text_out_once_and_never_a_whole_class(counts: list[int], seed: int) -> None:
    assume(sum(n > 1 for n in counts) > 1)
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), [n * (n > 1) for n in counts]))
    folds = in_folds(y, 4, seed)
    assert sorted(np.concatenate(folds)) == list(range(len(y)))
    assert len(folds) == min(4, max(counts))
    for outside in folds:
        assert set(np.delete(y, outside)) == set(y)


def test_a_class_with_no_text_is_no_class_with_one_text() -> None:
    base, states, y, weight = problem(text=1)
    _, without, _ = choose_reading(base, states, y, weight, split=3, seed=0)
    third = np.full((60, 1), -50.0)
    _, calibration, _ = choose_reading(np.hstack([base, third]), states, y, weight, split=3, seed=0)
    assert calibration.temperature == pytest.approx(without.temperature, rel=0.05)


def test_few_texts_of_wide_states_have_the_same_rows_as_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    base, states, y = rng.normal(0, 1, (12, 3)), rng.normal(0, 1, (12, 60)), np.arange(12) % 3
    short = fit_rows(base, states, y, np.ones(12), strength=0.5)
    monkeypatch.setattr(verbtune.rows, "_axes", lambda features: (np.eye(60), features))
    full = fit_rows(base, states, y, np.ones(12), strength=0.5)
    for a, b in zip(short, full, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_of_many_texts_some_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    base, states, y, weight = problem(MOST_CHOOSING + 100, text=1)
    sizes: list[int] = []
    fit = fit_rows
    monkeypatch.setattr(verbtune.rows, "fit_rows", lambda base, *a, **k: sizes.append(len(base)) or fit(base, *a, **k))
    *_, held_out = choose_reading(base, states, y, weight, split=3, seed=0)
    assert set(sizes[:-1]) == {MOST_CHOOSING * 3 // 4}
    assert sizes[-1] == 450  # of 600 texts: what is chosen is tried on a quarter of all
    assert held_out.scores.shape == (150, 2)
    assert len(set(held_out.index.tolist())) == 150


def test_many_classes_of_more_texts_than_choose_are_calibrated() -> None:
    """Of 100 classes one has a single text among those that choose: it cannot be held out in turn."""
    y = np.append(np.arange(2 * MOST_CHOOSING) % 99, [99, 99, 99])
    states = np.random.default_rng(0).normal(np.eye(100)[y], 0.2)
    chosen = verbtune.rows._of_all_classes(y, MOST_CHOOSING, 0)
    assert (y[chosen] == 99).sum() == 1
    _, calibration, _ = choose_reading(np.zeros((len(y), 100)), states, y, np.ones(len(y)), split=3, seed=0)
    assert calibration.temperature != 1.0
    assert len(calibration.right) + len(calibration.wrong) == len(y) // 4
    assert len(calibration.right) > len(calibration.wrong)


@pytest.mark.parametrize(("n", "n_classes"), [(500, 77), (302, 151), (7, 3), (1232, 77)])
def test_those_that_choose_are_of_all_classes(n: int, n_classes: int) -> None:
    """Else a class of one text among them leaves nothing to choose by."""
    y = np.random.default_rng(1).permutation(np.arange(16 * n_classes) % n_classes)
    chosen = verbtune.rows._of_all_classes(y, n, 0)
    assert len(np.unique(chosen)) == n
    counts = np.bincount(y[chosen], minlength=n_classes)
    assert counts.min() >= n // n_classes
    assert counts.max() <= -(-n // n_classes)
    assert (np.diff(chosen) < 0).any()


def test_the_calibration_is_tried_on_every_text_that_chose() -> None:
    _, calibration, held_out = choose_reading(*problem(text=0.3), split=3, seed=0)
    assert sorted(held_out.index.tolist()) == list(range(60))
    assert len(calibration.right) + len(calibration.wrong) == 60
    assert len(calibration.wrong) > 5  # texts of noise, which rows that saw them would get right


# -- in the classifier -------------------------------------------------------------------------------------------------

TONE = {"task": "tone", "template": "{text} It was {answer}.", "verbalizer": {"n": ["bad"], "p": ["good"]}}
LABELS = ["p", "n", "p", "n", "n", "p", "n"]


def make(labels: list[str], **options: Any) -> PromptClassifier:
    return PromptClassifier(TONE, model=tiny("bert"), steps=0, **options).fit(SENTENCES * 2, labels * 2)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_learned_verbalizer_fits_its_training_texts_before_any_step(architecture: str) -> None:
    learned, fixed = (
        PromptClassifier(TONE, model=tiny(architecture), steps=0, verbalizer=v).fit(SENTENCES * 2, LABELS * 2)
        for v in ("learned", "fixed")
    )
    assert learned.score(SENTENCES, LABELS) == 1.0
    assert fixed.score(SENTENCES, LABELS) < 1.0
    assert 0.01 < learned.calibration_.temperature < 100


def test_labels_the_other_way_round_are_learned_as_well() -> None:
    other = [{"p": "n", "n": "p"}[label] for label in LABELS]
    assert make(other).score(SENTENCES, other) == make(LABELS).score(SENTENCES, LABELS) == 1.0


def test_a_class_with_one_text_can_be_learned() -> None:
    clf = PromptClassifier(TONE, model=tiny("bert"), steps=0).fit(SENTENCES, ["p", "n", "n", "n", "n", "n", "n"])
    assert np.isfinite(clf.predict_proba(SENTENCES)).all()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_words_that_do_not_count_are_not_computed(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label words of several tokens take a pass each; without them the answer is the same, in one pass."""
    task = TONE | {"verbalizer": {"n": ["so bad"], "p": ["so very good"]}}
    clf = PromptClassifier(task, model=tiny(architecture), steps=0).fit(SENTENCES * 2, LABELS * 2)
    clf.verbalizer_.word_scale.zero_()
    wanted = clf.verbalizer_(*clf.compiled_.infer([{"text": t} for t in SENTENCES], clf.prompt_)).numpy()
    backbone = clf.compiled_.backbone
    run, passes = backbone._run, []
    monkeypatch.setattr(backbone, "_run", lambda *a, **k: passes.append(1) or run(*a, **k))
    np.testing.assert_allclose(clf.class_scores(SENTENCES), wanted, atol=1e-5)
    assert len(passes) == 1
