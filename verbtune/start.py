"""How examples begin, as what a causal LM need not compute again."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

__all__ = ["Start", "window"]

SLIDING = "sliding_attention"  # what transformers calls layers that see the last few positions only


def window(config: PreTrainedConfig) -> float:
    """How many positions a model's layers with a sliding window see; infinity where there are none."""
    return getattr(config, "sliding_window", None) or math.inf


@dataclasses.dataclass(frozen=True)
class Start:
    """How examples begin, as a causal LM's keys and values.

    Attributes
    ----------
    cache : Cache
        Of B rows, or of one that all examples share.
    attention : Tensor of shape (B, F)
        1 at the positions that are real.
    text_sum : Tensor of shape (B, H)
        Sum of the states of the texts' tokens so far.
    text_count : Tensor of shape (B, 1)
        How many these are.
    """

    cache: Cache
    attention: Tensor
    text_sum: Tensor
    text_count: Tensor

    @property
    def lengths(self) -> Tensor:
        """Positions of each row that are known, of shape (B,)."""
        return self.attention.sum(1)

    def select(self, rows: Sequence[int]) -> Start:
        """The given rows; what they are taken from stays as it is."""
        index = torch.tensor(rows, device=self.attention.device)
        start = self._fork()
        start.cache.batch_select_indices(index)
        return Start(start.cache, self.attention[index], self.text_sum[index], self.text_count[index])

    def of_size(self, size: int) -> Start:
        """A start that a forward pass of so many rows may extend."""
        return self._fork() if len(self.attention) == size else self.select([0] * size)

    def positions(self, attention: Tensor) -> Tensor:
        """Position ids (B, T) of what comes next; padding, where `attention` (B, T) is 0, repeats the last one."""
        return self.lengths[:, None] + (attention.cumsum(1) - 1).clamp(min=0)

    def mask(
        self, among: Tensor, positions: Tensor, *, config: PreTrainedConfig, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """What a model adds to attention's scores, so that new positions see all of the start, and some of each other.

        Of layers that see the last few positions only, a model tells these by their places in the batch; here padding
        and words side by side take places as well.

        Parameters
        ----------
        among : Tensor of shape (T, T)
            Which new position (row) sees which one.
        positions : Tensor of shape (B, T)
            Their position ids.
        config : PreTrainedConfig
            Of the model.
        dtype : torch.dtype

        Returns
        -------
        Tensor of shape (B, 1, T, F + T), or a dict of these by the name of a kind of layer
        """
        known = self.attention.bool()[:, None].expand(-1, len(among), -1)
        seen = torch.cat([known, among.expand(len(known), -1, -1)], dim=2)  # (B, T, F + T)
        every = torch.cat([self.attention.cumsum(1) - 1, positions], dim=1)  # (B, F + T)
        near = positions[:, :, None] - every[:, None] < window(config)  # (B, T, F + T)
        hidden = torch.finfo(dtype).min
        kinds = getattr(config, "layer_types", None) or [SLIDING]
        masks = {
            kind: torch.where(seen & near if kind == SLIDING else seen, 0.0, hidden).to(dtype)[:, None]
            for kind in dict.fromkeys(kinds)
        }
        return masks if len(masks) > 1 else masks[kinds[0]]

    def _fork(self) -> Start:
        # A cache grows by new tensors, so that the layers' lists are all that must not be shared.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return dataclasses.replace(self, cache=cache)
