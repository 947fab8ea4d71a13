"""Tables and charts of a record that `speed.py` wrote."""

from __future__ import annotations

import dataclasses
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verbtune.plots import INK, MAIN_COLOR, OTHER_COLOR, figure

FLOOR, OURS, PLAIN, PEFT, HARNESS = "floor", "verbtune", "plain loop", "PEFT prompt tuning", "lm-evaluation-harness"
OPENPROMPT = "OpenPrompt"
PAGE = Path(__file__).parent / "speed.md"
GENERATED = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)
CHARTS = {
    "speed-inference": ("Inference: speed beside the floor", ("inference", "shared prefix", "bf16")),
    "speed-training": ("Training: speed beside the floor", ("training step",)),
    "speed-reuse": (
        "What is computed once: speed beside the first of each group",
        ("in-context", "text cache", "eight tasks"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """What we want to reach: `value` at least, or at most, `limit`."""

    claim: str
    limit: float
    at_least: bool
    unit: str = "x"

    def met(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        return value >= self.limit if self.at_least else value <= self.limit


BARS = {
    "inference": Bar("masked LM, inference, fp32: examples/s beside the floor", 1.0, True),
    "OpenPrompt": Bar("masked LM, inference, fp32: examples/s beside OpenPrompt", 3.0, True),
    "bf16": Bar("inference, bf16: examples/s beside the fp32 floor", 1.8, True),
    "bf16 agreement": Bar("bf16 predicts what fp32 predicts, built-in models", 0.99, True, ""),
    "shared prefix": Bar("causal LM, prompt in front, fp32: examples/s beside the floor", 1.5, True),
    "in-context": Bar("8 demonstrations: examples/s beside scoring each candidate's full prompt", 10.0, True),
    "in-context scores": Bar("8 demonstrations: largest difference of log-probabilities", 1e-4, False, ""),
    "training step": Bar("training step: examples/s beside the floor's forward and backward", 1.0, True),
    "training memory": Bar("training step: peak memory beside the floor's", 1.0, False),
    "text cache": Bar("causal LM, epoch with the prompt in front / soft tokens after the text", 10.0, True),
    "eight tasks": Bar("causal LM, the same texts for eight tasks / for one", 1.5, False),
    "mixed batch": Bar("texts of eight tasks in one call / of one task", 1.1, False),
    "task memory": Bar("a thousand saved tasks on one LM: memory / bytes of their files", 1.0, False),
    "task swap": Bar("taking a saved task in, while others serve", 10.0, False, " ms"),
    "padding": Bar("computed tokens / real tokens", 1.1, False),
    "first prediction": Bar("`import verbtune` to the first prediction, built-in model", 5.0, False, " s"),
    "help": Bar("`verbtune --help`", 0.5, False, " s"),
    "stream": Bar("`verbtune predict`: peak memory of many texts / of a tenth of them", 1.05, False),
}


def write(record: dict[str, Any]) -> None:
    """Put tables into the page's generated part, and draw its charts."""
    for name, (title, bars) in CHARTS.items():
        rows = merged([row for row in record["rows"] if row["bar"] in bars])
        if rows:
            draw(rows, title, PAGE.parent / f"{name}.png")
    PAGE.write_text(written(record), "utf-8")


def written(record: dict[str, Any]) -> str:
    """The page as a record wants it."""
    blocks = [conditions(record), bars_table(record["rows"]), systems_table(record["rows"])]
    for name, (title, bars) in CHARTS.items():
        if merged([row for row in record["rows"] if row["bar"] in bars]):
            blocks.append(f"![{title}]({name}.png)")
    body = "\n\n".join(blocks) + "\n"
    return GENERATED.sub(lambda _: body, PAGE.read_text("utf-8"))


def conditions(record: dict[str, Any]) -> str:
    """Where, when and with what."""
    lines = []
    for letter, rows in by_machine(record["rows"]).items():
        m = rows[-1]["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        bf16 = f"with {', '.join(m['bf16'])}" if m["bf16"] else "without bf16"
        where = f"{m['processor']}, {m['cores']} cores {bf16}"
        where += f", {m['device']}" if m["device"] != "cpu" else ""
        times = sorted(row["time"] for row in rows)
        counts = {len(seconds) for row in rows for seconds in row["seconds"].values()}
        rounds = " to ".join(map(str, sorted({min(counts), max(counts)}))) + " rounds; " if counts else ""
        lines.append(
            f"- {letter}: {times[0]} to {times[-1]} UTC on {where}; {m['threads']} threads, {rounds}load average "
            f"before the (last) run {m['load before']}. Python {m['python']}, {versions}."
        )
    skipped = "; ".join(f"{name} ({why})" for name, why in record["skipped"].items())
    return "\n".join(["Measured on:", "", *lines] + (["", f"Not measured: {skipped}."] if skipped else []))


def by_machine(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by a letter for the processor, and the number of threads, that they were measured with."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(_machine_key(row), []).append(row)
    return {chr(ord("A") + i): found[key] for i, key in enumerate(sorted(found))}


def _machine_key(row: dict[str, Any]) -> tuple[Any, ...]:
    machine = row["machine"]
    return machine["processor"], tuple(machine["bf16"]), machine["device"], machine["threads"]


def bars_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every bar and what was measured."""
    lines = ["| what | where | on | bar | measured: median (lowest … highest) | |", "|---|---|---|---:|---:|---|"]
    letters = {_machine_key(some[0]): letter for letter, some in by_machine(rows).items()}
    for key, bar in BARS.items():
        for row in (row for row in rows if row["bar"] == key):
            limit = f"{'≥' if bar.at_least else '≤'} {plain(bar.limit, bar)}"
            verdict = "met" if bar.met(statistics.median(row["values"])) else "**missed**"
            note = f"; {row['note']}" if row["note"] else ""
            lines.append(
                f"| {bar.claim} | {row['setting']}{note} | {letters[_machine_key(row)]} | {limit} "
                f"| {shown(row['values'], bar)} | {verdict} |"
            )
    return "\n".join(lines)


def merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one setting whose systems ran in the same rounds as one: fp32 and bf16 are bars of their own."""
    whole: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["seconds"]:
            key = (row["measurement"], row["setting"], _machine_key(row))
            first = whole.setdefault(key, row | {"seconds": {}})
            first["seconds"] = first["seconds"] | row["seconds"]
    return list(whole.values())


def systems_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every system's speed, and its time over that of the first one of its group."""
    lines = ["| where | system | texts/s | time beside the first: median (lowest … highest) |", "|---|---|---:|---:|"]
    for row in merged(rows):
        (first, *_), where = row["seconds"], f"{row['measurement'].replace('_', ' ')}: {row['setting']}"
        for name, seconds in row["seconds"].items():
            beside = [a / b for a, b in zip(seconds, row["seconds"][first], strict=True)]
            speed = f"{row['items'] / statistics.median(seconds):.3g}"
            ratio = "1" if name == first else shown(beside, BARS["inference"])
            lines.append(f"| {where} | {name} | {speed} | {ratio} |")
            where = ""
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Horizontal bars of speed, one panel for each setting, with the range over the rounds."""
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    longest = max(len(row["seconds"]) for row in rows)
    drawing = figure(5.2 * columns, (0.8 + 0.3 * longest) * lines + 0.4)
    drawing.suptitle(title, color=INK)
    panels = drawing.subplots(lines, columns, squeeze=False).flat
    for row, panel in zip(rows, panels, strict=False):  # in this order, so that no panel is lost
        reference = next(iter(row["seconds"].values()))
        for at, (name, seconds) in enumerate(row["seconds"].items()):
            speeds = [b / a for a, b in zip(seconds, reference, strict=True)]
            middle = statistics.median(speeds)
            reach = [[middle - min(speeds)], [max(speeds) - middle]]
            color = MAIN_COLOR if name.startswith((OURS, "after", "eight")) else OTHER_COLOR
            panel.barh(at, middle, color=color, xerr=reach, error_kw={"ecolor": INK, "capsize": 2, "lw": 1})
            panel.annotate(
                f"{middle:.2f}", (max(speeds), at), xytext=(4, 0), textcoords="offset points", va="center", color=INK
            )
        panel.axvline(1, color=INK, lw=0.8, ls=":")
        panel.set_yticks(range(len(row["seconds"])), row["seconds"])
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_xlim(left=0)
        name = f"{row['measurement'].replace('_', ' ')}: {row['setting']}"
        panel.set_title(textwrap.fill(name, 48), fontsize=9, color=INK)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:
        panel.set_visible(False)
    drawing.savefig(path, dpi=110)


def plain(value: float, bar: Bar) -> str:
    """A value in the bar's unit."""
    number = f"{value:.0e}" if 0 < value < 0.001 else f"{value:.3f}" if bar.limit < 1 else f"{value:.2f}"
    return number + bar.unit.replace("x", " ×")


def shown(values: Sequence[float], bar: Bar) -> str:
    """Median and spread."""
    bare = dataclasses.replace(bar, unit="")
    spread = f" ({plain(min(values), bare)} … {plain(max(values), bare)})" if len(values) > 1 else ""
    return plain(statistics.median(values), bar) + spread
