"""Texts of one class drawn together and away from others: what a deep prompt learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["contrast", "in_groups"]

TEMPERATURE = 0.1


def contrast(points: Tensor, targets: Tensor) -> Tensor:
    """How far each text is from those of its class rather than from all others, in nats.

    The supervised contrastive loss of Khosla et al. 2020, arXiv 2004.11362: the mean negative log-probability of
    drawing each text of one's own class from all other texts, where those at a small angle are likely.

    Parameters
    ----------
    points : Tensor of shape (B, S)
    targets : Tensor of shape (B,)
        Classes as indices.

    Returns
    -------
    Tensor of shape (B,)
        0 for texts that have no other of their class here.
    """
    unit = F.normalize(points.float(), dim=1)
    alike = unit @ unit.T / TEMPERATURE  # (B, B)
    others = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    logs = alike.masked_fill(~others, -torch.inf).log_softmax(dim=1)
    same = (targets[:, None] == targets) & others
    loss: Tensor = -logs.where(same, 0).sum(dim=1) / same.sum(dim=1).clamp(min=1)  # (B,)
    return loss


def in_groups(y: NDArray[np.intp], lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: texts of some classes, drawn anew each time, the shortest first.

    Parameters
    ----------
    y : ndarray of shape (N,)
        Classes as indices.
    lengths : sequence of int, length N
        Tokens of each text.
    size : int
        Most texts of a batch: two of each class, or more where there are fewer classes.
    seed : int
        Decides the classes and their texts.
    """
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(y == c) for c in np.unique(y)]
    n_texts = max(2, size // len(members))
    while True:
        chosen = generator.choice(len(members), min(size // n_texts, len(members)), replace=False)
        drawn = [generator.choice(members[c], min(n_texts, len(members[c])), replace=False) for c in chosen]
        yield sorted((int(i) for i in np.concatenate(drawn)), key=lengths.__getitem__)
