"""From class scores to probabilities.

Every method here ends in the same two things, a temperature and a bias for each class, so that applying
it never depends on what else is in a batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

__all__ = ["CONTENT_FREE_TEXTS", "Calibration", "batch", "content_free", "temperature"]

Scores = NDArray[np.float64]

CONTENT_FREE_TEXTS = ("N/A", "...", "nothing")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`softmax(scores / temperature + bias)`.

    Examples
    --------
    >>> Calibration(1.0, np.zeros(2)).probabilities(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """

    temperature: float
    bias: Scores

    @classmethod
    def none(cls, n_classes: int) -> Calibration:
        """The calibration that changes nothing."""
        return cls(1.0, np.zeros(n_classes))

    def apply(self, scores: Scores) -> Scores:
        """Calibrated class scores (N, C) of class scores (N, C)."""
        return scores / self.temperature + self.bias

    def probabilities(self, scores: Scores) -> Scores:
        """Class probabilities (N, C) of class scores (N, C)."""
        probabilities: Scores = softmax(self.apply(scores), axis=1)
        return probabilities


def content_free(null_scores: Scores) -> Calibration:
    """Divide by the mean probabilities of texts that say nothing (Zhao et al. 2021, arXiv 2102.09690).

    Parameters
    ----------
    null_scores : ndarray of shape (N, C)
        Class scores of the `CONTENT_FREE_TEXTS`.
    """
    return _against(null_scores)


def batch(scores: Scores) -> Calibration:
    """Divide by the mean probabilities of real, unlabelled texts (Zhou et al. 2023, arXiv 2309.17249).

    Parameters
    ----------
    scores : ndarray of shape (N, C)
        Class scores of texts in which the classes are about equally common.
    """
    return _against(scores)


def _against(scores: Scores) -> Calibration:
    return Calibration(1.0, -np.log(softmax(scores, axis=1).mean(axis=0) + 1e-12))


def temperature(scores: Scores, y: NDArray[np.intp], *, sample_weight: Scores | None = None) -> Calibration:
    """The temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599).

    Parameters
    ----------
    scores : ndarray of shape (N, C)
        Class scores of texts that were not trained on.
    y : ndarray of shape (N,)
        Their classes, as indices.
    sample_weight : ndarray of shape (N,), optional
    """
    weight = np.ones(len(y)) if sample_weight is None else sample_weight

    def loss(log_scale: float) -> float:
        logs = log_softmax(scores * np.exp(log_scale), axis=1)[np.arange(len(y)), y]
        return float(-(weight * logs).sum() + log_scale**2)

    log_scale = minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    return Calibration(float(np.exp(-log_scale)), np.zeros(scores.shape[1]))
