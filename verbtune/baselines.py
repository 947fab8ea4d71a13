"""What else one could do with the same labels and the same LM, as scikit-learn classifiers.

All of them read, compile and score through the same functions as `PromptClassifier`, so that a difference
in a table is a difference of method. After `fit` each has `trained_parameters_` and `artifact_bytes_`: what a
task adds to the shared LM, in numbers and in bytes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .backbone import Backbone
from .calibration import CONTENT_FREE_TEXTS, Calibration, batch, content_free
from .classifier import PromptClassifier
from .compiled import compile_task
from .data import check_labels, check_rows
from .encode import MIN_FIELD_TOKENS, Row, tokenize
from .parameters import ParameterError, fixed_soft_tokens
from .task import Task
from .tuning import in_rounds, tune
from .verbalizer import Verbalizer

__all__ = [
    "MAIN",
    "METHODS",
    "FineTuned",
    "InContext",
    "LinearProbe",
    "Majority",
    "Tfidf",
    "ZeroShot",
    "make",
]

CALIBRATIONS = ("none", "content_free", "batch")
ROOM_FOR_TEXT = 128
FLOAT_BYTES = 4


class _TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """`predict` from `predict_proba`: all that these classifiers have in common."""

    classes_: NDArray[Any]

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each text."""
        best: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(axis=1)]
        return best


class Majority(_TextClassifier):
    """The share of every class among the training labels, whatever the text.

    Parameters
    ----------
    task : str, Path, dict or Task
    """

    def __init__(self, task: Any) -> None:
        self.task = task

    def fit(self, X: Any, y: Any) -> Majority:
        """Count the labels."""
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, _, codes = check_labels(y, len(rows), task)
        self.task_ = task
        self.dummy_ = DummyClassifier(strategy="prior").fit(np.zeros((len(rows), 1)), codes)
        self.trained_parameters_ = 0
        self.artifact_bytes_ = FLOAT_BYTES * len(self.classes_)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        check_is_fitted(self)
        probabilities: NDArray[np.float64] = self.dummy_.predict_proba(check_rows(X, self.task_.fields))
        return probabilities


class Tfidf(_TextClassifier):
    """TF-IDF of words and pairs of words, and a logistic regression: no language model at all.

    Parameters
    ----------
    task : str, Path, dict or Task
    C : float, default=10.0
        Inverse strength of the regression's L2 penalty.
    """

    def __init__(self, task: Any, *, C: float = 10.0) -> None:
        self.task = task
        self.C = C

    def fit(self, X: Any, y: Any) -> Tfidf:
        """Learn vocabulary and weights."""
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, _, codes = check_labels(y, len(rows), task)
        self.task_ = task
        self.pipeline_ = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b"),
            LogisticRegression(C=self.C, max_iter=1000),
        )
        self.pipeline_.fit(_joined(rows), codes)
        regression = self.pipeline_[-1]
        self.trained_parameters_ = regression.coef_.size + regression.intercept_.size
        self.artifact_bytes_ = len(pickle.dumps(self.pipeline_))
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        check_is_fitted(self)
        probabilities: NDArray[np.float64] = self.pipeline_.predict_proba(_joined(check_rows(X, self.task_.fields)))
        return probabilities


class ZeroShot(_TextClassifier):
    """The manual prompt: the LM's own scores of the label words, with no training.

    Parameters
    ----------
    task : str, Path, dict or Task
    model : str, Path or Backbone, default="builtin/masked"
    calibration : {"none", "content_free", "batch"}, default="none"
        Against texts that say nothing, or against the texts given to `fit`, whose labels are not used.
    aggregate : {"mean", "max", "logsumexp"}, default="mean"
    multi_token : {"exact", "first", "refuse"}, default="exact"
    max_length : int, optional
    device : str, optional
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
    """

    def __init__(
        self,
        task: Any,
        *,
        model: Any = "builtin/masked",
        calibration: str = "none",
        aggregate: str = "mean",
        multi_token: str = "exact",
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        self.task = task
        self.model = model
        self.calibration = calibration
        self.aggregate = aggregate
        self.multi_token = multi_token
        self.max_length = max_length
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any = None) -> ZeroShot:
        """Compile the task; estimate the calibration. Labels only say which classes there are."""
        if self.calibration not in CALIBRATIONS:
            raise ParameterError(f"calibration={self.calibration!r} is unknown; use one of {', '.join(CALIBRATIONS)}")
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        if y is None:
            self.classes_, names = np.array(sorted(task.classes)), tuple(sorted(task.classes))
        else:
            self.classes_, names, _ = check_labels(y, len(rows), task)
        backbone = Backbone.load(self.model, device=self.device, dtype=self.dtype)
        demonstrations = self._demonstrations(task, backbone, rows, y)
        self.task_ = task
        self.compiled_ = compile_task(
            task,
            backbone,
            classes=names,
            multi_token=self.multi_token,
            max_length=self.max_length,
            demonstrations=demonstrations,
        )
        self.verbalizer_ = Verbalizer(self.compiled_.words, backbone.state_width, aggregate=self.aggregate)
        if self.calibration == "content_free":
            nothing = [dict.fromkeys(task.fields, text) for text in CONTENT_FREE_TEXTS]
            self.calibration_ = content_free(self._scores(nothing))
        elif self.calibration == "batch":
            self.calibration_ = batch(self._scores(rows))
        else:
            self.calibration_ = Calibration.none(len(names))
        self.trained_parameters_ = 0
        bias = FLOAT_BYTES * len(names) * (self.calibration != "none")
        self.artifact_bytes_ = (
            len(task.to_yaml().encode()) + bias + len(json.dumps([list(map(str, d)) for d in demonstrations]))
        )
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        check_is_fitted(self)
        return self.calibration_.probabilities(self._scores(check_rows(X, self.task_.fields)))

    def _scores(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        words, states = self.compiled_.infer(rows)
        return self.verbalizer_(words, states).double().numpy()  # type: ignore[no-any-return]

    def _demonstrations(self, task: Task, backbone: Backbone, rows: Sequence[Row], y: Any) -> list[tuple[Row, str]]:
        return []


class InContext(ZeroShot):
    """In-context learning: labelled examples stand in the prompt (Brown et al. 2020, arXiv 2005.14165).

    Demonstrations are drawn class by class in turn until there are k of them, each cut to an equal share
    of the room; those that do not fit are left out.

    Parameters
    ----------
    task, model, calibration, aggregate, multi_token, max_length, device, dtype
        As for `ZeroShot`.
    k : int, default=8
        Demonstrations; with 0 it is `ZeroShot`.
    random_state : int, RandomState or None, default=0
        Which texts are drawn, and their order.
    """

    def __init__(
        self,
        task: Any,
        *,
        model: Any = "builtin/masked",
        k: int = 8,
        calibration: str = "none",
        aggregate: str = "mean",
        multi_token: str = "exact",
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        random_state: Any = 0,
    ) -> None:
        super().__init__(
            task,
            model=model,
            calibration=calibration,
            aggregate=aggregate,
            multi_token=multi_token,
            max_length=max_length,
            device=device,
            dtype=dtype,
        )
        self.k = k
        self.random_state = random_state

    def _demonstrations(self, task: Task, backbone: Backbone, rows: Sequence[Row], y: Any) -> list[tuple[Row, str]]:
        if self.k == 0:
            return []
        _, names, codes = check_labels(y, len(rows), task)
        rng = check_random_state(self.random_state)
        queues = [rng.permutation(np.flatnonzero(codes == c)).tolist() for c in range(len(names))]
        chosen: list[int] = []
        while len(chosen) < self.k and any(queues):
            chosen += [queue.pop() for queue in queues if queue]
        chosen = rng.permutation(chosen[: self.k]).tolist()
        limit = backbone.most_positions(self.max_length)
        empty = compile_task(task, backbone, max_length=self.max_length)
        frame = empty.layout.n_constant + empty.words.longest + 2  # tokens that a demonstration adds to its texts
        room = limit - frame - min(ROOM_FOR_TEXT, limit // 2)
        share = max(room // self.k - frame, MIN_FIELD_TOKENS * len(task.fields))
        demonstrations: list[tuple[Row, str]] = []
        for i in chosen:
            row: Row = {name: _cut_text(backbone, text, share // len(task.fields)) for name, text in rows[i].items()}
            room -= frame + sum(map(len, tokenize(backbone.tokenizer, list(row.values()), lead=True)))
            if room < 0:
                break
            demonstrations.append((row, next(iter(task.verbalizer[names[codes[i]]]))))
        return demonstrations


class LinearProbe(_TextClassifier):
    """A logistic regression on the frozen LM's states under the manual prompt.

    Parameters
    ----------
    task : str, Path, dict or Task
    model : str, Path or Backbone, default="builtin/masked"
    state : {"answer", "text", "last"}, default="answer"
        The state at the answer, or the mean state of the text at five sixths of the LM's depth or in its last layer:
        what `PromptClassifier` reads too.
    C : float, default=1.0
        Inverse strength of the regression's L2 penalty on standardised states.
    max_length : int, optional
    device : str, optional
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
    """

    def __init__(
        self,
        task: Any,
        *,
        model: Any = "builtin/masked",
        state: str = "answer",
        C: float = 1.0,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        self.task = task
        self.model = model
        self.state = state
        self.C = C
        self.max_length = max_length
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any) -> LinearProbe:
        """Encode the texts once and fit the regression."""
        if self.state not in ("answer", "text", "last"):
            raise ParameterError(f"state={self.state!r} is unknown; use answer, text or last")
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, _, codes = check_labels(y, len(rows), task)
        backbone = Backbone.load(self.model, device=self.device, dtype=self.dtype)
        self.task_ = task
        compiled = compile_task(task, backbone, max_length=self.max_length)
        self.compiled_ = dataclasses.replace(compiled, last=self.state == "last")
        self.probe_ = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=1000))
        self.probe_.fit(self._states(rows), codes)
        regression = self.probe_[-1]
        self.trained_parameters_ = regression.coef_.size + regression.intercept_.size
        self.artifact_bytes_ = FLOAT_BYTES * self.trained_parameters_ + len(task.to_yaml().encode())
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        check_is_fitted(self)
        probabilities: NDArray[np.float64] = self.probe_.predict_proba(self._states(check_rows(X, self.task_.fields)))
        return probabilities

    def _states(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        _, states = self.compiled_.for_states.infer(rows)
        answer, text = states.double().tensor_split([self.compiled_.backbone.width], dim=1)
        return (answer if self.state == "answer" else text).numpy()


class FineTuned(_TextClassifier):
    """The LM itself is trained, all of it or through LoRA: upper references, one copy of the LM a task.

    The manual prompt is the input and its label words are the output (prompt-based fine-tuning, Gao et
    al. 2021, arXiv 2012.15723); LoRA (Hu et al. 2021, arXiv 2106.09685) comes from PEFT.

    Parameters
    ----------
    task : str, Path, dict or Task
    model : str, Path or Backbone, default="builtin/masked"
        Copied, never changed.
    method : {"full", "lora"}, default="full"
    rank : int, default=8
        Rank of LoRA's factors, on all linear layers but the output.
    learning_rate : float, optional
        Default: 5e-5 for all weights, 1e-3 for LoRA.
    steps : int, default=100
    batch_size : int, default=16
    max_length : int, optional
    device : str, optional
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
    random_state : int, RandomState or None, default=0
    """

    def __init__(
        self,
        task: Any,
        *,
        model: Any = "builtin/masked",
        method: str = "full",
        rank: int = 8,
        learning_rate: float | None = None,
        steps: int = 100,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.task = task
        self.model = model
        self.method = method
        self.rank = rank
        self.learning_rate = learning_rate
        self.steps = steps
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> FineTuned:
        """Train a copy of the LM."""
        if self.method not in ("full", "lora"):
            raise ParameterError(f"method={self.method!r} is unknown; use full or lora")
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, names, codes = check_labels(y, len(rows), task)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        shared = Backbone.load(self.model, device=self.device, dtype=self.dtype)
        # Weights in 16 bits would lose small steps: those trained are float32, and products as precise as the LM's.
        model = shared.copy_of_model().float()
        backbone = Backbone(model, shared.tokenizer, kind=shared.kind)
        self.in_16_bits_ = shared.model.dtype != torch.float32
        if self.method == "lora":
            _add_lora(model, self.rank, seed)
        else:
            model.requires_grad_(True)
        compiled = compile_task(task, backbone, classes=names, max_length=self.max_length)
        verbalizer = Verbalizer(compiled.words, backbone.state_width).to(backbone.device)
        examples = compiled.encode(rows)
        targets = torch.tensor(codes, device=backbone.device)  # (N,)

        def loss(index: Sequence[int], vectors: Tensor | None) -> Tensor:
            with self._precision(backbone):
                found = backbone.word_scores([examples[i] for i in index], compiled.words)
            return F.cross_entropy(verbalizer(*found), targets[list(index)])  # of scores (B, C)

        tune(
            model,
            loss,
            in_rounds([len(e.ids) for e in examples], self.batch_size, seed),
            prompt=None,
            learning_rate=self.learning_rate or (5e-5 if self.method == "full" else 1e-3),
            steps=self.steps,
            warmup=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
        )
        self.trained_parameters_ = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.artifact_bytes_ = FLOAT_BYTES * self.trained_parameters_ + len(task.to_yaml().encode())
        model.requires_grad_(False)
        self.task_ = task
        self.compiled_ = compiled
        self.verbalizer_ = verbalizer
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        check_is_fitted(self)
        with self._precision(self.compiled_.backbone):
            words, states = self.compiled_.infer(check_rows(X, self.task_.fields))
        scores = self.verbalizer_.cpu()(words, states)  # (N, C)
        probabilities: NDArray[np.float64] = scores.softmax(dim=1).double().numpy()
        return probabilities

    def _precision(self, backbone: Backbone) -> torch.autocast:
        return torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=self.in_16_bits_)


def _add_lora(model: nn.Module, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("LoRA needs PEFT; pip install 'verbtune[bench]'") from None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0), model
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _joined(rows: Sequence[Row]) -> list[str]:
    return [" ".join(row.values()) for row in rows]


def _cut_text(backbone: Backbone, text: str, n: int) -> str:
    """The text's first n tokens, as text."""
    encoded = backbone.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= n else text[: offsets[n - 1][1]]


Factory = Callable[[Task, Backbone, int, int | None], Any]

METHODS: dict[str, Factory] = {
    "majority": lambda task, lm, seed, n: Majority(task),
    "tfidf": lambda task, lm, seed, n: Tfidf(task),
    "zero-shot": lambda task, lm, seed, n: ZeroShot(task, model=lm),
    "zero-shot+content-free": lambda task, lm, seed, n: ZeroShot(task, model=lm, calibration="content_free"),
    "zero-shot+batch": lambda task, lm, seed, n: ZeroShot(task, model=lm, calibration="batch"),
    "in-context": lambda task, lm, seed, n: InContext(task, model=lm, random_state=seed),
    "in-context+content-free": lambda task, lm, seed, n: InContext(
        task, model=lm, calibration="content_free", random_state=seed
    ),
    "in-context+batch": lambda task, lm, seed, n: InContext(task, model=lm, calibration="batch", random_state=seed),
    "linear-probe": lambda task, lm, seed, n: LinearProbe(task, model=lm),
    "linear-probe+text": lambda task, lm, seed, n: LinearProbe(task, model=lm, state="text"),
    "linear-probe+last": lambda task, lm, seed, n: LinearProbe(task, model=lm, state="last"),
    "soft-prompt": lambda task, lm, seed, n: PromptClassifier(
        task,
        model=lm,
        verbalizer="fixed",
        tune_template=False,
        prompt_length=n if n is not None else 0 if fixed_soft_tokens(task) else 20,
        learning_rate=0.02,
        steps=100,
        random_state=seed,
    ),
    "verbtune": lambda task, lm, seed, n: (
        PromptClassifier(task, model=lm, random_state=seed)
        if n is None
        else PromptClassifier(task, model=lm, random_state=seed, prompt_length=n, steps=100)
    ),
    "lora": lambda task, lm, seed, n: FineTuned(task, model=lm, method="lora", random_state=seed),
    "fine-tuning": lambda task, lm, seed, n: FineTuned(task, model=lm, random_state=seed),
}

MAIN = "verbtune"


def make(method: str, task: Task, backbone: Backbone, *, seed: int, prompt_length: int | None = None) -> Any:
    """The classifier that the bench calls by this name.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    task : Task
    backbone : Backbone
    seed : int
    prompt_length : int, optional
        For the methods that have a soft prompt.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"no method called {method!r}; the methods are {', '.join(METHODS)}")
    return METHODS[method](task, backbone, seed, prompt_length)
