"""A second opinion: what the LM makes of a text behind deep prompts that are tuned.

Rows read what the LM's states hold; a deep prompt changes what every layer makes of a text. One is tuned for how the
label words begin. Another is to draw the states of each class's texts together as well, and rows are fitted to the
states that it leaves: two that err differently are better than either. Many classes have only that one, and its label
words tell it nothing. With few texts that helps much or little, so all are heard alike, until texts that are held out
say otherwise. With very few the manual prompt, which nobody can learn badly, is heard as well.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from torch import Tensor, nn

from .calibration import PRIOR, Calibration, temperature
from .compiled import CompiledTask
from .contrast import contrast, in_groups
from .encode import Example
from .first_opinion import FirstOpinion
from .labelled import Labelled
from .loading import BackboneError
from .prompt import DeepPrompt, from_vocabulary
from .rows import fit_without_words, in_folds
from .tuning import History, TuningError, in_rounds, tune
from .verbalizer import Verbalizer

__all__ = ["Judged", "SecondOpinion", "second_opinion"]

Array = NDArray[np.float64]

LENGTH = 4
STEPS = 8.0  # times the square root of how many texts there are: 45 for 32, 78 for 96
MOST_STEPS_A_TEXT = 2  # of fewer than sixteen
MOST_STEPS = 300
RATES = (0.1, 0.05, 0.025)  # of learning, in units of how much a layer's keys, or values, differ
BATCH_SIZE = 8
FOLDS = 3  # and the fewest texts of the class that has most
FEW = 12  # texts; of fewer, those held out say how far what was learned is believed beside the manual prompt
MANY = 256  # texts; of more, one fold tells enough, and there are twice as many steps of half the size
MANY_CLASSES = 50  # label words of more tell little, and the steps take minutes
CONTRAST = 0.3  # its weight beside the label words' cross-entropy
GROUP_OF_MANY_CLASSES = 32  # texts that are contrasted
STEPS_OF_MANY_CLASSES = 60
STEPS_ON = 30  # with all texts, from what was tuned with some of them
MOST_TOKENS = 96  # of a text that a step reads, so that long ones take no minutes


@dataclasses.dataclass(frozen=True)
class SecondOpinion:
    """Class scores that are added to those of the rows.

    Attributes
    ----------
    deep : Tensor of shape (K, L, 2, A, D + 2, E)
        Deep prompts, in float16: a file of half the size. Behind the last one the mean state of a text is read; of
        few classes there are two, and behind the first one label words are heard.
    bias : ndarray of shape (C,)
    rows : Tensor of shape (C, H)
        They read the mean state of the text.
    weight : float
        Of the class scores of the label words' beginnings.
    """

    deep: Tensor
    bias: Array
    rows: Tensor
    weight: float = 0.0

    def asked(self, compiled: CompiledTask) -> list[tuple[Tensor, CompiledTask]]:
        """Each deep prompt (1, L, 2, A, D + 2, E), and the task to put behind it."""
        asked = compiled.by_beginnings if len(self.deep) > 1 else compiled.for_states
        return [(deep, asked) for deep in self.deep.split(1)]

    def scores(self, verbalizer: Verbalizer, heard: Sequence[tuple[Tensor, Tensor]]) -> Array:
        """What is added (N, C), from word scores (N, W) and states (N, S) behind each deep prompt."""
        states = heard[-1][1]
        found = states[:, -self.rows.shape[1] :] @ self.rows.T  # (N, C)
        if len(heard) > 1:
            found = found + self.weight * verbalizer.of_words(heard[0][0])
        added: Array = found.double().cpu().numpy() + self.bias
        return added

    @property
    def numbers(self) -> int:
        """How many there are in all."""
        return self.deep.numel() + self.bias.size + self.rows.numel()


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
    texts: Labelled,
    first: FirstOpinion,
    *,
    aggregate: str,
    seed: int,
    progress: bool = False,
) -> Judged:
    """Tune a deep prompt, and tell by texts that are held out how sure it may be.

    Parameters
    ----------
    compiled : CompiledTask
    texts : Labelled
    first : FirstOpinion
        The deep prompt starts where the manual prompt is calibrated, and is heard beside the rows. Texts that were
        held out from those once are not shown to the deep prompt either when it is judged.
    aggregate : str
        See `Verbalizer`.
    seed : int
    progress : bool

    Returns
    -------
    Judged
        Without an opinion with too few texts that can be held out, for an LM that takes no deep prompt, if Ctrl-C
        ended it, or if very few texts are likelier under the manual prompt.
    """
    none = Judged(None, first.calibration, History())
    y, weight, held_out = texts.codes, texts.weights, first.held_out
    told = np.sort(held_out.index)
    if not len(told) or (held_out.in_turn and np.bincount(y[told]).max() < FOLDS):
        return none
    backbone = compiled.backbone
    generator = torch.Generator().manual_seed(seed)
    table, special = backbone.embedding_table(), backbone.tokenizer.all_special_ids
    try:
        start = backbone.keys_and_values(from_vocabulary(table, LENGTH, exclude=special, generator=generator))
    except BackboneError as error:
        warnings.warn(f"{error}; only the rows are learned", stacklevel=3)
        return none
    verbalizer = Verbalizer(compiled.words, backbone.state_width, aggregate=aggregate).to(backbone.device)
    cropped = [example.cropped(MOST_TOKENS) for example in texts.examples]
    pupil = _Pupil(compiled, texts, cropped, first, verbalizer, start, seed, progress)
    if held_out.in_turn:
        one_fold = pupil.many_classes or len(y) > MANY
        folds = [told[outside] for outside in in_folds(y[told], FOLDS, seed)][: 1 if one_fold else None]
    else:
        folds = [held_out.index]
    rows = np.zeros((len(y), len(first.against)))
    rows[held_out.index] = held_out.scores
    teachers = [pupil.by_states] if pupil.many_classes else [pupil.by_words, pupil.by_states]
    heard = np.zeros((len(teachers), len(y), len(first.against)))
    try:
        for outside in folds:
            learned = [teach(np.setdiff1d(np.arange(len(y)), outside)) for teach in teachers]
            heard[:, outside] = [pupil.heard(one, outside) for one in learned]
        learned = [teach(np.arange(len(y)), one) for teach, one in zip(teachers, learned, strict=True)]
    except _Interrupted:
        warnings.warn("tuning was interrupted; only the rows are learned", stacklevel=3)
        return Judged(None, first.calibration, History(interrupted=True))
    told = np.concatenate(folds)
    beside, calibration = _together(rows[told], heard[:, told], y[told], weight[told], first.calibration)
    belief, other = 1.0, 0.0
    if len(y) < FEW:
        plain = temperature(first.manual, y, sample_weight=weight)
        both = rows + np.tensordot(beside, heard, 1)
        belief = _belief(calibration.apply(both)[told], plain.apply(first.manual)[told], y[told], weight[told])
        other = (1 - belief) * calibration.temperature / plain.temperature
        calibration = calibration.tried_on((belief * both + other * first.manual)[told], y[told])
    opinion = _opinion(learned, belief * beside) if belief else None
    return Judged(opinion, calibration, learned[0].history, belief, other)


class _Interrupted(Exception):
    """Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class _Learned:
    """A deep prompt, and what is heard behind it: rows (C, H) that read the text's mean state, or label words."""

    deep: Tensor
    bias: Array
    history: History
    rows: Tensor | None = None


def _opinion(learned: Sequence[_Learned], weights: Array) -> SecondOpinion:
    """What was learned, each heard at its weight."""
    *words, last = learned
    assert last.rows is not None
    return SecondOpinion(
        torch.cat([one.deep for one in learned]),
        np.tensordot(weights, [one.bias for one in learned], 1),
        float(weights[-1]) * last.rows,
        float(weights[0]) if words else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class _Pupil:
    """Learns opinions of some of the texts, and is heard about others."""

    compiled: CompiledTask
    texts: Labelled
    cropped: Sequence[Example]
    first: FirstOpinion
    verbalizer: Verbalizer
    start: Tensor
    seed: int
    progress: bool

    @property
    def many_classes(self) -> bool:
        return len(self.first.against) > MANY_CLASSES

    @property
    def asked(self) -> CompiledTask:
        return self.compiled.for_states if self.many_classes else self.compiled.by_beginnings

    def by_words(self, inside: NDArray[np.intp], _: _Learned | None = None) -> _Learned:
        """What cross-entropy of the label words' class scores teaches, from texts of the given indices."""
        parts = _Parts(self.start, self.first.against).to(self.compiled.backbone.device)

        def loss(words: Tensor, _: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.verbalizer.of_words(words) + parts.bias, targets, reduction="none")  # (B,)

        batches = functools.partial(in_rounds, self._lengths(inside), BATCH_SIZE, self.seed)
        history = self._tune(parts, loss, inside, batches, self._steps(inside))
        return _Learned(parts.deep().detach().half(), parts.bias.detach().double().cpu().numpy(), history)

    def by_states(self, inside: NDArray[np.intp], before: _Learned | None = None) -> _Learned:
        """What contrast of the texts' mean states teaches, to which rows are then fitted.

        Of few classes the label words teach as well; many go on from what fewer texts taught.
        """
        backbone = self.compiled.backbone
        parts = _Parts(self.start, self.first.against).to(backbone.device)
        center = torch.tensor(self.first.center, dtype=torch.float32, device=backbone.device)  # (S,)

        def loss(words: Tensor, states: Tensor, targets: Tensor) -> Tensor:
            drawn = contrast((states - center)[:, backbone.width :], targets)  # (B,)
            if self.many_classes:
                return drawn
            found = self.verbalizer.of_words(words) + parts.bias
            return F.cross_entropy(found, targets, reduction="none") + CONTRAST * drawn

        if self.many_classes:
            size, steps = GROUP_OF_MANY_CLASSES, STEPS_OF_MANY_CLASSES
            if before is not None:
                parts.deep.go_to(before.deep)
                steps = STEPS_ON
        else:
            size, steps = BATCH_SIZE, self._steps(inside)
        batches = functools.partial(in_groups, self.texts.codes[inside], self._lengths(inside), size, self.seed)
        history = self._tune(parts, loss, inside, batches, steps)
        deep = parts.deep().detach().half()
        _, states = self._read(deep, inside)
        read = states[:, backbone.width :].double().cpu().numpy()  # (N, H)
        taught = self.texts.take(inside)
        rows, bias = fit_without_words(read, taught.codes, taught.weights, len(self.first.against))
        return _Learned(deep, bias, history, torch.tensor(rows, dtype=torch.float32, device=backbone.device))

    def heard(self, learned: _Learned, index: NDArray[np.intp]) -> Array:
        """Class scores (N, C) of texts of the given indices."""
        words, states = self._read(learned.deep, index)
        if learned.rows is None:
            found = self.verbalizer.of_words(words)
        else:
            found = states[:, -learned.rows.shape[1] :] @ learned.rows.T
        scores: Array = found.detach().double().cpu().numpy() + learned.bias
        return scores

    @property
    def finer(self) -> bool:
        """Whether there are twice as many steps of half the size."""
        return len(self.texts) > MANY and not self.many_classes

    def _steps(self, inside: NDArray[np.intp]) -> int:
        return _steps(len(inside)) * (2 if self.finer else 1)

    def _read(self, deep: Tensor, index: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Word scores (N, W) and states (N, S)."""
        backbone, texts = self.asked.backbone, [self.texts.examples[i] for i in index]
        words, states = backbone.infer(texts, self.asked.words, deep=deep, n_prefix=self.asked.layout.n_prefix)
        return words.to(backbone.device), states.to(backbone.device)

    def _tune(
        self,
        parts: _Parts,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        inside: NDArray[np.intp],
        batches: Callable[[], Iterator[list[int]]],
        steps: int,
    ) -> History:
        """Tune by the loss (B,) of word scores (B, W), states (B, S) and classes (B,), weighted.

        What is lost begins anew at the next lower rate.

        Raises
        ------
        TuningError
            If loss or gradient are not finite at the lowest one.
        """
        asked, device = self.asked, self.asked.backbone.device
        targets = torch.tensor(self.texts.codes[inside], device=device)  # (N,)
        weights = torch.tensor(self.texts.weights[inside], dtype=torch.float32, device=device)  # (N,)
        texts = [self.cropped[i] for i in inside]

        def mean_loss(index: Sequence[int], _: Tensor | None) -> Tensor:
            at, deep = list(index), parts.deep()
            # In parts, so that short texts are not padded to the longest one.
            found = [
                asked.backbone.word_scores([texts[i] for i in at[start : start + BATCH_SIZE]], asked.words, deep=deep)
                for start in range(0, len(at), BATCH_SIZE)
            ]
            words, states = (torch.cat(part) for part in zip(*found, strict=True))
            return (loss(words, states, targets[at]) * weights[at]).mean()

        start = copy.deepcopy(parts.state_dict())
        goes_on = bool(parts.deep.theta.any())  # so that the loss is low from the first step
        for rate in RATES[1:] if self.finer else RATES:
            parts.load_state_dict(start)
            try:
                history = tune(
                    parts,
                    mean_loss,
                    batches(),
                    prompt=None,
                    learning_rate=rate,
                    steps=steps,
                    warmup=0.1,
                    weight_decay=0.01,
                    max_grad_norm=1.0,
                    progress=self.progress,
                )
            except TuningError:
                if rate == RATES[-1]:
                    raise TuningError(
                        f"deep prompts: even at a rate of {rate} loss or gradient are not finite, so nothing "
                        "was fitted; use dtype='float32', or steps=0, which learns the rows only"
                    ) from None
                continue
            if history.interrupted:
                raise _Interrupted
            if goes_on or not _lost(history):
                break
        return history

    def _lengths(self, index: NDArray[np.intp]) -> list[int]:
        return [len(self.cropped[i].ids) for i in index]


def _lost(history: History) -> bool:
    """Whether the loss ends higher than it began: every layer looks at the prompt alone, and all texts are one."""
    losses = [step.loss for step in history.steps[1:]]
    quarter = len(losses) // 4
    return sum(losses[len(losses) - quarter :]) > sum(losses[:quarter])


def _steps(n: int) -> int:
    return min(round(STEPS * math.sqrt(n)), MOST_STEPS_A_TEXT * n, MOST_STEPS)


def _together(
    rows: Array, heard: Array, y: NDArray[np.intp], weight: Array, first: Calibration
) -> tuple[Array, Calibration]:
    """The weights of class scores (K, N, C) heard beside those of the rows (N, C), and a calibration of the sum.

    The sum is a mean of all opinions, each at its own temperature: one that tells held-out texts little gets a high
    one, and so a low weight. Few texts leave their shares equal, and the mean as sure as it is: that all agree is
    little more than what one of them says.
    """
    seconds = [temperature(scores, y, sample_weight=weight) for scores in heard]
    opinions = [second.apply(scores) for second, scores in zip(seconds, heard, strict=True)]

    def loss(logs: Array) -> float:
        *shares, sharpness = np.exp(logs)
        mean = sharpness * (first.apply(rows) + np.tensordot(shares, opinions, 1)) / (1 + sum(shares))
        found = log_softmax(mean, axis=1)[np.arange(len(y)), y]
        return float(-(weight * found).sum() + PRIOR * (logs**2).sum())

    logs = minimize(loss, np.zeros(len(heard) + 1), method="L-BFGS-B", bounds=[(-3, 3)] * (len(heard) + 1)).x
    *shares, sharpness = np.exp(logs)
    beside = np.array(shares) * [first.temperature / second.temperature for second in seconds]
    calibration = Calibration(float((1 + sum(shares)) / sharpness * first.temperature), np.zeros(rows.shape[1]))
    return beside, calibration.tried_on(rows + np.tensordot(beside, heard, 1), y)


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
