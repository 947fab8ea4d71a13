"""What may be asked of a classifier."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from .prompt import REPARAMETERIZATIONS
from .task import Soft, Task, Template
from .verbalizer import AGGREGATIONS, MULTI_TOKEN

__all__ = ["ParameterError", "check_parameters", "fixed_soft_tokens"]

CHOICES = {
    "init": ("vocab", "labels", "random"),
    "reparameterization": REPARAMETERIZATIONS,
    "verbalizer": ("learned", "fixed"),
    "aggregate": AGGREGATIONS,
    "multi_token": MULTI_TOKEN,
}
RANGES = {
    "prompt_length": (0, 1000),
    "learning_rate": (0, math.inf),
    "steps": (0, math.inf),
    "batch_size": (1, math.inf),
    "weight_decay": (0, math.inf),
    "warmup": (0, 1),
    "max_grad_norm": (0, math.inf),
    "validation_fraction": (0, 0.9),
    "evaluate_every": (1, math.inf),
    "patience": (1, math.inf),
    "max_length": (1, math.inf),
}
OF_SOFT_TOKENS = (
    *("prompt_length", "tune_template", "init", "reparameterization", "verbalizer", "learning_rate", "batch_size"),
    *("weight_decay", "warmup", "max_grad_norm", "validation_fraction", "evaluate_every", "patience"),
)
WHOLE = ("prompt_length", "steps", "batch_size", "evaluate_every", "patience", "max_length")


class ParameterError(ValueError):
    """A parameter of a classifier that cannot be used: names it, its value and the remedy."""


def check_parameters(clf: Any, task: Task) -> None:
    """Refuse what a `PromptClassifier` cannot be fitted with, before anything is loaded.

    Raises
    ------
    ParameterError
    """
    for name, choices in CHOICES.items():
        value = getattr(clf, name)
        if value not in choices:
            raise ParameterError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")
    for name, (low, high) in RANGES.items():
        value = getattr(clf, name)
        if name in ("max_length", "steps") and value is None:
            continue
        kind, noun = (numbers.Integral, "a whole number") if name in WHOLE else (numbers.Real, "a number")
        good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(float(value))
        if not good or not low <= float(value) <= high:
            raise ParameterError(f"{name}={value!r} must be {noun} from {low} to {high}")
    for name in ("tune_template", "verbose"):
        if not isinstance(getattr(clf, name), bool | np.bool_):
            raise ParameterError(f"{name}={getattr(clf, name)!r} must be True or False")
    try:
        check_random_state(clf.random_state)
    except ValueError:
        raise ParameterError(
            f"random_state={clf.random_state!r} must be a whole number from 0 to 2**32 - 1, a RandomState or None"
        ) from None
    fixed = fixed_soft_tokens(task)
    if clf.prompt_length and fixed:
        raise ParameterError(
            f"prompt_length={clf.prompt_length!r} has nowhere to go: the template of {task.task!r} says {fixed}; "
            "write {soft} there, or leave prompt_length out"
        )
    defaults = inspect.signature(type(clf)).parameters
    for name in OF_SOFT_TOKENS if clf.steps is None else ():
        if name in defaults and getattr(clf, name) != defaults[name].default:
            raise ParameterError(
                f"{name}={getattr(clf, name)!r} is for soft tokens, which are tuned only if steps= says how long; "
                f"give steps=100, say, or leave {name} out"
            )


def fixed_soft_tokens(task: Task) -> str | None:
    """The soft piece of a template all of whose soft pieces say how many tokens they are, if there is such a one.

    A task's two templates are looked at both, so that `prompt_length` means the same whatever the LM.
    """
    for template in filter(None, (task.template, task.template_causal)):
        soft = [segment for segment in template.segments if isinstance(segment, Soft)]
        if soft and Soft() not in soft:
            return str(Template((soft[0],)))
    return None
