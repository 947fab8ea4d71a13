"""Metrics against values worked out by hand, against scikit-learn, and for what must always hold."""

import itertools

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import f1_score, log_loss

from verbtune.metrics import METRICS, N_BINS, ProbabilisticClassification, reliability, score

SLOW = settings(max_examples=25, deadline=None)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) and true classes (N,)."""
    n, c = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    raw = draw(hnp.arrays(np.float64, (n, c), elements=st.floats(0.001, 1)))
    return raw / raw.sum(axis=1, keepdims=True), draw(hnp.arrays(np.int64, n, elements=st.integers(0, c - 1)))


def of(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return score(probabilities, truth.tolist(), range(probabilities.shape[1]))


def test_values_worked_out_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    scores = score(probabilities, ["no", "yes", "yes", "no"], ["no", "yes"])
    assert set(scores) == set(METRICS)
    assert scores["accuracy"] == 0.5
    assert scores["macro_f1"] == pytest.approx(0.5)  # one true, one false positive, one miss in both classes
    assert scores["nll"] == pytest.approx(-(np.log([0.9, 0.4, 0.8, 0.3])).mean())
    assert scores["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.7) / 4)  # each text has a bin of its own
    assert scores["brier"] == pytest.approx(2 * (0.1**2 + 0.6**2 + 0.2**2 + 0.7**2) / 4)


def test_a_class_that_no_text_has_counts_in_macro_f1():
    probabilities = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert score(probabilities, ["a", "b"], ["a", "b", "c"])["macro_f1"] == pytest.approx(2 / 3)


def test_a_certain_mistake_has_a_finite_nll():
    assert score(np.array([[1.0, 0.0]]), ["b"], ["a", "b"])["nll"] == pytest.approx(-np.log(1e-12))


@SLOW
@given(distributions())
def test_agrees_with_scikit_learn(case):
    probabilities, truth = case
    labels = range(probabilities.shape[1])
    scores = of(probabilities, truth)
    assert scores["nll"] == pytest.approx(log_loss(truth, probabilities, labels=labels), rel=1e-6, abs=1e-9)
    expected = f1_score(truth, probabilities.argmax(1), labels=list(labels), average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected)


@SLOW
@given(distributions())
def test_ece_is_what_its_definition_says(case):
    probabilities, truth = case
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    expected = 0.0
    edges = np.linspace(0, 1, N_BINS + 1)
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    ece = of(probabilities, truth)["ece"]
    assert ece == pytest.approx(expected)
    assert 0 <= ece <= 1


@SLOW
@given(distributions(), st.randoms(use_true_random=False))
def test_order_of_texts_and_classes_does_not_matter(case, random):
    probabilities, truth = case
    n, c = probabilities.shape
    rows, columns = random.sample(range(n), n), random.sample(range(c), c)
    shuffled = score(probabilities[rows][:, columns], truth[rows].tolist(), columns)
    same = of(probabilities, truth)
    # argmax takes the first of equal probabilities, so accuracy and its kin only agree where there is no tie.
    ties = (probabilities == probabilities.max(1, keepdims=True)).sum(1).max() > 1
    for metric in ("nll", "brier") if ties else METRICS:
        assert shuffled[metric] == pytest.approx(same[metric], abs=1e-12)


@SLOW
@given(distributions())
def test_perfect_predictions_lose_nothing(case):
    _, truth = case
    scores = of(np.eye(6)[truth], truth)
    assert scores["accuracy"] == 1
    assert scores["nll"] == scores["ece"] == scores["brier"] == 0


def test_reliability_leaves_out_empty_bins_and_shares_sum_to_one():
    confidence, accuracy, share = reliability(np.array([[0.9, 0.1], [0.91, 0.09], [0.5, 0.5]]), np.array([0, 1, 0]))
    assert confidence == pytest.approx([0.5, 0.905])
    assert accuracy == pytest.approx([1, 0.5])
    assert share == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("probabilities", "truth", "message"),
    [
        ([[0.5, 0.5]], ["a", "b"], r"shape \(1, 2\) for 2 texts"),
        ([], [], "at least one"),
        ([[0.7, 0.7]], ["a"], "no distribution"),
        ([[np.nan, 0.5]], ["a"], "no distribution"),
        ([[1.5, -0.5]], ["a"], "no distribution"),
        ([[0.5, 0.5]], ["c"], "'c' is none of the classes a, b"),
    ],
)
def test_what_is_no_prediction_is_refused(probabilities, truth, message):
    with pytest.raises(ValueError, match=message):
        score(np.array(probabilities), truth, ["a", "b"])


def test_nothing_is_left_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    score(np.array([[0.5, 0.5]]), ["a"], ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_batches_can_be_added_one_by_one(tmp_path):
    metric = ProbabilisticClassification(keep_in_memory=True, cache_dir=str(tmp_path))
    metric.add_batch(predictions=[[0.9, 0.1]], references=[0])
    metric.add_batch(predictions=[[0.9, 0.1]], references=[1])
    assert metric.compute()["accuracy"] == 0.5
