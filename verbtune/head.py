"""The rows of the label words in place of a model's output matrix, at the answers only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["Head", "put_on"]


class Head(nn.Module):
    """Stands in for the output embeddings; remembers the states that it, a layer and the trunk saw."""

    bias = None  # some models copy it from their output embeddings

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = (weight, bias)
        self.states: Tensor | None = None
        self.layer: Tensor | None = None
        self.last: Tensor | None = None

    @classmethod
    def of(cls, output: nn.Module, rows: Tensor | None) -> Head:
        """The given rows (W,) of an output matrix, in float32, or all of it as it is."""
        weight: Any = output.weight
        bias = getattr(output, "bias", None)
        if rows is None:
            return cls(weight, bias)
        rows = rows.to(weight.device)
        # In 16 bits a score of 10 is rounded to steps of 0.06, often more than what tells two classes apart.
        return cls(weight[rows].float(), None if bias is None else bias[rows].float())

    def forward(self, states: Tensor) -> Tensor:
        """Logits (B, M, W) of states (B, M, H)."""
        self.states = states  # (B, M, H)
        with torch.autocast(states.device.type, enabled=False):  # which would round float32 scores to 16 bits
            return F.linear(states.to(self.matrix[0].dtype), *self.matrix)  # (B, M, W)


@contextlib.contextmanager
def put_on(head: Head, model: PreTrainedModel, *, text_layer: nn.Module, answers: Tensor) -> Iterator[None]:
    """While open: `head` replaces the output matrix, and the trunk hands on its states at `answers` (B, M) only."""

    def gather(module: nn.Module, args: Any, output: Any) -> Any:
        head.last = states = output.last_hidden_state  # (B, T, H)
        output.last_hidden_state = states.gather(1, answers[..., None].expand(-1, -1, states.shape[2]))
        return output

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        head.layer = output[0] if isinstance(output, tuple) else output  # (B, T, H)

    original = model.get_output_embeddings()
    trunk = model.get_decoder()
    if trunk is original:  # ModernBERT has its output matrix under the name "decoder"
        trunk = model.base_model
    hooks = [text_layer.register_forward_hook(remember), trunk.register_forward_hook(gather)]
    try:
        model.set_output_embeddings(head)
        yield
    finally:
        model.set_output_embeddings(original)
        for hook in hooks:
            hook.remove()
