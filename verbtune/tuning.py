"""One visible training loop."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["History", "Step", "TuningError", "in_rounds", "tune"]


class TuningError(ValueError):
    """A training that cannot go on: names the step and the remedy."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What happened at one step.

    Attributes
    ----------
    step : int
        0 is the state before training.
    loss : float
        Of the step's batch, in nats; NaN at step 0.
    learning_rate : float
    gradient_norms : list of float
        Norm of the loss's gradient at each of the P prompt vectors.
    validation_score : float or None
        Mean log-likelihood of the validation texts: higher is better.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norms: list[float]
    validation_score: float | None = None


@dataclasses.dataclass
class History:
    """The steps of a run, which one was kept, and whether it was interrupted."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    best_step: int = 0
    interrupted: bool = False


def tune(
    parts: nn.Module,
    loss: Callable[[Sequence[int], Tensor | None], Tensor],
    batches: Iterator[Sequence[int]],
    *,
    prompt: Callable[[], Tensor] | None,
    learning_rate: float,
    steps: int,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    validate: Callable[[], float] | None = None,
    evaluate_every: int = 10,
    patience: int = 5,
    progress: bool = False,
) -> History:
    """Minimise a loss with AdamW, warm-up and linear decay; leave `parts` at the best step.

    With `validate` the step of the best score is kept, step 0 among the candidates, and training ends
    early after `patience` evaluations without a better one. Without it the last step is kept. Ctrl-C
    ends training and keeps the best so far.

    Parameters
    ----------
    parts : nn.Module
        Its parameters are trained, nothing else.
    loss : callable (indices, vectors) → scalar Tensor
        Mean loss over the examples of the given indices, where vectors is `prompt()`, of shape (P, H).
    batches : iterator of sequence of int
        The examples of each step, as indices.
    prompt : callable, optional
        Gives the prompt vectors, whose gradient norms are recorded.
    learning_rate : float
        Peak of AdamW's step size.
    steps : int
    warmup : float
        Fraction of the steps over which the learning rate rises.
    weight_decay, max_grad_norm : float
    validate : callable → float, optional
        Higher is better.
    evaluate_every, patience : int
    progress : bool
        Draw a bar on standard error, if that is a terminal.

    Returns
    -------
    History

    Raises
    ------
    TuningError
        If loss or gradient are no longer finite: no later step could be.
    """
    parameters = [p for p in parts.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    ramp = max(1, round(warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / ramp, (steps - s) / max(1, steps - ramp))
    )
    score = validate() if validate else None
    history = History([Step(0, math.nan, 0.0, [], score)])
    best, best_score, waited = _snapshot(parts) if validate else {}, score, 0
    bar = tqdm(total=steps, desc="tuning", disable=not (progress and sys.stderr.isatty()), leave=False)
    try:
        for step in range(1, steps + 1):
            vectors = prompt() if prompt else None
            if vectors is not None and vectors.requires_grad:
                vectors.retain_grad()
            value = loss(next(batches), vectors)
            optimizer.zero_grad()
            value.backward()
            norms = [] if vectors is None or vectors.grad is None else vectors.grad.norm(dim=1).tolist()
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
            if not math.isfinite(value.item()) or not math.isfinite(norm):
                raise TuningError(
                    f"step {step}: with learning_rate={learning_rate} the loss is {value.item():.3g} and its gradient "
                    f"{norm:.3g}, so nothing was fitted; lower learning_rate, or use dtype='float32'"
                )
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            score = validate() if validate and (step % evaluate_every == 0 or step == steps) else None
            history.steps.append(Step(step, value.item(), rate, norms, score))
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
            bar.update()
            if score is not None and best_score is not None:
                waited = 0 if score > best_score else waited + 1
                if score > best_score:
                    best, best_score, history.best_step = _snapshot(parts), score, step
                if waited >= patience:
                    break
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        bar.close()
    if validate:
        parts.load_state_dict(best)
    else:
        history.best_step = history.steps[-1].step
    return history


def in_rounds(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, every example once in each round.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each example; batches hold examples of similar length, as far as they can without being the
        same in every round.
    size : int
        Examples of a batch.
    seed : int
        Decides the order.
    """
    generator = torch.Generator().manual_seed(seed)
    known = torch.tensor(lengths, dtype=torch.float)  # (N,)
    while True:
        # Lengths in disguise, by up to a fifth, so that the batches of a few texts differ from round to round.
        order = (known * (1 + torch.rand(len(known), generator=generator) / 5)).argsort().tolist()
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def _snapshot(parts: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in parts.state_dict().items()}
