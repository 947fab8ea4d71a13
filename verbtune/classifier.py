"""`PromptClassifier`: a scikit-learn classifier that is a few learned vectors on a frozen LM."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from . import artifact
from .backbone import Backbone
from .calibration import Calibration
from .card import model_card, peft_config
from .compiled import CompiledTask, compile_task
from .data import DataError, check_labels, check_rows, check_weights
from .deep import SecondOpinion, second_opinion
from .first_opinion import first_opinion
from .labelled import Labelled
from .parameters import check_parameters
from .plots import draw_history
from .rejection import least_confidence, most_probable
from .soft import start_prompt, tune_together
from .task import Task
from .tuning import History
from .verbalizer import Verbalizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PromptClassifier"]


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
        texts = Labelled(compiled.encode([rows[i] for i in counted]), codes[counted], weights[counted])
        prompt = start_prompt(
            compiled,
            init=self.init,
            reparameterization=self.reparameterization,
            generator=torch.Generator().manual_seed(seed),
        )
        verbalizer = Verbalizer(
            compiled.words, backbone.state_width, aggregate=self.aggregate, learned=self.verbalizer == "learned"
        ).to(backbone.device)

        history, calibration, opinion = History(), Calibration.none(len(classes)), None
        first = None
        if self.verbalizer == "learned":
            first = first_opinion(compiled, verbalizer, prompt, texts.take(training), seed)
            calibration = first.calibration
            compiled, texts = dataclasses.replace(compiled, last=first.last), texts.read_in(first.last)
        if self.steps:
            history = tune_together(
                compiled,
                verbalizer,
                prompt,
                texts.take(training),
                texts.take(held_out),
                strength=first.strength if first else 0.0,
                seed=seed,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                steps=self.steps,
                warmup=self.warmup,
                weight_decay=self.weight_decay,
                max_grad_norm=self.max_grad_norm,
                evaluate_every=self.evaluate_every,
                patience=self.patience,
                progress=self.verbose,
            )
        elif self.steps is None and first is not None:
            judged = second_opinion(compiled, texts, first, aggregate=self.aggregate, seed=seed, progress=self.verbose)
            opinion, calibration, history = judged.opinion, judged.calibration, judged.history
            against = torch.tensor(first.against, dtype=torch.float32, device=backbone.device)  # (C,)
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

    def _plain_parameters(self) -> dict[str, Any]:
        """What was asked for, as JSON holds it; not what belongs to this machine."""
        parameters = {
            k: v for k, v in self.get_params(deep=False).items() if k not in ("task", "model", "device", "dtype")
        }
        parameters = {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()}
        if not isinstance(parameters.get("random_state", 0), int):  # a generator
            parameters["random_state"] = None
        return parameters
