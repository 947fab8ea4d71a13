"""PyTorch's attention, whatever model calls it, with something before or around it.

Deep prompts come in here, and gradients get faster here, without a line for any architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .encode import Example

__all__ = ["AROUND", "AroundAttention", "behind", "quick_gradients"]

AROUND = 2  # the last vectors of a deep prompt: a factor and a shift


class AroundAttention(TorchFunctionMode):
    """While open, a function is called in place of PyTorch's attention, with that and its arguments."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        return self.call(func, *args, **named) if func is F.scaled_dot_product_attention else func(*args, **named)


def behind(deep: Tensor | None, examples: Sequence[Example]) -> contextlib.AbstractContextManager[Any]:
    """While open, every layer reads a batch by its deep prompts.

    The first D vectors of its keys, and values, stand before the text's own, which are multiplied by the next one. The
    last one is added to the text's values, and to its queries: added to all keys it would change next to nothing.

    Parameters
    ----------
    deep : Tensor of shape (K, L, 2, A, D + 2, E), optional
    examples : sequence of Example, length B
    """
    if deep is None:
        return contextlib.nullcontext()
    if len(deep) > 1:
        deep = deep[[example.deep for example in examples]]
    n_before = deep.shape[4] - AROUND
    layers = iter(deep.movedim(0, 2))  # L times (2, B or 1, A, D + 2, E)

    def attend(attention: Callable[..., Tensor], query: Tensor, keys: Tensor, values: Tensor, **named: Any) -> Tensor:
        together = next(layers).to(query.dtype)
        before, (key_factor, factor), (query_shift, shift) = together.split([n_before, 1, 1], dim=3)
        mask = named.get("attn_mask")
        if mask is None and named.get("is_causal"):
            mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            seen = True if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (n_before, 0), value=seen)  # (…, T, D + F)
        query = query + _of_heads(query_shift, query)
        keys = torch.cat([_of_heads(before[0], keys), keys * _of_heads(key_factor, keys)], dim=2)
        values = values * _of_heads(factor, values) + _of_heads(shift, values)
        values = torch.cat([_of_heads(before[1], values), values], dim=2)
        return attention(query, keys, values, **named | {"attn_mask": mask, "is_causal": False})

    return AroundAttention(attend)


def _of_heads(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors (B, A, D, E) for as many rows and heads as others have: some models repeat theirs when masked."""
    return vectors.repeat_interleave(like.shape[1] // vectors.shape[1], dim=1).expand(len(like), -1, -1, -1)


def _attend_in_float(attention: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    with torch.autocast(args[0].device.type, enabled=False):
        found = attention(*map(_in_float, args), **{key: _in_float(value) for key, value in named.items()})
    return found.to(args[0].dtype)


def _in_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def quick_gradients(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While open, a forward pass on a CPU is one whose gradient is computed as fast as can be.

    PyTorch's gradient of attention in bfloat16 takes a CPU five times as long as in float32 for sentences (70
    positions), 1.6 times at 512. Scores in float32 are no less exact, so that nothing else changes.
    """
    if device.type == "cpu" and torch.is_grad_enabled():
        return AroundAttention(_attend_in_float)
    return contextlib.nullcontext()
