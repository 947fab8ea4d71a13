"""Calibration: the published formulas, fitted properly, and one text's probabilities are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from verbtune.calibration import CONTENT_FREE_TEXTS, Calibration, batch, content_free, temperature

quick = settings(max_examples=50, deadline=None, derandomize=True)
score_arrays = arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=st.floats(-500, 500))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sample(n: int = 4000, temperature: float = 2.5, bias: tuple[float, ...] = (0.7, 0.0, -0.7), seed: int = 0) -> Any:
    """Scores, and labels drawn from softmax(scores / temperature + bias)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 4, (n, 3))
    p = softmax(scores / temperature + np.array(bias))
    return scores, (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)


# -- applying ----------------------------------------------------------------------------------------------------------


@quick
@given(score_arrays, st.floats(0.1, 10), arrays(np.float64, 3, elements=st.floats(-20, 20)))
def test_probabilities_are_the_formula_and_sum_to_one(scores: np.ndarray, t: float, bias: np.ndarray) -> None:
    found = Calibration(t, bias).probabilities(scores)
    np.testing.assert_allclose(found, softmax(scores / t + bias), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert ((found >= 0) & (found <= 1)).all()


@quick
@given(score_arrays, st.randoms(use_true_random=False))
def test_a_text_has_the_same_probabilities_in_any_company(scores: np.ndarray, random: Any) -> None:
    calibration = Calibration(1.7, np.array([0.5, 0.0, -1.0]))
    together = calibration.probabilities(scores)
    order = random.sample(range(len(scores)), len(scores))
    np.testing.assert_array_equal(calibration.probabilities(scores[order]), together[order])
    for i in range(len(scores)):
        np.testing.assert_array_equal(calibration.probabilities(scores[i : i + 1])[0], together[i])


def test_no_calibration_is_softmax() -> None:
    scores = np.array([[1.0, 2.0, -3.0]])
    np.testing.assert_allclose(Calibration.none(3).probabilities(scores), softmax(scores))


# -- without labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [content_free, batch])
@quick
@given(null=score_arrays, scores=score_arrays)
def test_it_divides_by_the_mean_probabilities(method: Any, null: np.ndarray, scores: np.ndarray) -> None:
    null, scores = null / 100, scores / 100  # so that nothing underflows in the plain formula
    divided = softmax(scores) / softmax(null).mean(axis=0)
    expected = divided / divided.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(method(null).probabilities(scores), expected, atol=1e-6)


def test_a_text_that_says_nothing_says_nothing_afterwards() -> None:
    null = np.array([[3.0, -1.0, 0.5]])
    np.testing.assert_allclose(content_free(null).probabilities(null), 1 / 3, atol=1e-6)


def test_a_class_that_never_scores_stays_finite() -> None:
    calibration = batch(np.array([[0.0, -2000.0], [0.0, -3000.0]]))
    assert np.isfinite(calibration.bias).all()
    assert np.isfinite(calibration.probabilities(np.array([[0.0, -2000.0], [-2000.0, 0.0]]))).all()


def test_the_content_free_texts_are_texts() -> None:
    assert all(text.strip() for text in CONTENT_FREE_TEXTS)
    assert len(set(CONTENT_FREE_TEXTS)) == len(CONTENT_FREE_TEXTS)


# -- with labels -------------------------------------------------------------------------------------------------------


def test_it_finds_the_temperature_that_made_the_labels() -> None:
    found = temperature(*sample(bias=(0.0, 0.0, 0.0)))
    assert found.temperature == pytest.approx(2.5, rel=0.1)
    assert not found.bias.any()


def test_it_never_makes_the_likelihood_worse_where_it_was_fitted() -> None:
    scores, y = sample(60, seed=3)

    def nll(calibration: Calibration) -> float:
        return float(-np.log(calibration.probabilities(scores)[np.arange(len(y)), y]).mean())

    assert nll(temperature(scores, y)) < nll(Calibration.none(3))


def test_a_whole_weight_is_that_many_copies() -> None:
    scores, y = sample(40)
    weights = np.arange(40) % 3
    weighted = temperature(scores, y, sample_weight=weights.astype(float))
    repeated = temperature(scores.repeat(weights, axis=0), y.repeat(weights))
    assert weighted.temperature == pytest.approx(repeated.temperature, rel=1e-3)


def test_one_label_moves_it_little() -> None:
    assert 0 < temperature(np.array([[5.0, 0.0, 0.0]]), np.array([1])).temperature < 25


# -- how sure an answer must be ----------------------------------------------------------------------------------------


def tried(n: int, seed: int, sharpness: float = 2.0) -> tuple[Calibration, np.ndarray, np.ndarray]:
    """A calibration that is right, tried on texts; and for many more texts the confidence, and what is right."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, sharpness, (n + 2000, 3))
    y = (softmax(scores).cumsum(axis=1) < rng.random((len(scores), 1))).sum(axis=1)
    p = softmax(scores[n:])
    return Calibration.none(3).tried_on(scores[:n], y[:n]), p.max(axis=1), p.argmax(axis=1) == y[n:]


def test_what_a_calibration_was_tried_on_is_kept_in_order_and_short() -> None:
    scores = np.log(np.array([[0.9, 0.1], [0.61239, 0.38761], [0.2, 0.8], [0.3, 0.7]]))
    found = Calibration.none(2).tried_on(scores, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(found.right, [0.6123, 0.7, 0.9], atol=1e-12)
    np.testing.assert_allclose(found.wrong, [0.8], atol=1e-4)


def test_error_rates_are_the_formula() -> None:
    found = Calibration(1.0, np.zeros(2), right=np.array([0.6, 0.9, 0.95]), wrong=np.array([0.6, 0.8]))
    confidence, rate = found.error_rates()
    np.testing.assert_allclose(confidence, [0.95, 0.9, 0.8, 0.6])
    deviation = np.sqrt(np.cumsum([0.0475, 0.09, 0.16, 0.48]))
    np.testing.assert_allclose(rate, (np.array([0.05, 0.15, 1.0, 2.0]) + deviation) / [1, 2, 3, 5])


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("n", [8, 32, 100])
def test_the_promised_error_rate_is_kept(rate: float, n: int) -> None:
    wrong, answered, broken = 0, 0, 0
    for seed in range(50):
        calibration, confidence, right = tried(n, seed)
        at = confidence >= calibration.threshold(rate)
        wrong, answered = wrong + (~right[at]).sum(), answered + at.sum()
        broken += bool(at.any()) and (~right[at]).mean() > 1.2 * rate
    assert wrong <= rate * answered
    assert broken <= 0.15 * 50
    assert n == 8 or answered > 0


def test_confidences_that_are_not_true_do_not_answer() -> None:
    """What was observed counts as well, not the confidences alone."""
    half = np.full(50, 0.99)
    assert Calibration(1.0, np.zeros(2), right=half, wrong=half).threshold(0.4) == np.inf
    assert Calibration(1.0, np.zeros(2), right=half, wrong=half[:0]).threshold(0.4) == 0.99


@quick
@given(st.integers(0, 60), st.integers(0, 10**6), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_lower_rate_never_has_a_lower_threshold(n: int, seed: int, one: float, other: float) -> None:
    calibration, *_ = tried(n, seed)
    assert calibration.threshold(min(one, other)) >= calibration.threshold(max(one, other))
    assert calibration.threshold(one) in {*calibration.right, *calibration.wrong, np.inf}
