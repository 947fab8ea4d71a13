"""Label words of several pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PieceTree", "log_probabilities"]


@dataclasses.dataclass(frozen=True)
class PieceTree:
    """Words of several pieces as a tree: a node for every beginning that words share, an edge for every later piece.

    Attributes
    ----------
    ids, depth : Tensor of shape (T,)
        The last piece of each beginning, and how many stand before it.
    ancestors : Tensor of shape (T, T)
        Which nodes a node sees: the beginnings of its beginning, and itself.
    node, piece, word : Tensor of shape (E,)
        Where each later piece of a word hangs, the piece, and the word.
    """

    ids: Tensor
    depth: Tensor
    ancestors: Tensor
    node: Tensor
    piece: Tensor
    word: Tensor

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, ...]], device: torch.device) -> PieceTree:
        """Words as tuples of pieces; those of one piece are no part of it."""
        nodes = sorted({p[:k] for p in pieces for k in range(1, len(p))})
        place = {node: i for i, node in enumerate(nodes)}
        edges = [(place[p[:k]], p[k], w) for w, p in enumerate(pieces) for k in range(1, len(p))]
        sees = [[above == node[: len(above)] for above in nodes] for node in nodes]
        return cls(
            torch.tensor([node[-1] for node in nodes], device=device),
            torch.tensor([len(node) - 1 for node in nodes], device=device),
            torch.tensor(sees, device=device),
            *(torch.tensor(column, device=device) for column in zip(*edges, strict=True)),
        )


def log_probabilities(logits: Tensor, places: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B, …) of ids (…) at places (…) of logits (B, T, V).

    Example by example, since those of a whole batch leave the caches and take three times as long.
    """
    return torch.stack([each.float().log_softmax(-1)[places, ids] for each in logits])
