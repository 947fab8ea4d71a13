"""How good class probabilities are: an `evaluate` module of this package, so that nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score

__all__ = ["METRICS", "ProbabilisticClassification", "reliability", "score"]

METRICS = ("accuracy", "macro_f1", "nll", "ece", "brier")
N_BINS = 15
SMALLEST = 1e-12

_DESCRIPTION = """
Accuracy, macro-F1 over all classes, negative log-likelihood in nats (probabilities clipped at 1e-12),
expected calibration error (15 bins of equal width of the confidence) and Brier score (squared
differences, summed over the classes, mean over the texts).
"""
_INPUTS = """
predictions (list of list of float): a probability for every class, for each text.
references (list of int): the index of each text's class.
"""
_CITATION = "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599 (ECE)"


class ProbabilisticClassification(evaluate.Metric):  # type: ignore[misc]
    """An `evaluate` metric of class probabilities; `compute` gives all of `METRICS`.

    Examples
    --------
    >>> metric = ProbabilisticClassification(keep_in_memory=True)
    >>> metric.compute(predictions=[[0.5, 0.5], [0.0, 1.0]], references=[0, 1])["brier"]
    0.25
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        probabilities, truth = np.asarray(predictions), np.asarray(references)
        n, n_classes = probabilities.shape
        predicted = probabilities.argmax(axis=1)
        confidence, accuracy, share = reliability(probabilities, truth)
        true_ones = np.eye(n_classes)[truth]
        return {
            "accuracy": float(accuracy_score(truth, predicted)),
            "macro_f1": float(f1_score(truth, predicted, labels=range(n_classes), average="macro", zero_division=0)),
            "nll": float(-np.log(probabilities[np.arange(n), truth].clip(SMALLEST, 1)).mean()),
            "ece": float((share * np.abs(confidence - accuracy)).sum()),
            "brier": float(((probabilities - true_ones) ** 2).sum(axis=1).mean()),
        }


def reliability(
    probabilities: NDArray[np.float64], truth: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Confidence against accuracy in `N_BINS` bins of equal width, of those that are not empty.

    Parameters
    ----------
    probabilities : ndarray of shape (N, C)
    truth : ndarray of shape (N,)
        Indices of the true classes.

    Returns
    -------
    confidence, accuracy, share : ndarray of shape (at most N_BINS,)
        Of each bin: the mean of the largest probability, how often its class is right, and the part of
        all texts that is in it.

    Examples
    --------
    >>> confidence, accuracy, share = reliability(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))
    >>> confidence, accuracy, share
    (array([0.8, 0.9]), array([0., 1.]), array([0.5, 0.5]))
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    # Bins are (low, high], as in Guo et al.
    bins = np.searchsorted(np.linspace(0, 1, N_BINS + 1), confidence, side="left")
    _, bins = np.unique(bins, return_inverse=True)
    count = np.bincount(bins)
    return np.bincount(bins, confidence) / count, np.bincount(bins, right) / count, count / len(truth)


def score(probabilities: NDArray[np.float64], truth: Sequence[Any], classes: Sequence[Any]) -> dict[str, float]:
    """All of `METRICS` for class probabilities.

    Parameters
    ----------
    probabilities : ndarray of shape (N, C)
    truth : sequence of length N
        The true labels.
    classes : sequence of length C
        What the columns stand for.

    Raises
    ------
    ValueError
        If shapes differ, a row is no distribution, or a label is no class.

    Examples
    --------
    >>> score(np.array([[0.5, 0.5], [0.0, 1.0]]), ["no", "yes"], ["no", "yes"])["accuracy"]
    1.0
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    shape = (len(truth), len(classes))
    if probabilities.shape != shape or not len(truth):
        raise ValueError(
            f"probabilities of shape {probabilities.shape} for {shape[0]} texts and {shape[1]} classes; "
            "give a row for each text (at least one) and a column for each class"
        )
    total = probabilities.sum(axis=1)
    odd = ~((probabilities >= 0).all(axis=1) & (np.abs(total - 1) < 1e-5))  # NaN compares false
    if odd.any():
        i = int(odd.argmax())
        raise ValueError(f"row {i}: {probabilities[i]} is no distribution; give numbers from 0 that sum to 1")
    index = {label: i for i, label in enumerate(classes)}
    unknown = [label for label in truth if label not in index]
    if unknown:
        raise ValueError(f"the label {unknown[0]!r} is none of the classes {', '.join(map(str, classes))}")
    # evaluate makes a folder in its cache even if it keeps everything in memory.
    with tempfile.TemporaryDirectory() as scratch:
        metric = ProbabilisticClassification(keep_in_memory=True, cache_dir=scratch)
        scores: dict[str, float] = metric.compute(predictions=probabilities, references=[index[t] for t in truth])
    return scores
