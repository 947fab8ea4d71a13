"""The pages of measurements say what the committed records say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of benchmarks, whose modules can be imported."""
    monkeypatch.setattr(sys, "path", [str(repository / "benchmarks"), *sys.path])
    return repository / "benchmarks"


@pytest.mark.parametrize("name", ["accuracy", "fewshot", "rejection"])
def test_a_page_says_what_its_records_say(name: str, scripts: Path) -> None:
    module = importlib.import_module(name)
    assert module.written() == (scripts / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_model_card_says_what_the_records_say(kind: str, scripts: Path) -> None:
    module = importlib.import_module("fewshot")
    text = module.CARDS[kind].read_text("utf-8")
    assert module.card(kind) == text
    assert "<!-- fewshot -->" in text


def test_the_page_of_speed_says_what_its_record_says(scripts: Path) -> None:
    report = importlib.import_module("speed_report")
    record = json.loads((scripts / "records" / "speed.json").read_text("utf-8"))
    assert report.written(record) == (scripts / "speed.md").read_text("utf-8")


def test_every_picture_is_on_a_page(scripts: Path) -> None:
    pages = [page for page in scripts.glob("*.md") if "](" in page.read_text("utf-8")]
    linked = {part.split(")")[0] for page in pages for part in page.read_text("utf-8").split("](")[1:]}
    pictures = {name for name in linked if name.endswith(".png")}
    assert pictures
    assert pictures == {path.name for path in scripts.glob("*.png")}
