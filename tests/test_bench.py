"""The bench: fair splits, records that survive anything, failures that stop nobody else, and its statistics."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from verbtune import Backbone, BackboneError, baselines, bench
from verbtune.bench import BenchError, run
from verbtune.data import DataError
from verbtune.task import Task

KEYS = [
    "task", "method", "model", "shots", "seed", "n_train", "n_test", "accuracy", "macro_f1", "nll", "ece", "brier",
    "trained_parameters", "artifact_bytes", "fit_seconds", "predict_seconds", "split_checksum",
]  # fmt: skip
METHODS = ("majority", "tfidf", "verbtune")


class FakeMethod:
    """Knows the answer with a probability that depends on method, seed and prompt length; counts its fits."""

    fits: list[tuple[str, int, int | None]] = []  # noqa: RUF012
    seen: dict[tuple[str, int, int | None], list[Any]] = {}  # noqa: RUF012

    def __init__(self, method: str, seed: int, prompt_length: int | None) -> None:
        self.key = (method, seed, prompt_length)
        self.parameters = {"C": 1.0}
        self.trained_parameters_ = 10 * (1 + (prompt_length or 0))
        self.artifact_bytes_ = 2048

    def get_params(self, deep: bool) -> dict[str, Any]:
        return {"task": object(), "model": object(), **self.parameters}

    def fit(self, X: Any, y: Any) -> FakeMethod:
        self.fits.append(self.key)
        self.seen[self.key] = list(zip(X, y, strict=True))
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        rng = np.random.default_rng([METHODS.index(self.key[0]), self.key[1], self.key[2] or 0])
        positive = np.array(["great" in row["text"] for row in X])
        sure = rng.uniform(0.3 + 0.2 * METHODS.index(self.key[0]), 1, len(X))
        right = np.where(positive, sure, 1 - sure)
        return np.stack([1 - right, right], axis=1)


def fake(hook: Callable[[FakeMethod], None] = lambda method: None) -> Callable[..., FakeMethod]:
    def make(method: str, task: Task, backbone: Backbone, *, seed: int, prompt_length: int | None = None) -> FakeMethod:
        made = FakeMethod(method, seed, prompt_length)
        hook(made)
        return made

    return make


def write_data(folder: Path, task: str, n_train: int = 12, n_test: int = 20) -> None:
    for split, n in (("train", n_train), ("test", n_test)):
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = (("terrible", "negative"), ("great", "positive"))
        texts = [(f"{task} {split} {i} was {kinds[i % 2][0]}", kinds[i % 2][1]) for i in range(n)]
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_data(folder, "tone")
    write_data(folder, "mood")
    return folder


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "make", fake())
    FakeMethod.fits.clear()
    FakeMethod.seen.clear()


@pytest.fixture
def bench_run(task: Task, data: Path, tmp_path: Path, faked: None) -> Callable[..., bench.Outcome]:
    def call(**changes: Any) -> bench.Outcome:
        arguments: dict[str, Any] = {
            "output": tmp_path / "out",
            "methods": METHODS,
            "shots": (2,),
            "seeds": (1, 2),
            "data": data,
        }
        tasks = changes.pop("tasks", [task])
        backbones = changes.pop("backbones", [tiny("bert")])
        return run(tasks, backbones, **arguments | changes)

    return call


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]


def test_real_methods_from_end_to_end(task, data, tmp_path, monkeypatch):
    make = baselines.make

    def quick(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        return made.set_params(steps=2) if "steps" in made.get_params() else made

    monkeypatch.setattr(baselines, "make", quick)
    backbone = tiny("bert")
    outcome = run([task], [backbone], output=tmp_path / "out", shots=(2,), seeds=(1,), data=data)
    assert not outcome.failures
    assert [r.method for r in outcome.records] == list(baselines.METHODS)
    by_method = {r.method: r for r in outcome.records}
    assert by_method["majority"].accuracy == 0.5
    assert by_method["majority"].trained_parameters == 0
    assert by_method["fine-tuning"].trained_parameters > by_method["lora"].trained_parameters > 0
    assert all(r.model_fingerprint == backbone.fingerprint for r in outcome.records)
    assert all(r.artifact_bytes > 0 and r.fit_seconds > 0 and r.peak_memory_mb >= 0 for r in outcome.records)


@pytest.mark.parametrize(
    ("template", "n", "length"),
    [("{text} It was {answer}.", None, 20), ("{text} It was {answer}.", 3, 3), ("{soft:4} {text} {answer}.", None, 0)],
)
def test_the_plain_soft_prompt_is_as_long_as_the_template_says(task, template, n, length):
    spec = Task.from_dict(task.to_dict() | {"template": template})
    made = baselines.make("soft-prompt", spec, tiny("bert"), seed=0, prompt_length=n).set_params(steps=0)
    rows = [{"text": "great"}, {"text": "bad"}]
    assert made.prompt_length == length
    assert len(made.fit(rows, ["positive", "negative"]).prompt_) == (length or 4)


def test_records_have_the_keys_they_promise(bench_run, tmp_path):
    outcome = bench_run()
    for plain in lines(tmp_path):
        assert list(plain)[: len(KEYS)] == KEYS
        assert set(plain["versions"]) == {"verbtune", "torch", "transformers", "scikit-learn", "python"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["records"] == lines(tmp_path) == [dataclasses.asdict(r) for r in outcome.records]
    assert results["failures"] == []
    assert len(outcome.records) == 6
    assert not [p.name for p in (tmp_path / "out").rglob("*tmp*")]


def test_all_methods_see_the_same_texts(bench_run):
    records = bench_run().records
    for seed in (1, 2):
        assert len({r.split_checksum for r in records if r.seed == seed}) == 1
        first, *others = [FakeMethod.seen[method, seed, None] for method in METHODS]
        assert all(other == first for other in others)
        assert len(first) == 4
    assert len({r.split_checksum for r in records}) == 2


def test_predictions_are_those_that_were_scored(bench_run, tmp_path):
    for record in bench_run().records:
        probabilities, truth, classes = bench.predictions(tmp_path / "out", record)
        assert classes == ["negative", "positive"]
        assert (probabilities.argmax(1) == truth).mean() == pytest.approx(record.accuracy)


def test_prompt_lengths_are_for_soft_prompts_only(bench_run):
    bench_run(prompt_lengths=(None, 1, 5), seeds=(1,))
    assert FakeMethod.fits == [("majority", 1, None), ("tfidf", 1, None), *(("verbtune", 1, n) for n in (None, 1, 5))]


def test_a_finished_bench_is_not_run_again(bench_run, tmp_path):
    first = bench_run()
    FakeMethod.fits.clear()
    assert bench_run() == first
    assert FakeMethod.fits == []
    assert len(bench_run(seeds=(2, 3)).records) == 6
    assert [seed for _, seed, _ in FakeMethod.fits] == [3, 3, 3]
    assert len(lines(tmp_path)) == 9


def test_an_interrupted_bench_goes_on_where_it_was(bench_run, tmp_path, monkeypatch):
    def interrupt(method: FakeMethod) -> None:
        if len(FakeMethod.fits) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "make", fake(interrupt))
        with pytest.raises(KeyboardInterrupt):
            bench_run()
    assert len(lines(tmp_path)) == 4
    assert not (tmp_path / "out" / "results.json").exists()
    FakeMethod.fits.clear()
    outcome = bench_run()
    assert FakeMethod.fits == [("tfidf", 2, None), ("verbtune", 2, None)]
    assert [(r.seed, r.method) for r in outcome.records] == [(s, m) for s in (1, 2) for m in METHODS]


def test_a_method_that_swallows_ctrl_c_has_not_finished(bench_run, tmp_path, monkeypatch):
    def swallow(made: FakeMethod) -> None:
        def fit(X: Any, y: Any) -> FakeMethod:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                FakeMethod.fit(made, X, y)
            return made

        if made.key[0] == "tfidf":
            made.fit = fit  # type: ignore[method-assign]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(baselines, "make", fake(swallow))
    with pytest.raises(KeyboardInterrupt):
        bench_run()
    assert [plain["method"] for plain in lines(tmp_path)] == ["majority"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_last_line_that_was_cut_is_dropped(bench_run, tmp_path):
    bench_run()
    path = tmp_path / "out" / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'"brier"')])
    FakeMethod.fits.clear()
    assert len(bench_run().records) == 6
    assert FakeMethod.fits == [("verbtune", 2, None)]
    assert len(lines(tmp_path)) == 6


def test_a_damaged_line_before_the_last_is_reported(bench_run, tmp_path):
    bench_run()
    path = tmp_path / "out" / "records.jsonl"
    path.write_text(path.read_text().replace('"brier"', '"bri', 1))
    with pytest.raises(BenchError, match=r"records\.jsonl:1: no record of a bench"):
        bench_run()


@pytest.mark.parametrize("field", ["split_checksum", "model_fingerprint", "task_checksum", "method_checksum"])
def test_records_of_other_data_models_or_specs_do_not_count(bench_run, tmp_path, field):
    bench_run()
    path = tmp_path / "out" / "records.jsonl"
    changed = [plain | {field: "0" * 64} for plain in lines(tmp_path)]
    path.write_text("".join(json.dumps(plain) + "\n" for plain in changed))
    FakeMethod.fits.clear()
    assert len(bench_run().records) == len(FakeMethod.fits) == 6


def test_a_method_with_other_parameters_is_measured_anew(bench_run, tmp_path, monkeypatch):
    def change(made: FakeMethod) -> None:
        if made.key[0] == "tfidf":
            made.parameters["C"] = 2.0

    bench_run()
    FakeMethod.fits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "make", fake(change))
        assert len(bench_run().records) == 6
    assert FakeMethod.fits == [("tfidf", 1, None), ("tfidf", 2, None)]
    assert len(bench_run().records) == 6
    assert len(FakeMethod.fits) == 2  # what was measured first is still there


def test_records_from_before_parameters_were_noted_do_not_count(bench_run, tmp_path):
    bench_run()
    path = tmp_path / "out" / "records.jsonl"
    old = [{key: value for key, value in plain.items() if key != "method_checksum"} for plain in lines(tmp_path)]
    path.write_text("".join(json.dumps(plain) + "\n" for plain in old))
    FakeMethod.fits.clear()
    assert len(bench_run().records) == len(FakeMethod.fits) == 6


def test_records_of_another_version_do_not_count(bench_run, tmp_path):
    bench_run()
    path = tmp_path / "out" / "records.jsonl"
    changed = [{"versions": {"verbtune": "0.0.0"}, "from": "another age"} for _ in lines(tmp_path)]
    path.write_text("".join(json.dumps(plain) + "\n" for plain in changed))
    FakeMethod.fits.clear()
    assert len(bench_run().records) == len(FakeMethod.fits) == 6


def test_a_record_without_predictions_is_measured_again(bench_run, tmp_path):
    record = bench_run().records[1]
    next((tmp_path / "out" / "predictions").glob(f"tone.{record.method}.{record.seed}.*")).unlink()
    FakeMethod.fits.clear()
    assert len(bench_run().records) == 6
    assert FakeMethod.fits == [(record.method, record.seed, None)]


def test_a_failing_method_stops_nobody_else_and_is_tried_again(bench_run, tmp_path, monkeypatch):
    def fail(made: FakeMethod) -> None:
        if made.key[0] == "tfidf":
            raise ValueError("template leaves\nno room; use a shorter one")
        if made.key[:2] == ("verbtune", 2):
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "make", fake(fail))
        outcome = bench_run()
    assert [(r.method, r.seed) for r in outcome.records] == [("majority", 1), ("verbtune", 1), ("majority", 2)]
    assert [(f.method, f.seed, f.error) for f in outcome.failures] == [
        ("tfidf", 1, "template leaves no room; use a shorter one"),
        ("tfidf", 2, "template leaves no room; use a shorter one"),
        ("verbtune", 2, "ZeroDivisionError: "),
    ]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["failures"]
    assert "no room" in saved[0]["traceback"]
    assert not bench_run().failures


def test_predictions_that_are_no_probabilities_are_a_failure(bench_run, monkeypatch):
    def broken(made: FakeMethod) -> None:
        made.predict_proba = lambda X: np.full((len(X), 2), np.nan)  # type: ignore[method-assign]

    monkeypatch.setattr(baselines, "make", fake(broken))
    outcome = bench_run(methods=("majority",), seeds=(1,))
    assert not outcome.records
    assert "no distribution" in outcome.failures[0].error


def test_limit_caps_the_test_texts_the_same_way_for_all_seeds(bench_run, tmp_path):
    records = bench_run(limit=6).records
    assert {r.n_test for r in records} == {6}
    truths = [bench.predictions(tmp_path / "out", r)[1].tolist() for r in records]
    assert all(truth == truths[0] for truth in truths)
    assert sum(truths[0]) == 3
    assert {r.n_test for r in bench_run(limit=1000).records} == {20}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=60), st.data())
def test_a_stratified_choice_has_every_class_and_its_share(labels, draw):
    n = draw.draw(st.integers(len(set(labels)), len(labels)))
    chosen = bench._stratified(labels, n)
    assert len(set(chosen)) == len(chosen) == n
    assert chosen == sorted(chosen) == bench._stratified(labels, n)
    for name in set(labels):
        got, share = sum(labels[i] == name for i in chosen), labels.count(name) * n / len(labels)
        assert got >= 1
        assert got <= share + len(set(labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("majority", "magic")}, "no method called 'magic'; the methods are majority, tfidf"),
        ({"methods": ()}, "no method given"),
        ({"methods": ("tfidf", "tfidf")}, "the method 'tfidf' is given twice"),
        ({"tasks": []}, "no task given"),
        ({"backbones": []}, "no model given"),
        ({"shots": (0,)}, "shots 0 is not a whole number from 1"),
        ({"seeds": (-1,)}, "seed -1 is not a whole number from 0"),
        ({"seeds": (1, 1)}, "the seed 1 is given twice"),
        ({"prompt_lengths": ("5",)}, "prompt length '5' is not a whole number"),
        ({"limit": 1}, "limit 1 is less than the 2 classes of 'tone'; raise it"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(bench_run, changes, message):
    with pytest.raises(BenchError, match=message):
        bench_run(**{"backbones": ["/no/such/model"]} | changes)


def test_the_same_task_twice_is_refused(bench_run, task):
    with pytest.raises(BenchError, match="the task 'tone' is given twice"):
        bench_run(tasks=[task, task], backbones=["/no/such/model"])


def test_the_same_model_twice_is_refused(bench_run):
    with pytest.raises(BenchError, match="the model 'BertForMaskedLM' is given twice"):
        bench_run(backbones=[tiny("bert"), tiny("bert")])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_texts_is_refused(bench_run, data, split):
    path = data / "tone" / f"{split}.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "positive" not in line))
    with pytest.raises(DataError, match=r"has no .* text of the class 'positive'"):
        bench_run(backbones=["/no/such/model"])


def test_a_folder_that_cannot_be_written_is_refused(bench_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        bench_run(output=tmp_path / "file" / "out", backbones=["/no/such/model"])


@pytest.mark.parametrize("name", ["predictions", "records.jsonl"])
def test_what_cannot_be_written_later_is_one_line(bench_run, tmp_path, monkeypatch, name):
    def block(made: FakeMethod) -> None:
        place = tmp_path / "out" / name
        place.parent.mkdir()
        place.write_text("") if name == "predictions" else place.mkdir()

    monkeypatch.setattr(baselines, "make", fake(block))
    with pytest.raises(
        BenchError, match=rf"{name}.*: cannot be written \(.+\); make room, or choose a folder"
    ) as raised:
        bench_run()
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_folder_with_a_saved_classifier_is_refused(bench_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "verbtune.json").write_text("{}")
    with pytest.raises(BenchError, match="out: holds a saved classifier; choose another folder"):
        bench_run(backbones=["/no/such/model"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verbtune.json"]


def test_what_fails_before_the_first_measurement_leaves_nothing_behind(bench_run, tmp_path):
    with pytest.raises(BackboneError):
        bench_run(backbones=["/no/such/model"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "method"), [("matplotlib", "majority"), ("peft", "lora")])
def test_a_missing_extra_is_named(bench_run, monkeypatch, module, method):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(BenchError, match=rf"needs {module} .*pip install 'verbtune\[bench\]'"):
        bench_run(methods=(method,), backbones=["/no/such/model"])


def test_peak_memory_is_what_the_work_held():
    held = 64 << 20

    def work() -> None:
        block = np.ones(held, dtype=np.uint8)
        time.sleep(0.1)
        del block

    for _ in range(2):  # the second time the memory could be there already
        seconds, peak = bench._watched(work, torch.device("cpu"))
        assert seconds > 0.1
        assert peak == pytest.approx(held / 1e6, abs=8)


def test_fine_tuning_of_an_lm_in_16_bits_trains_in_32(task) -> None:
    original = tiny("bert")
    shared = Backbone(copy.deepcopy(original.model).bfloat16(), original.tokenizer)
    before = shared.model.state_dict()["bert.embeddings.word_embeddings.weight"].clone()
    made = baselines.make("fine-tuning", task, shared, seed=0).set_params(steps=2)
    made.fit([{"text": "great"}, {"text": "bad"}], ["positive", "negative"])
    assert made.compiled_.backbone.model.dtype == torch.float32
    trained = made.compiled_.backbone.model.state_dict()["bert.embeddings.word_embeddings.weight"]
    assert not torch.equal(trained, before.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = made.compiled_.infer([{"text": "great"}, {"text": "bad"}])
    assert not torch.equal(scores, scores.bfloat16().float())  # as precise as the frozen methods'
    assert shared.model.dtype == torch.bfloat16
    assert torch.equal(shared.model.state_dict()["bert.embeddings.word_embeddings.weight"], before)
    assert made.predict_proba([{"text": "great"}]).sum() == pytest.approx(1)
