"""What a bench found, as a table for the terminal and a report in Markdown and HTML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from . import baselines, plots
from .bench import Failure, Outcome, predictions, write_whole
from .document import Block, Heading, Picture, Table, Text, as_html, as_markdown, plain
from .metrics import reliability
from .summary import Comparison, Record, Row, Summary, label, shown_length, summarize

__all__ = ["table", "write"]

TITLE = "verbtune bench"
COLUMNS = 5  # tasks side by side; more of them get a table of their own
UNTRAINED = "zero-shot"
REFERENCES = ("lora", "fine-tuning")
BARS = "; bars are one standard deviation over the seeds to each side"

_Measured = TypeVar("_Measured", Record, Row)


def table(summary: Summary) -> str:
    """The accuracy of every method on every task, as Markdown that a terminal shows well.

    Parameters
    ----------
    summary : Summary
    """
    shown = dataclasses.replace(summary, rows=_shown(summary.rows))
    return as_markdown(_main_tables(shown)) if summary.rows else "No measurement was finished.\n"


def write(outcome: Outcome, folder: str | Path) -> None:
    """Write `report.md` with its pictures, and `report.html`, which needs no other file.

    Parameters
    ----------
    outcome : Outcome
        Of a bench whose output went to the same folder.
    folder : str or Path

    Raises
    ------
    BenchError
        If the folder cannot be written, or its predictions cannot be read.
    """
    folder = Path(folder)
    blocks = list(_report(outcome, folder))
    for block in blocks:
        if isinstance(block, Picture):
            write_whole(folder / "pictures" / f"{block.name}.svg", _standalone(block.svg))
    write_whole(folder / "report.md", as_markdown(blocks))
    write_whole(folder / "report.html", as_html(blocks, title=TITLE))


def _report(outcome: Outcome, folder: Path) -> Iterator[Block]:
    records, summary = outcome.records, summarize(outcome.records)
    yield Heading(1, TITLE)
    if outcome.failures:
        n, total = len(outcome.failures), len(outcome.failures) + len(records)
        yield Text(f"**{n} of {total} measurements failed**; they are listed under Failures.")
    if not records:
        yield Text("No measurement was finished.")
    else:
        shown = dataclasses.replace(summary, rows=_shown(summary.rows))
        yield from _main_tables(shown)
        yield from _method_pictures(_shown(records))
        yield from _comparison_tables(summary)
        yield from _cost_tables(shown)
        yield from _shots_pictures(shown)
        yield from _length_section(summary)
        yield from _calibration_pictures(records, folder)
        yield from _confusion_pictures(records, folder)
        yield from _task_tables(summary)
    yield from _failure_table(outcome)
    if records:
        yield from _provenance(records)


# Numbers -------------------------------------------------------------------------------------------


def _spread(row: Row, metric: str, digits: int, factor: float = 1.0) -> str:
    spread = row.scores[metric]
    text = f"{factor * spread.mean:.{digits}f}"
    return text if spread.std is None else f"{text} ± {factor * spread.std:.{digits}f}"


def _percent(row: Row, metric: str, n_seeds: int) -> str:
    text = _spread(row, metric, 1, 100)
    return text if row.n_seeds == n_seeds else f"{text} ({row.n_seeds} of {n_seeds} seeds)"


def _bytes(n: float) -> str:
    """Say a size as people do.

    Examples
    --------
    >>> _bytes(20_123)
    '20.1 kB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def _seconds(n: float) -> str:
    return f"{n:.2f}" if n < 10 else f"{n:.0f}"


# What can stand in a table of rows, given how many seeds there are: the column's head and a row's cell.
_CELLS: dict[str, Callable[[Row, int], str]] = {
    "method": lambda row, n_seeds: _name(row),
    "accuracy, %": lambda row, n_seeds: _percent(row, "accuracy", n_seeds),
    "worst seed": lambda row, n_seeds: f"{100 * row.scores['accuracy'].worst:.1f}",
    "macro-F1, %": lambda row, n_seeds: _percent(row, "macro_f1", n_seeds),
    "NLL": lambda row, n_seeds: _spread(row, "nll", 3),
    "ECE": lambda row, n_seeds: _spread(row, "ece", 3),
    "Brier": lambda row, n_seeds: _spread(row, "brier", 3),
    "trained parameters": lambda row, n_seeds: f"{row.trained_parameters:,.0f}",
    "peak memory, MB": lambda row, n_seeds: f"{row.peak_memory_mb:,.0f}",
    "saved": lambda row, n_seeds: _bytes(row.artifact_bytes),
    "fit, s": lambda row, n_seeds: _seconds(row.fit_seconds),
    "predict, ms a text": lambda row, n_seeds: f"{1000 * row.predict_seconds / row.n_test:.2f}",
}


def _table_of(rows: Sequence[Row], n_seeds: int, *names: str) -> Table:
    columns = [name for name in names if name != "worst seed" or n_seeds > 1]
    return Table(columns, [[_CELLS[column](row, n_seeds) for column in columns] for row in rows])


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _bold_best(rows: Sequence[Row], cells: Sequence[str], metric: str) -> list[str]:
    """Embolden the highest mean, and what cannot be told from it as it is printed."""
    best = max((round(100 * row.scores[metric].mean, 1) for row in rows), default=None)
    return [
        f"**{cell}**" if round(100 * row.scores[metric].mean, 1) == best else cell
        for row, cell in zip(rows, cells, strict=True)
    ]


# Sections ------------------------------------------------------------------------------------------


def _settings(items: Sequence[_Measured]) -> Iterator[tuple[str, list[_Measured]]]:
    """Split by model and number of shots, with how to call that."""
    for model, shots in dict.fromkeys((item.model, item.shots) for item in items):
        own = [item for item in items if (item.model, item.shots) == (model, shots)]
        yield _title(own), own


def _title(items: Sequence[_Measured]) -> str:
    """How to call what one model made of one number of shots."""
    model, shots = items[0].model, items[0].shots
    # Two or more classes that all have so many texts give a multiple of it.
    short = any(item.n_train < 2 * shots or item.n_train % shots for item in items)
    return f"{plain(model)}, {'at most ' * short}{shots} training text{'s' * (shots > 1)} a class"


def _shown(items: Sequence[_Measured]) -> list[_Measured]:
    """Records or rows with every method at one prompt length."""
    lengths = {method: shown_length(method, items) for method in {item.method for item in items}}
    return [item for item in items if item.prompt_length == lengths[item.method]]


def _name(item: Record | Row | Failure) -> str:
    return label(item.method, item.prompt_length)


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows if row.task is not None))


def _overall(rows: Sequence[Row]) -> list[Row]:
    """The rows in the mean over tasks, or those of the only task."""
    return [row for row in rows if row.task is None] if len({row.task for row in rows}) > 1 else list(rows)


def _main_tables(summary: Summary) -> Iterator[Block]:
    n_seeds = len(summary.seeds)
    for title, rows in _settings(summary.rows):
        tasks = _tasks(rows)
        yield Heading(2, f"Accuracy: {title}")
        spread = (
            f"mean ± standard deviation (n − 1) over {n_seeds} seeds ({_joined(summary.seeds)}); each seed draws its "
            "own training texts, the same for all methods"
            if n_seeds > 1
            else f"of one seed ({summary.seeds[0]}); all methods saw the same training texts"
        )
        sizes = {row.task: (row.n_train, row.n_test) for row in rows}
        yield Text(
            f"Accuracy on the test texts in %, {spread}. Bold: the highest of a column. Training and test texts: "
            + "; ".join(f"{task} {sizes[task][0]:,} and {sizes[task][1]:,}" for task in tasks)
            + "."
        )
        names, overall = list(dict.fromkeys(map(_name, rows))), _overall(rows)
        columns: dict[str, list[str]] = {}
        for task in tasks + [None] * (len(tasks) > 1):
            own = [row for row in rows if row.task == task]
            cells = _bold_best(own, [_percent(row, "accuracy", n_seeds) for row in own], "accuracy")
            columns[task or "mean of tasks"] = _aligned(own, cells, names, "failed" if task else "–")
        last = {
            "worst seed": [_CELLS["worst seed"](row, n_seeds) for row in overall],
            "ECE": [f"{row.scores['ece'].mean:.3f}" for row in overall],
            "trained": [_CELLS["trained parameters"](row, n_seeds) for row in overall],
            "fit, s": [_seconds(row.fit_seconds) for row in overall],
        }
        if n_seeds == 1:
            del last["worst seed"]
        shared = {name: _aligned(overall, cells, names, "–") for name, cells in last.items()}
        for start in range(0, len(tasks), COLUMNS):
            end = start + COLUMNS
            chosen = {name: columns[name] for name in tasks[start:end]}
            if end >= len(tasks):
                chosen |= ({"mean of tasks": columns["mean of tasks"]} if len(tasks) > 1 else {}) | shared
            body = [[name, *cells] for name, *cells in zip(names, *chosen.values(), strict=True)]
            yield Table(["method", *chosen], body)
        legend = (
            "ECE: expected calibration error, 0 is best. Trained: parameters. Fit: "
            f"{'the median over the seeds, ' * (n_seeds > 1)}on this machine."
        )
        if len(tasks) > 1:
            legend += f" These columns{' and the worst seed' * (n_seeds > 1)} are of the mean over the tasks."
        copies = [method for method in REFERENCES if method in {row.method for row in rows}]
        if copies:
            legend += f" Upper reference{'s' * (len(copies) > 1)}, with a copy of the LM: {_joined(copies)}."
        yield Text(legend)


def _aligned(rows: Sequence[Row], cells: Sequence[str], names: Sequence[str], missing: str) -> list[str]:
    """Cells in the order of the method names."""
    by_name = {_name(row): cell for row, cell in zip(rows, cells, strict=True)}
    return [by_name.get(name, missing) for name in names]


def _task_tables(summary: Summary) -> Iterator[Block]:
    n_seeds = len(summary.seeds)
    yield Heading(2, "Every task in full")
    yield Text(
        "NLL: negative log-likelihood in nats. ECE: expected calibration error, 15 bins. Brier: squared differences, "
        "summed over the classes. All three: lower is better."
        + " ±: standard deviation (n − 1) over the seeds."
        * (n_seeds > 1)
    )
    scores = ("accuracy, %", "worst seed", "macro-F1, %", "NLL", "ECE", "Brier")
    for title, rows in _settings(summary.rows):
        for task in _tasks(rows):
            own = [row for row in rows if row.task == task]
            yield Heading(3, f"{task}: {title}")
            table = _table_of(own, n_seeds, "method", *scores, "fit, s", "predict, ms a text")
            for head, metric in (("accuracy, %", "accuracy"), ("macro-F1, %", "macro_f1")):
                at = table.header.index(head)
                for cells, best in zip(table.rows, _bold_best(own, [c[at] for c in table.rows], metric), strict=True):
                    cells[at] = best
            yield table


def _comparison_tables(summary: Summary) -> Iterator[Block]:
    yield Heading(2, f"Is {baselines.MAIN} better? Paired tests")
    if not summary.comparisons:
        yield Text(f"There is nothing to pair: that takes {baselines.MAIN}, a baseline, and two tasks or seeds.")
        return
    yield Text(
        "Difference: accuracy of the main method minus the baseline's, in percentage points, mean over all pairs of "
        "task and seed. Interval: 95 %, bootstrap over tasks and, within them, seeds. p: two-sided sign-flip "
        "permutation test over the pairs, exact for up to 14 of them, not corrected for the number of baselines; it "
        "speaks of these tasks, not of new ones."
    )
    header = ["against", "difference", "95 % interval", "wins", "ties", "losses", "p"]
    for title, rows in _settings(summary.rows):
        own = [c for c in summary.comparisons if (c.model, c.shots) == (rows[0].model, rows[0].shots)]
        if own:
            yield Heading(3, f"{own[0].main}: {title}")
            yield Table(header, [_comparison_row(c) for c in own])


def _comparison_row(c: Comparison) -> list[str]:
    return [
        c.baseline,
        _points(c.difference),
        f"{_points(c.low)} to {_points(c.high)}",
        *map(str, (c.wins, c.ties, c.losses)),
        "< 0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}",
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _cost_tables(summary: Summary) -> Iterator[Block]:
    tuned = [(title, [r for r in _overall(rows) if r.trained_parameters]) for title, rows in _settings(summary.rows)]
    if not any(rows for _, rows in tuned):
        return
    yield Heading(2, "What training costs")
    yield Text(
        "Medians over the seeds. " * (len(summary.seeds) > 1)
        + "Of several tasks, the mean. " * (len(_tasks(summary.rows)) > 1)
        + "Memory: by how much fitting raised the process's resident memory at most, with the LM already loaded (on a "
        "GPU: what was allocated there). Saved: what one task adds on disk to the shared LM."
    )
    costs = ("trained parameters", "peak memory, MB", "saved", "fit, s")
    for title, rows in tuned:
        if rows:
            yield Heading(3, title)
            yield _table_of(rows, len(summary.seeds), "method", "accuracy, %", *costs)


def _failure_table(outcome: Outcome) -> Iterator[Block]:
    yield Heading(2, "Failures")
    if not outcome.failures:
        yield Text("None.")
        return
    yield Text("Each with its traceback in `results.json`. Running the bench again tries them again.")
    alike: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in outcome.failures:
        alike.setdefault((failure.task, failure.model, failure.error), []).append(failure)
    yield Table(
        ["task", "model", "methods", "shots", "seeds", "error"],
        [
            [
                task,
                plain(model),
                *(
                    _joined(list(dict.fromkeys(values)))
                    for values in (map(_name, failures), (f.shots for f in failures), (f.seed for f in failures))
                ),
                plain(error),
            ]
            for (task, model, error), failures in alike.items()
        ],
    )


def _provenance(records: Sequence[Record]) -> Iterator[Block]:
    yield Heading(2, "Made with")
    versions = dict.fromkeys(tuple(record.versions.items()) for record in records)
    for version in versions:
        yield Text(_joined([f"{name} {number}" for name, number in version]) + ".")
    models = dict.fromkeys((record.model, record.model_fingerprint) for record in records)
    yield Table(["model", "SHA-256 of its weights"], [[plain(model), f"`{total}`"] for model, total in models])
    yield Text(
        "Training and test texts of every seed, by the first 16 digits of their SHA-256; all methods saw the same."
    )
    splits = dict.fromkeys((r.task, r.shots, r.seed, r.n_train, r.n_test, r.split_checksum) for r in records)
    yield Table(
        ["task", "shots", "seed", "training texts", "test texts", "checksum"],
        [[*map(str, split[:5]), f"`{split[5][:16]}`"] for split in splits],
    )


# Pictures ------------------------------------------------------------------------------------------


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _main_label(items: Sequence[Record] | Sequence[Row]) -> str:
    return label(baselines.MAIN, shown_length(baselines.MAIN, items))


def _method_pictures(records: Sequence[Record]) -> Iterator[Block]:
    for title, group in _settings(records):
        panels: dict[str, dict[str, list[float]]] = {}
        for r in group:
            panels.setdefault(f"{r.task} ({r.n_test:,} texts)", {}).setdefault(_name(r), []).append(100 * r.accuracy)
        drawing = plots.draw_methods(panels, main=_main_label(group), xlabel="accuracy, %")
        yield Picture(
            f"accuracy-{_slug(group[0].model)}-{group[0].shots}",
            plots.svg(drawing),
            f"Accuracy by method, {title}"
            + ": a small dot for each seed, the mean, and one standard deviation to each side"
            * (len({r.seed for r in group}) > 1)
            + ". Further right is better.",
        )


def _curves(
    rows: Sequence[Row], x: Callable[[Row], int], name: Callable[[Row], str]
) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in sorted(rows, key=x):
        spread = row.scores["accuracy"]
        curves.setdefault(name(row), []).append((x(row), 100 * spread.mean, 100 * (spread.std or 0)))
    return curves


def _by_model(summary: Summary) -> Iterator[tuple[str, str, list[Row]]]:
    """Rows in the mean over tasks of every model that has some, and how to call that mean."""
    for model in dict.fromkeys(row.model for row in summary.rows):
        rows = [row for row in summary.rows if row.model == model]
        tasks, overall = _tasks(rows), _overall(rows)
        if overall:
            yield model, f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0], overall


def _shots_pictures(summary: Summary) -> Iterator[Block]:
    pictures = []
    for model, over, rows in _by_model(summary):
        if len({row.shots for row in rows}) < 2:
            continue
        curves = _curves(rows, lambda row: row.shots, _name)
        drawing = plots.draw_curves(
            curves,
            main=_main_label(rows),
            xlabel="training texts a class, at most",
            ylabel=f"accuracy, % ({over})",
            levels={},
            logarithmic=True,
        )
        pictures.append(
            Picture(
                f"shots-{_slug(model)}",
                plots.svg(drawing),
                f"What more labels buy, {plain(model)}: accuracy, {over}, against the most training texts a class "
                f"(logarithmic){BARS * (len(summary.seeds) > 1)}.",
            )
        )
    if pictures:
        yield Heading(2, "Accuracy against labelled texts")
        yield from pictures


def _length_section(summary: Summary) -> Iterator[Block]:
    blocks: list[Block] = []
    for model, over, rows in _by_model(summary):
        most = max(row.shots for row in rows)
        rows = [row for row in rows if row.shots == most]
        varied = [row for row in rows if row.prompt_length is not None]
        if len({row.prompt_length for row in varied}) < 2:
            continue
        known = {UNTRAINED, *(row.method for row in varied)}
        fixed = [row for row in rows if row.prompt_length is None and row.method in known]
        drawing = plots.draw_curves(
            _curves(varied, lambda row: row.prompt_length or 0, lambda row: row.method),
            main=baselines.MAIN,
            xlabel="soft tokens added to the prompt",
            ylabel=f"accuracy, % ({over})",
            levels={
                row.method + ("" if row.method == UNTRAINED else ", default"): 100 * row.scores["accuracy"].mean
                for row in fixed
            },
            logarithmic=False,
        )
        picture = Picture(
            f"prompt-length-{_slug(model)}",
            plots.svg(drawing),
            f"What a longer soft prompt buys, {_title(rows)}: accuracy, {over}{BARS * (len(summary.seeds) > 1)}.",
        )
        costs = ("trained parameters", "saved", "fit, s")
        blocks += [picture, _table_of(varied, len(summary.seeds), "method", "accuracy, %", "worst seed", *costs)]
    if blocks:
        yield Heading(2, "Accuracy against prompt length")
        yield from blocks


def _of_main(records: Sequence[Record]) -> Iterator[tuple[str, str, str, dict[str, dict[str, list[Record]]]]]:
    """Of each model at its most shots: its name, the title, the main method, and records by task and method."""
    for model in dict.fromkeys(r.model for r in records):
        settings = _settings([r for r in records if r.model == model])
        title, own = max(settings, key=lambda setting: setting[1][0].shots)
        main = _main_label(own)
        tasks: dict[str, dict[str, list[Record]]] = {}
        for r in own:
            tasks.setdefault(r.task, {}).setdefault(_name(r), []).append(r)
        measured = {task: by_name for task, by_name in tasks.items() if main in by_name}
        if measured:
            yield model, title + ", all seeds together" * (len({r.seed for r in own}) > 1), main, measured


def _pooled(records: Sequence[Record], folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities (N, C), true classes (N,) and classes of all seeds together."""
    saved = [predictions(folder, record) for record in records]
    return np.concatenate([s[0] for s in saved]), np.concatenate([s[1] for s in saved]), saved[0][2]


def _calibration_pictures(records: Sequence[Record], folder: Path) -> Iterator[Block]:
    pictures = []
    for model, title, main, tasks in _of_main(records):
        panels = {
            task: {name: reliability(*_pooled(own[name], folder)[:2]) for name in (UNTRAINED, main) if name in own}
            for task, own in tasks.items()
        }
        pictures.append(
            Picture(
                f"reliability-{_slug(model)}",
                plots.svg(plots.draw_reliability(panels, main=main)),
                f"How often a method is right against how sure it is, {title}: on the dashed line it is right as often "
                "as it says; below it, it is too sure. The larger a dot, the more texts.",
            )
        )
    if pictures:
        yield Heading(2, "Calibration")
        yield from pictures


def _confusion_pictures(records: Sequence[Record], folder: Path) -> Iterator[Block]:
    pictures = []
    for model, title, main, tasks in _of_main(records):
        for task, own in tasks.items():
            probabilities, truth, classes = _pooled(own[main], folder)
            counts = np.zeros((len(classes), len(classes)), dtype=int)
            np.add.at(counts, (truth, probabilities.argmax(axis=1)), 1)
            pictures.append(
                Picture(
                    f"confusion-{_slug(model)}-{_slug(task)}",
                    plots.svg(plots.draw_confusion(counts, classes)),
                    f"{task}, {title}: where {main} puts the texts of each true class, in %. "
                    f"The diagonal is right{_worst_confusions(counts, classes)}.",
                )
            )
    if pictures:
        yield Heading(2, "Which classes are confused")
        yield from pictures


def _worst_confusions(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Say the three mistakes that the greatest share of a class's texts meets."""
    wrong = counts / counts.sum(axis=1, keepdims=True)
    np.fill_diagonal(wrong, 0)
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:3]]
    names = list(map(plain, classes))
    said = [f"{names[i]} taken for {names[j]} ({100 * wrong[i, j]:.0f} %)" for i, j in pairs if wrong[i, j] > 0]
    return f"; most often wrong: {_joined(said)}" if said else ""


def _standalone(svg: str) -> str:
    """An SVG file: on white, because a file does not know what page it will stand on."""
    return svg.replace("<svg ", f'<svg style="background: #fff; color: {plots.INK}" ', 1)
