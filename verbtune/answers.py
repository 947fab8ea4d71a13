"""Answers to a stream of texts: a chunk at a time, in the order and with the columns of the texts."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .classifier import PromptClassifier
from .data import UNDECODED, DataError, open_text, stream_rows
from .encode import Row
from .rejection import most_probable

__all__ = ["stream_answers"]

ROWS_PER_CHUNK = 4096
ODD = "backslashreplace"  # of what an encoding lacks; in JSON it is the right way to write a lone surrogate

_Named = tuple[str, dict[str, Any], Row]  # where it stands, everything there, and the task's texts
_Answer = tuple[dict[str, Any], Any, dict[str, float] | None]  # everything there, the label, and probabilities


def stream_answers(
    clf: PromptClassifier,
    source: Path | None,
    output: Path | None,
    *,
    form_in: str,
    form_out: str,
    proba: bool = False,
    least: float | None = None,
) -> None:
    """Classify the texts of a file, and write what was found, never holding more than a chunk of either.

    Parameters
    ----------
    clf : PromptClassifier
    source, output : Path, optional
        Default: standard input and output. An output file gets its name only when it is whole.
    form_in, form_out : {"text", "csv", "jsonl"}
        As text a label on each line, as CSV and JSONL with the input's columns.
    proba : bool
        Whether to give the probabilities as well; as text that of the label.
    least : float, optional
        Probability of a label that is given; where it is lower, the label is empty, in JSONL null.

    Raises
    ------
    DataError
        If the input has an error, of which it names the line, or the output cannot be written.
    """
    with _reading(source) as lines, _writing(output) as stream:
        rows = stream_rows(lines, clf.task_, name=str(source or "standard input"), form=form_in)
        if form_out != "text":
            of_classes = ["probabilities"] if form_out == "jsonl" else [f"p({name})" for name in clf.classes_.tolist()]
            rows = _kept(rows, form_out, ["prediction", *of_classes] if proba else ["prediction"])
        _WRITERS[form_out](stream, _answers(clf, rows, proba=proba, least=least, on_screen=output is None))


def _kept(rows: Iterator[_Named], form: str, added: Sequence[str]) -> Iterator[_Named]:
    """Pass rows on, but refuse one of which the output would lose a column."""
    columns: Collection[str] = ()
    for where, record, row in rows:
        columns = columns or record.keys()
        for name in record:
            if name in added:
                raise DataError(f"{where}: the column {name!r} would be overwritten with what predict says; rename it")
            if form == "csv" and name not in columns:
                raise DataError(f"{where}: the column {name!r} is not in the first row, as CSV wants it; write JSONL")
        yield where, record, row


def _answers(
    clf: PromptClassifier, rows: Iterator[_Named], *, proba: bool, least: float | None, on_screen: bool
) -> Iterator[_Answer]:
    classes = [str(name) for name in clf.classes_.tolist()]
    hidden = not sys.stderr.isatty() or (on_screen and sys.stdout.isatty())
    with tqdm(desc="predicting", unit=" texts", disable=hidden, leave=False) as bar:
        while chunk := list(itertools.islice(rows, ROWS_PER_CHUNK)):
            probabilities = clf.predict_proba([row for _, _, row in chunk])
            labels = most_probable(clf.classes_, probabilities, least).tolist()
            for (_, record, _), label, p in zip(chunk, labels, probabilities.tolist(), strict=True):
                yield record, label, dict(zip(classes, p, strict=True)) if proba else None
            bar.update(len(chunk))


def _write_lines(stream: TextIO, answers: Iterator[_Answer]) -> None:
    for _, label, probabilities in answers:
        highest = "" if probabilities is None else f"\t{max(probabilities.values()):.6f}"
        stream.write(f"{'' if label is None else label}{highest}\n")


def _write_csv(stream: TextIO, answers: Iterator[_Answer]) -> None:
    writer = None
    for record, label, probabilities in answers:
        columns = {f"p({name})": f"{p:.6f}" for name, p in (probabilities or {}).items()}
        record = {**record, "prediction": label, **columns}
        if writer is None:
            writer = csv.DictWriter(stream, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)


def _write_jsonl(stream: TextIO, answers: Iterator[_Answer]) -> None:
    for record, label, probabilities in answers:
        extra = {} if probabilities is None else {"probabilities": probabilities}
        stream.write(json.dumps({**record, "prediction": label, **extra}, ensure_ascii=False) + "\n")


_WRITERS: dict[str, Callable[[TextIO, Iterator[_Answer]], None]] = {
    "text": _write_lines,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
}


@contextlib.contextmanager
def _reading(path: Path | None) -> Iterator[TextIO]:
    """Open the input as UTF-8, whatever the locale says."""
    if path is None:
        yield _utf8(sys.stdin, "utf-8-sig", UNDECODED)
        return
    with open_text(path) as stream:
        yield stream


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[TextIO]:
    """Open the output as UTF-8; a file gets its name only when it is whole."""
    if path is None:
        yield _utf8(sys.stdout, "utf-8", ODD)
        return
    whole = not path.exists() or path.is_file()  # and no pipe or device
    path = path.resolve() if whole else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}") if whole else path
    try:
        stream = temporary.open("w", encoding="utf-8", errors=ODD, newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with stream:
            yield stream
        if whole:
            temporary.replace(path)
    except BaseException:
        if whole:
            temporary.unlink()
        raise


def _utf8(stream: TextIO, encoding: str, errors: str) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding=encoding, errors=errors, newline="")
    return stream
