"""Soft tokens: where they start, and how they are tuned together with the rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .compiled import CompiledTask
from .labelled import Labelled
from .prompt import SoftPrompt, from_labels, from_random, from_vocabulary
from .text_cache import TextCache, frozen_length
from .tuning import History, in_rounds, tune
from .verbalizer import Verbalizer

__all__ = ["start_prompt", "tune_together"]


def start_prompt(
    compiled: CompiledTask, *, init: str, reparameterization: str, generator: torch.Generator
) -> SoftPrompt | None:
    """A task's soft tokens before they are tuned, or `None` if it has none.

    Parameters
    ----------
    compiled : CompiledTask
    init, reparameterization : str
        See `PromptClassifier`.
    generator : torch.Generator
    """
    tokens = compiled.layout.slot_tokens
    if not tokens:
        return None
    backbone = compiled.backbone
    table = backbone.embedding_table()  # (V, H)
    free = [i for i, token in enumerate(tokens) if token is None]
    start = table[[0 if token is None else token for token in tokens]]  # (P, H)
    if free and init == "vocab":
        special = backbone.tokenizer.all_special_ids
        start[free] = from_vocabulary(table, len(free), exclude=special, generator=generator)
    elif free and init == "labels":
        start[free] = from_labels(table, len(free), words=compiled.words.pieces)
    elif free:
        start[free] = from_random(table, len(free), generator=generator)
    return SoftPrompt(
        start,
        # Row by row: all squares at once would be a table more.
        scale=float((table.norm(dim=1).square().mean() / table.shape[1]).sqrt()),
        reparameterization=reparameterization,
        generator=generator,
    )


def tune_together(
    compiled: CompiledTask,
    verbalizer: Verbalizer,
    prompt: SoftPrompt | None,
    training: Labelled,
    held_out: Labelled,
    *,
    strength: float,
    seed: int,
    batch_size: int,
    learning_rate: float,
    steps: int,
    warmup: float,
    weight_decay: float,
    max_grad_norm: float,
    evaluate_every: int,
    patience: int,
    progress: bool,
) -> History:
    """Tune soft tokens and rows by cross-entropy of the class scores.

    Parameters
    ----------
    compiled : CompiledTask
    verbalizer : Verbalizer
    prompt : SoftPrompt or None
    training : Labelled
    held_out : Labelled
        They choose the step that is kept, if there are any.
    strength : float
        Of the rows' pull to zero, in units of one text.
    seed, batch_size : int
        See `in_rounds`.
    learning_rate, steps, warmup, weight_decay, max_grad_norm, evaluate_every, patience, progress
        See `tune`.

    Returns
    -------
    History
        Without steps if nothing can be learned.

    Raises
    ------
    TuningError
        If loss or gradient are no longer finite.
    """
    parts = nn.ModuleList([verbalizer] if prompt is None else [verbalizer, prompt])
    if not any(p.requires_grad for p in parts.parameters()):
        return History()
    backbone, words = compiled.backbone, compiled.words
    # On a causal LM either the text comes before all soft tokens and is read once, or a stretch that all
    # examples share comes first and is read once a batch.
    shared = min(compiled.layout.n_prefix, *(e.answer for e in training.examples))
    frozen = [frozen_length(e) for e in training.examples]
    reused = backbone.kind == "causal" and min(frozen) > shared
    texts = TextCache(backbone, training.examples, frozen) if reused else None

    def loss(index: Sequence[int], vectors: Tensor | None) -> Tensor:
        batch = training.take(index)
        start = texts.start(index) if texts else backbone.encode_start(batch.examples[:1], [shared], vectors)
        scores = verbalizer(*backbone.word_scores(batch.examples, words, vectors, start=start))  # (B, C)
        pull = 0.0 if verbalizer.rows is None else strength / 2 * verbalizer.rows.square().sum() / len(training)
        return batch.loss(scores) + pull

    def validate() -> float:
        with torch.no_grad():
            vectors = None if prompt is None else prompt()
            found = backbone.infer(held_out.examples, words, vectors, n_prefix=compiled.layout.n_prefix)
            return -float(held_out.loss(verbalizer(*(part.to(backbone.device) for part in found))))

    history = tune(
        parts,
        loss,
        in_rounds([len(e.ids) for e in training.examples], batch_size, seed),
        prompt=prompt,
        learning_rate=learning_rate,
        steps=steps,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        validate=validate if len(held_out) else None,
        evaluate_every=evaluate_every,
        patience=patience,
        progress=progress,
    )
    if history.interrupted:
        warnings.warn(
            f"training was interrupted after {len(history.steps) - 1} of {steps} steps; "
            f"the prompt of step {history.best_step} is kept",
            stacklevel=3,
        )
    return history
