"""PyTorch's attention, whatever model calls it, with something before or around it.

Deep prompts come in here, gradients get faster here, and a layer is spared what nobody reads of it, without a line
for any architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .encode import Example

__all__ = ["AROUND", "AroundAttention", "behind", "only_at", "quick_gradients"]

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


class _Reached(Exception):
    """Attention is reached."""


@contextlib.contextmanager
def only_at(layer: nn.Module, answers: Tensor) -> Iterator[None]:
    """While open, a layer gives its states at `answers` (B, 1) only, and zeros elsewhere.

    Its keys and values take all positions, what comes behind its attention takes the answers'. So it runs up to its
    attention, and once more on the answers' states, where attention takes the queries, keys and values of the first
    time. It has to call PyTorch's attention once; a cache that it extends is of no more use.
    """
    replaced = contextlib.ExitStack()
    size = 0

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal size
        seen: list[Any] = []

        def stop(attention: Callable[..., Tensor], *tensors: Tensor, **named: Any) -> Tensor:
            seen.extend((*tensors, named))
            raise _Reached

        with contextlib.suppress(_Reached), AroundAttention(stop):
            module.forward(*args, **kwargs)
        query, keys, values, named = seen
        size = query.shape[2]
        mask = named.get("attn_mask")
        if mask is None and named.get("is_causal"):
            mask = torch.arange(keys.shape[2], device=answers.device) <= answers[..., None, None]  # (B, 1, 1, T)
        elif mask is not None and mask.shape[2] > 1:
            mask = _rows(mask.expand(len(answers), -1, -1, -1), answers)  # (B, …, 1, F + T)
        query = _rows(query, answers)  # (B, A, 1, E)

        def attend(attention: Callable[..., Tensor], *_: Tensor, **__: Any) -> Tensor:
            return attention(query, keys, values, **named | {"attn_mask": mask, "is_causal": False})

        replaced.enter_context(AroundAttention(attend))
        return _at(args, size, answers), {name: _at(value, size, answers) for name, value in kwargs.items()}

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        replaced.close()
        states = output[0] if isinstance(output, tuple) else output  # (B, 1, H)
        width = states.shape[2]
        whole = states.new_zeros(len(states), size, width).scatter(1, answers[..., None].expand(-1, -1, width), states)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = [layer.register_forward_pre_hook(begin, with_kwargs=True), layer.register_forward_hook(end)]
    with replaced:  # if the layer fails
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _at(value: Any, size: int, answers: Tensor) -> Any:
    """An argument of a layer, at the answers (B, 1) only if it is of as many positions (B or 1, T, …)."""
    if isinstance(value, tuple):
        return tuple(_at(v, size, answers) for v in value)
    if not isinstance(value, Tensor) or value.dim() not in (2, 3) or value.shape[1] != size:
        return value
    batch = torch.arange(len(answers), device=answers.device)[:, None]  # (B, 1)
    return value.expand(len(answers), *value.shape[1:])[batch, answers]


def _rows(tensor: Tensor, answers: Tensor) -> Tensor:
    """The rows (B, A, 1, E) of a tensor (B, A, T, E) at the answers (B, 1)."""
    return tensor.gather(2, answers[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
