"""The bench: every method on every task, on the same few labelled texts, again and again.

A finished measurement is a line of `records.jsonl`, so that an interrupted bench goes on where it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from . import baselines
from .artifact import STATE_FILE
from .backbone import Backbone
from .data import DataError, Split, Splits, checksum, load_splits, sample_shots
from .metrics import score
from .summary import Record, label, summarize
from .task import Task

__all__ = [
    "SEEDS",
    "BenchError",
    "Failure",
    "Outcome",
    "predictions",
    "run",
    "write_whole",
]

SEEDS = (13, 21, 42, 87, 100)
WITH_PROMPT_LENGTH = ("soft-prompt", "verbtune")
SAMPLING_SECONDS = 0.005
IDENTITY = (
    *("task", "method", "model", "shots", "seed", "prompt_length"),
    *("split_checksum", "model_fingerprint", "task_checksum", "method_checksum"),
)


class BenchError(ValueError):
    """A bench that cannot start or go on: names what is wrong and the remedy."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A method that ended with an error where others went on."""

    task: str
    method: str
    model: str
    shots: int
    seed: int
    prompt_length: int | None
    error: str
    traceback: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a bench found, in the order in which it was asked."""

    records: list[Record]
    failures: list[Failure]


@dataclasses.dataclass(frozen=True)
class _Job:
    task: Task
    backbone: Backbone
    method: str
    shots: int
    seed: int
    prompt_length: int | None
    train: Split
    test: Split
    split_checksum: str

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, in the words of a record."""
        return {
            "task": self.task.task,
            "method": self.method,
            "model": _name(self.backbone),
            "shots": self.shots,
            "seed": self.seed,
            "prompt_length": self.prompt_length,
        }

    def identity(self, classifier: Any) -> dict[str, Any]:
        """What a record must agree in to be this job's: the names are `IDENTITY`, the values plain JSON."""
        return {
            **self.asked,
            "split_checksum": self.split_checksum,
            "model_fingerprint": self.backbone.fingerprint,
            "task_checksum": _digest(self.task.to_yaml()),
            "method_checksum": _method_checksum(classifier),
        }


def run(
    tasks: Sequence[Any],
    backbones: Sequence[Any],
    *,
    output: str | Path,
    methods: Sequence[str] = tuple(baselines.METHODS),
    shots: Sequence[int] = (16,),
    seeds: Sequence[int] = SEEDS,
    data: str | Path | None = None,
    prompt_lengths: Sequence[int | None] = (None,),
    limit: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Fit and score every method on every task, with the same texts for all of them.

    What can be checked cheaply is checked first. Every finished measurement is appended to
    `output/records.jsonl`, its probabilities go to `output/predictions`, and all that was asked for goes to
    `output/results.json` at the end. A measurement that is there already, of the same texts, task spec, LM,
    parameters and version of verbtune, is not repeated. A method that ends with an error does not end the bench.

    Parameters
    ----------
    tasks : sequence of str, Path, dict or Task
    backbones : sequence of str, Path or Backbone
    output : str or Path
        A folder, made if it is not there; none that holds a saved classifier.
    methods : sequence of str
        Of `verbtune.baselines.METHODS`.
    shots : sequence of int
        Training texts of each class.
    seeds : sequence of int
        Each draws its own training texts.
    data : str or Path, optional
        A folder with `<task>/train.jsonl` and `test.jsonl`; default: the bundled data or the hub.
    prompt_lengths : sequence of int or None
        For the methods with a soft prompt; None is their default. The others run once.
    limit : int, optional
        Most test texts of a task, chosen class by class, the same for all seeds.
    progress : bool
        Draw a bar on standard error, if that is a terminal.

    Returns
    -------
    Outcome

    Raises
    ------
    BenchError, TaskError, DataError, BackboneError
        Before the first fit: what is wrong, and the remedy.
    KeyboardInterrupt
        On Ctrl-C; what is finished stays recorded.
    """
    output = Path(output)
    _check_arguments(tasks, backbones, methods, shots, seeds, prompt_lengths, limit)
    _check_imports(methods)
    _check_writable(output)
    specs = [Task.load(task) for task in tasks]
    _check_distinct("task", [spec.task for spec in specs])
    splits = [_load(spec, Path(data) if data else None, limit) for spec in specs]
    models = [Backbone.load(backbone) for backbone in backbones]
    _check_distinct("model", [_name(model) for model in models])
    jobs = list(_jobs(specs, splits, models, methods, shots, seeds, prompt_lengths))

    finished = _read_records(output / "records.jsonl")
    records: list[Record] = []
    failures: list[Failure] = []
    bar = tqdm(total=len(jobs), desc="bench", disable=not (progress and sys.stderr.isatty()))
    with bar, _quick_collection():
        for job in jobs:
            bar.set_postfix_str(f"{job.task.task}, {label(job.method, job.prompt_length)}, seed {job.seed}")
            probabilities = None
            try:
                made = baselines.make(
                    job.method, job.task, job.backbone, seed=job.seed, prompt_length=job.prompt_length
                )
                record = finished.get(_key(job.identity(made)))
                if record is None or not _predictions_file(output, record).is_file():
                    record, probabilities = _measure(job, made)
            except Exception as error:
                failures.append(_failure(job, error))
            else:
                if probabilities is not None:
                    _store(record, probabilities, job.test.labels, output)
                records.append(record)
            bar.update()
    outcome = Outcome(records, failures)
    plain = dataclasses.asdict(outcome) | {"summary": dataclasses.asdict(summarize(records))}
    write_whole(output / "results.json", json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False))
    return outcome


def _check_arguments(
    tasks: Sequence[Any],
    backbones: Sequence[Any],
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    prompt_lengths: Sequence[int | None],
    limit: int | None,
) -> None:
    plain: dict[str, Sequence[Any]] = {
        "method": methods,
        "number of shots": shots,
        "seed": seeds,
        "prompt length": prompt_lengths,
    }
    for noun, values in {"task": tasks, "model": backbones, **plain}.items():
        if not values:
            raise BenchError(f"no {noun} given; give at least one")
    for noun, values in plain.items():
        _check_distinct(noun, values)
    for method in methods:
        if method not in baselines.METHODS:
            raise BenchError(f"no method called {method!r}; the methods are {', '.join(baselines.METHODS)}")
    for noun, numbers, low in (
        ("shots", shots, 1),
        ("seed", seeds, 0),
        ("prompt length", [n for n in prompt_lengths if n is not None], 0),
        ("limit", [] if limit is None else [limit], 1),
    ):
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or number < low:
                raise BenchError(f"{noun} {number!r} is not a whole number from {low}; give one that is")


def _check_distinct(noun: str, values: Sequence[Any]) -> None:
    repeated = [v for i, v in enumerate(values) if v in values[:i]]
    if repeated:
        raise BenchError(f"the {noun} {repeated[0]!r} is given twice; give it once")


def _check_imports(methods: Sequence[str]) -> None:
    # Imported here, so that the first fit does not pay for it in seconds and memory.
    needed = ["matplotlib", "psutil"] + ["peft"] * ("lora" in methods)
    for module in needed:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BenchError(f"the bench needs {module} ({error}); pip install 'verbtune[bench]'") from None


def _check_writable(output: Path) -> None:
    try:
        if (output / STATE_FILE).exists():
            raise BenchError(f"{output}: holds a saved classifier; choose another folder")
        # What fails before the first measurement leaves nothing behind, so that no folder is made here.
        there = next(path for path in (output / "predictions", output, *output.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _no_writing(output, error) from None


def _no_writing(path: Path, error: OSError) -> BenchError:
    return BenchError(f"{path}: cannot be written ({error.strerror}); make room, or choose a folder you may write")


def _load(task: Task, data: Path | None, limit: int | None) -> Splits:
    splits = load_splits(task, data)
    for name, split in (("training", splits.train), ("test", splits.test)):
        missing = [c for c in task.classes if c not in split.labels]
        if missing:
            raise DataError(
                f"the task {task.task!r} has no {name} text of the class {missing[0]!r}; add one, or take the class "
                "out of its verbalizer"
            )
    if limit is None or limit >= len(splits.test):
        return splits
    if limit < len(task.classes):
        raise BenchError(f"limit {limit} is less than the {len(task.classes)} classes of {task.task!r}; raise it")
    return Splits(splits.train, splits.test.take(_stratified(splits.test.labels, limit)))


def _stratified(labels: Sequence[str], n: int) -> list[int]:
    """Choose n rows by index: of every class at least one and otherwise its share; always the same."""
    rng = np.random.default_rng(0)
    depth = np.empty(len(labels))  # how far down its class's list a row stands, from 0 to 1
    for name in sorted(set(labels)):
        rows = rng.permutation([i for i, v in enumerate(labels) if v == name])
        depth[rows] = np.arange(len(rows)) / len(rows)
    chosen: list[int] = np.lexsort((rng.permutation(len(labels)), depth))[:n].tolist()
    return sorted(chosen)


def _jobs(
    specs: Sequence[Task],
    splits: Sequence[Splits],
    models: Sequence[Backbone],
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    prompt_lengths: Sequence[int | None],
) -> Iterator[_Job]:
    for model, (spec, split), k, seed in itertools.product(models, zip(specs, splits, strict=True), shots, seeds):
        train = split.train.take(sample_shots(split.train.labels, k, seed))
        total = checksum([train, split.test])
        for method in methods:
            for length in prompt_lengths if method in WITH_PROMPT_LENGTH else (None,):
                yield _Job(spec, model, method, k, seed, length, train, split.test, total)


def _name(backbone: Backbone) -> str:
    return backbone.name or type(backbone.model).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _method_checksum(classifier: Any) -> str:
    # What a caller's factory changes besides, such as a `fit` of its own, cannot be seen: it needs another name.
    kind = type(classifier)
    asked = sorted((k, v) for k, v in classifier.get_params(deep=False).items() if k not in ("task", "model"))
    return _digest(f"{kind.__module__}.{kind.__qualname__}{asked!r}")


def _key(identity: Mapping[str, Any]) -> str:
    return _digest(json.dumps(identity, sort_keys=True))


def _record_key(record: Record) -> str:
    return _key({name: getattr(record, name) for name in IDENTITY})


def _read_records(path: Path) -> dict[str, Record]:
    """Read the finished measurements of this version, by key; remove a last line that was cut."""
    if not path.is_file():
        return {}
    try:
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(path, end)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}); choose another folder") from None
    finished = {}
    for number, line in enumerate(whole[:end].splitlines(), 1):
        try:
            plain = json.loads(line)
            if plain["versions"]["verbtune"] != metadata.version("verbtune"):
                continue
            record = Record(**plain)
        except (ValueError, TypeError, KeyError) as error:
            raise BenchError(
                f"{path}:{number}: no record of a bench ({type(error).__name__}: {error}); remove the line, or choose "
                "another folder"
            ) from None
        finished[_record_key(record)] = record
    return finished


def _measure(job: _Job, classifier: Any) -> tuple[Record, NDArray[np.float64]]:
    """Fit, ask and score: the record, and the probabilities (N, C) of the sorted classes."""
    identity = job.identity(classifier)
    with _interrupts() as interrupts:
        fit_seconds, peak = _watched(lambda: classifier.fit(job.train.rows, job.train.labels), job.backbone.device)
        # A training loop that keeps its best step on Ctrl-C has not finished for us.
        if interrupts:
            raise KeyboardInterrupt
    start = time.perf_counter()
    probabilities = classifier.predict_proba(job.test.rows)
    predict_seconds = time.perf_counter() - start
    scores: dict[str, Any] = score(probabilities, job.test.labels, classifier.classes_.tolist())
    record = Record(
        **identity,
        **scores,
        n_train=len(job.train),
        n_test=len(job.test),
        trained_parameters=int(classifier.trained_parameters_),
        artifact_bytes=int(classifier.artifact_bytes_),
        fit_seconds=fit_seconds,
        predict_seconds=predict_seconds,
        peak_memory_mb=peak,
        versions={
            **{name: metadata.version(name) for name in ("verbtune", "torch", "transformers", "scikit-learn")},
            "python": platform.python_version(),
        },
    )
    return record, probabilities


def _store(record: Record, probabilities: NDArray[np.float64], labels: Sequence[str], output: Path) -> None:
    """Put a measurement on disk: its probabilities first, so that a record always has them."""
    classes, truth = np.unique(labels, return_inverse=True)
    packed = io.BytesIO()
    np.savez_compressed(
        packed, probabilities=probabilities.astype(np.float32), truth=truth.astype(np.uint16), classes=classes
    )
    line = json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(_predictions_file(output, record), packed.getvalue())
    path = output / "records.jsonl"
    try:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(line)
    except OSError as error:
        raise _no_writing(path, error) from None


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note the Ctrl-C signals that come while it is open, those included that someone below catches."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # others never get the signal
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)


def _watched(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds that the work took, and by how many MB it raised the memory in use at most."""
    import psutil  # type: ignore[import-untyped]  # part of the bench extra

    process = psutil.Process()
    done = threading.Event()
    gc.collect()
    _return_free_memory()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_SECONDS):
            peak = max(peak, process.memory_info().rss)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    watcher = threading.Thread(target=watch, daemon=True)
    start = time.perf_counter()
    watcher.start()
    try:
        work()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    peak = max(peak, process.memory_info().rss)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return seconds, (peak - before) / 1e6


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """While open, `gc.collect` passes over what was there before: modules and models, 0.3 s a time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _return_free_memory() -> None:
    # glibc keeps what one fit freed; the next finds it there and seems to need none (180 MB measured as 0).
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _failure(job: _Job, error: Exception) -> Failure:
    reason = " ".join(str(error).split())
    said = reason if reason and isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
    return Failure(**job.asked, error=said, traceback="".join(traceback.format_exception(error)))


def _predictions_file(output: Path, record: Record) -> Path:
    return output / "predictions" / f"{record.task}.{record.method}.{record.seed}.{_record_key(record)[:16]}.npz"


def predictions(output: str | Path, record: Record) -> tuple[NDArray[Any], NDArray[Any], list[str]]:
    """Read what a record's method said.

    Returns
    -------
    probabilities : ndarray of shape (N, C), float32
    truth : ndarray of shape (N,)
        Indices of the true classes.
    classes : list of str, length C
    """
    path = _predictions_file(Path(output), record)
    try:
        with np.load(path, allow_pickle=False) as saved:
            return saved["probabilities"], saved["truth"].astype(np.intp), saved["classes"].tolist()
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BenchError(f"{path}: cannot be read ({error}); remove it and run the bench again") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it when it is whole.

    Raises
    ------
    BenchError
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _no_writing(path, error) from None
