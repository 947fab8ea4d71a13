"""A second opinion: how the label words begin, as the LM scores it behind a deep prompt that is tuned.

Rows read what the LM's states hold; a deep prompt changes what every layer makes of a text.
With few texts that helps much or little, so both are heard alike, until texts that are held out say otherwise. With
very few the manual prompt, which nobody can learn badly, is heard as well.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from torch import Tensor, nn

from .calibration import PRIOR, Calibration, temperature
from .compiled import CompiledTask
from .encode import Example
from .loading import BackboneError
from .prompt import DeepPrompt, from_vocabulary
from .rows import HeldOut, in_folds
from .tuning import History, tune
from .verbalizer import Verbalizer

__all__ = ["Judged", "SecondOpinion", "second_opinion"]

Array = NDArray[np.float64]

LENGTH = 4
STEPS = 8.0  # times the square root of how many texts there are: 45 for 32, 78 for 96
MOST_STEPS_A_TEXT = 2  # of fewer than sixteen
MOST_STEPS = 300
LEARNING_RATE = 0.1  # in units of how much a layer's keys, or values, differ
BATCH_SIZE = 8
FOLDS = 3  # and the fewest texts of the class that has most
FEW = 12  # texts; of fewer, those held out say how far what was learned is believed beside the manual prompt
MANY = 256  # texts; of more, one fold tells enough, and there are twice as many steps
MOST_CLASSES = 50  # label words of more tell little, and the steps take minutes
MOST_TOKENS = 128  # of a text that a step reads, so that long ones take no minutes
SHARE = 1.0  # of the second opinion for each of the rows', when both are equally sure


@dataclasses.dataclass(frozen=True)
class SecondOpinion:
    """Class scores that are added to those of the rows.

    Attributes
    ----------
    deep : Tensor of shape (1, L, 2, A, D + 2, E)
        The deep prompt, in float16.
    weight : float
        Of the class scores of the label words' `beginnings`.
    bias : ndarray of shape (C,)
    """

    deep: Tensor
    weight: float
    bias: Array

    def scores(self, class_scores: Array) -> Array:
        """What is added (N, C), from the label words' class scores (N, C) behind the deep prompt."""
        return self.weight * class_scores + self.bias


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a second opinion.

    Attributes
    ----------
    opinion : SecondOpinion or None
    calibration : Calibration
        For the sum of all class scores.
    history : History
        Of tuning on all texts; without a second opinion it has no steps.
    rows, manual : float
        Weights of the rows' class scores and of those of the calibrated manual prompt.
    """

    opinion: SecondOpinion | None
    calibration: Calibration
    history: History
    rows: float = 1.0
    manual: float = 0.0


def second_opinion(
    compiled: CompiledTask,
    examples: Sequence[Example],
    y: NDArray[np.intp],
    weight: Array,
    *,
    aggregate: str,
    against: Array,
    manual: Array,
    held_out: HeldOut,
    first: Calibration,
    seed: int,
    progress: bool = False,
) -> Judged:
    """Tune a deep prompt, and tell by texts that are held out how sure it may be.

    Parameters
    ----------
    compiled : CompiledTask
    examples : sequence of Example, length N
    y, weight : ndarray of shape (N,)
        Classes as indices, and weights.
    aggregate : str
        See `Verbalizer`.
    against : ndarray of shape (C,)
        The class bias that calibrates the manual prompt, where the tuned one starts.
    manual : ndarray of shape (N, C)
        The calibrated manual prompt's class scores.
    held_out : HeldOut
        Of the rows. Those that were held out once are not shown to the deep prompt either when it is judged.
    first : Calibration
        The one that suits these.
    seed : int
    progress : bool

    Returns
    -------
    Judged
        Without an opinion with too few texts that can be held out or too many classes, for an LM that takes no deep
        prompt, if Ctrl-C ended it, or if very few texts are likelier under the manual prompt.
    """
    none = Judged(None, first, History())
    told = np.sort(held_out.index)
    if not len(told) or np.bincount(y[told]).max() < FOLDS or len(against) > MOST_CLASSES:
        return none
    backbone = compiled.backbone
    generator = torch.Generator().manual_seed(seed)
    table, special = backbone.embedding_table(), backbone.tokenizer.all_special_ids
    try:
        start = backbone.keys_and_values(from_vocabulary(table, LENGTH, exclude=special, generator=generator))
    except BackboneError as error:
        warnings.warn(f"{error}; only the rows are learned", stacklevel=3)
        return none
    words = compiled.words.beginnings
    verbalizer = Verbalizer(words, backbone.state_width, aggregate=aggregate).to(backbone.device)
    cropped = [example.cropped(MOST_TOKENS) for example in examples]
    many = len(y) > MANY

    targets = torch.tensor(y, device=backbone.device)  # (N,)
    weights = torch.tensor(weight, dtype=torch.float32, device=backbone.device)  # (N,)

    def tuned(inside: NDArray[np.intp]) -> tuple[_Parts, History]:
        parts = _Parts(start, against).to(backbone.device)

        def loss(index: Sequence[int], _: Tensor | None) -> Tensor:
            at = inside[list(index)].tolist()
            found, _ = backbone.word_scores([cropped[i] for i in at], words, deep=parts.deep())
            each = F.cross_entropy(verbalizer.of_words(found) + parts.bias, targets[at], reduction="none")  # (B,)
            return (each * weights[at]).mean()

        history = tune(
            parts,
            loss,
            [len(cropped[i].ids) for i in inside],
            prompt=None,
            learning_rate=LEARNING_RATE,
            steps=_steps(len(inside)) * (2 if many else 1),
            batch_size=BATCH_SIZE,
            warmup=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=seed,
            progress=progress,
        )
        return parts.requires_grad_(False), history

    def heard(index: NDArray[np.intp], parts: _Parts) -> Array:
        chosen, n_prefix = [examples[i] for i in index], compiled.layout.n_prefix
        found, _ = backbone.infer(chosen, words, deep=parts.deep(), n_prefix=n_prefix)
        scores: Tensor = verbalizer.of_words(found.to(backbone.device)) + parts.bias  # (B, C)
        return scores.double().cpu().numpy()

    if held_out.in_turn:
        folds = [told[outside] for outside in in_folds(y[told], FOLDS, seed)][: 1 if many else None]
    else:
        folds = [held_out.index]
    rows, second = np.zeros((2, len(y), len(against)))
    rows[held_out.index] = held_out.scores
    for outside in folds:
        parts, history = tuned(np.setdiff1d(np.arange(len(y)), outside))
        if history.interrupted:
            return _interrupted(first)
        second[outside] = heard(outside, parts)
    parts, history = tuned(np.arange(len(y)))
    if history.interrupted:
        return _interrupted(first)
    told = np.concatenate(folds)
    beside, calibration = _together(rows[told], second[told], y[told], weight[told], first)
    belief, other = 1.0, 0.0
    if len(y) < FEW:
        plain = temperature(manual, y, sample_weight=weight)
        learned = rows + beside * second
        belief = _belief(calibration.apply(learned)[told], plain.apply(manual)[told], y[told], weight[told])
        other = (1 - belief) * calibration.temperature / plain.temperature
        calibration = calibration.tried_on((belief * learned + other * manual)[told], y[told])
    beside *= belief
    # As it is saved: a file of half the size, and the same answers after loading.
    deep = parts.deep().half()
    opinion = SecondOpinion(deep, beside, beside * parts.bias.double().cpu().numpy()) if belief else None
    return Judged(opinion, calibration, history, belief, other)


def _steps(n: int) -> int:
    return min(round(STEPS * math.sqrt(n)), MOST_STEPS_A_TEXT * n, MOST_STEPS)


def _interrupted(first: Calibration) -> Judged:
    warnings.warn("tuning was interrupted; only the rows are learned", stacklevel=4)
    return Judged(None, first, History(interrupted=True))


def _together(
    rows: Array, words: Array, y: NDArray[np.intp], weight: Array, first: Calibration
) -> tuple[float, Calibration]:
    """The weight of the label words' class scores (N, C) beside those of the rows (N, C), and a calibration of the sum.

    The sum is a mean of both opinions, each at its own temperature: words that tell held-out texts little get a high
    one, and so a low weight. Few texts leave the words' share at `SHARE`, and the mean as sure as it is: that both
    agree is little more than what one of them says.
    """
    second = temperature(words, y, sample_weight=weight)
    opinions = first.apply(rows), second.apply(words)

    def loss(logs: Array) -> float:
        share, sharpness = np.exp(logs) * (SHARE, 1.0)
        mean = sharpness * (opinions[0] + share * opinions[1]) / (1 + share)
        found = log_softmax(mean, axis=1)[np.arange(len(y)), y]
        return float(-(weight * found).sum() + PRIOR * (logs**2).sum())

    logs = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-3, 3)] * 2).x
    share, sharpness = np.exp(logs) * (SHARE, 1.0)
    beside = float(share * first.temperature / second.temperature)
    calibration = Calibration(float((1 + share) / sharpness * first.temperature), np.zeros(rows.shape[1]))
    return beside, calibration.tried_on(rows + beside * words, y)


def _belief(learned: Array, manual: Array, y: NDArray[np.intp], weight: Array) -> float:
    """How far to believe calibrated class scores (N, C) beside the manual prompt's: less likely ones not at all."""

    def likelihood(scores: Array) -> float:
        return float((weight * log_softmax(scores, axis=1)[np.arange(len(y)), y]).sum())

    belief = float(expit(likelihood(learned) - likelihood(manual)))
    return belief if belief > 0.5 else 0.0


class _Parts(nn.Module):
    """What is tuned: a deep prompt, and the bias of the classes."""

    def __init__(self, start: Tensor, against: Array) -> None:
        super().__init__()
        self.deep = DeepPrompt(start)
        self.bias = nn.Parameter(torch.tensor(against, dtype=torch.float32))  # (C,)
