"""The data that comes with the package: as much as promised, clean, and no test text is nearly one of training."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from verbtune.data import load_splits
from verbtune.task import Task, tasks_folder

TASKS = ["sentiment", "support_intent", "intencao", "sentimento"]
MOST_ALIKE = 0.6
every = pytest.mark.parametrize("name", TASKS)


def read(name: str, split: str) -> list[dict[str, str]]:
    lines = (tasks_folder() / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> frozenset[str]:
    """A text's words, without case and accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return frozenset(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def too_alike(one: list[str], other: list[str]) -> list[tuple[str, str]]:
    """Pairs that share most of their words."""
    sets = [(text, words(text)) for text in other]
    return [(a, b) for a in one for own in [words(a)] for b, its in sets if alike(own, its) >= MOST_ALIKE]


def test_the_check_for_near_duplicates_finds_one() -> None:
    assert too_alike(["The box arrived broken!"], ["the box arrived, BROKEN", "the cup"]) == [
        ("The box arrived broken!", "the box arrived, BROKEN")
    ]


@pytest.mark.parametrize(("name", "train", "test"), [("sentiment", 120, 200)])
def test_there_is_as_much_as_promised(name: str, train: int, test: int) -> None:
    assert len(read(name, "train")) >= train
    assert len(read(name, "test")) >= test


@every
def test_every_class_has_as_much_as_promised(name: str) -> None:
    classes = Task.load(name).classes
    for split, least in (("train", 30), ("test", 40)):
        counts = Counter(row["label"] for row in read(name, split))
        assert set(counts) == set(classes)
        assert min(counts.values()) >= least
        assert max(counts.values()) <= 1.5 * min(counts.values())


def test_support_intent_has_ten_intents_and_texts_outside_them() -> None:
    assert len(Task.load("support_intent").classes) == 10
    outside = read("support_intent", "out_of_scope")
    assert len(outside) >= 80
    assert not {row.get("label") for row in outside} & set(Task.load("support_intent").classes)


@every
def test_the_data_loads_as_any_other(name: str) -> None:
    task = Task.load(name)
    splits = load_splits(task)
    assert len(splits.train) == len(read(name, "train"))
    assert len(splits.test) == len(read(name, "test"))
    assert set(splits.train.labels) == set(task.classes)


@every
def test_rows_are_clean(name: str) -> None:
    for split in ("train", "test", *(["out_of_scope"] if name == "support_intent" else [])):
        for row in read(name, split):
            assert set(row) in ({"text", "label"}, {"text"})
            assert row["text"] == row["text"].strip()
            assert words(row["text"])
            assert len(row["text"]) < 400
            assert unicodedata.is_normalized("NFC", row["text"])
            assert not re.search(r"[\x00-\x1f\ufffd]|\[MASK\]|\{", row["text"])


def everything(name: str) -> list[str]:
    splits = ["train", "test", *(["out_of_scope"] if name == "support_intent" else [])]
    return [row["text"] for split in splits for row in read(name, split)]


@every
def test_no_text_comes_twice(name: str) -> None:
    counts = Counter(" ".join(re.findall(r"\w+", text.casefold())) for text in everything(name))
    assert [text for text, n in counts.items() if n > 1] == []


@every
def test_no_test_text_is_nearly_one_of_training(name: str) -> None:
    train = [row["text"] for row in read(name, "train")]
    assert too_alike([row["text"] for row in read(name, "test")], train) == []
    if name == "support_intent":
        assert too_alike([row["text"] for row in read(name, "out_of_scope")], train) == []


@every
def test_sentences_are_no_fillings_of_a_pattern(name: str) -> None:
    """Few texts start with the same three words."""
    texts = everything(name)
    starts = Counter(tuple(re.findall(r"\w+", text.casefold())[:3]) for text in texts)
    assert max(starts.values()) <= max(4, 0.03 * len(texts))


@every
def test_the_card_says_where_the_data_is_from(name: str) -> None:
    card = (tasks_folder() / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n")
    assert "written for this project" in " ".join(card.split())
    assert "Apache-2.0" in card
    counts = Counter(row["label"] for row in read(name, "train"))
    for label in Task.load(name).classes:
        line = next(line for line in card.splitlines() if f"`{label}`" in line)
        assert str(counts[label]) in re.findall(r"\d+", line)


@every
def test_only_what_is_meant_lies_there(name: str) -> None:
    names = {path.name for path in Path(tasks_folder() / name).iterdir()}
    assert names - {"out_of_scope.jsonl"} == {"README.md", "train.jsonl", "test.jsonl"}
