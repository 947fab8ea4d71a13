"""Examples in padded batches of similar length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .encode import Example

__all__ = ["Batch", "by_length", "collate"]

TOKENS_PER_BATCH = 2048  # on a CPU: what is computed stays in the caches of a core
TOKENS_PER_BATCH_ON_GPU = 16384


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes
    ----------
    ids : Tensor of shape (B, T)
    attention : Tensor of shape (B, T)
        1 at real positions, 0 at padding.
    slots : Tensor of shape (B, T)
        Index of the prompt vector that stands at a position, or -1.
    texts : Tensor of shape (B, T)
        1 at the tokens of the fields' texts, else 0.
    last : Tensor of shape (B,)
        Whether these are read in the last layer.
    answers : Tensor of shape (B, M)
        Positions whose logits are wanted: the M masks, or the last position of a causal context.
    """

    ids: Tensor
    attention: Tensor
    slots: Tensor
    texts: Tensor
    last: Tensor
    answers: Tensor


def collate(examples: Sequence[Example], *, pad_id: int, mask_id: int | None = None, n_masks: int = 1) -> Batch:
    """Pad examples on the right to one batch.

    Parameters
    ----------
    n_masks : int
        Number of masks at the answer, for label words of that many pieces.
    """
    extra = n_masks - 1
    width = max(len(e.ids) for e in examples) + extra
    ids = torch.full((len(examples), width), pad_id)  # (B, T)
    slots = torch.full((len(examples), width), -1)  # (B, T)
    attention = torch.zeros((len(examples), width), dtype=torch.long)  # (B, T)
    texts = torch.zeros(len(examples), width)  # (B, T)
    for i, e in enumerate(examples):
        at = e.answer
        row = e.ids if not extra else [*e.ids[:at], *[mask_id or 0] * extra, *e.ids[at:]]
        marks = e.slots if not extra else [*e.slots[:at], *[-1] * extra, *e.slots[at:]]
        ids[i, : len(row)] = torch.tensor(row)
        slots[i, : len(row)] = torch.tensor(marks)
        attention[i, : len(row)] = 1
        for start, stop in e.texts:
            moved = extra if start >= at else 0
            texts[i, start + moved : stop + moved] = 1
    answers = torch.tensor([e.answer for e in examples])[:, None] + torch.arange(n_masks)  # (B, M)
    last = torch.tensor([e.last for e in examples])  # (B,)
    return Batch(ids, attention, slots, texts, last, answers)


def by_length(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most as many positions, when padded, as suit the device."""
    most = TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH_ON_GPU
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
