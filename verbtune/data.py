"""Examples: what users hand over, what files hold, and fair few-shot samples of it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import numbers
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from .encode import Row
from .task import Task, tasks_folder

__all__ = [
    "DataError",
    "Split",
    "Splits",
    "check_labels",
    "check_row",
    "check_rows",
    "check_weights",
    "checksum",
    "form_of",
    "load_splits",
    "open_text",
    "read_split",
    "sample_shots",
    "stream_rows",
]

MOST_CHARACTERS = 1 << 27
INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # controls, marks without width, spaces: some are no tokens
FORMATS = {"": "text", ".txt": "text", ".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}
UNDECODED = "surrogateescape"  # keeps bytes that are no UTF-8, so that the line they stand in can be named


class DataError(ValueError):
    """Texts, labels or a data file that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of texts and their labels."""

    rows: list[Row]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Sequence[int]) -> Split:
        """The rows of the given indices, in that order."""
        return Split([self.rows[i] for i in index], [self.labels[i] for i in index])


@dataclasses.dataclass(frozen=True)
class Splits:
    """A task's data."""

    train: Split
    test: Split
    validation: Split | None = None


def check_rows(X: Any, fields: Sequence[str]) -> list[Row]:
    """Texts in any of the usual forms as a list of field → text.

    Parameters
    ----------
    X : list, ndarray or Series of str; list of dict; or DataFrame
        Bare strings only for a task of one field; dicts and frames are keyed by field.
    fields : sequence of str

    Raises
    ------
    DataError
        Naming the row and what is wrong with it.
    """
    if isinstance(X, str | bytes | Mapping):
        raise DataError(f"expected a list of texts, got a single {type(X).__name__}; put it in a list")
    if hasattr(X, "columns") and hasattr(X, "to_dict"):
        missing = [name for name in fields if name not in X.columns]
        if missing:
            raise DataError(f"the table has no column {missing[0]!r}; its columns are {list(X.columns)}")
        X = X[list(fields)].to_dict("records")
    if hasattr(X, "ndim") and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    try:
        items = list(X)
    except TypeError:
        raise DataError(f"expected a list of texts, got {type(X).__name__}") from None
    if not items:
        raise DataError("Found array with 0 sample(s): give at least one text")
    return [check_row(item, fields, f"row {i}") for i, item in enumerate(items)]


def check_row(item: Any, fields: Sequence[str], where: str) -> Row:
    """One text, or a mapping of field → text, as a row; what is wrong with it is said with `where` in front.

    Raises
    ------
    DataError
    """
    if not isinstance(item, Mapping):
        if len(fields) > 1:
            raise DataError(
                f"{where}: this task reads {', '.join(fields)}; give a dict with these keys, not {item!r:.60}"
            )
        item = {fields[0]: item}
    row = {}
    for name in fields:
        if name not in item:
            raise DataError(f"{where}: the field {name!r} is missing; it has {', '.join(map(str, item))}")
        text = item[name]
        if not isinstance(text, str):
            raise DataError(f"{where}: {name} is {text!r:.60} ({type(text).__name__}), not a text")
        if all(unicodedata.category(character) in INVISIBLE for character in text):
            raise DataError(f"{where}: {name} is empty; remove the row or give it a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {name} has a lone surrogate at character {error.start}; decode it properly, or clean it "
                "with text.encode('utf-8', 'replace').decode()"
            ) from None
        row[name] = str(text)
    return row


def check_labels(y: Any, n_rows: int, task: Task) -> tuple[NDArray[Any], tuple[str, ...], NDArray[np.intp]]:
    """Labels as the classes that occur, their names in the spec, and an index for every row.

    Parameters
    ----------
    y : array-like of str or int, length n_rows
        Class names, or integers that count the spec's classes from 0. No booleans: which class is True is not said.

    Returns
    -------
    classes : ndarray of shape (C,)
        The distinct labels, sorted, as the user writes them.
    names : tuple of str, length C
        The spec's names of these classes.
    codes : ndarray of shape (n_rows,)
        Index into `classes` for every row.

    Raises
    ------
    DataError
    """
    if y is None:
        raise DataError("requires y to be passed, but the target y is None; give a label for every text")
    if isinstance(y, Iterator):
        y = list(y)
    try:
        labels = np.asarray(y)
    except ValueError:
        raise DataError(f"{n_rows} texts but labels of different lengths; give one label for every text") from None
    # In a list of names numpy would turn NaN into "nan" and 1 into "1".
    values = list(y) if labels.ndim == 1 and isinstance(y, list | tuple) else labels.ravel().tolist()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != n_rows:
        raise DataError(f"{n_rows} texts but labels of shape {labels.shape}; give one label for every text")
    for i, value in enumerate(values):
        if _missing(value):
            raise DataError(f"row {i}: the label is {value}; Input y contains NaN or None: remove the row or label it")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | numbers.Integral):
            raise DataError(
                f"row {i}: the label {value!r:.60} is neither a class name nor a whole number; give class names, or "
                "whole numbers from 0 in the order of the spec's classes"
            )
    known: dict[Any, str]
    if all(isinstance(v, numbers.Integral) for v in values):
        labels = np.array(values) if labels.dtype.kind == "O" else labels
        known = dict(enumerate(task.classes))
        spelled = f"0 to {len(known) - 1}, in the order {', '.join(task.classes)}"
    else:
        labels = labels.astype(str) if labels.dtype.kind != "O" else labels
        known = {name: name for name in task.classes}
        spelled = ", ".join(task.classes)
    unknown = [v for v in values if v not in known]
    if unknown:
        raise DataError(
            f"Unknown label type: {unknown[0]!r} is no class of the task {task.task!r}; its classes are {spelled}"
        )
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"all labels are one class, {classes.item(0)!r}; a classifier needs examples of at least two")
    return classes, tuple(known[c] for c in classes.tolist()), codes.astype(np.intp)


def check_weights(sample_weight: Any, n: int) -> NDArray[np.float64]:
    """Sample weights as an array of length n; the mean of those that are not 0 is 1.

    Raises
    ------
    DataError
        If there are not n numbers, one is negative or not finite, or all are zero.
    """
    if sample_weight is None:
        return np.ones(n)
    try:
        weights = np.asarray(sample_weight, dtype=float)
    except (ValueError, TypeError) as error:
        raise DataError(f"sample_weight: {error}; give each of the {n} texts a number, 0 or more") from None
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise DataError(
            f"sample_weight of shape {weights.shape} for {n} texts; give each a finite number, 0 or more, not all zero"
        )
    scaled: NDArray[np.float64] = weights / weights[weights > 0].mean()
    return scaled


def _missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA knows neither
        return True


def read_split(path: Path, task: Task) -> Split:
    """A labelled split from a JSONL or CSV file with the task's fields and `label`: a class, or its number from 0.

    Raises
    ------
    DataError
        Naming the file and line.
    """
    rows: list[Row] = []
    labels: list[str] = []
    form = form_of(path)
    # CSV has no numbers but their digits, which may be the names of classes as well.
    counted = form == "csv" and not any(name.isdecimal() for name in task.classes)
    names = {str(i): name for i, name in enumerate(task.classes)} if counted else {}
    with open_text(path) as stream:
        for where, record, row in stream_rows(stream, task, name=str(path), form=form):
            if "label" not in record:
                raise DataError(f"{where}: no 'label'; a training or test row needs one")
            label = record["label"]
            labels.append(_class_name(names.get(str(label), label), task, where))
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows; give it at least one for each class")
    return Split(rows, labels)


def _class_name(label: Any, task: Task, where: str) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(task.classes):
        return task.classes[label]
    if label not in task.classes:
        raise DataError(
            f"{where}: the label {label!r:.60} is no class of the task {task.task!r}; "
            f"its classes are {', '.join(task.classes)}"
        )
    return str(label)


def form_of(path: Path, default: str | None = None) -> str:
    """The format of a file, by its suffix: csv, jsonl, or text, one a line; of another suffix the default.

    Raises
    ------
    DataError
        If the suffix says nothing and there is no default.
    """
    form = FORMATS.get(path.suffix.lower(), default)
    if form is None:
        raise DataError(
            f"{path}: the suffix {path.suffix} says no format; use one of {', '.join(filter(None, FORMATS))}"
        )
    return form


def open_text(path: Path) -> TextIO:
    """Open a file for `stream_rows`: as UTF-8, whatever the locale says.

    Raises
    ------
    DataError
        If it cannot be opened.
    """
    try:
        return path.open(encoding="utf-8-sig", errors=UNDECODED, newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def stream_rows(stream: TextIO, task: Task, *, name: str, form: str) -> Iterator[tuple[str, dict[str, Any], Row]]:
    """Rows of a file or stream one by one, never the whole of it at once.

    Parameters
    ----------
    stream : TextIO
        Decoded with `errors=UNDECODED`, so that bytes that are no UTF-8 can be refused by line.
    task : Task
    name : str
        How messages call the stream.
    form : {"text", "csv", "jsonl"}
        In text every line is a text, for tasks that read one.

    Yields
    ------
    where : str
        Name and line.
    record : dict
        Everything that stands there.
    row : Row
        The task's texts in it.

    Raises
    ------
    DataError
        Naming name and line.
    """
    if form == "text" and len(task.fields) > 1:
        raise DataError(f"{name}: the task {task.task!r} reads {', '.join(task.fields)}; use CSV or JSONL")
    lines = _utf8(stream, name)
    if form == "csv":
        records = _csv_records(lines, name)
    elif form == "jsonl":
        records = _json_records(lines, name)
    else:
        records = ((number, {task.fields[0]: line.rstrip("\r\n")}) for number, line in enumerate(lines, 1))
    for number, record in records:
        where = f"{name}:{number}"
        yield where, record, check_row(record, task.fields, where)


def _utf8(stream: TextIO, name: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8 (byte 0x{ord(line[error.start]) & 0xFF:02x} at character {error.start}); "
                "convert the file first"
            ) from None
        yield line


def _csv_records(lines: Iterator[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MOST_CHARACTERS)  # the default refuses texts of 131,072 characters
    table = csv.DictReader(lines, strict=True)  # or else a stray quote swallows the rest of the file
    last = 0
    try:
        names = list(table.fieldnames or ())
        n = len(names)
        for column, count in Counter(names).items():
            if column and count > 1:  # spreadsheets end a header with columns of no name
                raise DataError(f"{name}:1: {count} columns are named {column!r}; rename or remove all but one")
        last = table.line_num
        for record in table:
            if None in record:
                raise DataError(
                    f"{name}:{table.line_num}: {n + len(record[None])} cells but {n} column{'' if n == 1 else 's'}; "
                    "put texts with commas in quotes"
                )
            last = table.line_num
            yield last, record
    except csv.Error as error:
        raise DataError(
            f"{name}:{last + 1}: not readable as CSV ({error}); end every quoted text with a quote, and double "
            "the quotes inside it"
        ) from None


def _json_records(lines: Iterator[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not a line of JSON ({error}); write one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f'{name}:{number}: expected an object such as {{"text": …}}, got {line.strip():.60}')
        yield number, record


def load_splits(task: Task, folder: Path | None = None) -> Splits:
    """A task's data: from `folder/<task>/{train,validation,test}.jsonl`, the hub, or the bundled files.

    Raises
    ------
    DataError
        If there is no data, or it does not fit the spec.
    """
    root = (folder or tasks_folder()) / task.task
    # A spec of the user's own that says where its data is may have the name of a bundled one.
    if folder or (task.dataset is None and (root / "train.jsonl").is_file()):
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; --data takes a folder that holds {task.task}/train.jsonl")
        held_out = root / "validation.jsonl"
        return Splits(
            read_split(root / "train.jsonl", task),
            read_split(root / "test.jsonl", task),
            read_split(held_out, task) if held_out.is_file() else None,
        )
    if task.dataset is None:
        raise DataError(
            f"the task {task.task!r} has no data of its own and no dataset: block; "
            f"give a folder with {task.task}/train.jsonl and test.jsonl (--data)"
        )
    return _load_hub(task)


def _load_hub(task: Task) -> Splits:
    import datasets  # takes a second to import, and most runs do not need it

    source = task.dataset
    assert source is not None
    splits: dict[str, Split] = {}
    for split, name in (("train", source.train), ("test", source.test), ("validation", source.validation)):
        if name is None:
            continue
        try:
            data = datasets.load_dataset(source.path, source.name, revision=source.revision, split=name)
            columns = [list(data[column]) for column in (source.label, *source.fields.values())]
        except Exception as error:  # datasets raises many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"cannot load {source.path!r} from the hub: {reason}; give the data as a folder instead (--data)"
            ) from error
        splits[split] = Split([], [])
        for i, (label, *texts) in enumerate(zip(*columns, strict=True)):
            where = f"{source.path}: {name}: row {i}"
            splits[split].labels.append(_class_name(label, task, where))
            splits[split].rows.append(check_row(dict(zip(source.fields, texts, strict=True)), task.fields, where))
    return Splits(**splits)


def sample_shots(labels: Sequence[str], shots: int, seed: int) -> list[int]:
    """Indices of `shots` rows a class, all of a class that has fewer; the same for the same labels and seed."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for name in sorted(set(labels)):
        rows = [i for i, label in enumerate(labels) if label == name]
        chosen += rng.permutation(rows)[:shots].tolist()
    return [chosen[i] for i in rng.permutation(len(chosen))]


def checksum(splits: Iterable[Split]) -> str:
    """SHA-256 of texts and labels, in order: equal if and only if two runs saw the same data."""
    digest = hashlib.sha256()
    for split in splits:
        for row, label in zip(split.rows, split.labels, strict=True):
            digest.update(json.dumps([dict(row), label], sort_keys=True).encode() + b"\n")
        digest.update(b"\f")
    return digest.hexdigest()
