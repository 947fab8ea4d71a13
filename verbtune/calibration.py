"""From class scores to probabilities, and how sure an answer must be.

Every method here ends in the same two things, a temperature and a bias for each class, so that applying
it never depends on what else is in a batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

__all__ = ["CONTENT_FREE_TEXTS", "PRIOR", "Calibration", "batch", "content_free", "temperature"]

Scores = NDArray[np.float64]

CONTENT_FREE_TEXTS = ("N/A", "...", "nothing")
PRIOR = 3.0  # of a temperature of 1, say: a handful of texts that are all right would ask for one near 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`softmax(scores / temperature + bias)`.

    Attributes
    ----------
    temperature : float
    bias : ndarray of shape (C,)
    right, wrong : ndarray
        The confidences, which are the highest probabilities, of texts that were not trained on: of those that were
        classified right and of the others, in ascending order. Both are empty where there were no such texts.

    Examples
    --------
    >>> Calibration(1.0, np.zeros(2)).probabilities(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """

    temperature: float
    bias: Scores
    right: Scores = dataclasses.field(default_factory=lambda: np.empty(0))
    wrong: Scores = dataclasses.field(default_factory=lambda: np.empty(0))

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

    def tried_on(self, scores: Scores, y: NDArray[np.intp]) -> Calibration:
        """The same calibration, with the confidences of texts that were not trained on.

        Parameters
        ----------
        scores : ndarray of shape (N, C)
        y : ndarray of shape (N,)
            Their classes, as indices.
        """
        probabilities = self.probabilities(scores)
        confidence = np.floor(probabilities.max(axis=1) * 1e4) / 1e4  # so that a file holds a few bytes a text
        right = probabilities.argmax(axis=1) == y
        return dataclasses.replace(self, right=np.sort(confidence[right]), wrong=np.sort(confidence[~right]))

    def error_rates(self) -> tuple[Scores, Scores]:
        """Confidences, and a cautious error rate of the texts that are at least as sure.

        The rate is the larger of two estimates, the mean of 1 - confidence and the part of the texts that was
        classified wrong, plus one standard deviation that the first would have if the confidences were true. The
        observed part alone promises too much of few texts, since the threshold is chosen by it.

        Returns
        -------
        confidence : ndarray of shape (M,)
            Those that occur, from the highest to the lowest.
        rate : ndarray of shape (M,)
        """
        every = np.concatenate([self.right, self.wrong])
        order = np.argsort(-every, kind="stable")
        confidence, count = every[order], np.arange(1, len(every) + 1)
        expected, variance = (1 - confidence).cumsum(), (confidence * (1 - confidence)).cumsum()
        observed = (order >= len(self.right)).cumsum()
        rate = (np.maximum(expected, observed) + np.sqrt(variance)) / count
        last = np.append(confidence[1:] < confidence[:-1], True)[: len(every)]  # of those that are equally sure
        return confidence[last], rate[last]

    def threshold(self, rate: float) -> float:
        """The lowest confidence at which `error_rates` are at most `rate`; infinite if there is none.

        Examples
        --------
        >>> Calibration(1.0, np.zeros(2), right=np.array([0.6, 0.99, 0.99]), wrong=np.array([0.7])).threshold(0.1)
        0.99
        """
        confidence, rates = self.error_rates()
        return float(min(confidence[rates <= rate], default=np.inf))


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
        return float(-(weight * logs).sum() + PRIOR * log_scale**2)

    log_scale = minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    return Calibration(float(np.exp(-log_scale)), np.zeros(scores.shape[1]))
