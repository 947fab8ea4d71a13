"""The report: everything is in it, it needs nothing from outside, and it says what its numbers are."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from test_bench import METHODS, FakeMethod, fake, write_data
from test_summary import record

from verbtune import baselines, plots, report
from verbtune.bench import BenchError, Outcome, run
from verbtune.summary import summarize
from verbtune.task import Task

VOID = {"meta", "br", "image", "link", "img", "path", "use"}


class _Checked(HTMLParser):
    """Every tag that opens is closed, and nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids_used: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._look_at(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look_at(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "object")
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
                self.ids_used += [value[1:]] if value and value.startswith("#") else []
            self.ids_used += re.findall(r"url\(#(.+?)\)", value or "")


@pytest.fixture
def outcome(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Two tasks, two seeds, two numbers of shots, two prompt lengths, and a method that fails once."""

    def fail(made: FakeMethod) -> None:
        if made.key == ("tfidf", 2, None):
            raise ValueError("no room | for <script>alert(1)</script> **here** in `it`")

    monkeypatch.setattr(baselines, "make", fake(fail))
    write_data(tmp_path / "data", "tone")
    write_data(tmp_path / "data", "mood")
    return run(
        [task, dataclasses.replace(task, task="mood")],
        [tiny("bert")],
        output=tmp_path / "out",
        methods=METHODS,
        shots=(2, 4),
        seeds=(1, 2),
        data=tmp_path / "data",
        prompt_lengths=(None, 1, 5),
    )


def written(outcome: Outcome, tmp_path: Path) -> tuple[str, str]:
    report.write(outcome, tmp_path / "out")
    return (tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()


def table_lines(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_the_report_has_all_its_sections(outcome, tmp_path):
    markdown, page = written(outcome, tmp_path)
    for heading in (
        "verbtune bench",
        "Accuracy: BertForMaskedLM, 2 training texts a class",
        "Accuracy: BertForMaskedLM, 4 training texts a class",
        "Is verbtune better? Paired tests",
        "What training costs",
        "Accuracy against labelled texts",
        "Accuracy against prompt length",
        "Calibration",
        "Which classes are confused",
        "Every task in full",
        "Failures",
        "Made with",
    ):
        assert re.search(rf"^#+ {re.escape(heading)}$", markdown, re.MULTILINE), heading
        assert re.search(rf"<h\d>{re.escape(heading)}</h\d>", page), heading
    for said in (
        "mean ± standard deviation (n − 1) over 2 seeds (1, 2)",
        "tone 4 and 20; mood 4 and 20",
        "sign-flip permutation test",
        outcome.records[0].model_fingerprint,
        outcome.records[0].split_checksum[:16],
        "scikit-learn ",
        "1 token",
        "4 of 40 measurements failed",
        "tfidf",
    ):
        assert said in markdown, said
        assert said in page, said
    files = list((tmp_path / "out" / "pictures").iterdir())
    assert page.count("<svg") == page.count("<figcaption>") == markdown.count("](pictures/") == len(files) == 7


def test_the_main_method_stands_out_by_the_name_that_is_shown(outcome, tmp_path, monkeypatch):
    draw, mains = plots.draw_curves, []
    monkeypatch.setattr(
        plots, "draw_curves", lambda curves, **asked: mains.append(asked["main"]) or draw(curves, **asked)
    )
    written(Outcome([r for r in outcome.records if r.method != "verbtune" or r.prompt_length == 1], []), tmp_path)
    assert mains == ["verbtune, 1 token"]


def test_the_page_needs_nothing_from_outside(outcome, tmp_path):
    _, page = written(outcome, tmp_path)
    parsed = _Checked(page)
    assert "http" not in page
    assert "@import" not in page
    assert set(parsed.ids_used) <= parsed.ids


def test_an_error_message_is_shown_as_it_is(outcome, tmp_path):
    markdown, page = written(outcome, tmp_path)
    assert "no room | for &lt;script&gt;alert(1)&lt;/script&gt; **here** in `it`" in page
    row = next(line for line in markdown.splitlines() if "no room" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 7  # six cells: the bar in the message divides none


def test_names_of_models_and_classes_are_shown_as_they_are(outcome, tmp_path, monkeypatch):
    model, classes = r"C:\models\[x](*y*)", ["a*b*", "<i>`c`"]
    wrong = np.eye(2)[::-1], np.arange(2), classes
    monkeypatch.setattr(report, "predictions", lambda folder, record: wrong)
    records = [dataclasses.replace(r, model=model) for r in outcome.records]
    failures = [dataclasses.replace(f, model=model) for f in outcome.failures]
    markdown, page = written(Outcome(records, failures), tmp_path)
    assert page.count(model) > 10
    assert "a*b* taken for &lt;i&gt;`c`" in page
    assert markdown.count(r"C:\\models\\\[x\](\*y\*)") == markdown.count("C:") > 10
    assert r"a\*b\* taken for \<i\>\`c\`" in markdown


def test_pictures_are_whole_and_pointed_to(outcome, tmp_path):
    markdown, _ = written(outcome, tmp_path)
    for name in re.findall(r"\]\((pictures/.+?\.svg)\)", markdown):
        text = (tmp_path / "out" / name).read_text()
        assert text.startswith("<svg ")
        assert "background: #fff" in text
        assert text.rstrip().endswith("</svg>")


def test_the_same_outcome_gives_the_same_report(outcome, tmp_path):
    assert written(outcome, tmp_path) == written(outcome, tmp_path)


def test_tables_are_aligned_and_whole(outcome, tmp_path):
    markdown, _ = written(outcome, tmp_path)
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(line) for line in block.splitlines()}) == 1
    shown = report.table(summarize(outcome.records))
    methods = [cells[0].strip() for cells in table_lines(shown)]
    assert methods[2:5] == ["majority", "tfidf", "verbtune"]  # no other prompt lengths here


def test_the_best_is_bold_and_so_is_what_ties_with_it():
    records = [record(method=m, accuracy=a) for m, a in (("majority", 0.5), ("tfidf", 0.91), ("verbtune", 0.91001))]
    cells = {row[0].strip(): row[1].strip() for row in table_lines(report.table(summarize(records)))}
    assert cells["majority"] == "50.0"
    assert cells["tfidf"] == cells["verbtune"] == "**91.0**"


def test_missing_seeds_and_tasks_are_said():
    records = [record(task=t, seed=s, accuracy=0.5) for t in "ab" for s in (1, 2)]
    records += [record(task="a", seed=1, method="tfidf", accuracy=0.4)]
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in table_lines(report.table(summarize(records)))}
    assert cells["tfidf"] == ["40.0 (1 of 2 seeds)", "failed", "–", "–", "–", "–", "–"]


def test_no_seed_with_all_tasks_leaves_the_mean_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "predictions", lambda folder, record: (np.eye(2), np.arange(2), ["no", "yes"]))
    records = [
        record(task=task, seed=seed, method=method, shots=shots, prompt_length=length, accuracy=0.5)
        for task, seed in (("a", 1), ("b", 2))
        for method, shots, length in (("tfidf", 2, None), ("verbtune", 2, 1), ("verbtune", 2, 5), ("verbtune", 4, 1))
    ]
    markdown, _ = written(Outcome(records, []), tmp_path)
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in table_lines(report.table(summarize(records)))}
    assert cells["tfidf"][2:] == ["–"] * 5
    for heading in ("What training costs", "Accuracy against labelled texts", "Accuracy against prompt length"):
        assert heading not in markdown  # nothing to show under it


def test_many_tasks_stand_in_tables_side_by_side():
    records = [record(task=f"task{t}", method=m) for t in range(7) for m in METHODS]
    headers = [row for row in table_lines(report.table(summarize(records))) if row[0].strip() == "method"]
    assert [len(row) for row in headers] == [6, 7]
    assert headers[1][3].strip() == "mean of tasks"


def test_one_seed_of_one_task(tmp_path, task, monkeypatch):
    monkeypatch.setattr(baselines, "make", fake())
    write_data(tmp_path / "data", "tone")
    outcome = run(
        [task], [tiny("bert")], output=tmp_path / "out", methods=METHODS, shots=(2,), seeds=(1,), data=tmp_path / "data"
    )
    markdown, page = written(outcome, tmp_path)
    assert "of one seed (1)" in markdown
    assert "There is nothing to pair" in markdown
    assert "nan" not in markdown
    for said in (
        "worst seed",
        "over the seeds",
        "over the tasks",
        "standard deviation",
        "each seed",
        "all seeds",
        "mean",
    ):
        assert said not in page, said


def test_fewer_texts_than_were_asked_for_are_said():
    for shots, n_train, title in (
        (80, 160, "m, 80 training texts a class"),
        (100, 160, "m, at most 100 training texts a class"),
        (100_000, 160, "m, at most 100000 training texts a class"),
        (1, 2, "m, 1 training text a class"),
    ):
        records = [record(shots=shots, n_train=n_train, seed=seed, method=m) for m in METHODS for seed in (1, 2)]
        assert report.table(summarize(records)).startswith(f"## Accuracy: {title}\n")


def test_only_the_references_that_ran_are_named():
    said = report.table(summarize([record(), record(method="lora")]))
    assert "Upper reference, with a copy of the LM: lora." in said
    assert "fine-tuning" not in said
    assert "Upper reference" not in report.table(summarize([record()]))


def test_nothing_finished_is_a_report_too(tmp_path):
    markdown, page = written(Outcome([], []), tmp_path)
    assert "No measurement was finished." in markdown
    assert "No measurement was finished." in page
    assert report.table(summarize([])) == "No measurement was finished.\n"


def test_without_the_main_method_the_rest_is_there(outcome, tmp_path):
    others = Outcome([r for r in outcome.records if r.method != "verbtune"], [])
    markdown, _ = written(others, tmp_path)
    assert "Calibration" not in markdown
    assert "There is nothing to pair" in markdown


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"PK damaged",
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:100] + b"\xff" * 40 + whole[140:],
    ],
    ids=["other", "empty", "cut", "overwritten"],
)
def test_lost_predictions_are_named(outcome, tmp_path, damage):
    for path in (tmp_path / "out" / "predictions").glob("*verbtune*"):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BenchError, match=r"verbtune.*\.npz: cannot be read .*run the bench again"):
        report.write(outcome, tmp_path / "out")


def test_the_worst_confusions_are_named():
    counts = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 10]])
    said = report._worst_confusions(counts, ["a", "b", "c"])
    assert said == "; most often wrong: a taken for b (20 %), b taken for a (10 %)"
    assert report._worst_confusions(np.eye(2), ["a", "b"]) == ""


@pytest.mark.parametrize("n", [2, 10, 30, 77])
def test_confusion_matrices_of_any_size(n):
    drawing = plots.draw_confusion(np.eye(n) * 5, [f"class_{i}" for i in range(n)])
    text = plots.svg(drawing)
    assert ("class_1<" in text) == (n <= 40)
    assert ("sorted by name" in text) == (n > 40)
    assert text.count(">100<") == 1 + n * (n <= 15)  # one on the scale


def test_a_single_point_of_each_of_twenty_methods_can_be_told_from_the_others() -> None:
    curves = {f"method {i}": [(1.0, float(i), 0.0)] for i in range(20)}
    drawing = plots.draw_curves(curves, main="method 0", xlabel="x", ylabel="y", levels={}, logarithmic=False)
    drawn = {(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in drawing.axes[0].containers}
    assert len(drawn) == len(curves)


def test_many_points_on_a_logarithmic_axis_stand_between_powers_of_ten() -> None:
    curves = {f"method {i}": [(3.0 * 4**i, float(i), 0.0)] for i in range(9)}  # 3 to 196,608
    drawing = plots.draw_curves(curves, main="method 0", xlabel="x", ylabel="y", levels={}, logarithmic=True)
    ticks = [tick.get_text() for tick in drawing.axes[0].get_xticklabels()]
    assert ticks == ["10", "100", "1k", "10k", "100k"]


def test_dollar_signs_in_names_are_no_mathematics():
    names = ["cost $5_$", "$x$", "plain"]
    curves = {name: [(1.0, 2.0, 0.0), (2.0, 3.0, 0.0)] for name in names}
    reliable = {name: (np.ones(1), np.ones(1), np.ones(1)) for name in names}
    for drawing in (
        plots.draw_confusion(np.eye(3), names),
        plots.draw_methods(dict.fromkeys(names, dict.fromkeys(names, (1.0, 2.0))), main="$x$", xlabel="$x$"),
        plots.draw_curves(curves, main="$x$", xlabel="$x$", ylabel="$x$", levels={}, logarithmic=True),
        plots.draw_reliability(dict.fromkeys(names, reliable), main="$x$"),
    ):
        text = plots.svg(drawing)
        assert text.count(">cost $5_$<") == text.count(">plain<") > 0
        assert ">$x$<" in text


def test_a_figure_keeps_the_pages_ink():
    drawing = plots.draw_methods({"tone": {"verbtune": [1, 2], "tfidf": [1]}}, main="verbtune", xlabel="accuracy, %")
    text = plots.svg(drawing)
    assert "currentColor" in text
    assert plots.INK not in text
    assert "accuracy, %" in text


def test_sizes_are_said_as_people_do() -> None:
    said: list[Any] = [report._bytes(n) for n in (12, 20_123, 34_400_000, 2.5e9)]
    assert said == ["12 B", "20.1 kB", "34.4 MB", "2.5 GB"]
