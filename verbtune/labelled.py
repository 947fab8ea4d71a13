"""Labelled texts, encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .encode import Example

__all__ = ["Labelled"]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Encoded texts, the index of each one's class, and its weight.

    Attributes
    ----------
    examples : list of Example, length N
    codes : ndarray of shape (N,)
    weights : ndarray of shape (N,)
    """

    examples: list[Example]
    codes: NDArray[np.intp]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.examples)

    def read_in(self, last: bool) -> Labelled:
        """The same texts, read in the last layer or not."""
        return dataclasses.replace(self, examples=[dataclasses.replace(e, last=last) for e in self.examples])

    def take(self, index: Sequence[int] | NDArray[np.intp]) -> Labelled:
        """The texts of the given indices, in that order."""
        at = np.asarray(index, dtype=np.intp)
        return Labelled([self.examples[i] for i in at], self.codes[at], self.weights[at])

    def loss(self, scores: Tensor) -> Tensor:
        """Weighted mean cross-entropy of class scores (N, C), in nats."""
        targets = torch.tensor(self.codes, device=scores.device)
        weights = torch.tensor(self.weights, dtype=torch.float32, device=scores.device)
        return (F.cross_entropy(scores, targets, reduction="none") * weights).mean()
