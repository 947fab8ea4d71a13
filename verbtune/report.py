"""What a bench found, as a table for the terminal and a report in Markdown and HTML."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from . import baselines, plots
from .bench import (
    Comparison,
    Failure,
    Outcome,
    Record,
    Row,
    Summary,
    label,
    predictions,
    shown_length,
    summarize,
    write_whole,
)
from .metrics import reliability

__all__ = ["table", "write"]

COLUMNS = 5  # tasks side by side; more of them get a table of their own
UNTRAINED = "zero-shot"
REFERENCES = ("lora", "fine-tuning")


@dataclasses.dataclass(frozen=True)
class _Heading:
    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class _Text:
    text: str


@dataclasses.dataclass(frozen=True)
class _Table:
    """Cells of Markdown inline text; the first column to the left, the others to the right."""

    header: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    name: str
    svg: str
    caption: str


_Block = _Heading | _Text | _Table | _Picture
_Item = TypeVar("_Item", Record, Row)


def table(summary: Summary) -> str:
    """The accuracy of every method on every task, as Markdown that a terminal shows well.

    Parameters
    ----------
    summary : Summary
    """
    shown = dataclasses.replace(summary, rows=_shown(summary.rows))
    return _markdown(_main_tables(shown)) if summary.rows else "No measurement was finished.\n"


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
        if isinstance(block, _Picture):
            write_whole(folder / "pictures" / f"{block.name}.svg", _standalone(block.svg))
    write_whole(folder / "report.md", _markdown(blocks))
    write_whole(folder / "report.html", _html(blocks))


def _report(outcome: Outcome, folder: Path) -> Iterator[_Block]:
    records, summary = outcome.records, summarize(outcome.records)
    yield _Heading(1, "verbtune bench")
    if outcome.failures:
        n, total = len(outcome.failures), len(outcome.failures) + len(records)
        yield _Text(f"**{n} of {total} measurements failed**; they are listed under Failures.")
    if not records:
        yield _Text("No measurement was finished.")
    else:
        shown = dataclasses.replace(summary, rows=_shown(summary.rows))
        yield from _main_tables(shown)
        yield from _method_pictures(_shown(records))
        yield from _comparison_tables(summary)
        yield from _cost_tables(shown)
        yield from _shots_picture(shown)
        yield from _length_section(summary)
        yield from _calibration_pictures(records, folder)
        yield from _confusion_pictures(records, folder)
        yield from _task_tables(summary)
    yield from _failure_table(outcome)
    if records:
        yield from _provenance(records)


# Numbers -------------------------------------------------------------------------------------------


def _percent(row: Row, metric: str, n_seeds: int) -> str:
    spread = row.scores[metric]
    text = f"{100 * spread.mean:.1f}" + ("" if spread.std is None else f" ± {100 * spread.std:.1f}")
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


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _bold_best(rows: Sequence[Row], cells: Sequence[str], metric: str) -> list[str]:
    """Embolden the highest mean, and what cannot be told from it as it is printed."""
    best = max(round(100 * row.scores[metric].mean, 1) for row in rows)
    return [
        f"**{cell}**" if round(100 * row.scores[metric].mean, 1) == best else cell
        for row, cell in zip(rows, cells, strict=True)
    ]


# Sections ------------------------------------------------------------------------------------------


def _groups(summary: Summary) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one model and number of shots, with how to call them."""
    for model, shots in dict.fromkeys((row.model, row.shots) for row in summary.rows):
        title = f"{model}, {shots} training text{'s' * (shots > 1)} a class"
        yield title, [row for row in summary.rows if (row.model, row.shots) == (model, shots)]


def _shown(items: Sequence[_Item]) -> list[_Item]:
    """Records or rows with every method at one prompt length."""
    lengths = {method: shown_length(method, items) for method in {item.method for item in items}}
    return [item for item in items if item.prompt_length == lengths[item.method]]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(label(row.method, row.prompt_length) for row in rows))


def _overall(rows: Sequence[Row]) -> list[Row]:
    """The rows in the mean over tasks, or those of the only task."""
    return [row for row in rows if row.task is None] if len({row.task for row in rows}) > 1 else list(rows)


def _main_tables(summary: Summary) -> Iterator[_Block]:
    n_seeds = len(summary.seeds)
    for title, rows in _groups(summary):
        tasks = [task for task in dict.fromkeys(row.task for row in rows) if task is not None]
        yield _Heading(2, f"Accuracy: {title}")
        spread = (
            f"mean ± standard deviation (n − 1) over {n_seeds} seeds ({_joined(summary.seeds)})"
            if n_seeds > 1
            else f"of one seed ({summary.seeds[0]})"
        )
        sizes = {row.task: (row.n_train, row.n_test) for row in rows}
        yield _Text(
            f"Accuracy on the test texts in %, {spread}; each seed draws its own training texts, the same for all "
            "methods. Bold: the highest of a column. Training and test texts: "
            + "; ".join(f"{task} {sizes[task][0]:,} and {sizes[task][1]:,}" for task in tasks)
            + "."
        )
        names, overall = _names(rows), _overall(rows)
        columns: dict[str, list[str]] = {}
        for task in tasks + [None] * (len(tasks) > 1):
            own = [row for row in rows if row.task == task]
            cells = _bold_best(own, [_percent(row, "accuracy", n_seeds) for row in own], "accuracy")
            columns[task or "mean of tasks"] = _aligned(own, cells, names, "failed" if task else "–")
        last = {
            "worst seed": [f"{100 * row.scores['accuracy'].worst:.1f}" for row in overall],
            "ECE": [f"{row.scores['ece'].mean:.3f}" for row in overall],
            "trained": [f"{row.trained_parameters:,.0f}" for row in overall],
            "fit, s": [_seconds(row.fit_seconds) for row in overall],
        }
        shared = {name: _aligned(overall, cells, names, "–") for name, cells in last.items()}
        for start in range(0, len(tasks), COLUMNS):
            end = start + COLUMNS
            chosen = {name: columns[name] for name in tasks[start:end]}
            if end >= len(tasks):
                chosen |= ({"mean of tasks": columns["mean of tasks"]} if len(tasks) > 1 else {}) | shared
            body = [[name, *cells] for name, *cells in zip(names, *chosen.values(), strict=True)]
            yield _Table(["method", *chosen], body)
        legend = (
            "ECE: expected calibration error, 0 is best. Trained: parameters. Fit: the median over the seeds, on this "
            "machine."
        )
        if len(tasks) > 1:
            legend += " These columns and the worst seed are of the mean over the tasks."
        if any(row.method in REFERENCES for row in rows):
            legend += f" {' and '.join(REFERENCES)} train a copy of the LM: upper references."
        yield _Text(legend)


def _aligned(rows: Sequence[Row], cells: Sequence[str], names: Sequence[str], missing: str) -> list[str]:
    """Cells in the order of the method names."""
    by_name = {label(row.method, row.prompt_length): cell for row, cell in zip(rows, cells, strict=True)}
    return [by_name.get(name, missing) for name in names]


def _task_tables(summary: Summary) -> Iterator[_Block]:
    yield _Heading(2, "Every task in full")
    yield _Text(
        "NLL: negative log-likelihood in nats. ECE: expected calibration error, 15 bins. Brier: squared differences, "
        "summed over the classes. All three: lower is better. ±: standard deviation (n − 1) over the seeds."
    )
    n_seeds = len(summary.seeds)
    for title, rows in _groups(summary):
        for task in [task for task in dict.fromkeys(row.task for row in rows) if task is not None]:
            own = [row for row in rows if row.task == task]
            yield _Heading(3, f"{task}: {title}")
            accuracy = _bold_best(own, [_percent(row, "accuracy", n_seeds) for row in own], "accuracy")
            f1 = _bold_best(own, [_percent(row, "macro_f1", n_seeds) for row in own], "macro_f1")
            yield _Table(
                [
                    "method",
                    "accuracy, %",
                    "worst seed",
                    "macro-F1, %",
                    "NLL",
                    "ECE",
                    "Brier",
                    "fit, s",
                    "predict, ms a text",
                ],
                [
                    [
                        label(row.method, row.prompt_length),
                        accuracy[i],
                        f"{100 * row.scores['accuracy'].worst:.1f}",
                        f1[i],
                        *(_three_decimals(row, metric) for metric in ("nll", "ece", "brier")),
                        _seconds(row.fit_seconds),
                        f"{1000 * row.predict_seconds / row.n_test:.2f}",
                    ]
                    for i, row in enumerate(own)
                ],
            )


def _three_decimals(row: Row, metric: str) -> str:
    spread = row.scores[metric]
    return f"{spread.mean:.3f}" + ("" if spread.std is None else f" ± {spread.std:.3f}")


def _comparison_tables(summary: Summary) -> Iterator[_Block]:
    yield _Heading(2, f"Is {baselines.MAIN} better? Paired tests")
    if not summary.comparisons:
        yield _Text(f"There is nothing to pair: that takes {baselines.MAIN}, a baseline, and two tasks or seeds.")
        return
    yield _Text(
        "Difference: accuracy of the main method minus the baseline's, in percentage points, mean over all pairs of "
        "task and seed. Interval: 95 %, bootstrap over tasks and, within them, seeds. p: two-sided sign-flip "
        "permutation test over the pairs, exact for up to 14 of them, not corrected for the number of baselines; it "
        "speaks of these tasks, not of new ones."
    )
    groups = dict.fromkeys((c.model, c.shots, c.main) for c in summary.comparisons)
    for model, shots, main in groups:
        yield _Heading(3, f"{main}: {model}, {shots} training text{'s' * (shots > 1)} a class")
        own = [c for c in summary.comparisons if (c.model, c.shots, c.main) == (model, shots, main)]
        yield _Table(
            ["against", "difference", "95 % interval", "wins", "ties", "losses", "p"], [_comparison_row(c) for c in own]
        )


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


def _cost_tables(summary: Summary) -> Iterator[_Block]:
    tuned = [row for row in summary.rows if row.trained_parameters]
    if not tuned:
        return
    yield _Heading(2, "What training costs: prompt tuning, LoRA and full fine-tuning")
    yield _Text(
        "Medians over the seeds, in the mean over the tasks. Memory: by how much fitting raised the process's resident "
        "memory at most, with the LM already loaded (on a GPU: what was allocated there). Saved: what one task adds on "
        "disk to the shared LM."
    )
    for title, rows in _groups(dataclasses.replace(summary, rows=tuned)):
        yield _Heading(3, title)
        yield _Table(
            ["method", "accuracy, %", "trained parameters", "peak memory, MB", "saved", "fit, s"],
            [
                [
                    label(row.method, row.prompt_length),
                    _percent(row, "accuracy", len(summary.seeds)),
                    f"{row.trained_parameters:,.0f}",
                    f"{row.peak_memory_mb:,.0f}",
                    _bytes(row.artifact_bytes),
                    _seconds(row.fit_seconds),
                ]
                for row in _overall(rows)
            ],
        )


def _failure_table(outcome: Outcome) -> Iterator[_Block]:
    yield _Heading(2, "Failures")
    if not outcome.failures:
        yield _Text("None.")
        return
    yield _Text("Each with its traceback in `results.json`. Running the bench again tries them again.")
    alike: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in outcome.failures:
        alike.setdefault((failure.task, failure.model, failure.error), []).append(failure)
    yield _Table(
        ["task", "model", "methods", "shots", "seeds", "error"],
        [
            [
                task,
                model,
                *(
                    _joined(list(dict.fromkeys(values)))
                    for values in (
                        [label(f.method, f.prompt_length) for f in failures],
                        [f.shots for f in failures],
                        [f.seed for f in failures],
                    )
                ),
                _plain(error),
            ]
            for (task, model, error), failures in alike.items()
        ],
    )


def _provenance(records: Sequence[Record]) -> Iterator[_Block]:
    yield _Heading(2, "Made with")
    versions = dict.fromkeys(tuple(record.versions.items()) for record in records)
    for version in versions:
        yield _Text(_joined([f"{name} {number}" for name, number in version]) + ".")
    models = dict.fromkeys((record.model, record.model_fingerprint) for record in records)
    yield _Table(["model", "SHA-256 of its weights"], [[model, f"`{total}`"] for model, total in models])
    yield _Text(
        "Training and test texts of every seed, by the first 16 digits of their SHA-256; all methods saw the same."
    )
    splits = dict.fromkeys((r.task, r.shots, r.seed, r.n_train, r.n_test, r.split_checksum) for r in records)
    yield _Table(
        ["task", "shots", "seed", "training texts", "test texts", "checksum"],
        [[*map(str, split[:5]), f"`{split[5][:16]}`"] for split in splits],
    )


# Pictures ------------------------------------------------------------------------------------------


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _record_groups(records: Sequence[Record]) -> Iterator[tuple[str, int, list[Record]]]:
    for model, shots in dict.fromkeys((r.model, r.shots) for r in records):
        yield model, shots, [r for r in records if (r.model, r.shots) == (model, shots)]


def _main_label(records: Sequence[Record]) -> str:
    return label(baselines.MAIN, shown_length(baselines.MAIN, records))


def _method_pictures(records: Sequence[Record]) -> Iterator[_Block]:
    for model, shots, group in _record_groups(records):
        panels: dict[str, dict[str, list[float]]] = {}
        for r in group:
            panel = panels.setdefault(f"{r.task} ({r.n_test:,} texts)", {})
            panel.setdefault(label(r.method, r.prompt_length), []).append(100 * r.accuracy)
        drawing = plots.draw_methods(panels, main=_main_label(group), xlabel="accuracy, %")
        yield _Picture(
            f"accuracy-{_slug(model)}-{shots}",
            plots.svg(drawing),
            f"Accuracy by method, {model}, {shots} training texts a class: a small dot for each seed, the mean, and "
            "one standard deviation to each side. Further right is better.",
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
    """Rows in the mean over tasks of every model, and how to call that mean."""
    for model in dict.fromkeys(row.model for row in summary.rows):
        rows = [row for row in summary.rows if row.model == model]
        tasks = [task for task in dict.fromkeys(row.task for row in rows) if task is not None]
        yield model, f"mean of {len(tasks)} tasks" if len(tasks) > 1 else str(tasks[0]), _overall(rows)


def _shots_picture(summary: Summary) -> Iterator[_Block]:
    if len({row.shots for row in summary.rows}) < 2:
        return
    yield _Heading(2, "Accuracy against labelled texts")
    for model, over, rows in _by_model(summary):
        curves = _curves(rows, lambda row: row.shots, lambda row: label(row.method, row.prompt_length))
        drawing = plots.draw_curves(
            curves,
            main=baselines.MAIN,
            xlabel="training texts a class",
            ylabel=f"accuracy, % ({over})",
            levels={},
            logarithmic=True,
        )
        yield _Picture(
            f"shots-{_slug(model)}",
            plots.svg(drawing),
            f"What more labels buy, {model}: accuracy, {over}, against training texts a class (logarithmic); bars are "
            "one standard deviation over the seeds to each side.",
        )


def _length_section(summary: Summary) -> Iterator[_Block]:
    if len({row.prompt_length for row in summary.rows} - {None}) < 2:
        return
    yield _Heading(2, "Accuracy against prompt length")
    most = max(row.shots for row in summary.rows)
    for model, over, rows in _by_model(summary):
        rows = [row for row in rows if row.shots == most]
        varied = [row for row in rows if row.prompt_length is not None]
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
        yield _Picture(
            f"prompt-length-{_slug(model)}",
            plots.svg(drawing),
            f"What a longer soft prompt buys, {model}, {most} training texts a class: accuracy, {over}; bars are one "
            "standard deviation over the seeds to each side.",
        )
        names = _names(varied)
        yield _Table(
            ["method", "accuracy, %", "worst seed", "trained parameters", "saved", "fit, s"],
            [
                [
                    name,
                    _percent(row, "accuracy", len(summary.seeds)),
                    f"{100 * row.scores['accuracy'].worst:.1f}",
                    f"{row.trained_parameters:,.0f}",
                    _bytes(row.artifact_bytes),
                    _seconds(row.fit_seconds),
                ]
                for name, row in zip(names, varied, strict=True)
            ],
        )


def _of_main(records: Sequence[Record]) -> Iterator[tuple[str, int, dict[str, list[Record]], dict[str, list[Record]]]]:
    """Of each model with the most shots: records of the main method, and of the untrained prompt, by task."""
    for model in dict.fromkeys(r.model for r in records):
        most = max(r.shots for r in records if r.model == model)
        own = [r for r in records if (r.model, r.shots) == (model, most)]
        main = _main_label(own)
        ours: dict[str, list[Record]] = {}
        theirs: dict[str, list[Record]] = {}
        for r in own:
            if label(r.method, r.prompt_length) == main:
                ours.setdefault(r.task, []).append(r)
            elif r.method == UNTRAINED:
                theirs.setdefault(r.task, []).append(r)
        if ours:
            yield model, most, ours, theirs


def _pooled(records: Sequence[Record], folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities (N, C), true classes (N,) and classes of all seeds together."""
    saved = [predictions(folder, record) for record in records]
    return np.concatenate([s[0] for s in saved]), np.concatenate([s[1] for s in saved]), saved[0][2]


def _calibration_pictures(records: Sequence[Record], folder: Path) -> Iterator[_Block]:
    pictures = []
    for model, shots, ours, theirs in _of_main(records):
        main = _main_label([r for own in ours.values() for r in own])
        panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for task, own in ours.items():
            for name, chosen in ((UNTRAINED, theirs.get(task)), (main, own)):
                if chosen:
                    probabilities, truth, _ = _pooled(chosen, folder)
                    panels.setdefault(task, {})[name] = reliability(probabilities, truth)
        pictures.append(
            _Picture(
                f"reliability-{_slug(model)}",
                plots.svg(plots.draw_reliability(panels, main=main)),
                f"How often a method is right against how sure it is, {model}, {shots} training texts a class, all "
                "seeds together: on the dashed line it is right as often as it says; below it, it is too sure. The "
                "larger a dot, the more texts.",
            )
        )
    if pictures:
        yield _Heading(2, "Calibration")
        yield from pictures


def _confusion_pictures(records: Sequence[Record], folder: Path) -> Iterator[_Block]:
    pictures = []
    for model, shots, ours, _ in _of_main(records):
        for task, own in ours.items():
            probabilities, truth, classes = _pooled(own, folder)
            counts = np.zeros((len(classes), len(classes)), dtype=int)
            np.add.at(counts, (truth, probabilities.argmax(axis=1)), 1)
            pictures.append(
                _Picture(
                    f"confusion-{_slug(model)}-{_slug(task)}",
                    plots.svg(plots.draw_confusion(counts, classes)),
                    f"{task}, {model}, {shots} training texts a class, all seeds together: where "
                    f"{_main_label(own)} puts the texts of each true class, in %. The diagonal is right"
                    f"{_worst_confusions(counts, classes)}.",
                )
            )
    if pictures:
        yield _Heading(2, "Which classes are confused")
        yield from pictures


def _worst_confusions(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Say the three mistakes that the greatest share of a class's texts meets."""
    wrong = counts / counts.sum(axis=1, keepdims=True)
    np.fill_diagonal(wrong, 0)
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:3]]
    said = [f"{classes[i]} taken for {classes[j]} ({100 * wrong[i, j]:.0f} %)" for i, j in pairs if wrong[i, j] > 0]
    return f"; most often wrong: {_joined(said)}" if said else ""


# Rendering -----------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text that is not ours, so that Markdown takes none of it for structure."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def _markdown(blocks: Sequence[_Block] | Iterator[_Block]) -> str:
    return "\n".join(map(_markdown_block, blocks))


def _markdown_block(block: _Block) -> str:
    match block:
        case _Heading(level, text):
            return f"{'#' * level} {text}\n"
        case _Text(text):
            return f"{text}\n"
        case _Picture(name, _, caption):
            return f"![{caption}](pictures/{name}.svg)\n\n*{caption}*\n"
        case _Table(header, rows):
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
            lines = []
            for row in (header, rule, *rows):
                cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
                lines.append(f"| {' | '.join(cells)} |")
            return "\n".join(lines) + "\n"


_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #8b949e55; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.long { white-space: normal; text-align: left; min-width: 20rem; }
tbody tr:hover { background: #8b949e22; }
figure { margin: 1.5rem 0; }
figure svg { max-width: 100%; height: auto; overflow: visible; }
figcaption { font-size: .9rem; opacity: .8; max-width: 50rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""


def _html(blocks: Sequence[_Block]) -> str:
    body = "\n".join(map(_html_block, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>verbtune bench</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: _Block) -> str:
    match block:
        case _Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case _Text(text):
            return f"<p>{_inline(text)}</p>"
        case _Picture(_, svg, caption):
            # In an HTML page the namespaces go without saying.
            bare = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
            return f"<figure>{bare}<figcaption>{_inline(caption)}</figcaption></figure>"
        case _Table(header, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _html_cell(cell: str) -> str:
    return f"<td{' class=long' * (len(cell) > 70)}>{_inline(cell)}</td>"


def _inline(text: str) -> str:
    """The Markdown of our own cells and sentences as HTML: bold, code and escapes, nothing else."""
    pieces = re.split(r"(\\.|\*\*.+?\*\*|`.+?`)", text)
    return "".join(map(_inline_piece, pieces))


def _inline_piece(piece: str) -> str:
    if piece.startswith("\\") and len(piece) == 2:
        return html.escape(piece[1])
    if piece.startswith("**") and len(piece) > 4:
        return f"<strong>{html.escape(piece[2:-2])}</strong>"
    if piece.startswith("`") and len(piece) > 2:
        return f"<code>{html.escape(piece[1:-1])}</code>"
    return html.escape(piece)


def _standalone(svg: str) -> str:
    """An SVG file: on white, because a file does not know what page it will stand on."""
    return svg.replace("<svg ", f'<svg style="background: #fff; color: {plots.INK}" ', 1)
