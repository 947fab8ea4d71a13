"""`PromptClassifier`: what scikit-learn expects, what the frozen LM must stay, and one clear error for all else."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CAUSAL, SENTENCES, tiny
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import verbtune.first_opinion
import verbtune.labelled
import verbtune.rows
import verbtune.soft
from verbtune import Backbone, PromptClassifier, Task, TaskError
from verbtune.compiled import compile_task
from verbtune.data import DataError
from verbtune.parameters import ParameterError
from verbtune.tuning import TuningError
from verbtune.verbalizer import Verbalizer

LABELS = ["positive", "negative", "positive", "negative", "negative", "positive", "negative"]
TEXTS = [*SENTENCES, "Good.", "so bad " * 60, "It was [MASK] {answer} </s>\0 🙂"]
TONE = Task.from_dict(
    {
        "task": "tone",
        "template": "{text} It was {answer}.",
        "verbalizer": {"negative": ["bad", "terrible"], "positive": ["good", "great"]},
    }
)
THREE = Task.from_dict(
    {
        "task": "three",
        "template": "{text} It was {answer}.",
        "verbalizer": {"z": ["bad"], "a": ["good"], "m": ["film"]},
    }
)


def make(architecture: str = "bert", **options: Any) -> PromptClassifier:
    """A classifier on a tiny LM; the verbalizer is fixed unless asked for, so that the prompt does the work."""
    defaults = {"steps": 3, "learning_rate": 0.05, "batch_size": 4, "verbalizer": "fixed"}
    return PromptClassifier(options.pop("task", TONE), model=tiny(architecture), **(defaults | options))


# -- scikit-learn's own checks -----------------------------------------------------------------------------------------

WORDS = ["bad", "good", "great", "terrible", "film", "money", "order", "music", "back", "status"]


class Rendered(PromptClassifier):
    """Numbers in, their digits as text through: scikit-learn's checks know numbers only."""

    def __init__(self, task: Any = None, *, model: Any = None, steps: int = 1, max_length: int = 40) -> None:
        super().__init__(task, model=model, steps=steps, max_length=max_length)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Rendered:
        given = self.task, self.model
        self.task, self.model = TONE, tiny("bert")
        try:
            if y is None:
                super().fit(["text"], None)
            X, y = validate_data(self, X, y)
            check_classification_targets(y)
            labels, codes = np.unique(y, return_inverse=True)
            words = {f"c{i}": [word] for i, word in enumerate(WORDS[: max(2, len(labels))])}
            self.task = TONE.to_dict() | {"verbalizer": words}
            super().fit(self._render(X), codes, sample_weight)
        finally:
            self.task, self.model = given
        self.classes_ = labels
        return self

    def class_scores(self, X: Any) -> Any:
        check_is_fitted(self)
        return super().class_scores(self._render(validate_data(self, X, reset=False)))

    def _render(self, X: Any) -> list[str]:
        return [" ".join(f"{value:.1f}" for value in row[:3]) for row in X]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = False, True
        tags.classifier_tags.poor_score = True  # digits of blobs, one step
        return tags


NOT_HERE = {
    "array_api": "other array libraries hold no texts",
    "check_sample_weight_equivalence_on_dense_data": "batches of 16 differ; on one batch see below",
    "check_methods_subset_invariance": "1e-7 is less than float32 holds; to 1e-5 see below",
}

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SkipTestWarning)  # what takes texts is checked for little by itself
    every = parametrize_with_checks([PromptClassifier(TONE, model=tiny("bert"), steps=1), Rendered()]).mark
    NAMES, CHECKS = every.args[0], [pair for pair in every.args[1] if not any(name in str(pair) for name in NOT_HERE)]


@pytest.mark.parametrize(NAMES, CHECKS, **every.kwargs)
def test_scikit_learn_says_it_is_a_classifier(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


# -- scikit-learn's contracts, with texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("words", [["bad", "not bad at all"], ["dreadful", "not bad at all"]])
def test_rows_that_do_without_costly_words_are_fitted_without_them(
    architecture: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TONE.to_dict() | {"verbalizer": dict(zip(("negative", "positive"), words, strict=True))}
    monkeypatch.setattr(verbtune.rows, "FEW_CLASSES", 1)
    monkeypatch.setattr(verbtune.rows, "ENOUGH_OF_MANY", 1)
    passes: list[int] = []
    infer = Backbone.infer
    monkeypatch.setattr(
        Backbone, "infer", lambda lm, examples, words, *a, **k: passes.append(words.longest) or infer(
            lm, examples, words, *a, **k
        )
    )  # fmt: skip
    clf = PromptClassifier(task, model=tiny(architecture), steps=0).fit(SENTENCES, LABELS)
    assert not clf.verbalizer_.hears_words
    assert passes == 2 * [1 if architecture == "gpt2" else min(map(len, clf.compiled_.words.pieces))]  # two layers
    monkeypatch.setattr(verbtune.first_opinion, "leaves_out_words", lambda *_: False)
    plain = PromptClassifier(task, model=tiny(architecture), steps=0).fit(SENTENCES, LABELS)
    np.testing.assert_allclose(clf.predict_proba(TEXTS), plain.predict_proba(TEXTS), rtol=1e-4)


def test_clones_share_the_language_model() -> None:
    clf = make().fit(SENTENCES, LABELS)
    copy = clone(clf)
    assert copy.model is clf.model is tiny("bert")
    assert not hasattr(copy, "prompt_")
    assert copy.fit(SENTENCES, LABELS).compiled_.backbone is clf.compiled_.backbone


def test_parameters_are_stored_as_given_and_never_touched() -> None:
    task = {**TONE.to_dict()}
    clf = make(task=task, learning_rate=1e-3)
    before = clf.get_params()
    assert before["task"] is task
    clf.fit(SENTENCES, LABELS).predict(SENTENCES)
    assert all(value is before[name] for name, value in clf.get_params().items())
    assert task == TONE.to_dict()
    clf.set_params(steps=0, prompt_length=2)
    assert (clf.steps, clf.prompt_length) == (0, 2)
    with pytest.raises(ValueError, match="Invalid parameter 'nothing'"):
        clf.set_params(nothing=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda clf, folder: clf.predict(TEXTS),
        lambda clf, folder: clf.predict_proba(TEXTS),
        lambda clf, folder: clf.decision_function(TEXTS),
        lambda clf, folder: clf.class_scores(TEXTS),
        lambda clf, folder: clf.score(SENTENCES, LABELS),
        lambda clf, folder: clf.nearest_tokens(),
        lambda clf, folder: clf.plot_history(),
        lambda clf, folder: clf.save_pretrained(folder / "x"),
    ],
    ids=["predict", "predict_proba", "decision_function", "class_scores", "score", "nearest_tokens", "plot", "save"],
)
def test_before_fit_everything_says_not_fitted(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match="PromptClassifier instance is not fitted yet"):
        call(make(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_grid_search_over_prompt_length_and_learning_rate() -> None:
    grid = {"prompt_length": np.array([0, 2]), "learning_rate": [0.01, 0.1]}
    search = GridSearchCV(make(steps=1), grid, cv=2, n_jobs=1).fit(SENTENCES, LABELS)
    assert len(search.cv_results_["params"]) == 4
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.compiled_.backbone is tiny("bert")
    assert set(search.predict(TEXTS)) <= set(LABELS)


def test_a_pipeline_and_cross_validation() -> None:
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [t.lower() for t in texts]), make(steps=1))
    scores = cross_val_score(pipeline, np.array(SENTENCES, dtype=object), LABELS, cv=3)
    assert ((scores >= 0) & (scores <= 1)).all()
    named = Pipeline([("clf", make(steps=0))]).set_params(clf__prompt_length=3).fit(SENTENCES, LABELS)
    assert named.named_steps["clf"].prompt_.shape[0] >= 3


@pytest.mark.parametrize("scoring", ["accuracy", "f1_macro", "neg_log_loss", "roc_auc"])
def test_scores_of_every_kind(scoring: str) -> None:
    assert np.isfinite(cross_val_score(make(steps=1), SENTENCES, LABELS, cv=2, scoring=scoring)).all()


@pytest.mark.parametrize(("task", "labels"), [(TONE, LABELS), (THREE, ["z", "a", "m", "z", "a", "m", "z"])])
def test_scikit_learn_can_calibrate_it(task: Task, labels: list[str]) -> None:
    texts = np.array(SENTENCES * 2, dtype=object)
    calibrated = CalibratedClassifierCV(make(task=task, steps=0), cv=2, ensemble=False).fit(texts, labels * 2)
    np.testing.assert_allclose(calibrated.predict_proba(TEXTS).sum(axis=1), 1)
    assert calibrated.classes_.tolist() == sorted(set(labels))


def test_out_of_fold_probabilities() -> None:
    found = cross_val_predict(make(steps=0), SENTENCES, LABELS, cv=2, method="predict_proba")
    np.testing.assert_allclose(found.sum(axis=1), 1)


# -- pickling ----------------------------------------------------------------------------------------------------------


def test_a_pickled_classifier_predicts_the_same() -> None:
    clf = make(verbalizer="learned").fit(SENTENCES, LABELS)
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict_proba(TEXTS), clf.predict_proba(TEXTS))


def test_a_pickled_classifier_of_a_named_model_holds_no_weights(tmp_path: Path) -> None:
    tiny("bert").model.save_pretrained(tmp_path)
    tiny("bert").tokenizer.save_pretrained(tmp_path)
    clf = make(verbalizer="learned").set_params(model=str(tmp_path)).fit(SENTENCES, LABELS)
    data = pickle.dumps(clf)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert len(data) < weights / 4
    again = pickle.loads(data)
    assert again.compiled_.backbone is clf.compiled_.backbone
    np.testing.assert_array_equal(again.predict_proba(TEXTS), clf.predict_proba(TEXTS))


# -- labels and texts --------------------------------------------------------------------------------------------------

CODES = [1, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS, ["negative", "positive"]),
        (np.array(LABELS), ["negative", "positive"]),
        (np.array(LABELS, dtype=object), ["negative", "positive"]),
        (pd.Series(LABELS, index=range(7, 14), dtype="category"), ["negative", "positive"]),
        (CODES, [0, 1]),
        (np.array(CODES, dtype=np.uint8), [0, 1]),
        (pd.Series(CODES), [0, 1]),
    ],
    ids=["list", "str", "object", "category", "int", "uint8", "series"],
)
def test_any_labels_come_back_as_they_were(labels: Any, classes: list[Any]) -> None:
    clf = make().fit(SENTENCES, labels)
    assert clf.classes_.tolist() == classes
    np.testing.assert_array_equal(clf.predict_proba(TEXTS), make().fit(SENTENCES, LABELS).predict_proba(TEXTS))
    predicted = clf.predict(TEXTS)
    assert predicted.tolist() == [classes[i] for i in clf.predict_proba(TEXTS).argmax(axis=1)]
    assert clf.score(TEXTS, predicted) == 1.0


def test_classes_are_sorted_and_columns_follow_them() -> None:
    labels = ["z", "a", "m", "z", "a", "m", "z"]
    clf = make(task=THREE, steps=0, tune_template=False).fit(SENTENCES, labels)
    assert clf.classes_.tolist() == ["a", "m", "z"]
    words, _ = compile_task(THREE, tiny("bert"), classes=["a", "m", "z"]).infer([{"text": t} for t in TEXTS])
    names = compile_task(THREE, tiny("bert"), classes=["a", "m", "z"]).words.words
    expected = words[:, [names.index(w) for w in ("good", "film", "bad")]]
    np.testing.assert_allclose(clf.decision_function(TEXTS), expected.numpy(), atol=1e-5)


def test_classes_of_the_spec_that_never_occur_are_left_out() -> None:
    clf = make(task=THREE).fit(SENTENCES, ["z", "a", "z", "a", "a", "z", "a"])
    assert clf.classes_.tolist() == ["a", "z"]
    assert clf.predict_proba(TEXTS).shape == (len(TEXTS), 2)


def test_pairs_are_dicts_or_a_frame() -> None:
    task = {"task": "pair", "template": "{a}? {answer}, {b}", "template_causal": "{a} {b} {answer}",
            "verbalizer": {"n": ["bad"], "p": ["good"]}}  # fmt: skip
    rows = [{"a": a, "b": b} for a, b in zip(SENTENCES, reversed(SENTENCES), strict=True)]
    codes = ["n", "p", "n", "p", "n", "p", "n"]
    by_dict = make(task=task).fit(rows, codes)
    by_frame = make(task=task).fit(pd.DataFrame(rows)[["b", "a"]], codes)
    np.testing.assert_array_equal(by_dict.predict_proba(rows), by_frame.predict_proba(pd.DataFrame(rows)))
    with pytest.raises(DataError, match="row 0: this task reads a, b; give a dict"):
        by_dict.predict(["only one"])


def test_decisions_have_the_shape_that_scikit_learn_wants() -> None:
    two = make().fit(SENTENCES, LABELS)
    assert two.decision_function(TEXTS).shape == (len(TEXTS),)
    assert two.class_scores(TEXTS).shape == (len(TEXTS), 2)
    log_odds = np.log(two.predict_proba(TEXTS)[:, 1] / two.predict_proba(TEXTS)[:, 0])
    np.testing.assert_allclose(two.decision_function(TEXTS), log_odds, atol=1e-8)
    three = make(task=THREE).fit(SENTENCES, ["z", "a", "m", "z", "a", "m", "z"])
    assert three.decision_function(TEXTS).shape == (len(TEXTS), 3)
    assert three.predict(TEXTS).tolist() == three.classes_[three.decision_function(TEXTS).argmax(axis=1)].tolist()


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["mean", "logsumexp"])
def test_untrained_it_is_the_manual_prompt(backbone: Backbone, aggregate: str) -> None:
    """With the template's own tokens as soft tokens, step 0 of training is the untuned template."""
    task = Task.from_dict(
        TONE.to_dict() | {"verbalizer": {"negative": ["bad", "dreadful"], "positive": ["good", "great"]}}
    )
    clf = PromptClassifier(task, model=backbone, steps=0, verbalizer="fixed", aggregate=aggregate).fit(
        SENTENCES, LABELS
    )
    assert len(clf.prompt_) > 0
    manual = compile_task(task, backbone)
    scores = Verbalizer(manual.words, backbone.state_width, aggregate=aggregate)(
        *manual.infer([{"text": t} for t in TEXTS])
    )
    np.testing.assert_allclose(clf.class_scores(TEXTS), scores.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("verbalizer", ["fixed", "learned"])
def test_fitting_changes_no_bit_of_the_language_model(backbone: Backbone, verbalizer: str) -> None:
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = model.get_output_embeddings()
    clf = PromptClassifier(TONE, model=backbone, prompt_length=2, steps=2, learning_rate=0.5, verbalizer=verbalizer)
    clf.fit(SENTENCES, LABELS).predict(TEXTS)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.get_output_embeddings() is head
    assert not model.training


def test_training_moves_every_vector_of_the_prompt(backbone: Backbone) -> None:
    def fit(steps: int) -> PromptClassifier:
        return PromptClassifier(
            TONE, model=backbone, prompt_length=2, steps=steps, weight_decay=0.0, verbalizer="fixed"
        ).fit(SENTENCES, LABELS)

    start, end = fit(0).prompt_, fit(4).prompt_
    assert ((end - start).norm(dim=1) > 0).all()
    assert not start.requires_grad
    assert not end.requires_grad


def test_training_lowers_the_loss(backbone: Backbone) -> None:
    clf = PromptClassifier(
        TONE, model=backbone, prompt_length=4, steps=30, learning_rate=0.1, verbalizer="fixed", batch_size=7
    ).fit(SENTENCES, LABELS)
    losses = [s.loss for s in clf.history_.steps[1:]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("verbalizer", ["fixed", "learned"])
def test_one_seed_is_one_classifier_bit_for_bit(verbalizer: str) -> None:
    def fit(seed: Any) -> PromptClassifier:
        return make(prompt_length=3, verbalizer=verbalizer, random_state=seed).fit(SENTENCES, LABELS)

    one, same, other = fit(1), fit(1), fit(2)
    assert torch.equal(one.prompt_, same.prompt_)
    assert not torch.equal(one.prompt_, other.prompt_)
    np.testing.assert_array_equal(one.predict_proba(TEXTS), same.predict_proba(TEXTS))
    assert torch.equal(fit(np.random.RandomState(1)).prompt_, fit(np.random.RandomState(1)).prompt_)
    fit(None)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_a_text_has_the_same_probabilities_in_any_company(architecture: str) -> None:
    clf = make(architecture, verbalizer="learned", prompt_length=2).fit(SENTENCES, LABELS)
    together = clf.predict_proba(TEXTS)
    np.testing.assert_allclose(clf.predict_proba(TEXTS[::-1])[::-1], together, atol=1e-5)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(clf.predict_proba([text])[0], together[i], atol=1e-5)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("prompt_length", [0, 3])
def test_reading_texts_once_gives_the_same_training(
    architecture: str, prompt_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"prompt_length": prompt_length, "tune_template": prompt_length == 0, "steps": 4}
    fast = make(architecture, **options).fit(SENTENCES, LABELS)
    monkeypatch.setattr(Backbone, "encode_start", lambda *args, **kwargs: None)
    monkeypatch.setattr(verbtune.soft, "TextCache", lambda *args: None)
    slow = make(architecture, **options).fit(SENTENCES, LABELS)
    torch.testing.assert_close(fast.prompt_, slow.prompt_, rtol=1e-3, atol=1e-3)
    losses = [[s.loss for s in clf.history_.steps[1:]] for clf in (fast, slow)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


# -- sample weights ----------------------------------------------------------------------------------------------------


ZEROED = [2, 5, 8, 11]


@pytest.mark.parametrize("verbalizer", ["learned", "fixed"])
@pytest.mark.parametrize("validation_fraction", [0.0, 0.3])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_row_of_weight_zero_is_as_good_as_absent(verbalizer: str, validation_fraction: float, steps: int) -> None:
    texts, labels = np.array(SENTENCES * 2, dtype=object), np.array(LABELS * 2)
    weight = np.arange(1.0, 15.0)
    weight[ZEROED] = 0
    texts[ZEROED[:2]], labels[ZEROED[2:]] = "so bad " * 30, "positive"
    options = {"verbalizer": verbalizer, "validation_fraction": validation_fraction, "steps": steps}
    one = make(**options).fit(texts, labels, sample_weight=weight)
    other = make(**options).fit(*(np.delete(part, ZEROED) for part in (texts, labels, weight)))
    np.testing.assert_allclose(one.predict_proba(TEXTS), other.predict_proba(TEXTS), atol=1e-6, rtol=0)
    weight[ZEROED] = 1
    third = make(**options).fit(texts, labels, sample_weight=weight)
    if verbalizer == "learned" or steps:
        assert np.abs(one.predict_proba(TEXTS) - third.predict_proba(TEXTS)).max() > 1e-4


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_class_whose_rows_all_weigh_nothing_stays_a_class_that_nothing_speaks_for(architecture: str) -> None:
    """As for scikit-learn's own classifiers: `classes_` has all labels given."""
    labels = ["z", "a", "m", "z", "a", "m", "z"]
    weight = [float(label != "m") for label in labels]
    clf = make(architecture, task=THREE, verbalizer="learned", steps=2).fit(SENTENCES, labels, sample_weight=weight)
    assert clf.classes_.tolist() == ["a", "m", "z"]
    assert clf.predict_proba(TEXTS).shape == (len(TEXTS), 3)
    even = make(architecture, task=THREE, verbalizer="learned", steps=2).fit(SENTENCES, labels)
    assert clf.predict_proba(SENTENCES)[:, 1].mean() < even.predict_proba(SENTENCES)[:, 1].mean()
    forest = RandomForestClassifier(5, random_state=0).fit(np.eye(7), labels, sample_weight=weight)
    assert forest.classes_.tolist() == clf.classes_.tolist()


def test_a_whole_weight_is_that_many_copies() -> None:
    counts = [1, 2, 1, 3, 1, 1, 2]
    texts, labels = (
        [v for v, n in zip(values, counts, strict=True) for _ in range(n)] for values in (SENTENCES, LABELS)
    )
    options = {"batch_size": 100, "steps": 3, "learning_rate": 0.01}
    weighted = make(**options).fit(SENTENCES, LABELS, sample_weight=counts)
    repeated = make(**options).fit(texts, labels)
    torch.testing.assert_close(weighted.prompt_, repeated.prompt_, rtol=1e-3, atol=1e-4)


def test_only_the_proportion_of_weights_counts() -> None:
    one, ten = (make().fit(SENTENCES, LABELS, sample_weight=np.full(7, w)).prompt_ for w in (1.0, 10.0))
    assert torch.equal(one, ten)
    assert torch.equal(one, make().fit(SENTENCES, LABELS).prompt_)


@pytest.mark.parametrize(
    "weight", [[1] * 6, [[1] * 7], [-1] + [1] * 6, [np.nan] + [1] * 6, [np.inf] + [1] * 6, [0] * 7, 3.0, ["a"] * 7]
)
def test_bad_weights_are_refused(weight: Any) -> None:
    with pytest.raises(DataError, match=r"^sample_weight( of shape|: could not convert)"):
        make().fit(SENTENCES, LABELS, sample_weight=weight)


# -- refusals, before a language model is loaded -----------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    *[("init", v) for v in ("zeros", None, ["vocab"])],
    *[
        (name, v)
        for name in ("reparameterization", "verbalizer", "aggregate", "multi_token")
        for v in ("nothing", None, 3)
    ],
    *[("prompt_length", v) for v in (-1, 1001, 2.0, "4", None, True)],
    *[("steps", v) for v in (-1, 1.5, "9", np.inf)],
    *[(name, v) for name in ("batch_size", "evaluate_every", "patience") for v in (0, -1, 1.5, None)],
    *[
        (name, v)
        for name in ("learning_rate", "weight_decay", "max_grad_norm")
        for v in (-1e-3, np.nan, np.inf, "1", None)
    ],
    *[("warmup", v) for v in (-0.1, 1.1, np.nan, "0")],
    *[("validation_fraction", v) for v in (-0.1, 0.95, 1, np.nan, "0.2")],
    *[("max_length", v) for v in (0, -5, 12.5, "64", True)],
    *[("tune_template", v) for v in ("yes", 1, None)],
    *[("verbose", v) for v in ("no", 2)],
    *[("dtype", v) for v in ("float8", None, 16)],
    *[("random_state", v) for v in ("seed", -1, 1.5)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}={value!r}" for name, value in BAD])
def test_a_bad_parameter_is_one_clear_error_before_the_model_is_loaded(name: str, value: Any) -> None:
    clf = PromptClassifier(TONE, model="nobody/nothing", **{name: value})
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{name}={value!r} ')}") as error:
        clf.fit(SENTENCES, LABELS)
    assert name == "dtype" or type(error.value) is ParameterError
    assert "nobody/nothing" not in str(error.value)
    assert "\n" not in str(error.value)


OTHERWISE = {
    "prompt_length": 3,
    "tune_template": False,
    "init": "labels",
    "reparameterization": "mlp",
    "verbalizer": "fixed",
    "learning_rate": 0.1,
    "batch_size": 8,
    "weight_decay": 0.1,
    "warmup": 0.5,
    "max_grad_norm": 2.0,
    "validation_fraction": 0.5,
    "evaluate_every": 2,
    "patience": 1,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_for_soft_tokens_is_refused_where_none_are_tuned(name: str) -> None:
    clf = PromptClassifier(TONE, model="nobody/nothing", **{name: OTHERWISE[name]})
    with pytest.raises(ParameterError, match=rf"^{name}=.* is for soft tokens, .* steps=100, say, or leave {name} out"):
        clf.fit(SENTENCES, LABELS)
    PromptClassifier(TONE, model=tiny("bert"), steps=1, **{name: OTHERWISE[name]}).fit(SENTENCES * 2, LABELS * 2)


def test_without_steps_soft_pieces_stand_as_text_or_not_at_all() -> None:
    plain, soft = (
        PromptClassifier(TONE.to_dict() | {"template": template}, model=tiny("bert")).fit(SENTENCES, LABELS)
        for template in ("{text} It was {answer}.", "{soft:8} {text} {soft:It was} {answer}.")
    )
    assert soft.prompt_ is None
    np.testing.assert_array_equal(soft.predict_proba(SENTENCES), plain.predict_proba(SENTENCES))


def test_rows_are_fitted_to_all_texts() -> None:
    some, every = (
        make(verbalizer="learned", steps=0, validation_fraction=f).fit(SENTENCES, LABELS) for f in (0.4, 0.0)
    )
    np.testing.assert_array_equal(some.predict_proba(SENTENCES), every.predict_proba(SENTENCES))


SOFT = [
    ({"template": "{soft:8} {text} It was {answer}."}, "{soft:8}"),
    ({"template": "{text} {soft:It was} {answer}."}, "{soft:It was}"),
    ({"template_causal": "{text} {soft:3} It was {answer}"}, "{soft:3}"),
    ({"template": "{soft:8} {text} {soft} It was {answer}."}, None),
    ({"template": "{text} It was {answer}."}, None),
]


@pytest.mark.parametrize(("template", "piece"), SOFT)
def test_a_prompt_length_is_used_or_refused_never_ignored(template: dict[str, str], piece: str | None) -> None:
    task = Task.from_dict(TONE.to_dict() | template)
    options = {"steps": 0, "tune_template": False, "task": task}
    if piece:
        message = f"prompt_length=3 has nowhere to go: the template of 'tone' says {piece}; write {{soft}} there, or "
        with pytest.raises(ParameterError, match=re.escape(message)):
            make(prompt_length=3, **options).set_params(model="nobody/nothing").fit(SENTENCES, LABELS)
        make(prompt_length=0, **options).fit(SENTENCES, LABELS)
    else:
        short, long = (make(prompt_length=n, **options).fit(SENTENCES, LABELS).prompt_ for n in (1, 4))
        assert len(long) == len(short) + 3


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (["x", ""], LABELS[:2], "row 1: text is empty"),
        (["x", "\ud800"], LABELS[:2], "lone surrogate"),
        (["x", None], LABELS[:2], "row 1: text is None"),
        ("a single text", ["positive"], "got a single str; put it in a list"),
        (["x", "y"], ["positive", "positive"], "all labels are one class"),
        (["x", "y"], ["positive", "good"], "'good' is no class of the task 'tone'"),
        (["x", "y"], ["positive"], "2 texts but labels of shape (1,)"),
        (["x", "y"], None, "the target y is None"),
        (["x", "y"], ["positive", np.nan], "row 1: the label is nan"),
    ],
)
def test_bad_data_is_refused_before_the_model_is_loaded(X: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        PromptClassifier(TONE, model="nobody/nothing").fit(X, y)


def test_a_bad_task_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(TaskError, match=r"no task called 'nothing'"):
        PromptClassifier("nothing", model="nobody/nothing").fit(SENTENCES, LABELS)


def test_what_does_not_fit_the_model_is_a_task_error() -> None:
    with pytest.raises(TaskError, match="leave no room for the text; use fewer of them, or a larger max_length"):
        make(prompt_length=150).fit(SENTENCES, LABELS)
    after = Task.from_dict(TONE.to_dict() | {"template": "{answer}: {text}"})
    with pytest.raises(TaskError, match="a causal LM cannot read"):
        make("gpt2", task=after).fit(SENTENCES, LABELS)
    split = Task.from_dict(TONE.to_dict() | {"verbalizer": {"negative": ["dreadful"], "positive": ["good"]}})
    with pytest.raises(TaskError, match=r"'dreadful' is \d+ tokens"):
        make(task=split, multi_token="refuse").fit(SENTENCES, LABELS)


def test_a_failed_fit_leaves_an_earlier_one_as_it_was() -> None:
    clf = make().fit(SENTENCES, LABELS)
    expected = clf.predict_proba(TEXTS)
    with pytest.raises(DataError):
        clf.fit(["x", ""], LABELS[:2])
    np.testing.assert_array_equal(clf.predict_proba(TEXTS), expected)


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.3}])
def test_a_training_that_explodes_is_one_clear_error_and_leaves_nothing(options: dict[str, Any]) -> None:
    clf = make(steps=20, learning_rate=1e37, **options)
    with pytest.raises(TuningError, match=r"^step \d+: with learning_rate=1e\+37 the loss is (nan|inf) and .+; lower"):
        clf.fit(SENTENCES * 2, LABELS * 2)
    assert not hasattr(clf, "prompt_")
    assert not hasattr(clf, "history_")


def test_a_validation_part_that_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(DataError, match=r"validation_fraction=0.5 cannot be held out of 3 texts: "):
        make(validation_fraction=0.5).fit(SENTENCES[:3], ["positive", "positive", "negative"])


@pytest.mark.parametrize("X", [[], ["x", ""], "x", ["x", 3]])
def test_bad_texts_are_refused_by_predict(X: Any) -> None:
    with pytest.raises(DataError):
        make(steps=0).fit(SENTENCES, LABELS).predict(X)


# -- answers that are not given ----------------------------------------------------------------------------------------

MANY, MANY_LABELS = [f"{text} {i}" for i in range(8) for text in SENTENCES], LABELS * 8


def sure(task: Task = TONE, labels: Any = MANY_LABELS, **options: Any) -> PromptClassifier:
    options = {"task": task, "verbalizer": "learned", "steps": 0} | options
    return make(**options).fit(MANY, labels)


@pytest.mark.parametrize(
    ("task", "labels"),
    [(TONE, MANY_LABELS), (TONE, CODES * 8), (THREE, ["z", "a", "m", "z", "a", "m", "z"] * 8)],
    ids=["str", "int", "three"],
)
def test_a_lower_error_rate_never_answers_more_and_never_answers_otherwise(task: Task, labels: Any) -> None:
    clf = sure(task, labels)
    confidence = clf.predict_proba(TEXTS).max(axis=1)
    clf.calibration_ = dataclasses.replace(clf.calibration_, right=np.sort(confidence.repeat(200)))
    plain, answered = clf.predict(TEXTS).tolist(), np.zeros(len(TEXTS), dtype=bool)
    shares = []
    for rate in (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.999):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = clf.predict(TEXTS, reject_at=rate)
        assert found.dtype == object
        now = np.array([label is not None for label in found])
        assert (now >= answered).all()
        assert all(
            label is None or (label == usual and type(label) is type(usual))
            for label, usual in zip(found, plain, strict=True)
        )
        np.testing.assert_array_equal(now, confidence >= clf.rejection_threshold(rate) if now.any() else False)
        answered = now
        shares.append(now.mean())
    assert shares[0] < shares[-1] == 1
    assert clf.predict(TEXTS).dtype == clf.classes_.dtype


def test_the_threshold_comes_from_texts_that_were_held_out() -> None:
    labels = np.random.default_rng(0).permutation(MANY_LABELS)  # nothing to learn
    clf = sure(labels=labels)
    assert len(clf.calibration_.right) + len(clf.calibration_.wrong) == len(MANY)
    assert len(clf.calibration_.wrong) > 0.3 * len(MANY)
    with pytest.warns(UserWarning):
        assert clf.predict(MANY, reject_at=0.1).tolist() == [None] * len(MANY)


def test_a_rate_that_is_not_reached_is_one_warning_and_no_answer() -> None:
    clf = make(verbalizer="learned").fit(SENTENCES, LABELS)
    with pytest.warns(UserWarning) as caught:
        assert clf.predict(TEXTS, reject_at=0.001).tolist() == [None] * len(TEXTS)
    (warning,) = caught
    message = (
        r"^reject_at=0.001 is less than the held-out training texts can show, which is (0\.\d+|1) at best, so every "
        "text is rejected; allow more errors or fit on more texts$"
    )
    assert re.match(message, str(warning.message))
    assert warning.filename == __file__


@pytest.mark.parametrize("rate", [0, 1, 0.0, 1.0, -0.1, 5, np.nan, np.inf, "0.05", None, True, [0.05]])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    clf = sure()
    with pytest.raises(ParameterError, match=rf"^{re.escape(f'reject_at={rate!r}')} must be a number above 0 .+; give"):
        clf.rejection_threshold(rate)
    if rate is not None:
        with pytest.raises(ParameterError, match="must be a number above 0 and below 1"):
            clf.predict(TEXTS, reject_at=rate)


def test_without_texts_held_out_no_rate_can_be_kept() -> None:
    message = r"^reject_at=0.05 has no held-out texts to go by; fit with verbalizer='learned' and at least two texts"
    with pytest.raises(ParameterError, match=message):
        make(verbalizer="fixed").fit(SENTENCES, LABELS).predict(TEXTS, reject_at=0.05)
    with pytest.raises(ParameterError, match=message):
        sure(labels=["positive", *["negative"] * (len(MANY) - 1)]).predict(TEXTS, reject_at=0.05)


def test_a_rate_passes_through_a_pipeline() -> None:
    pipeline = make_pipeline(FunctionTransformer(list), make(verbalizer="learned", steps=0)).fit(MANY, MANY_LABELS)
    clf = pipeline[-1]
    assert pipeline.predict(TEXTS, reject_at=0.999).tolist() == clf.predict(TEXTS, reject_at=0.999).tolist()


# -- what is learned, and seen of it -----------------------------------------------------------------------------------


def test_history_has_the_gradient_norm_of_every_prompt_token() -> None:
    clf = make(prompt_length=2, steps=5).fit(SENTENCES, LABELS)
    assert [s.step for s in clf.history_.steps] == list(range(6))
    assert clf.history_.best_step == 5
    for step in clf.history_.steps[1:]:
        assert len(step.gradient_norms) == len(clf.prompt_)
        assert min(step.gradient_norms) > 0
        assert np.isfinite(step.loss)


def test_with_validation_the_best_step_is_kept() -> None:
    clf = make(validation_fraction=0.3, evaluate_every=2, steps=8, learning_rate=0.3, patience=9).fit(
        SENTENCES * 2, LABELS * 2
    )
    scores = {s.step: s.validation_score for s in clf.history_.steps if s.validation_score is not None}
    assert list(scores) == [0, 2, 4, 6, 8]
    assert clf.history_.best_step == max(scores, key=lambda step: (scores[step], -step))


@pytest.mark.parametrize("init", ["vocab", "labels", "random"])
def test_soft_tokens_start_where_asked(init: str) -> None:
    backbone = tiny("bert")
    clf = make(prompt_length=4, tune_template=False, init=init, steps=0).fit(SENTENCES, LABELS)
    table = backbone.embedding_table()
    distances = torch.cdist(clf.prompt_, table, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.argmin(dim=1).tolist()
    if init == "labels":
        assert backbone.tokenizer.convert_ids_to_tokens(nearest) == ["bad", "terrible", "good", "great"]
    if init == "vocab":
        assert not set(nearest) & set(backbone.tokenizer.all_special_ids)
    if init == "random":
        assert distances.min() > 0.1
        torch.testing.assert_close(clf.prompt_.norm(dim=1), table.norm(dim=1).mean().expand(4))
    else:
        assert distances.min(dim=1).values.max() == 0


@pytest.mark.parametrize("reparameterization", ["direct", "mlp", "low_rank"])
def test_however_it_is_computed_only_the_vectors_are_kept(reparameterization: str) -> None:
    clf = make(prompt_length=3, tune_template=False, reparameterization=reparameterization).fit(SENTENCES, LABELS)
    assert clf.prompt_.shape == (3, 32)
    numbers = {"direct": 3 * 32, "mlp": 3 * 32 + 2 * 32 * 32, "low_rank": 3 * 4 + 4 * 32}
    assert clf.trained_parameters_ == numbers[reparameterization]


def test_trained_parameters_are_counted() -> None:
    width = tiny("bert").state_width
    clf = make(prompt_length=3, tune_template=False, verbalizer="learned").fit(SENTENCES, LABELS)
    assert clf.trained_parameters_ == 3 * 32 + 2 * (width + 1)
    nothing = make(tune_template=False).fit(SENTENCES, LABELS)
    assert nothing.trained_parameters_ == 0
    assert nothing.prompt_ is None
    assert nothing.nearest_tokens() == []


def test_untrained_the_nearest_tokens_are_the_templates_own(backbone: Backbone) -> None:
    clf = PromptClassifier(TONE, model=backbone, steps=0).fit(SENTENCES, LABELS)
    nearest = clf.nearest_tokens(k=2)
    own = backbone.tokenizer.convert_ids_to_tokens(list(clf.compiled_.layout.slot_tokens))
    assert [tokens[0] for tokens in nearest] == [(token, 0.0) for token in own]
    assert all(tokens[1][1] > 0 for tokens in nearest)
    assert all(len(tokens) == 2 for tokens in nearest)


def test_distances_grow_as_the_prompt_is_trained() -> None:
    clf = make(steps=5, learning_rate=0.2).fit(SENTENCES, LABELS)
    assert all(distance > 0 for ((_, distance),) in clf.nearest_tokens(k=1))


@pytest.mark.parametrize(
    "options", [{}, {"validation_fraction": 0.3}, {"steps": 0}, {"tune_template": False}, {"steps": 1}]
)
def test_the_history_can_be_drawn(options: dict[str, Any]) -> None:
    figure = make(**options).fit(SENTENCES * 2, LABELS * 2).plot_history()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
    assert len(figure.axes) >= 3
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []  # it hangs in no global list


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.3, "evaluate_every": 1}])
def test_ctrl_c_keeps_the_prompt_so_far_and_says_so(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses, cross_entropy = 0, torch.nn.functional.cross_entropy

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal losses
        losses += 1
        if losses == 7:
            raise KeyboardInterrupt
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr("verbtune.labelled.F.cross_entropy", interrupted)
    clf = make(steps=50, **options)
    with pytest.warns(UserWarning, match=r"interrupted after \d of 50 steps; the prompt of step \d is kept"):
        clf.fit(SENTENCES * 2, LABELS * 2)
    assert clf.history_.interrupted
    assert 1 <= len(clf.history_.steps) - 1 <= 6
    assert clf.history_.best_step <= len(clf.history_.steps) - 1
    assert np.isfinite(clf.predict_proba(TEXTS)).all()


def test_a_text_of_200000_characters_is_read() -> None:
    clf = make(steps=1).fit(["a\0 great film " * 15_000, *SENTENCES[1:]], LABELS)
    assert np.isfinite(clf.predict_proba(["so bad [MASK] {answer} " * 10_000])).all()


def test_max_length_shortens_the_text_only() -> None:
    clf = make(steps=0, max_length=24).fit(SENTENCES, LABELS)
    np.testing.assert_array_equal(clf.predict_proba(["good " * 50]), clf.predict_proba(["good " * 90]))
    assert clf.compiled_.layout.max_length == 24
