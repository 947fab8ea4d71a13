"""The README: its code runs, its table is what the records say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from verbtune import Task


def test_the_tables_are_what_the_records_say(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme", repository / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (repository / "README.md").read_text("utf-8")
    assert "bench" in {match["name"] for match in module.BLOCK.finditer(readme)}
    assert readme == module.written()


def test_the_python_code_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-sentiment" / "verbtune.json").is_file()


def test_the_task_is_a_task(repository: Path) -> None:
    (spec,) = re.findall(r"```yaml\n(.*?)```", (repository / "README.md").read_text("utf-8"), re.DOTALL)
    assert Task.from_text(spec, source="README.md").classes == ("billing", "delivery", "other")
