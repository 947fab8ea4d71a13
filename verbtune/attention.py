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

__all__ = ["AroundAttention", "behind", "quick_gradients"]


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
    """While open, a batch is read with its deep prompts before the keys and values of every layer, in their order.

    Parameters
    ----------
    deep : Tensor of shape (K, L, 2, A, D, E), optional
    examples : sequence of Example, length B
    """
    if deep is None:
        return contextlib.nullcontext()
    if len(deep) > 1:
        deep = deep[[example.deep for example in examples]]
    layers = iter(deep.movedim(0, 2))  # L times (2, B or 1, A, D, E)

    def attend(attention: Callable[..., Tensor], query: Tensor, *pair: Tensor, **named: Any) -> Tensor:
        before = next(layers).to(query.dtype)
        mask = named.get("attn_mask")
        if mask is None and named.get("is_causal"):
            mask = torch.ones(query.shape[2], pair[0].shape[2], dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            seen = True if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (before.shape[3], 0), value=seen)  # (…, T, D + F)
        keys, values = (torch.cat([_of_heads(b, x), x], dim=2) for b, x in zip(before, pair, strict=True))
        return attention(query, keys, values, **named | {"attn_mask": mask, "is_causal": False})

    return AroundAttention(attend)


def _of_heads(before: Tensor, like: Tensor) -> Tensor:
    """Keys or values (B, A, D, E) for as many rows and heads as others have: some models repeat theirs when masked."""
    return before.repeat_interleave(like.shape[1] // before.shape[1], dim=1).expand(len(like), -1, -1, -1)


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
