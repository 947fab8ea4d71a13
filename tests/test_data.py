"""Texts, labels and data files: every usual form is read, every bad one is one clear line."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from verbtune.data import (
    DataError,
    Split,
    Splits,
    check_labels,
    check_rows,
    checksum,
    form_of,
    load_splits,
    open_text,
    read_split,
    sample_shots,
    stream_rows,
)
from verbtune.task import Task

TONE = Task.from_dict(
    {"task": "tone", "template": "{text} {answer}", "verbalizer": {"neg": ["bad"], "pos": ["good"], "mid": ["so-so"]}}
)
PAIR = Task.from_dict(
    {"task": "pair", "template": "{text_a} {text_b} {answer}", "verbalizer": {"no": ["no"], "yes": ["yes"]}}
)
NAN = float("nan")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- texts -------------------------------------------------------------------------------------------------------------

TEXTS = ["Good.", "Bad, [MASK] {answer} 🙂\0"]


@pytest.mark.parametrize(
    "X",
    [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS, dtype=object),
        np.array(TEXTS, dtype=object)[:, None],
        pd.Series(TEXTS, index=[7, 7]),
        pd.Series(TEXTS, dtype="string"),
        pd.DataFrame({"other": [1, 2], "text": TEXTS}, index=[5, 3]),
        [{"text": t} for t in TEXTS],
        [{"text": t, "more": 1} for t in TEXTS],
    ],
    ids=["list", "tuple", "iterator", "array", "column", "series", "string", "frame", "dicts", "wide"],
)
def test_texts_come_in_any_usual_form(X: Any) -> None:
    assert check_rows(X, ["text"]) == [{"text": t} for t in TEXTS]


def test_texts_are_plain_strings_afterwards() -> None:
    (row,) = check_rows(np.array(["Good."]), ["text"])
    assert type(row["text"]) is str


def test_pairs_are_dicts_or_a_frame() -> None:
    rows = [{"text_a": "A", "text_b": "B"}, {"text_a": "C", "text_b": "D"}]
    assert check_rows(rows, PAIR.fields) == check_rows(pd.DataFrame(rows)[["text_b", "text_a"]], PAIR.fields) == rows


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("Good.", "expected a list of texts, got a single str; put it in a list"),
        (b"Good.", "expected a list of texts, got a single bytes; put it in a list"),
        ({"text": "Good."}, "expected a list of texts, got a single dict; put it in a list"),
        (None, "expected a list of texts, got NoneType"),
        (3, "expected a list of texts, got int"),
        (np.array("Good."), "expected a list of texts, got ndarray"),
        ([], "give at least one text"),
        (pd.Series([], dtype=object), "give at least one text"),
        (["ok", ""], "row 1: text is empty; remove the row or give it a text"),
        (["ok", " \n\t "], "row 1: text is empty"),
        (["ok", "\u3000"], "row 1: text is empty"),
        (["ok", "\ufeff\u200b\0 \u202e"], "row 1: text is empty"),
        (["ok", None], "row 1: text is None (NoneType), not a text"),
        (["ok", NAN], "row 1: text is nan (float), not a text"),
        (["ok", pd.NA], "row 1: text is <NA> (NAType), not a text"),
        (pd.Series(["ok", None]), "row 1: text is"),
        (["ok", 3], "row 1: text is 3 (int), not a text"),
        (["ok", b"x"], "row 1: text is b'x' (bytes), not a text"),
        (["ok", ["x"]], "row 1: text is ['x'] (list), not a text"),
        (np.array([["a", "b"]]), "row 0: text is"),
        ([[1.0, 2.0]], "row 0: text is [1.0, 2.0] (list), not a text"),
        (["ok", "a\ud800"], "row 1: text has a lone surrogate at character 1; decode it properly, or clean it"),
        (["ok", "\udfff"], "row 1: text has a lone surrogate at character 0"),
        ([{"text": "ok"}, {"txt": "x"}], "row 1: the field 'text' is missing; it has txt"),
        ([{"text": "ok"}, {}], "row 1: the field 'text' is missing"),
        (pd.DataFrame({"txt": ["x"]}), "the table has no column 'text'; its columns are ['txt']"),
        (pd.DataFrame({0: ["x"]}), "the table has no column 'text'; its columns are [0]"),
    ],
)
def test_bad_texts_are_one_line_that_names_the_row(X: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        check_rows(X, ["text"])
    assert message in one_line(error)


def test_a_bare_text_is_refused_where_a_pair_is_wanted() -> None:
    with pytest.raises(DataError, match="row 0: this task reads text_a, text_b; give a dict with these keys, not 'x'"):
        check_rows(["x"], PAIR.fields)
    with pytest.raises(DataError, match="row 0: the field 'text_b' is missing; it has text_a"):
        check_rows([{"text_a": "x"}], PAIR.fields)
    with pytest.raises(DataError, match="row 0: text_b is empty"):
        check_rows([{"text_a": "x", "text_b": ""}], PAIR.fields)


def test_a_long_value_is_not_printed_in_full() -> None:
    with pytest.raises(DataError) as error:
        check_rows([["x" * 10_000]], ["text"])
    assert len(one_line(error)) < 200


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y",
    [
        ["pos", "neg", "pos"],
        ("pos", "neg", "pos"),
        np.array(["pos", "neg", "pos"]),
        np.array(["pos", "neg", "pos"], dtype=object),
        np.array(["pos", "neg", "pos"])[:, None],
        pd.Series(["pos", "neg", "pos"], index=[9, 9, 9]),
        pd.Series(["pos", "neg", "pos"], dtype="category"),
        pd.Series(["pos", "neg", "pos"], dtype="string"),
        iter(["pos", "neg", "pos"]),
    ],
    ids=["list", "tuple", "array", "object", "column", "series", "category", "string", "iterator"],
)
def test_names_as_labels(y: Any) -> None:
    classes, names, codes = check_labels(y, 3, TONE)
    assert classes.tolist() == ["neg", "pos"]
    assert names == ("neg", "pos")
    assert codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "y",
    [
        [2, 0, 2],
        np.array([2, 0, 2], dtype=np.int8),
        np.array([2, 0, 2], dtype=np.uint64),
        np.array([2, 0, 2], dtype=object),
        pd.Series([2, 0, 2]),
        pd.Series([2, 0, 2], dtype="Int64"),
        pd.Series([2, 0, 2], dtype="category"),
    ],
    ids=["list", "int8", "uint64", "object", "series", "Int64", "category"],
)
def test_integers_as_labels_count_the_classes_of_the_spec(y: Any) -> None:
    classes, names, codes = check_labels(y, 3, TONE)
    assert classes.tolist() == [0, 2]
    assert classes.dtype.kind in "iu"
    assert names == ("neg", "mid")
    assert codes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "y",
    [[True, False], np.array([True, False]), np.array([1, True], dtype=object), [0, np.True_], [1.0, 0.0]],
    ids=["list", "array", "object", "mixed", "float"],
)
def test_labels_that_do_not_say_which_class_they_mean_are_refused(y: Any) -> None:
    """True would be the second class of the spec, which may be called "no"."""
    with pytest.raises(DataError) as error:
        check_labels(y, 2, TONE)
    assert "is neither a class name nor a whole number; give class names, or whole numbers from 0" in one_line(error)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed, but the target y is None; give a label for every text"),
        (["pos", "neg"], "3 texts but labels of shape (2,); give one label for every text"),
        (["pos", "neg", "pos", "neg"], "3 texts but labels of shape (4,)"),
        ([["pos", "neg"]] * 3, "3 texts but labels of shape (3, 2)"),
        ("pos", "3 texts but labels of shape ()"),
        ([["pos"], ["neg", "pos"], []], "give one label for every text"),
        (["pos", "neg", None], "row 2: the label is None"),
        (["pos", NAN, "neg"], "row 1: the label is nan"),
        ([0, 1, NAN], "row 2: the label is nan"),
        (pd.Series(["pos", "neg", pd.NA]), "row 2: the label is"),
        (pd.Series([0, 1, pd.NA], dtype="Int64"), "row 2: the label is"),
        (np.array([0, 1, "NaT"], dtype="datetime64[D]"), "row"),
        (["pos", "neg", "Pos"], "'Pos' is no class of the task 'tone'; its classes are neg, pos, mid"),
        (["pos", "neg", ""], "'' is no class of the task 'tone'"),
        ([0, 1, 3], "3 is no class of the task 'tone'; its classes are 0 to 2, in the order neg, pos, mid"),
        ([0, 1, -1], "-1 is no class of the task 'tone'"),
        ([0.5, 1.0, 0.0], "row 0: the label 0.5 is neither a class name nor a whole number"),
        ([float("inf"), 1.0, 0.0], "row 0: the label inf is neither a class name nor a whole number"),
        (np.array(["pos", 1, "neg"], dtype=object), "1 is no class of the task 'tone'; its classes are neg"),
        (["pos", "pos", "pos"], "all labels are one class, 'pos'; a classifier needs examples of at least two"),
        ([1, 1, 1], "all labels are one class, 1"),
    ],
)
def test_bad_labels_are_one_line(y: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        check_labels(y, 3, TONE)
    assert message in one_line(error)


def test_a_class_name_that_looks_like_a_number_is_a_name() -> None:
    task = Task.from_dict({"task": "t", "template": "{text} {answer}", "verbalizer": {"1": ["bad"], "0": ["good"]}})
    assert check_labels(["0", "1"], 2, task)[1] == ("0", "1")
    assert check_labels([0, 1], 2, task)[1] == ("1", "0")  # the order of the spec


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


JSONL = '{"text": "Good.", "label": "pos"}\n\n  \n{"label": 0, "text": "Bad\\u2028.", "id": 3}\n'
CSV = 'label,text\npos,Good.\nneg,"Bad,\r\n ""so""."\n'


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_split_from_jsonl(tmp_path: Path, bom: str) -> None:
    split = read_split(write(tmp_path / "a.jsonl", bom + JSONL), TONE)
    assert split == Split([{"text": "Good."}, {"text": "Bad\u2028."}], ["pos", "neg"])
    assert len(split) == 2
    assert split.take([1, 1]) == Split([{"text": "Bad\u2028."}] * 2, ["neg", "neg"])


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_split_from_csv(tmp_path: Path, bom: str) -> None:
    split = read_split(write(tmp_path / "a.csv", bom + CSV), TONE)
    assert split == Split([{"text": "Good."}, {"text": 'Bad,\r\n "so".'}], ["pos", "neg"])


def test_numbers_as_labels_in_csv_are_those_of_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nx,2\ny,0\nz,pos\n")
    assert read_split(path, TONE).labels == ["mid", "neg", "pos"]
    with pytest.raises(DataError, match=r"a.csv:2: the label '3' is no class"):
        read_split(write(path, "text,label\nx,3\n"), TONE)
    stars = dataclasses.replace(TONE, verbalizer={"1": {"bad": 1.0}, "2": {"good": 1.0}})
    assert read_split(write(path, "text,label\nx,1\ny,2\n"), stars).labels == ["1", "2"]
    with pytest.raises(DataError, match=r"a.csv:2: the label '0' is no class"):
        read_split(write(path, "text,label\nx,0\n"), stars)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": "pos"}\n{"text": "x"', "a.jsonl:2: not a line of JSON"),
        ("a.jsonl", "Good.\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", '{"text": "x", "label": ' + "1" * 5000 + "}\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", '["x", "pos"]\n', "a.jsonl:1: expected an object such as"),
        ("a.jsonl", '\n\n{"text": "x"}\n', "a.jsonl:3: no 'label'; a training or test row needs one"),
        ("a.jsonl", '{"text": "x", "label": "good"}\n', "a.jsonl:1: the label 'good' is no class of the task 'tone'"),
        ("a.jsonl", '{"text": "x", "label": 3}\n', "a.jsonl:1: the label 3 is no class"),
        ("a.jsonl", '{"text": "x", "label": -1}\n', "a.jsonl:1: the label -1 is no class"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "a.jsonl:1: the label True is no class"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "a.jsonl:1: the label None is no class"),
        ("a.jsonl", '{"text": "x", "label": ["pos"]}\n', "a.jsonl:1: the label ['pos'] is no class"),
        ("a.jsonl", '{"txt": "x", "label": "pos"}\n', "a.jsonl:1: the field 'text' is missing; it has txt, label"),
        ("a.jsonl", '{"text": "", "label": "pos"}\n', "a.jsonl:1: text is empty"),
        ("a.jsonl", '{"text": NaN, "label": "pos"}\n', "a.jsonl:1: text is nan (float), not a text"),
        ("a.jsonl", '{"text": "\\ud800", "label": "pos"}\n', "a.jsonl:1: text has a lone surrogate at character 0"),
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.jsonl", b'{"text": "\xe9", "label": "pos"}\n', "a.jsonl:1: not UTF-8"),
        ("a.csv", "text,label\nx,pos\ny\n", "a.csv:3: the label None is no class"),
        ("a.csv", "label,text\npos,x\npos\n", "a.csv:3: text is None (NoneType), not a text"),
        ("a.csv", "text\nx\n", "a.csv:2: no 'label'"),
        ("a.csv", "label,txt\npos,x\n", "a.csv:2: the field 'text' is missing; it has label, txt"),
        ("a.csv", "label,text\npos, \n", "a.csv:2: text is empty"),
        ("a.csv", "label,text\n", "a.csv: no rows"),
        ("a.csv", b"label,text\npos,\xff\n", "a.csv:2: not UTF-8"),
        ("a.csv", "label,text\npos,x\nneg,No, thanks, no.\n", "a.csv:3: 4 cells but 2 columns; put texts with commas"),
        ("a.csv", "text,label,text\na,pos,b\n", "a.csv:1: 2 columns are named 'text'; rename or remove all but one"),
        ("a.csv", "text\nNo, thanks.\n", "a.csv:2: 2 cells but 1 column; put texts with commas in quotes"),
        (
            "a.csv",
            'label,text\npos,x\nneg,"No.\npos,x\n',
            "a.csv:3: not readable as CSV (unexpected end of data); end every quoted text with a quote, and double the",
        ),
        ("a.csv", 'label,text\npos,"So" bad.\n', "a.csv:2: not readable as CSV (',' expected after '\"'); end every"),
        ("a.txt", "Good.\n", "a.txt:1: no 'label'"),
        (
            "a.tsv",
            "text\tlabel\nx\tpos\n",
            "a.tsv: the suffix .tsv says no format; use one of .txt, .csv, .json, .jsonl, .ndjson",
        ),
    ],
    ids=range(32),
)
def test_a_bad_file_is_one_line_that_names_file_and_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_split(path, TONE)
    assert one_line(error).startswith(f"{tmp_path}/{message}")
    assert len(one_line(error)) < 400


def test_a_long_csv_text_is_read_and_an_endless_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", 'label,text\npos,"' + "x" * 200_000 + '"\n')
    assert len(read_split(path, TONE).rows[0]["text"]) == 200_000
    monkeypatch.setattr("verbtune.data.MOST_CHARACTERS", 100_000)
    with pytest.raises(DataError, match=r"a.csv:2: not readable as CSV \(field larger than"):
        read_split(path, TONE)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read \(No such file"):
        read_split(tmp_path / "gone.jsonl", TONE)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory"):
        read_split(tmp_path, TONE)


def rows_of(path: Path, task: Task = TONE) -> Iterator[dict[str, str]]:
    with open_text(path) as stream:
        for _, _, row in stream_rows(stream, task, name=path.name, form=form_of(path)):
            yield row


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "Good.\r\nBad.\n"),
        ("a", "Good.\nBad."),
        ("a.csv", "text\nGood.\nBad.\n"),
        ("a.jsonl", '{"text": "Good."}\n{"text": "Bad.", "label": "neg"}\n'),
        ("a.json", '{"text": "Good."}\n{"text": "Bad."}\n'),
        ("a.ndjson", '{"text": "Good."}\n{"text": "Bad."}\n'),
        ("A.CSV", "text\nGood.\nBad.\n"),
        ("A.JSONL", '{"text": "Good."}\n{"text": "Bad."}\n'),
    ],
)
def test_rows_without_labels_from_any_file(tmp_path: Path, name: str, content: str) -> None:
    assert list(rows_of(write(tmp_path / name, content))) == [{"text": "Good."}, {"text": "Bad."}]


def test_a_streamed_row_comes_with_its_place_and_its_record() -> None:
    found = list(stream_rows(io.StringIO('id,text\n7,"two\nlines"\n'), TONE, name="x", form="csv"))
    assert found == [("x:3", {"id": "7", "text": "two\nlines"}, {"text": "two\nlines"})]
    assert list(stream_rows(io.StringIO("Good."), TONE, name="x", form="text")) == [("x:1", *[{"text": "Good."}] * 2)]
    assert list(stream_rows(io.StringIO(), TONE, name="x", form="text")) == []


def test_pairs_need_a_file_with_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.txt: the task 'pair' reads text_a, text_b; use CSV or JSONL"):
        list(rows_of(write(tmp_path / "a.txt", "x\n"), PAIR))
    assert list(rows_of(write(tmp_path / "a.csv", "text_b,text_a\nB,A\n"), PAIR)) == [{"text_a": "A", "text_b": "B"}]


def test_a_file_is_streamed_not_read_at_once(tmp_path: Path) -> None:
    """The first rows are there before a later line is seen to be bad."""
    rows = rows_of(write(tmp_path / "a.jsonl", b'{"text": "Good."}\n' * 3 + b"\xff\n"))
    assert [next(rows) for _ in range(3)] == [{"text": "Good."}] * 3
    with pytest.raises(DataError, match=r"a.jsonl:4: not UTF-8"):
        next(rows)


@pytest.mark.parametrize("line", [1, 2, 3000])
@pytest.mark.parametrize(("name", "head"), [("a.txt", b""), ("a.csv", b"text\n"), ("a.jsonl", b"")])
def test_bytes_that_are_no_utf_8_are_named_by_line(tmp_path: Path, name: str, head: bytes, line: int) -> None:
    good, bad = (b'"gut"', '"häßlich"'.encode("latin-1"))
    if name.endswith("jsonl"):
        good, bad = (b'{"text": %s}' % text for text in (good, bad))
    content = head + b"\n".join([good] * (line - 1) + [bad] + [good] * 3)
    number = line + head.count(b"\n")
    with pytest.raises(DataError, match=rf"^{name}:{number}: not UTF-8 \(byte 0xe4 at character \d+\); convert"):
        list(rows_of(write(tmp_path / name, content)))


# -- splits ------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_a_tasks_data(tmp_path: Path) -> None:
    (tmp_path / "tone").mkdir()
    for name in ("train", "test"):
        write(tmp_path / "tone" / f"{name}.jsonl", json.dumps({"text": name, "label": "pos"}) + "\n")
    assert load_splits(TONE, tmp_path) == Splits(
        Split([{"text": "train"}], ["pos"]), Split([{"text": "test"}], ["pos"])
    )
    write(tmp_path / "tone" / "validation.jsonl", JSONL)
    validation = load_splits(TONE, tmp_path).validation
    assert validation is not None
    assert validation.labels == ["pos", "neg"]


def test_a_folder_without_the_task_or_a_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tone: no such folder; --data takes a folder that holds tone/train\.jsonl"):
        load_splits(TONE, tmp_path)
    (tmp_path / "tone").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl: cannot be read"):
        load_splits(TONE, tmp_path)


def test_a_task_without_data_says_how_to_give_it() -> None:
    with pytest.raises(DataError, match=r"the task 'tone' has no data of its own and no dataset: block; give a folder"):
        load_splits(TONE)


HUB = Task.from_dict(TONE.to_dict() | {"dataset": {"path": "some/where", "fields": {"text": "sentence"}, "label": "y"}})


def hub(monkeypatch: pytest.MonkeyPatch, **columns: list[Any]) -> list[tuple[Any, ...]]:
    """Puts `columns` on the hub, and records what is asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, revision: str | None, split: str) -> dict[str, list[Any]]:
        asked.append((path, name, revision, split))
        return columns

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, sentence=["a", "b", "c"], y=[0, 2, 1], other=[1, 2, 3])
    splits = load_splits(HUB)
    assert asked == [("some/where", None, None, "train"), ("some/where", None, None, "test")]
    assert splits.train == splits.test == Split([{"text": t} for t in "abc"], ["neg", "mid", "pos"])
    assert splits.validation is None


def test_a_spec_that_says_where_its_data_is_gets_it_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a bundled task called sentiment."""
    hub(monkeypatch, sentence=["a", "b"], y=["pos", "neg"])
    assert load_splits(dataclasses.replace(HUB, task="sentiment")).train.rows == [{"text": "a"}, {"text": "b"}]
    assert len(load_splits(Task.load("sentiment")).train) > 2


def test_a_data_set_with_names_as_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, sentence=["a", "b"], y=["pos", "neg"])
    assert load_splits(HUB).train.labels == ["pos", "neg"]


@pytest.mark.parametrize("label", [-1, 3, "good", None])
def test_a_label_of_the_hub_that_is_no_class_is_refused(monkeypatch: pytest.MonkeyPatch, label: Any) -> None:
    """Hidden test labels are -1 on the hub, which must not become the last class."""
    hub(monkeypatch, sentence=["a", "b"], y=[0 if label in (-1, 3) else "pos", label])
    with pytest.raises(DataError, match=f"^some/where: train: row 1: the label {label!r} is no class"):
        load_splits(HUB)


@pytest.mark.parametrize("text", [None, " ", "\ud800"])
def test_a_text_of_the_hub_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    hub(monkeypatch, sentence=["a", text], y=[0, 1])
    with pytest.raises(DataError, match=r"^some/where: train: row 1: text (is|has)"):
        load_splits(HUB)


def test_a_column_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, text=["a"], y=[0])
    with pytest.raises(
        DataError, match=r"cannot load 'some/where' from the hub: .*sentence.*; give the data as a folder"
    ):
        load_splits(HUB)


def test_no_network_is_one_clear_line() -> None:
    with pytest.raises(
        DataError, match=r"cannot load 'stanfordnlp/sst2' from the hub: .*; give the data as a folder inst"
    ) as e:
        load_splits(Task.load("sst2"))
    one_line(e)


# -- few shots ---------------------------------------------------------------------------------------------------------

LABELS = ["a", "b", "b", "a", "c", "b", "a", "a", "b"]


def test_shots_are_so_many_of_each_class_or_all_there_are() -> None:
    chosen = sample_shots(LABELS, 3, seed=13)
    assert sorted(LABELS[i] for i in chosen) == ["a"] * 3 + ["b"] * 3 + ["c"]
    assert len(set(chosen)) == len(chosen)
    assert sorted(sample_shots(LABELS, 99, seed=13)) == list(range(9))


def test_shots_are_the_same_for_the_same_seed_and_others_for_others() -> None:
    assert sample_shots(LABELS, 2, seed=13) == sample_shots(LABELS, 2, seed=13)
    assert len({tuple(sample_shots(LABELS, 2, seed=s)) for s in range(20)}) > 10


def test_every_row_can_be_a_shot_and_classes_are_mixed() -> None:
    draws = [sample_shots(LABELS, 2, seed=s) for s in range(50)]
    assert set().union(*draws) == set(range(9))
    assert any([LABELS[i] for i in d] != sorted(LABELS[i] for i in d) for d in draws)


def test_fewer_shots_are_a_part_of_more() -> None:
    """So that a curve over shots adds data and swaps none."""
    few, many = sample_shots(LABELS, 1, seed=5), sample_shots(LABELS, 3, seed=5)
    assert set(few) <= set(many)


# -- checksum ----------------------------------------------------------------------------------------------------------

BASE = [Split([{"text": "a"}, {"text": "b"}], ["x", "y"]), Split([{"text": "c"}], ["x"])]


@pytest.mark.parametrize(
    "other",
    [
        [Split([{"text": "a "}, {"text": "b"}], ["x", "y"]), BASE[1]],
        [Split([{"text": "a"}, {"text": "b"}], ["y", "x"]), BASE[1]],
        [Split([{"text": "b"}, {"text": "a"}], ["y", "x"]), BASE[1]],
        [Split([{"t": "a"}, {"text": "b"}], ["x", "y"]), BASE[1]],
        [BASE[1], BASE[0]],
        [BASE[0]],
        [Split([*BASE[0].rows, *BASE[1].rows], ["x", "y", "x"])],
        [*BASE, Split([], [])],
    ],
)
def test_any_change_of_the_data_changes_the_checksum(other: list[Split]) -> None:
    assert checksum(other) != checksum(BASE)


def test_the_checksum_is_that_of_the_content() -> None:
    same = [Split([dict(r) for r in s.rows], list(s.labels)) for s in BASE]
    assert checksum(iter(same)) == checksum(BASE)
    one = checksum([Split([{"a": "1", "b": "2"}], ["x"])])
    assert one == checksum([Split([{"b": "2", "a": "1"}], ["x"])])
