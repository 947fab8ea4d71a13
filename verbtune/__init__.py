"""Text classification by prompt tuning on frozen language models.

Text goes in at one end, class probabilities come out at the other, a frozen language model sits in the
middle, and all that learns are a few prompt vectors and a row for every class::

    examples = encode(layout, rows, tokenizer)                      # ids, soft slots, answer positions
    vectors = prompt()                                              # (P, H): the trainable part
    words, states = backbone.word_scores(examples, words, vectors)  # (B, W): label words only, at the answer only
    scores = verbalizer(words, states)                              # (B, C)
    probabilities = calibration.probabilities(scores)               # (B, C)
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone
    from .bank import TaskBank
    from .classifier import PromptClassifier
    from .loading import BackboneError
    from .task import Task, TaskError

__all__ = ["Backbone", "BackboneError", "PromptClassifier", "Task", "TaskBank", "TaskError"]

_HOMES = {
    "Backbone": "backbone",
    "BackboneError": "loading",
    "PromptClassifier": "classifier",
    "Task": "task",
    "TaskBank": "bank",
    "TaskError": "task",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `verbtune --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()  # what is imported stays: to look for garbage among half a million objects takes a tenth of the time
    try:
        module = importlib.import_module(f".{_HOMES[name]}", __name__)
    finally:
        if collecting:
            gc.enable()
    return getattr(module, name)
