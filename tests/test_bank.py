"""`TaskBank`: whatever the mixture, every answer is that of the task's own classifier."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import gc
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SENTENCES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

import verbtune.deep
import verbtune.rows
from verbtune import Backbone, BackboneError, PromptClassifier, TaskBank, TaskError
from verbtune.artifact import ArtifactError, size
from verbtune.data import DataError
from verbtune.parameters import ParameterError

LABELS = ["positive", "negative", "positive", "negative", "negative", "positive", "negative"]
TEXTS = [*SENTENCES[:3], "Good.", "so bad " * 85, "It was [MASK] {answer} </s> 🙂"]
ROWS = [{"text": a, "b": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
TONE = {
    "task": "tone",
    "template": "{text} It was {answer}.",
    "verbalizer": {"negative": ["bad", "terrible"], "positive": ["good", "great"]},
}
SEVERAL = {"negative": ["bad", "dreadful"], "positive": ["marvellous"]}
ALL_LONG = {"negative": ["dreadful"], "positive": ["marvellous"]}
PAIR = {"template": "{text}? {answer}, {b}", "template_causal": "{text} {b} So {answer}"}
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learned": (TONE, {"verbalizer": "learned"}),
    "fixed": (TONE, {"prompt_length": 3, "aggregate": "logsumexp"}),
    "plain": (TONE | {"template": "{text} So {answer}."}, {"tune_template": False}),
    "after": (TONE | {"template": "{text} {soft:2} It was {answer}."}, {"tune_template": False}),
    "several": (TONE | {"verbalizer": SEVERAL}, {}),
    "weightless": (TONE | {"verbalizer": ALL_LONG}, {"verbalizer": "learned", "prompt_length": 1}),
    "pair": (TONE | PAIR, {"prompt_length": 2}),
    "second": (TONE, {"verbalizer": "learned"}),
    "another second": (TONE | {"verbalizer": SEVERAL}, {"verbalizer": "learned", "random_state": 1}),
    "second of many": (TONE | {"verbalizer": ALL_LONG}, {"verbalizer": "learned"}),
}


@functools.cache
def fitted(architecture: str) -> dict[str, PromptClassifier]:
    """Classifiers of every kind on one tiny LM, with prompts that are nobody's tokens."""
    torch.manual_seed(1)
    classifiers = {}
    for name, (task, options) in TASKS.items():
        X = [{"text": text, "b": "a film"} for text in SENTENCES] if name == "pair" else SENTENCES
        options = {"verbalizer": "fixed", "steps": None if "second" in name else 0} | options
        # A second opinion whether it helps or not.
        many = 1 if name == "second of many" else 50
        # Some read texts in the last layer, whether that helps or not.
        last = name in ("learned", "another second", "second of many")
        with (
            mock.patch.multiple(verbtune.deep, FEW=0, MANY_CLASSES=many),
            mock.patch.object(verbtune.rows, "STEP_TO_LAST", -1e9 if last else 1e9),
        ):
            clf = PromptClassifier(task, model=tiny(architecture), **options).fit(X, LABELS)
        assert (clf.second_opinion_ is not None) == ("second" in name)
        assert clf.compiled_.last == last
        if clf.prompt_ is not None:
            clf.prompt_ = clf.prompt_ + 0.1 * torch.randn_like(clf.prompt_)
        if name == "weightless":
            clf.verbalizer_.word_scale.zero_()
        classifiers[name] = clf
    return classifiers


@functools.cache
def expected(architecture: str) -> dict[str, NDArray[np.float64]]:
    return {n: c.predict_proba(ROWS if n == "pair" else TEXTS) for n, c in fitted(architecture).items()}


def filled(architecture: str) -> TaskBank:
    bank = TaskBank(tiny(architecture))
    for name, clf in fitted(architecture).items():
        bank.add(name, clf)
    return bank


def pairs_of(choices: list[tuple[str, int]]) -> list[tuple[str, Any]]:
    return [(name, ROWS[i] if name == "pair" else TEXTS[i]) for name, i in choices]


EVERY = [(name, i) for i in range(len(TEXTS)) for name in TASKS]


@contextmanager
def positions(backbone: Backbone) -> Iterator[list[int]]:
    """The positions of every pass of the LM while open, padding included."""
    passes: list[int] = []

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        passes.append(inputs["inputs_embeds"].shape[0] * inputs["inputs_embeds"].shape[1])

    hook = backbone.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "gpt2", "llama", "opt"])
def test_every_answer_is_that_of_the_tasks_own_classifier(architecture: str) -> None:
    bank, own = filled(architecture), expected(architecture)
    for (name, i), found in zip(EVERY, bank.predict_proba(pairs_of(EVERY)), strict=True):
        np.testing.assert_allclose(found, own[name][i], atol=1e-5)
    for name, found in bank.predict_proba_all(ROWS).items():
        np.testing.assert_allclose(found, own[name], atol=1e-5)


def test_a_pickled_bank_answers_alike() -> None:
    bank = pickle.loads(pickle.dumps(filled("bert")))
    assert bank.names == list(TASKS)
    for name, answer in bank.predict_proba_all(ROWS).items():
        np.testing.assert_allclose(answer, expected("bert")[name], rtol=0, atol=1e-5)
    bank.remove("plain")
    assert "plain" not in bank


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(choices=st.lists(st.sampled_from(EVERY), max_size=12))
def test_no_mixture_changes_an_answer(architecture: str, choices: list[tuple[str, int]]) -> None:
    found = filled(architecture).predict_proba(pairs_of(choices))
    assert len(found) == len(choices)
    for (name, i), row in zip(choices, found, strict=True):
        np.testing.assert_allclose(row, expected(architecture)[name][i], atol=1e-5)


def test_words_of_a_template_are_not_taken_for_the_same_words_of_a_text() -> None:
    """Two prompts may start with the same tokens, which are text in one and template in the other."""
    bank, templates = TaskBank(tiny("gpt2")), {"bare": "{text} So {answer}", "framed": "film film {text} So {answer}"}
    lm = tiny("gpt2")
    own = {n: PromptClassifier(TONE | {"template": t}, model=lm).fit(SENTENCES, LABELS) for n, t in templates.items()}
    for name, clf in own.items():
        bank.add(name, clf)
    for name, found in bank.predict_proba_all(["film film film film is good"]).items():
        np.testing.assert_allclose(found, own[name].predict_proba(["film film film film is good"]), atol=1e-5)


def test_labels_are_each_tasks_own() -> None:
    bank = filled("bert")
    counted = PromptClassifier(TONE, model=tiny("bert")).fit(SENTENCES, [int(label == "positive") for label in LABELS])
    bank.add("counted", counted)
    found = bank.predict([("fixed", TEXTS[0]), ("counted", TEXTS[1]), ("fixed", TEXTS[1])])
    clf = fitted("bert")["fixed"]
    assert found == [clf.predict(TEXTS[:1])[0], counted.predict(TEXTS[1:2])[0], clf.predict(TEXTS[1:2])[0]]
    assert [type(label) for label in found] == [str, int, str]


def test_a_text_is_rejected_where_the_tasks_own_classifier_rejects_it() -> None:
    bank, fitted_here = TaskBank(tiny("bert")), {}
    for name, labels in {"mood": LABELS, "code": [int(label == "positive") for label in LABELS]}.items():
        clf = PromptClassifier(TONE, model=tiny("bert"), steps=0, random_state=0).fit(SENTENCES, labels)
        middle = np.median(clf.predict_proba(TEXTS).max(axis=1))
        clf.calibration_ = dataclasses.replace(clf.calibration_, right=np.full(99, middle), wrong=np.empty(0))
        bank.add(name, clf)
        fitted_here[name] = clf
    own = {name: clf.predict(TEXTS, reject_at=0.999).tolist() for name, clf in fitted_here.items()}
    assert [answers.count(None) for answers in own.values()] == [len(TEXTS) // 2] * 2
    pairs = [(name, text) for text in TEXTS for name in fitted_here]
    answers = [own[name][i] for i in range(len(TEXTS)) for name in fitted_here]
    assert bank.predict(pairs, reject_at=0.999) == answers
    assert {n: found.tolist() for n, found in bank.predict_all(TEXTS, reject_at=0.999).items()} == own


def both_ways(name: str) -> list[Any]:
    """Ask a bank of one task about a text, by its name and as all tasks."""
    bank = TaskBank(tiny("bert"))
    bank.add(name, fitted("bert")[name])
    return [
        lambda rate: bank.predict([(name, "Good.")], reject_at=rate),
        lambda rate: bank.predict_all(["Good."], reject_at=rate)[name].tolist(),
    ]


def test_a_rate_that_cannot_be_kept_names_the_task() -> None:
    for ask in both_ways("fixed"):
        with pytest.raises(ParameterError, match=r"^task 'fixed': reject_at=0.1 has no held-out texts to go by; fit"):
            ask(0.1)
        with pytest.raises(ParameterError, match=r"^task 'fixed': reject_at=1 must be a number above 0 and below 1;"):
            ask(1)
    for ask in both_ways("learned"):
        with pytest.warns(UserWarning, match=r"^task 'learned': reject_at=0.001 is less than the held-out") as caught:
            assert ask(0.001) == [None]
        assert [warning.filename for warning in caught] == [__file__]


def test_all_tasks_over_texts_in_any_form() -> None:
    bank, few = filled("bert"), ROWS[:2]
    for texts in (few, pd.DataFrame(few), iter(few)):
        found = bank.predict_all(texts)
        assert list(found) == list(TASKS)
        for name, clf in fitted("bert").items():
            assert found[name].tolist() == clf.classes_[expected("bert")[name][:2].argmax(axis=1)].tolist()


def test_nothing_in_nothing_out() -> None:
    bank = filled("bert")
    assert bank.predict([]) == bank.predict_proba([]) == []
    assert {name: found.shape for name, found in bank.predict_all([]).items()} == dict.fromkeys(TASKS, (0,))
    assert {found.shape for found in bank.predict_proba_all([]).values()} == {(0, 2)}
    assert TaskBank(tiny("bert")).predict_all(TEXTS) == {}


# -- work --------------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_on_a_masked_lm_is_one_pass_over_as_many_positions() -> None:
    backbone, bank = tiny("bert"), TaskBank(tiny("bert"))
    for i, words in enumerate([("bad", "good"), ("terrible", "great"), ("film", "music")]):
        task = TONE | {"verbalizer": {"n": [words[0]], "p": [words[1]]}}
        bank.add(f"task{i}", PromptClassifier(task, model=backbone, steps=0).fit(SENTENCES, [0, 1, 0, 1, 1, 0, 1]))
    with positions(backbone) as alone:
        bank.predict([("task0", text) for text in SENTENCES])
    with positions(backbone) as mixed:
        bank.predict([(f"task{i % 3}", text) for i, text in enumerate(SENTENCES)])
    assert mixed == alone
    assert len(mixed) == 1


@pytest.mark.parametrize("template", ["{text} {soft:4} {answer}", "{text} It was {answer}"])
def test_eight_tasks_over_a_text_cost_a_causal_lm_little_more_than_one(template: str) -> None:
    backbone, bank = tiny("gpt2"), TaskBank(tiny("gpt2"))
    clf = PromptClassifier(TONE | {"template": template}, model=backbone, steps=0).fit(SENTENCES, LABELS)
    for i in range(8):
        clf.prompt_ = clf.prompt_ + 1
        bank.add(f"task{i}", clf)
    texts = [" ".join(SENTENCES[i : i + 4]) for i in range(3)]
    with positions(backbone) as one:
        clf.predict(texts)
    with positions(backbone) as eight:
        bank.predict_all(texts)
    assert sum(eight) <= 1.5 * sum(one)


def test_a_prompt_in_front_is_read_once_for_each_task() -> None:
    backbone, bank = tiny("gpt2"), TaskBank(tiny("gpt2"))
    clf = PromptClassifier(TONE, model=backbone, prompt_length=50, tune_template=False, steps=0).fit(SENTENCES, LABELS)
    for name in "ab":
        bank.add(name, clf)
    with positions(backbone) as passes:
        bank.predict([(name, "good film") for name in "ab" for _ in range(10)])
    assert sum(passes) < 20 * 50


def test_where_memory_is_short_everything_is_read_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, own, whole = filled("gpt2"), expected("gpt2"), Backbone.word_scores

    def short(self: Backbone, examples: Any, *args: Any, start: Any = None, **options: Any) -> Any:
        if start is not None or len(examples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, examples, *args, start=start, **options)

    monkeypatch.setattr(Backbone, "word_scores", short)
    for name, found in bank.predict_proba_all(ROWS).items():
        np.testing.assert_allclose(found, own[name], atol=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    stores = {
        o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in kinds
    }
    return sum(stores.values())


def test_a_task_takes_no_more_memory_than_its_file(tmp_path: Path) -> None:
    fitted("bert")["learned"].save_pretrained(tmp_path / "saved")
    bank = TaskBank(tiny("bert"))
    bank.add("first", tmp_path / "saved")
    before = tensor_bytes()
    for i in range(50):
        bank.add(f"copy{i}", tmp_path / "saved")
    assert tensor_bytes() - before <= 50 * size(tmp_path / "saved")
    assert len(bank) == 51
    assert {id(served.compiled.backbone) for served in bank._tasks.values()} == {id(tiny("bert"))}
    found = bank.predict_proba([(name, TEXTS[0]) for name in bank.names])
    np.testing.assert_allclose(found, [expected("bert")["learned"][0]] * 51, atol=1e-5)


def test_a_classifier_on_another_copy_of_the_lm_is_served_on_the_banks() -> None:
    clf = fitted("bert")["learned"]
    copy = Backbone(tiny("bert").model, tiny("bert").tokenizer)
    bank = TaskBank(copy)
    bank.add("tone", clf)
    assert bank._tasks["tone"].compiled.backbone is copy
    np.testing.assert_allclose(bank.predict_proba([("tone", TEXTS[0])])[0], expected("bert")["learned"][0], atol=1e-5)


# -- coming and going --------------------------------------------------------------------------------------------------


def test_tasks_come_are_replaced_and_go() -> None:
    bank = TaskBank(tiny("bert"))
    assert len(bank) == 0
    for name in ("a", "b", "a"):
        bank.add(name, fitted("bert")["learned"])
    assert bank.names == ["a", "b"]
    bank.add("a", fitted("bert")["fixed"])
    np.testing.assert_allclose(bank.predict_proba([("a", TEXTS[0])])[0], expected("bert")["fixed"][0], atol=1e-5)
    bank.remove("a")
    assert "a" not in bank
    assert "b" in bank
    assert len(bank) == 1


def test_fitting_a_classifier_again_changes_nothing_in_the_bank() -> None:
    clf = PromptClassifier(TONE, model=tiny("bert")).fit(SENTENCES, LABELS)
    bank = TaskBank(tiny("bert"))
    bank.add("tone", clf)
    before = bank.predict_proba([("tone", text) for text in TEXTS])
    clf.fit(SENTENCES, LABELS[::-1])
    np.testing.assert_array_equal(bank.predict_proba([("tone", text) for text in TEXTS]), before)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_tasks_come_and_go_while_others_serve(architecture: str, tmp_path: Path) -> None:
    bank, own = filled(architecture), expected(architecture)
    fitted(architecture)["fixed"].save_pretrained(tmp_path / "saved")

    def swap() -> None:
        for _ in range(15):
            bank.add("guest", tmp_path / "saved")
            bank.remove("guest")

    def serve() -> None:
        while not swapping.done():
            for (name, i), found in zip(EVERY[-8:], bank.predict_proba(pairs_of(EVERY[-8:])), strict=True):
                np.testing.assert_allclose(found, own[name][i], atol=1e-5)
            found = bank.predict_all(ROWS[:1])
            assert set(TASKS) <= set(found) <= {*TASKS, "guest"}

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        swapping = pool.submit(swap)
        for serving in [pool.submit(serve), pool.submit(serve)]:
            serving.result()
        swapping.result()
    assert bank.names == list(TASKS)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        (
            [("learned", "a"), ("leaned", "b")],
            TaskError,
            "row 1: no task called 'leaned'; near to it: learned; the bank",
        ),
        ([("zzz", "a")], TaskError, "row 0: no task called 'zzz'; the bank has 10; give one of bank.names"),
        ([(["learned"], "a")], TaskError, "row 0: no task called ['learned']; near to it: learned; the bank"),
        ([("learned", "a"), ("pair", "b")], DataError, "row 1: task 'pair': this task reads text, b; give a dict"),
        ([("pair", {"text": "b"})], DataError, "row 0: task 'pair': the field 'b' is missing; it has text"),
        ([("learned", "a"), ("learned", " ")], DataError, "row 1: task 'learned': text is empty"),
        ([("learned", 3)], DataError, "row 0: task 'learned': text is 3 (int), not a text"),
        ([("learned", "a"), "ab"], DataError, "row 1: 'ab' is no pair; give (task, text)"),
        ([("learned", "a", "b")], DataError, "row 0: ('learned', 'a', 'b') is no pair"),
        ({"learned": "a"}, DataError, "expected a list of (task, text), got dict"),
        ("learned", DataError, "expected a list of (task, text), got str"),
        (None, DataError, "expected a list of (task, text), got NoneType"),
    ],
)
def test_what_cannot_be_answered_is_named(pairs: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)) as error:
        filled("bert").predict(pairs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b"], "task 'pair': row 0: this task reads text, b; give a dict"),
        ([ROWS[0], {"text": ""}], "task 'learned': row 1: text is empty"),
        ("a", "task 'learned': expected a list of texts, got a single str"),
        (None, "task 'learned': expected a list of texts, got NoneType"),
    ],
)
def test_texts_that_a_task_cannot_read_are_named(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match="^" + re.escape(message)):
        filled("bert").predict_all(texts)


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    bank = TaskBank(tiny("bert"))
    clf = fitted("bert")["learned"]
    with pytest.raises(
        BackboneError, match=r"^tone: fitted on Backbone\(RobertaForMaskedLM, masked\) \(\w{12}…\), but"
    ):
        bank.add("tone", fitted("roberta")["learned"])
    fitted("roberta")["learned"].save_pretrained(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="pass the LM it was trained on"):
        bank.add("tone", tmp_path / "saved")
    with pytest.raises(NotFittedError):
        bank.add("tone", PromptClassifier(TONE, model=tiny("bert")))
    with pytest.raises(
        TypeError, match=r"^tone: got dict; give a fitted PromptClassifier or the folder of a saved one"
    ):
        bank.add("tone", TONE)  # type: ignore[arg-type]
    for name in ("", None, 3):
        with pytest.raises(TaskError, match="give a str that is not empty"):
            bank.add(name, clf)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"^no task called 'tone'; the bank has 0; add it first"):
        bank.remove("tone")
    assert bank.names == []
