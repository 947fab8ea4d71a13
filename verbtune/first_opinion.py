"""The first opinion: rows that read what the LM makes of a text as it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from .calibration import Calibration, batch
from .compiled import CompiledTask
from .labelled import Labelled
from .prompt import SoftPrompt
from .rows import HeldOut, choose_reading, fit_rows, leaves_out_words
from .verbalizer import Verbalizer

__all__ = ["FirstOpinion", "first_opinion"]


@dataclasses.dataclass(frozen=True)
class FirstOpinion:
    """What is known of rows that were fitted.

    Attributes
    ----------
    strength : float
        Of their pull to zero.
    calibration : Calibration
    against : ndarray of shape (C,)
        The class bias that calibrates the manual prompt.
    manual : ndarray of shape (N, C)
        The class scores of that.
    center : ndarray of shape (S,)
        Mean of the texts' states.
    held_out : HeldOut
    last : bool
        Whether texts are read in the last layer.
    """

    strength: float
    calibration: Calibration
    against: NDArray[np.float64]
    manual: NDArray[np.float64]
    center: NDArray[np.float64]
    held_out: HeldOut
    last: bool


def first_opinion(
    compiled: CompiledTask, verbalizer: Verbalizer, prompt: SoftPrompt | None, texts: Labelled, seed: int
) -> FirstOpinion:
    """Set the verbalizer's rows to the best ones for the prompt as it starts.

    Parameters
    ----------
    compiled : CompiledTask
    verbalizer : Verbalizer
        Changed in place.
    prompt : SoftPrompt or None
    texts : Labelled
    seed : int
        Decides the folds of cross-validation.
    """
    backbone = compiled.backbone
    costly = compiled.words.longest > 1
    with torch.no_grad():
        vectors = None if prompt is None else prompt()

        def heard(asked: CompiledTask, *, last: bool = False) -> tuple[Tensor, Tensor]:
            examples = texts.read_in(last).examples
            return backbone.infer(examples, asked.words, vectors, n_prefix=compiled.layout.n_prefix)

        if costly and leaves_out_words(verbalizer.n_classes, len(texts)):
            one_pass = compiled.by_beginnings.words.longest == compiled.for_states.words.longest == 1
            words, states = heard(compiled.by_beginnings if one_pass else compiled.for_states)
            if not one_pass:  # the tuning of label words starts uncalibrated, which is not worth the passes
                words = torch.zeros(len(texts), len(compiled.words.words))
        else:
            words, states = heard(compiled)
        _, states_of_last = heard(compiled.for_states, last=True)
        scores = verbalizer.cpu().of_words(words).double().numpy()  # (N, C)
    y, weight, read, of_last = texts.codes, texts.weights, states.double().numpy(), states_of_last.double().numpy()
    against = batch(scores).bias
    manual = scores + against
    # Products are small here: threads that wait for each other take ten times as long.
    with threadpool_limits(1, user_api="blas"):
        reading, calibration, held_out = choose_reading(
            manual,
            read,
            y,
            weight,
            split=backbone.width,
            seed=seed,
            last=of_last,
            costly_words=costly,
        )
        read = of_last if reading.last else read
        rows, bias = fit_rows(reading.word_scale * manual, reading.features(read), y, weight, strength=reading.strength)
    found = {
        "rows": rows,
        "bias": bias + reading.word_scale * against,
        "word_scale": np.array(reading.word_scale),
        "center": reading.center,
        "gain": reading.gain,
    }
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in found.items()}
    verbalizer.load_state_dict(verbalizer.state_dict() | tensors)
    verbalizer.to(backbone.device)
    return FirstOpinion(reading.strength, calibration, against, manual, reading.center, held_out, reading.last)
