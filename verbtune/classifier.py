"""`PromptClassifier`: a scikit-learn classifier that is a few learned vectors on a frozen LM."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from . import artifact
from .backbone import Backbone
from .calibration import Calibration, batch
from .card import model_card, peft_config
from .compiled import CompiledTask, compile_task
from .data import DataError, check_labels, check_rows, check_weights
from .deep import SecondOpinion, second_opinion
from .encode import Example
from .parameters import check_parameters
from .plots import draw_history
from .prompt import SoftPrompt, from_labels, from_random, from_vocabulary
from .rejection import least_confidence, most_probable
from .rows import HeldOut, choose_reading, fit_rows, leaves_out_words
from .task import Task
from .text_cache import TextCache, frozen_length
from .tuning import History, in_rounds, tune
from .verbalizer import Verbalizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PromptClassifier"]


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """Encoded texts, the index of each one's class, and its weight."""

    examples: list[Example]
    codes: NDArray[np.intp]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.examples)

    def read_in(self, last: bool) -> _Labelled:
        """The same texts, read in the last layer or not."""
        return dataclasses.replace(self, examples=[dataclasses.replace(e, last=last) for e in self.examples])

    def take(self, index: Sequence[int] | NDArray[np.intp]) -> _Labelled:
        """The texts of the given indices, in that order."""
        at = np.asarray(index, dtype=np.intp)
        return _Labelled([self.examples[i] for i in at], self.codes[at], self.weights[at])

    def loss(self, scores: Tensor) -> Tensor:
        """Weighted mean cross-entropy of class scores (B, C), in nats."""
        targets = torch.tensor(self.codes, device=scores.device)
        weights = torch.tensor(self.weights, dtype=torch.float32, device=scores.device)
        return (F.cross_entropy(scores, targets, reduction="none") * weights).mean()


@dataclasses.dataclass(frozen=True)
class _Fitted:
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


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Text classification by prompt tuning on a frozen masked or causal language model.

    What is learned are a row for every class, which starts at the manual prompt, and a prompt. The rows are fitted with
    the prompt as it is; then two deep prompts are tuned as a second opinion beside the rows: for every layer keys and
    values before those of the text, and a factor and a shift for the text's own. Both are tuned for the label words,
    one also by contrast of the texts, whose states further rows read; of more than 50 classes there is only one,
    tuned by contrast alone. Cross-validation inside the training texts says what the rows read, and in which layer,
    how far they leave the manual prompt, how much each opinion weighs, and at which temperature scores become
    probabilities.

    Parameters
    ----------
    task : str, Path, dict or Task
        A bundled name, the path of a YAML file, its content as a dict, or a `Task`.
    model : str, Path or Backbone, default="builtin/masked"
        The frozen LM: `builtin/masked`, `builtin/causal`, a folder, a hub name, or a `Backbone`.
    prompt_length : int, default=0
        Soft tokens, where the template says `{soft}`, or in front if it has no soft piece; refused if its soft
        pieces all say themselves how many tokens they are. This and all that tunes soft tokens needs `steps`.
    tune_template : bool, default=True
        Whether the template's own tokens become soft tokens, which start as what they are.
    init : {"vocab", "labels", "random"}, default="vocab"
        Where soft tokens without a text of their own start: at real tokens, at the label words, or at
        random vectors with the norm of real ones.
    reparameterization : {"direct", "mlp", "low_rank"}, default="direct"
        How the prompt's change is computed while it is learned.
    verbalizer : {"learned", "fixed"}, default="learned"
    aggregate : {"mean", "max", "logsumexp"}, default="mean"
        A class's score from those of its words.
    multi_token : {"exact", "first", "refuse"}, default="exact"
        What becomes of label words of several tokens.
    learning_rate : float, default=0.003
        Peak step size of AdamW; prompt vectors move in units of the LM's embedding size.
    steps : int, optional
        Of joint tuning of rows and soft tokens in place of the deep prompts; 0 learns the rows only, in a fraction of
        the time. Default: deep prompts, and no soft tokens: those of the template stand as their text, or not at all.
    batch_size : int, default=16
    weight_decay : float, default=0.01
        Pull back to the manual prompt and to the LM's own rows.
    warmup : float, default=0.1
        Fraction of the steps over which the learning rate rises.
    max_grad_norm : float, default=1.0
    validation_fraction : float, default=0.0
        Part of the data held out, class by class, to choose the best step and to stop early.
    evaluate_every, patience : int, default=10, 5
        Steps between validations, and how many without improvement end training.
    max_length : int, optional
        Most tokens of an example; default: what the LM can read, up to 512.
    device : str, optional
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
    random_state : int, RandomState or None, default=0
    verbose : bool, default=False
        Draw a progress bar on standard error.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
        The distinct labels seen, sorted.
    prompt_ : Tensor of shape (P, H), or None
        The soft tokens' vectors, where there are `steps`.
    verbalizer_ : Verbalizer
    second_opinion_ : SecondOpinion or None
        The deep prompts, where there are some: a text is read once more for each.
    calibration_ : Calibration
    history_ : History
        Loss, validation score, learning rate and gradient norms, step by step, of the last tuning; of two deep
        prompts, of the one whose label words are heard.
    trained_parameters_ : int
    task_ : Task
    compiled_ : CompiledTask
        Layout and label words on the backbone.

    See Also
    --------
    verbtune.baselines : the other ways of using the same frozen LM.

    References
    ----------
    Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691.

    Examples
    --------
    >>> clf = PromptClassifier("sentiment", steps=2)
    >>> clf.fit(["Great, I love it.", "It broke at once."], ["positive", "negative"]).classes_
    array(['negative', 'positive'], dtype='<U8')
    """

    def __init__(
        self,
        task: Any,
        *,
        model: Any = "builtin/masked",
        prompt_length: int = 0,
        tune_template: bool = True,
        init: str = "vocab",
        reparameterization: str = "direct",
        verbalizer: str = "learned",
        aggregate: str = "mean",
        multi_token: str = "exact",
        learning_rate: float = 0.003,
        steps: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        max_grad_norm: float = 1.0,
        validation_fraction: float = 0.0,
        evaluate_every: int = 10,
        patience: int = 5,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.task = task
        self.model = model
        self.prompt_length = prompt_length
        self.tune_template = tune_template
        self.init = init
        self.reparameterization = reparameterization
        self.verbalizer = verbalizer
        self.aggregate = aggregate
        self.multi_token = multi_token
        self.learning_rate = learning_rate
        self.steps = steps
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.max_grad_norm = max_grad_norm
        self.validation_fraction = validation_fraction
        self.evaluate_every = evaluate_every
        self.patience = patience
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PromptClassifier:
        """Learn prompt and verbalizer from labelled texts; the LM stays as it is.

        Parameters
        ----------
        X : list, ndarray or Series of str of length N; list of dict or DataFrame for several fields
        y : array-like of shape (N,)
            Class names of the task, or integers that count its classes from 0.
        sample_weight : array-like of shape (N,), optional

        Returns
        -------
        self

        Raises
        ------
        ParameterError, TaskError, DataError
            Naming the parameter, spec key or row that is wrong, before the LM is loaded.
        TuningError
            If loss or gradient are no longer finite.
        """
        task = Task.load(self.task)
        check_parameters(self, task)
        rows = check_rows(X, task.fields)
        classes, names, codes = check_labels(y, len(rows), task)
        weights = check_weights(sample_weight, len(rows))
        counted = np.flatnonzero(weights)  # a row of weight 0 is as good as absent
        training, held_out = self._split(codes[counted])
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))

        backbone = Backbone.load(self.model, device=self.device, dtype=self.dtype)
        compiled = self._compile(task, backbone, names)
        texts = _Labelled(compiled.encode([rows[i] for i in counted]), codes[counted], weights[counted])
        prompt = self._start(compiled, torch.Generator().manual_seed(seed))
        verbalizer = Verbalizer(
            compiled.words, backbone.state_width, aggregate=self.aggregate, learned=self.verbalizer == "learned"
        ).to(backbone.device)

        history, calibration, opinion = History(), Calibration.none(len(classes)), None
        fitted = None
        if self.verbalizer == "learned":
            fitted = _fit_rows(compiled, verbalizer, prompt, texts.take(training), seed)
            calibration = fitted.calibration
            compiled, texts = dataclasses.replace(compiled, last=fitted.last), texts.read_in(fitted.last)
        if self.steps:
            strength = fitted.strength if fitted else 0.0
            history = self._tune(
                compiled, verbalizer, prompt, texts.take(training), texts.take(held_out), strength, seed
            )
        elif self.steps is None and fitted is not None:
            judged = second_opinion(
                compiled,
                texts.examples,
                texts.codes,
                texts.weights,
                aggregate=self.aggregate,
                against=fitted.against,
                manual=fitted.manual,
                center=fitted.center,
                held_out=fitted.held_out,
                first=fitted.calibration,
                seed=seed,
                progress=self.verbose,
            )
            opinion, calibration, history = judged.opinion, judged.calibration, judged.history
            against = torch.tensor(fitted.against, dtype=torch.float32, device=backbone.device)  # (C,)
            verbalizer.mix(judged.rows, judged.manual, against)

        self.parameters_ = self._plain_parameters()
        self.task_ = task
        self.classes_ = classes
        self.compiled_ = compiled
        self.prompt_ = None if prompt is None else prompt().detach()
        self.verbalizer_ = verbalizer.requires_grad_(False)
        self.second_opinion_ = opinion
        self.calibration_ = calibration
        self.history_ = history
        learned = [verbalizer, prompt] if self.steps and prompt is not None else [verbalizer]
        self.trained_parameters_ = sum(p.numel() for part in learned for p in part.parameters())
        if opinion is not None:
            self.trained_parameters_ += opinion.numbers
        return self

    def class_scores(self, X: Any) -> NDArray[np.float64]:
        """Class scores (N, C) before calibration, in nats."""
        check_is_fitted(self)
        rows = check_rows(X, self.task_.fields)
        if self.verbalizer_.hears_words:
            words, states = self.compiled_.infer(rows, self.prompt_)
        else:
            _, states = self.compiled_.for_states.infer(rows, self.prompt_)
            words = torch.zeros(len(rows), len(self.compiled_.words.words))
        device = self.compiled_.backbone.device
        with torch.no_grad():
            scores: Tensor = self.verbalizer_(words.to(device), states.to(device))
        found: NDArray[np.float64] = scores.double().cpu().numpy()
        opinion = self.second_opinion_
        if opinion is not None:
            heard = [asked.infer(rows, deep=deep) for deep, asked in opinion.asked(self.compiled_)]
            heard = [(words.to(device), states.to(device)) for words, states in heard]
            found = found + opinion.scores(self.verbalizer_, heard)
        return found

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Calibrated class scores (N, C); as scikit-learn wants it, their difference (N,) for two classes."""
        check_is_fitted(self)
        scores = self.calibration_.apply(self.class_scores(X))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C); the columns follow `classes_`."""
        check_is_fitted(self)
        return self.calibration_.probabilities(self.class_scores(X))

    def predict(self, X: Any, *, reject_at: float | None = None) -> NDArray[Any]:
        """The most probable class of each text, or `None` where it is too unsure.

        Parameters
        ----------
        X : list, ndarray or Series of str of length N; list of dict or DataFrame for several fields
        reject_at : float, optional
            The part of the answers that may be wrong, such as 0.05: texts that are too unsure for it get no answer.
            See `rejection_threshold`.

        Returns
        -------
        ndarray of shape (N,)
            Of Python objects if there is a `reject_at`, with `None` where there is no answer.
        """
        check_is_fitted(self)
        least = None if reject_at is None else self.rejection_threshold(reject_at)
        return most_probable(self.classes_, self.predict_proba(X), least)

    def rejection_threshold(self, reject_at: float) -> float:
        """The highest class probability that an answer needs, so that at most a given part of the answers is wrong.

        It is the confidence of the least sure training text such that of all that are at least as sure, held out in
        turn, no larger part is wrong, by a cautious estimate (`Calibration.error_rates`). That holds for texts like
        the training texts, with the classes as common as there; sample weights do not count, and what `steps` change
        is not seen. Nothing is promised for texts that belong to no class: they are less sure, so the lower the rate,
        the more of them are rejected.

        Parameters
        ----------
        reject_at : float
            Above 0 and below 1.

        Returns
        -------
        float
            Infinite, with a warning, if no confidence is enough.

        Raises
        ------
        ParameterError
            If the rate is none, or no texts were held out in `fit`: with a fixed verbalizer, or where no two
            classes have two texts.
        """
        check_is_fitted(self)
        return least_confidence(self.calibration_, reject_at)

    @property
    def artifact_bytes_(self) -> int:
        """Bytes on disk of the saved classifier."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "saved")
            return artifact.size(Path(folder) / "saved")

    def nearest_tokens(self, k: int = 3) -> list[list[tuple[str, float]]]:
        """The real tokens nearest to each learned vector.

        Returns
        -------
        list of length P of list of length k of (token, Euclidean distance)
        """
        check_is_fitted(self)
        if self.prompt_ is None:
            return []
        backbone = self.compiled_.backbone
        # The default by matrix product is off by 1e-3 where the distance is 0.
        distances = torch.cdist(
            self.prompt_.float(), backbone.embedding_table(), compute_mode="donot_use_mm_for_euclid_dist"
        )  # (P, V)
        values, ids = distances.topk(k, largest=False)
        return [
            list(zip(backbone.tokenizer.convert_ids_to_tokens(i), v, strict=True))
            for i, v in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def plot_history(self) -> Figure:
        """Loss, validation score, learning rate and gradient norms by step, as a matplotlib figure."""
        check_is_fitted(self)
        return draw_history(self.history_)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the classifier, without the LM, to a folder: all of it or nothing.

        Raises
        ------
        ArtifactError
        """
        check_is_fitted(self)
        compiled = self.compiled_
        backbone = compiled.backbone
        prompt, peft = self.prompt_, None
        if prompt is not None and backbone.kind == "causal" and compiled.layout.n_soft_prefix:
            start = torch.tensor(compiled.layout.before_prompt, dtype=torch.long)
            prompt = torch.cat([backbone.embed(start).float(), prompt])  # PEFT puts its vectors before everything
            peft = peft_config(backbone, len(prompt))
        state = {
            "verbtune": metadata.version("verbtune"),
            "base_model": {"name": backbone.name, "kind": backbone.kind, "fingerprint": backbone.fingerprint},
            "parameters": self.parameters_,
            "classes": self.classes_.tolist(),
            "class_names": list(compiled.words.classes),
            "calibration": {"temperature": self.calibration_.temperature, "bias": self.calibration_.bias.tolist()},
            "held_out": {"right": self.calibration_.right.tolist(), "wrong": self.calibration_.wrong.tolist()},
            "trained_parameters": self.trained_parameters_,
            "last_layer": compiled.last,
        }
        opinion, second = self.second_opinion_, {}
        if opinion is not None:
            second = {"deep_prompts": opinion.deep.cpu(), "rows": opinion.rows.cpu()}
            state["second_opinion"] = {"weight": opinion.weight, "bias": opinion.bias.tolist()}
        tensors = {k: v.cpu() for k, v in self.verbalizer_.state_dict().items() if k not in ("owner", "weights")}
        parts = {"rows": "rows" in tensors, "deep prompts": second, "soft tokens": self.parameters_["steps"]}
        learned = [name for name, there in parts.items() if there]
        saved = artifact.Artifact(
            self.task_,
            None if prompt is None else prompt.float().cpu(),
            second,
            tensors,
            state,
            peft,
            model_card(self.task_, compiled, self.classes_.tolist(), learned, self.trained_parameters_),
        )
        artifact.write(Path(folder), saved)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        model: str | Path | Backbone | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> PromptClassifier:
        """Read a classifier that `save_pretrained` wrote.

        Parameters
        ----------
        folder : str or Path
        model : str, Path or Backbone, optional
            The LM it was trained on; default: the one of the name that was saved.

        Raises
        ------
        ArtifactError
            If the folder is incomplete or damaged, or the LM is not the one it was trained on.
        """
        saved = artifact.read(Path(folder))
        base = saved.state["base_model"]
        if model is None and base["name"] is None:
            raise artifact.ArtifactError(
                f"{folder}: trained on an LM that was in memory only; pass it (model=Backbone(…), or --model with "
                "its folder)"
            )
        backbone = Backbone.load(base["name"] if model is None else model, device=device, dtype=dtype)
        if backbone.fingerprint != base["fingerprint"]:
            raise artifact.ArtifactError(
                f"{folder}: trained on {base['name']} ({base['kind']}, {base['fingerprint'][:12]}…), but "
                f"{backbone.name} ({backbone.kind}) is {backbone.fingerprint[:12]}…; "
                "pass the LM it was trained on (model=, --model)"
            )
        asked: dict[str, Any] = {"model": backbone if model is not None else base["name"]}
        asked |= {"device": device, "dtype": dtype}
        try:
            clf = cls(saved.task, **asked, **saved.state["parameters"])
        except TypeError as error:
            raise artifact.ArtifactError(
                f"{folder}: saved by verbtune {saved.state['verbtune']}, which asks for what this version lacks "
                f"({error}); update verbtune"
            ) from None
        clf.parameters_ = saved.state["parameters"]
        clf.task_ = saved.task
        clf.classes_ = np.array(saved.state["classes"])
        compiled = clf._compile(saved.task, backbone, saved.state["class_names"])
        clf.compiled_ = dataclasses.replace(compiled, last=saved.state["last_layer"])
        n_slots = len(clf.compiled_.layout.slot_tokens)
        clf.prompt_ = None if saved.prompt is None else saved.prompt[len(saved.prompt) - n_slots :].to(backbone.device)
        clf.verbalizer_ = (
            Verbalizer(
                clf.compiled_.words, backbone.state_width, aggregate=clf.aggregate, learned=bool(saved.verbalizer)
            )
            .requires_grad_(False)
            .to(backbone.device)
        )
        try:
            clf.verbalizer_.load_state_dict(clf.verbalizer_.state_dict() | saved.verbalizer)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise artifact.ArtifactError(f"{folder}: does not fit its own task ({reason}); save it again") from None
        calibration = saved.state["calibration"]
        tried = {name: np.array(found) for name, found in saved.state["held_out"].items()}
        clf.calibration_ = Calibration(calibration["temperature"], np.array(calibration["bias"]), **tried)
        second = saved.state.get("second_opinion")
        learned = {name: tensor.to(backbone.device) for name, tensor in saved.second.items()}
        clf.second_opinion_ = (
            SecondOpinion(learned["deep_prompts"], np.array(second["bias"]), learned["rows"], second["weight"])
            if second and learned
            else None
        )
        clf.history_ = History()
        clf.trained_parameters_ = saved.state["trained_parameters"]
        return clf

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def _split(self, codes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        everything = np.arange(len(codes))
        if not self.validation_fraction or not self.steps:
            return everything, everything[:0]
        splitter = StratifiedShuffleSplit(1, test_size=self.validation_fraction, random_state=self.random_state)
        try:
            training, held_out = next(splitter.split(everything, codes))
        except ValueError as error:
            raise DataError(
                f"validation_fraction={self.validation_fraction} cannot be held out of {len(codes)} texts: {error}"
            ) from None
        return training, held_out

    def _compile(self, task: Task, backbone: Backbone, names: Sequence[str]) -> CompiledTask:
        return compile_task(
            task,
            backbone,
            classes=names,
            multi_token=self.multi_token,
            max_length=self.max_length,
            soft=self.steps is not None,
            prompt_length=self.prompt_length,
            tune_template=self.tune_template,
        )

    def _start(self, compiled: CompiledTask, generator: torch.Generator) -> SoftPrompt | None:
        tokens = compiled.layout.slot_tokens
        if not tokens:
            return None
        backbone = compiled.backbone
        table = backbone.embedding_table()  # (V, H)
        free = [i for i, token in enumerate(tokens) if token is None]
        start = table[[0 if token is None else token for token in tokens]]  # (P, H)
        if free and self.init == "vocab":
            special = backbone.tokenizer.all_special_ids
            start[free] = from_vocabulary(table, len(free), exclude=special, generator=generator)
        elif free and self.init == "labels":
            start[free] = from_labels(table, len(free), words=compiled.words.pieces)
        elif free:
            start[free] = from_random(table, len(free), generator=generator)
        return SoftPrompt(
            start,
            # Row by row: all squares at once would be a table more.
            scale=float((table.norm(dim=1).square().mean() / table.shape[1]).sqrt()),
            reparameterization=self.reparameterization,
            generator=generator,
        )

    def _plain_parameters(self) -> dict[str, Any]:
        """What was asked for, as JSON holds it; not what belongs to this machine."""
        parameters = {
            k: v for k, v in self.get_params(deep=False).items() if k not in ("task", "model", "device", "dtype")
        }
        parameters = {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()}
        if not isinstance(parameters.get("random_state", 0), int):  # a generator
            parameters["random_state"] = None
        return parameters

    def _tune(
        self,
        compiled: CompiledTask,
        verbalizer: Verbalizer,
        prompt: SoftPrompt | None,
        training: _Labelled,
        held_out: _Labelled,
        strength: float,
        seed: int,
    ) -> History:
        """Tune prompt and rows together; `strength` of the rows' pull to zero is in units of one text."""
        parts = nn.ModuleList([verbalizer] if prompt is None else [verbalizer, prompt])
        if not any(p.requires_grad for p in parts.parameters()):
            return History()
        backbone, words = compiled.backbone, compiled.words
        # On a causal LM either the text comes before all soft tokens and is read once, or a stretch that all
        # examples share comes first and is read once a batch.
        shared = min(compiled.layout.n_prefix, *(e.answer for e in training.examples))
        frozen = [frozen_length(e) for e in training.examples]
        steps = self.steps or 0
        reused = steps > 0 and backbone.kind == "causal" and min(frozen) > shared
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
            in_rounds([len(e.ids) for e in training.examples], self.batch_size, seed),
            prompt=prompt,
            learning_rate=self.learning_rate,
            steps=steps,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            validate=validate if len(held_out) else None,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            progress=self.verbose,
        )
        if history.interrupted:
            warnings.warn(
                f"training was interrupted after {len(history.steps) - 1} of {steps} steps; "
                f"the prompt of step {history.best_step} is kept",
                stacklevel=3,
            )
        return history


def _fit_rows(
    compiled: CompiledTask, verbalizer: Verbalizer, prompt: SoftPrompt | None, texts: _Labelled, seed: int
) -> _Fitted:
    """Set the verbalizer's rows to the best ones for the prompt as it starts."""
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
    return _Fitted(reading.strength, calibration, against, manual, reading.center, held_out, reading.last)
