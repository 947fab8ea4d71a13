"""What a causal LM makes of texts that come before anything trainable, computed once a dataset.

Every epoch, and every task that reads the same texts, goes on from there. Small datasets stay in memory,
larger ones in a temporary file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from .backbone import Backbone
from .batch import by_length
from .encode import Example
from .start import Start

__all__ = ["TextCache", "frozen_length"]

MEMORY_BYTES = 2 << 30


def frozen_length(example: Example) -> int:
    """Positions before the first soft one, at most up to the answer."""
    return next((i for i, slot in enumerate(example.slots[: example.answer]) if slot >= 0), example.answer)


class TextCache:
    """Keys and values of how each of many examples begins.

    Parameters
    ----------
    backbone : Backbone
        A causal LM.
    examples : sequence of Example
    lengths : sequence of int
        How many positions of each to keep, all at least 1.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.device = backbone.device
        self.offsets: list[int] = []
        self.text_sum = self.text_count = torch.empty(0)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store = torch.empty(0)
        self._shape: tuple[int, int, int] = (0, 0, 0)
        with torch.no_grad():
            for index in by_length(self.lengths, self.device):
                start = backbone.encode_start([examples[i] for i in index], [self.lengths[i] for i in index])
                assert start is not None
                pairs = [torch.stack([x.keys, x.values]) for x in start.cache.layers]  # type: ignore[union-attr,list-item]
                layers = torch.stack(pairs)  # (L, 2, B, h, F, d)
                if not self.offsets:
                    self._allocate(layers)
                    self.text_sum = torch.empty(len(examples), start.text_sum.shape[1])
                    self.text_count = torch.empty(len(examples), 1)
                self.text_sum[index], self.text_count[index] = start.text_sum.cpu(), start.text_count.cpu()
                for row, i in enumerate(index):
                    n = self.lengths[i]
                    self._part(i).copy_(layers[:, :, row, :, :n].reshape(-1))

    def start(self, index: Sequence[int]) -> Start:
        """The beginnings of the given examples, padded on the right to one batch."""
        n_layers, heads, width = self._shape
        longest = max(self.lengths[i] for i in index)
        padded = torch.zeros(n_layers, 2, len(index), heads, longest, width, dtype=self._store.dtype)
        attention = torch.zeros(len(index), longest, dtype=torch.long)  # (B, F)
        for row, i in enumerate(index):
            n = self.lengths[i]
            padded[:, :, row, :, :n] = self._part(i).view(n_layers, 2, heads, n, width)
            attention[row, :n] = 1
        layers = padded.to(self.device)
        cache = DynamicCache([(keys, values) for keys, values in layers])
        sums, counts = self.text_sum[list(index)], self.text_count[list(index)]
        return Start(cache, *(t.to(self.device) for t in (attention, sums, counts)))

    def _part(self, i: int) -> Tensor:
        n_layers, heads, width = self._shape
        size = n_layers * 2 * heads * width * self.lengths[i]
        return self._store[self.offsets[i] : self.offsets[i] + size]

    def _allocate(self, layers: Tensor) -> None:
        n_layers, _, _, heads, _, width = layers.shape
        self._shape = (n_layers, heads, width)
        per_token = n_layers * 2 * heads * width
        total = 0
        for n in self.lengths:
            self.offsets.append(total)
            total += per_token * n
        if total * layers.element_size() <= MEMORY_BYTES:
            self._store = torch.empty(total, dtype=layers.dtype)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="verbtune-")
        needed, free = total * layers.element_size(), shutil.disk_usage(self._folder.name).free
        if needed > free:
            raise OSError(
                f"the cached texts take {needed >> 20} MiB and {self._folder.name} has {free >> 20} MiB free; "
                "make room, or set TMPDIR to a folder with more"
            )
        path = Path(self._folder.name) / "texts"
        self._store = torch.from_file(str(path), shared=True, size=total, dtype=layers.dtype)
