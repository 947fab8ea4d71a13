"""Prompts: the vectors that are learned, and where they start.

A `SoftPrompt` is `() → (P, H)`, a `DeepPrompt` `() → (1, L, 2, A, D + 2, E)`: a frozen start plus a learned change
that is zero at first, so that step 0 of training is the start itself. Only the sum is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DeepPrompt", "SoftPrompt", "from_labels", "from_random", "from_vocabulary"]

AROUND_UNIT = 0.3  # of a factor, which is 1 at the start, and of a shift
REPARAMETERIZATIONS = ("direct", "mlp", "low_rank")


class SoftPrompt(nn.Module):
    """P vectors, `start + scale · change(θ)`, with a change of zero at the start.

    `change` is θ itself (direct; Lester et al. 2021, arXiv 2104.08691), `tanh(Z W₁) W₂` (mlp; P-tuning, Liu
    et al. 2021, arXiv 2103.10385) or `A B` (low_rank; in the spirit of DePT, Shi and Lipani 2023, arXiv
    2309.05173). In units of `scale`, the root mean square of the LM's embeddings, one learning rate
    serves all LMs.

    Parameters
    ----------
    start : Tensor of shape (P, H)
        Where the vectors begin.
    scale : float
        Size of one unit of change.
    reparameterization : {"direct", "mlp", "low_rank"}, default="direct"
    rank : int, default=4
        Width of the low-rank factors.
    generator : torch.Generator, optional
        Source of the random factors; those that multiply them are zero.

    Examples
    --------
    >>> prompt = SoftPrompt(torch.ones(3, 8), scale=1.0)
    >>> prompt().shape
    torch.Size([3, 8])
    """

    start: Tensor

    def __init__(
        self,
        start: Tensor,
        *,
        scale: float,
        reparameterization: str = "direct",
        rank: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        n, width = start.shape
        self.scale = scale
        self.reparameterization = reparameterization
        self.register_buffer("start", start.detach().clone())

        def random(rows: int, columns: int) -> nn.Parameter:
            noise = torch.randn(rows, columns, generator=generator) / columns**0.5
            return nn.Parameter(noise.to(start.device))

        if reparameterization == "direct":
            self.theta = nn.Parameter(torch.zeros_like(start))  # (P, H)
        elif reparameterization == "mlp":
            self.inputs = random(n, width)  # (P, H)
            self.hidden = random(width, width)  # (H, H)
            self.theta = nn.Parameter(torch.zeros(width, width, device=start.device))  # (H, H)
        elif reparameterization == "low_rank":
            self.left = random(n, rank)  # (P, R)
            self.theta = nn.Parameter(torch.zeros(rank, width, device=start.device))  # (R, H)
        else:
            raise ValueError(
                f"reparameterization={reparameterization!r} is unknown; use one of {', '.join(REPARAMETERIZATIONS)}"
            )

    def forward(self) -> Tensor:
        """The vectors, of shape (P, H)."""
        change: Tensor
        if self.reparameterization == "mlp":
            change = torch.tanh(self.inputs @ self.hidden) @ self.theta
        elif self.reparameterization == "low_rank":
            change = self.left @ self.theta
        else:
            change = self.theta
        vectors: Tensor = self.start + self.scale * change  # (P, H)
        return vectors


class DeepPrompt(nn.Module):
    """What every layer's attention reads beside a text, and how it reads the text.

    Keys and values stand before those of every layer and take no positions (P-tuning v2, arXiv 2110.07602). The text's
    own are multiplied by a factor (as in (IA)³, arXiv 2205.05638), and values and queries are shifted; at the start
    that changes nothing.

    Each layer's keys, and its values, change in units of how much those of the prompt differ at the start; factors and
    shifts in units of `AROUND_UNIT`.

    Parameters
    ----------
    start : Tensor of shape (L, 2, A, D, E)
        Keys and values of D vectors in L layers of A heads of width E, as `Backbone.keys_and_values` gives them.

    Examples
    --------
    >>> DeepPrompt(torch.randn(6, 2, 12, 4, 32))().shape
    torch.Size([1, 6, 2, 12, 6, 32])
    """

    start: Tensor
    scale: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        factor = torch.ones_like(start[..., :1, :])  # (L, 2, A, 1, E)
        unit = start.std(dim=(2, 3, 4), keepdim=True).expand(-1, -1, -1, start.shape[3], -1)  # (L, 2, 1, D, 1)
        around = torch.full_like(unit[..., :1, :], AROUND_UNIT)  # (L, 2, 1, 1, 1)
        self.register_buffer("start", torch.cat([start.detach(), factor, 0 * factor], dim=3))  # (L, 2, A, D + 2, E)
        self.register_buffer("scale", torch.cat([unit, around, around], dim=3))  # (L, 2, 1, D + 2, 1)
        self.theta = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        """One deep prompt, of shape (1, L, 2, A, D + 2, E), as `attention.behind` takes it."""
        together: Tensor = (self.start + self.scale * self.theta)[None]
        return together

    def go_to(self, deep: Tensor) -> None:
        """Become a deep prompt (1, L, 2, A, D + 2, E) that was tuned from the same start."""
        with torch.no_grad():
            self.theta.copy_((deep[0] - self.start) / self.scale)


def from_vocabulary(embeddings: Tensor, n: int, *, exclude: Sequence[int], generator: torch.Generator) -> Tensor:
    """`n` real token embeddings, drawn without the special ones; shape (n, H)."""
    allowed = torch.ones(len(embeddings))
    allowed[list(exclude)] = 0
    ids = torch.multinomial(allowed, n, replacement=n > int(allowed.sum()), generator=generator)
    return embeddings[ids.to(embeddings.device)].detach().clone()


def from_labels(embeddings: Tensor, n: int, *, words: Sequence[Sequence[int]]) -> Tensor:
    """`n` vectors that go round the label words, a word of several pieces by its mean; shape (n, H)."""
    means = torch.stack([embeddings[list(pieces)].mean(dim=0) for pieces in words])  # (W, H)
    return means[torch.arange(n) % len(means)].detach().clone()


def from_random(embeddings: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """`n` random directions with the mean norm of real embeddings; shape (n, H)."""
    noise = torch.randn(n, embeddings.shape[1], generator=generator).to(embeddings.device)
    norm = embeddings.norm(dim=1).mean()
    vectors: Tensor = noise / noise.norm(dim=1, keepdim=True) * norm
    return vectors.to(embeddings.dtype)
