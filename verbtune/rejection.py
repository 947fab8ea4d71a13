"""Answers that are not given because the model is too unsure."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .parameters import ParameterError

__all__ = ["least_confidence", "most_probable"]


def most_probable(classes: NDArray[Any], probabilities: NDArray[np.float64], least: float | None) -> NDArray[Any]:
    """The most probable of the classes (C,) by each row (N, C), or `None` where it is less probable than `least`."""
    best: NDArray[Any] = classes[probabilities.argmax(axis=1)]
    if least is not None:
        best = best.astype(object)
        best[probabilities.max(axis=1) < least] = None
    return best


def least_confidence(calibration: Calibration, reject_at: float, whose: str = "") -> float:
    """The confidence that an answer needs, as of `PromptClassifier.rejection_threshold`; errors begin with `whose`."""
    number = isinstance(reject_at, numbers.Real) and not isinstance(reject_at, bool | np.bool_)
    if not number or not 0 < reject_at < 1:
        raise ParameterError(
            f"{whose}reject_at={reject_at!r} must be a number above 0 and below 1; give the part of the answers that "
            "may be wrong, such as 0.05"
        )
    _, rates = calibration.error_rates()
    if not len(rates):
        raise ParameterError(
            f"{whose}reject_at={reject_at!r} has no held-out texts to go by; fit with verbalizer='learned' and at "
            "least two texts of each class"
        )
    least = calibration.threshold(float(reject_at))
    if math.isinf(least):
        warnings.warn(
            f"{whose}reject_at={reject_at!r} is less than the held-out training texts can show, which is "
            f"{min(1, math.ceil(1000 * rates.min()) / 1000):g} at best, so every text is rejected; allow more "
            "errors or fit on more texts",
            stacklevel=4,
        )
    return least
