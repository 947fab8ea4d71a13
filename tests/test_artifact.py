"""Saved classifiers: the same afterwards, whole or not at all, and readable by PEFT where that is possible."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import CAUSAL, SENTENCES, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import verbtune.backbone
import verbtune.rows
from verbtune import Backbone, BackboneError, PromptClassifier, Task
from verbtune.artifact import Artifact, ArtifactError, _checksum, check_folder, read, size, write
from verbtune.encode import tokenize
from verbtune.parameters import ParameterError

LABELS = ["positive", "negative", "positive", "negative", "negative", "positive", "negative"]
TONE = {
    "task": "tone",
    "template": "{text} It was {answer}.",
    "verbalizer": {"negative": {"bad": 2, "dreadful": 1}, "positive": ["good", "great"]},
    "description": "Ton\u2028é 🙂",
}


def fitted(architecture: str = "bert", **options: Any) -> PromptClassifier:
    defaults = {"steps": 3, "learning_rate": 0.05, "prompt_length": 2, "batch_size": 4}
    return PromptClassifier(TONE, model=tiny(architecture), **(defaults | options)).fit(SENTENCES, LABELS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with every file."""
    folder = tmp_path_factory.mktemp("saved") / "tone"
    fitted("gpt2", tune_template=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def load(folder: Path, architecture: str = "gpt2") -> PromptClassifier:
    return PromptClassifier.from_pretrained(folder, model=tiny(architecture))


# -- the same afterwards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"verbalizer": "fixed"},
        {"tune_template": False},
        {"tune_template": False, "prompt_length": 0},
        {"tune_template": False, "prompt_length": 0, "verbalizer": "fixed"},
        {"reparameterization": "mlp", "aggregate": "logsumexp"},
        {"reparameterization": "low_rank", "aggregate": "max", "multi_token": "first", "init": "random"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_a_classifier_read_back_gives_the_same_probabilities(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    clf = fitted(architecture, **options)
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", architecture)
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES))
    assert again.predict(SENTENCES).tolist() == clf.predict(SENTENCES).tolist()
    assert again.task_ == clf.task_
    assert again.trained_parameters_ == clf.trained_parameters_
    assert {k: v for k, v in again.get_params(deep=False).items() if k not in ("task", "model")} == {
        k: v for k, v in clf.get_params(deep=False).items() if k not in ("task", "model")
    }
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "tone").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
def test_classes_keep_their_kind(dtype: Any, tmp_path: Path) -> None:
    labels = np.array([1, 0, 1, 0, 0, 1, 0], dtype=dtype)
    clf = PromptClassifier(TONE, model=tiny("bert"), steps=0).fit(SENTENCES, labels)
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert")
    assert again.classes_.tolist() == clf.classes_.tolist()
    assert type(again.classes_.tolist()[0]) is type(clf.classes_.tolist()[0])


def test_parameters_changed_after_fit_are_not_saved_as_fitted(tmp_path: Path) -> None:
    clf = fitted("bert", aggregate="max")
    answers = clf.predict_proba(SENTENCES)
    clf.set_params(aggregate="mean", verbalizer="fixed").save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert")
    assert (again.aggregate, again.verbalizer) == ("max", "learned")
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), answers)


def test_numbers_from_numpy_are_saved_like_any_other(tmp_path: Path) -> None:
    """A grid search sets parameters from arrays."""
    clf = fitted(prompt_length=np.int64(1), learning_rate=np.float32(0.5), random_state=np.int64(7), steps=np.int32(1))
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert")
    assert (again.prompt_length, again.learning_rate, again.random_state, again.steps) == (1, 0.5, 7, 1)


def test_a_classifier_read_back_can_be_fitted_again(tmp_path: Path) -> None:
    clf = fitted()
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert").fit(SENTENCES, LABELS)
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES))


@pytest.mark.parametrize("verbalizer", ["learned", "fixed"])
def test_a_classifier_read_back_rejects_the_same(verbalizer: str, tmp_path: Path) -> None:
    texts = [f"{text} {i}" for i in range(8) for text in SENTENCES]
    clf = PromptClassifier(TONE, model=tiny("bert"), verbalizer=verbalizer, steps=0).fit(texts, LABELS * 8)
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert")
    for name in ("right", "wrong"):
        np.testing.assert_array_equal(getattr(again.calibration_, name), getattr(clf.calibration_, name))
    if verbalizer == "fixed":
        with pytest.raises(ParameterError, match="has no held-out texts to go by"):
            again.predict(texts, reject_at=0.9)
        return
    confidence, rates = clf.calibration_.error_rates()
    at = len(rates) // 2
    rate = float(rates[at:].min())
    assert again.rejection_threshold(rate) == clf.rejection_threshold(rate) <= confidence[at]
    assert again.predict(texts, reject_at=rate).tolist() == clf.predict(texts, reject_at=rate).tolist()
    found = json.loads((tmp_path / "tone" / "verbtune.json").read_text(encoding="utf-8"))["held_out"]
    assert len(found["right"]) + len(found["wrong"]) == len(texts)
    assert len(json.dumps(found)) < 10 * len(texts)


@pytest.mark.parametrize("last", [True, False])
def test_the_layer_in_which_texts_are_read_is_saved(
    last: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verbtune.rows, "STEP_TO_LAST", -1e9 if last else 1e9)
    clf = fitted("bert", steps=0, prompt_length=0)
    clf.save_pretrained(tmp_path / "tone")
    again = load(tmp_path / "tone", "bert")
    assert again.compiled_.last == clf.compiled_.last == last
    np.testing.assert_allclose(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES), rtol=1e-6)


def test_the_files_are_plain_and_small(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "verbalizer.safetensors", "verbtune.json", "task.yaml",
        "README.md",
    }  # fmt: skip
    assert size(saved) < 20_000
    assert Task.from_yaml(saved / "task.yaml") == Task.from_dict(TONE)
    state = json.loads((saved / "verbtune.json").read_text(encoding="utf-8"))
    assert state["base_model"]["fingerprint"] == tiny("gpt2").fingerprint
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "library_name: verbtune" in card
    assert "from_pretrained" in card


def test_the_size_is_what_lies_on_disk(saved: Path) -> None:
    assert fitted("gpt2", tune_template=False).artifact_bytes_ == size(saved)


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CAUSAL)
def test_peft_reads_a_pure_prefix_and_predicts_the_same(architecture: str, tmp_path: Path) -> None:
    backbone = tiny(architecture)
    clf = fitted(architecture, tune_template=False, prompt_length=4, learning_rate=0.5)
    clf.save_pretrained(tmp_path / "tone")
    model = deepcopy(backbone.model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "tone").eval()
    text = SENTENCES[0]
    (example,) = clf.compiled_.encode([{"text": text}])
    ids = tokenize(backbone.tokenizer, [text, "It was"], lead=False)
    (was,) = tokenize(backbone.tokenizer, ["It was"], lead=True)
    assert example.ids[-len(was) :] == was
    plain = example.ids[max(i for i, s in enumerate(example.slots) if s >= 0) + 1 :]
    assert plain[: len(ids[0])][1:] == ids[0][1:]  # the text, as a user of PEFT would tokenize it
    with torch.no_grad():
        logits = adapted(input_ids=torch.tensor([plain])).logits[0, -1]
        ours = backbone._run([example], clf.prompt_, None)[0][0, 0]
    torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("bert", {"tune_template": False}), ("gpt2", {}), ("gpt2", {"tune_template": False, "prompt_length": 0})],
)
def test_nothing_is_promised_to_peft_where_it_cannot_read(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    fitted(architecture, **options).save_pretrained(tmp_path / "tone")
    assert not (tmp_path / "tone" / "adapter_config.json").exists()
    assert "PEFT" not in (tmp_path / "tone" / "README.md").read_text(encoding="utf-8")


# -- damage ------------------------------------------------------------------------------------------------------------

CHECKED = ["adapter_config.json", "adapter_model.safetensors", "verbalizer.safetensors", "verbtune.json", "task.yaml"]


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.parametrize("name", CHECKED)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{name}: cannot be read (No such file or directory); is the folder complete?" in refused(copy)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1], ids=["empty", "byte", "half", "all-but-one"])
def test_a_truncated_file_is_refused(copy: Path, name: str, keep: float) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    assert "damaged" in refused(copy)


@pytest.mark.parametrize("name", CHECKED)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_refused(saved: Path, copy: Path, name: str, place: float, bit: int) -> None:
    data = bytearray((saved / name).read_bytes())
    at = int(place * len(data))
    data[at] ^= 1 << bit
    (copy / name).write_bytes(data)
    if name != "verbtune.json":
        refused(copy)
        return
    try:
        same = json.loads(data.decode()) == json.loads((saved / name).read_text(encoding="utf-8"))
    except ValueError:
        same = False
    if not same:  # white space between the values may change
        refused(copy)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"format": 2}',
        '{"format": 2, "files": "x"}',
        "[" * 100_000,
        "1" * 5000,
        "\ufeff{}",
    ],
    ids=range(10),
)
def test_a_state_that_is_something_else_is_refused(copy: Path, content: str) -> None:
    (copy / "verbtune.json").write_text(content, encoding="utf-8")
    assert "verbtune.json: damaged" in refused(copy)


@pytest.mark.parametrize(
    ("files", "content", "message"),
    [
        (None, b"", "verbtune.json: does not say which files there are; save the classifier again"),
        (["task.yaml"], b"", "verbtune.json: does not say which files there are"),
        ({}, b"", "damaged ('task.yaml'); save the classifier again"),
        ({"thesis.txt": "0"}, b"", "verbtune.json: lists the unknown file 'thesis.txt'"),
        ({"task.yaml": 3}, b"", "task.yaml: damaged or changed (SHA-256 "),
        ("task.yaml", b"task: [", "task.yaml: not a readable YAML file"),
        ("adapter_model.safetensors", b"", "damaged ("),
        ("verbalizer.safetensors", b"x" * 99, "damaged ("),
        ("adapter_config.json", b"{", "damaged ("),
        ("adapter_config.json", b"\xff", "damaged ("),
        ("adapter_config.json", b"[" * 100_000, "damaged ("),
    ],
    ids=range(11),
)
def test_a_folder_that_is_odd_but_sealed_is_refused(copy: Path, files: Any, content: bytes, message: str) -> None:
    """Checksums do not say that the content is what it should be."""
    state = json.loads((copy / "verbtune.json").read_text(encoding="utf-8"))
    del state["checksum"]
    if isinstance(files, str):
        (copy / files).write_bytes(content)
        files = state["files"] | {files: hashlib.sha256(content).hexdigest()}
    state = {key: value for key, value in (state | {"files": files}).items() if value is not None}
    sealed = json.dumps(state | {"checksum": _checksum(state)})
    (copy / "verbtune.json").write_text(sealed, encoding="utf-8")
    assert message in refused(copy)


def test_another_format_is_refused_with_the_remedy(copy: Path) -> None:
    state = json.loads((copy / "verbtune.json").read_text(encoding="utf-8"))
    (copy / "verbtune.json").write_text(json.dumps(state | {"format": 99}), encoding="utf-8")
    assert "format 99, this version reads 2; update verbtune" in refused(copy)
    (copy / "verbtune.json").write_text(json.dumps(state | {"format": 1}), encoding="utf-8")
    assert "format 1, this version reads 2; fit and save the classifier again" in refused(copy)


def test_a_changed_card_does_no_harm(copy: Path) -> None:
    (copy / "README.md").write_text("# mine", encoding="utf-8")
    assert load(copy).classes_.tolist() == ["negative", "positive"]


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "no such folder; give the folder that save_pretrained wrote" in refused(tmp_path / folder)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    prompt = torch.tensor([[1.0, float("nan")]])
    write(tmp_path / "tone", Artifact(Task.from_dict(TONE), prompt, None, {}, {}, None, "card"))
    with pytest.raises(ArtifactError, match="prompt holds numbers that are not finite; train it again"):
        read(tmp_path / "tone")


def test_a_second_opinion_without_deep_prompts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tone", Artifact(Task.from_dict(TONE), None, {"rows": torch.ones(2, 3)}, {}, {}, None, "card"))
    with pytest.raises(ArtifactError, match="has rows in place of deep_prompts and rows") as error:
        read(tmp_path / "tone")
    assert "\n" not in str(error.value)


# -- the language model ------------------------------------------------------------------------------------------------


def test_another_base_model_is_refused_with_both_fingerprints(saved: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        load(saved, "qwen3")
    for architecture in ("gpt2", "qwen3"):
        assert tiny(architecture).fingerprint[:12] in str(error.value)
    assert "pass the LM it was trained on (model=, --model)" in str(error.value)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "lm"
    tiny("bert").model.save_pretrained(folder)
    tiny("bert").tokenizer.save_pretrained(folder)
    yield folder
    verbtune.backbone._LATEST.clear()


def test_the_language_model_is_found_by_its_name(on_disk: Path, tmp_path: Path) -> None:
    clf = PromptClassifier(TONE, model=str(on_disk), steps=1).fit(SENTENCES, LABELS)
    clf.save_pretrained(tmp_path / "tone")
    again = PromptClassifier.from_pretrained(tmp_path / "tone")
    assert again.model == str(on_disk)
    assert again.compiled_.backbone is clf.compiled_.backbone
    np.testing.assert_array_equal(again.predict_proba(SENTENCES), clf.predict_proba(SENTENCES))


def test_a_language_model_that_changed_on_disk_is_refused(on_disk: Path, tmp_path: Path) -> None:
    clf = PromptClassifier(TONE, model=str(on_disk), steps=1).fit(SENTENCES, LABELS)
    clf.save_pretrained(tmp_path / "tone")
    before = clf.compiled_.backbone.fingerprint
    del clf
    verbtune.backbone._LATEST.clear()
    changed = Backbone.load(tiny("roberta")).model
    changed.save_pretrained(on_disk)
    tiny("roberta").tokenizer.save_pretrained(on_disk)
    with pytest.raises(ArtifactError) as error:
        PromptClassifier.from_pretrained(tmp_path / "tone")
    assert before[:12] in str(error.value)
    assert tiny("roberta").fingerprint[:12] in str(error.value)


def test_a_language_model_that_is_gone_is_refused(on_disk: Path, tmp_path: Path) -> None:
    PromptClassifier(TONE, model=str(on_disk), steps=1).fit(SENTENCES, LABELS).save_pretrained(tmp_path / "tone")
    verbtune.backbone._LATEST.clear()
    (on_disk / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="cannot load the language model"):
        PromptClassifier.from_pretrained(tmp_path / "tone")


def test_a_language_model_that_was_in_memory_only_must_be_passed(saved: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"in memory only; pass it \(model=Backbone\(…\), or --model with its folder\)"
    ):
        PromptClassifier.from_pretrained(saved)


# -- whole or not at all -----------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"cannot be written \(.+\); choose a folder you may write"):
        fitted().save_pretrained(tmp_path / "file" / "tone")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("earlier", "failing"), [(False, 1), (True, 1), (True, 2)])
def test_a_write_that_fails_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, earlier: bool, failing: int
) -> None:
    """At the first renaming, which puts an earlier classifier aside, or at the second."""
    folder = tmp_path / "tone"
    if earlier:
        fitted(steps=0).save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if earlier else {}
    calls, rename = 0, os.rename

    def failing_rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    clf = fitted()
    with pytest.raises(ArtifactError, match=r"tone: cannot be written \(Permission denied\); choose a folder"):
        clf.save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == (["tone"] if earlier else [])
    assert ({p.name: p.read_bytes() for p in folder.iterdir()} if earlier else {}) == before


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    clf = fitted()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        clf.save_pretrained(tmp_path / "tone")
    assert not list(tmp_path.iterdir())


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path / "a" / "b")
    assert load(tmp_path / "a" / "b", "bert").classes_.tolist() == ["negative", "positive"]


def test_an_earlier_classifier_is_replaced_whole(saved: Path, copy: Path) -> None:
    fitted("bert").save_pretrained(copy)
    assert not (copy / "adapter_config.json").exists()
    assert load(copy, "bert").compiled_.backbone is tiny("bert")
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    "names", [["notes.txt"], ["README.md"], ["verbtune.json", "notes.txt"], ["task.yaml"], ["verbtune.json", ".git"]]
)
def test_other_content_is_never_overwritten(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "tone"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine", encoding="utf-8")
    with pytest.raises(
        ArtifactError, match="tone: holds something that is not a saved classifier; choose another folder"
    ):
        fitted(steps=0).save_pretrained(folder)
    assert {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir()} == dict.fromkeys(names, "mine")


def test_a_file_or_a_broken_link_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ArtifactError, match="holds something that is not a saved classifier"):
            fitted(steps=0).save_pretrained(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_what_write_would_refuse_is_refused_without_writing(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "verbtune.json").write_text("mine", encoding="utf-8")
    (tmp_path / "other" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match="other: holds something that is not a saved classifier"):
        check_folder(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"thesis.txt is no folder that you may write to\); choose a folder"):
        check_folder(tmp_path / "other" / "thesis.txt" / "a" / "b")
    for fine in (saved, tmp_path / "new", tmp_path / "new" / "deeper"):
        check_folder(fine)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be renamed over where one stands, or over a mount point."""
    (tmp_path / "volume").mkdir()
    monkeypatch.chdir(tmp_path / "volume")
    for folder in (Path(), tmp_path / "volume"):
        with pytest.raises(ArtifactError, match=r"the current folder or a mount point, .*; choose a folder inside it"):
            check_folder(folder)
    monkeypatch.chdir(tmp_path)
    check_folder(tmp_path / "volume")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(ArtifactError, match="volume: the current folder or a mount point"):
        check_folder(tmp_path / "volume")
    check_folder(tmp_path / "volume" / "tone")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "tone").mkdir()
    fitted(steps=0).save_pretrained(tmp_path / "tone")
    assert (tmp_path / "tone" / "verbtune.json").is_file()


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({"steps": 0}, "Rows for the frozen"),
        ({"steps": 1, "verbalizer": "fixed"}, "Soft tokens for the frozen"),
        ({"steps": 1}, "Rows and soft tokens for the frozen"),
    ],
)
def test_the_card_says_what_was_learned(options: dict[str, Any], learned: str, tmp_path: Path) -> None:
    PromptClassifier(TONE, model=tiny("bert"), **options).fit(SENTENCES, LABELS).save_pretrained(tmp_path / "tone")
    assert f"\n{learned} " in (tmp_path / "tone" / "README.md").read_text("utf-8")
