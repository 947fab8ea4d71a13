"""What `predict(reject_at=…)` is worth: texts of no class, and whether the promised error rate is kept.

    python benchmarks/rejection.py run --data ../shared/data --model builtin/masked
    python benchmarks/rejection.py table

`run` resumes where it was interrupted. The records go to `benchmarks/records/rejection-*.json`, and `table`
writes `benchmarks/rejection.md` and its pictures from them.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, xlogy
from sklearn.metrics import roc_auc_score

from verbtune import Backbone, PromptClassifier, Task
from verbtune.data import Split, load_splits, sample_shots
from verbtune.plots import draw_curves

HERE = Path(__file__).parent
PAGE = HERE / "rejection.md"
MODELS = ("builtin/masked", "builtin/causal")
TASKS = ("clinc150", "sst2", "trec6", "snips", "banking77")
SEEDS = (13, 21, 42)
SHOTS = 16
RATES = (0.05, 0.1, 0.2)
COVERAGES = tuple(tenth / 10 for tenth in range(1, 11))
NO_CLASS = "out of scope"
SCORES = ("highest probability", "negative entropy", "energy")


@click.group()
def main() -> None:
    """Answers that are not given."""


@main.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with the public sets.")
@click.option("--model", type=click.Choice(MODELS), required=True)
@click.option("--limit", default=300, show_default=True, help="Most test texts of a set, and most of no class.")
@click.option("--threads", default=1, show_default=True)
def run(data: Path, model: str, limit: int, threads: int) -> None:
    """Measure one model."""
    torch.set_num_threads(threads)
    target = HERE / "records" / f"{name_of(model)}.json"
    records = json.loads(target.read_text()) if target.is_file() else []
    lm = Backbone.load(model)
    for task in TASKS:
        for seed in SEEDS:
            if any((record["task"], record["seed"]) == (task, seed) for record in records):
                continue
            records.append({"task": task, "model": model, "seed": seed, **measure(task, lm, data, seed, limit)})
            target.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
            click.echo(f"{task}, seed {seed}: {records[-1]['fit_seconds']} s to fit")


def measure(name: str, lm: Backbone, data: Path, seed: int, limit: int) -> dict[str, Any]:
    """Fit one classifier to a few texts of each class; see which of the others it answers."""
    task = Task.load(name)
    splits = load_splits(task, data)
    known, foreign = parted(splits.train)
    shots = sample_shots(known.labels, SHOTS, seed)
    unused = known.take(sorted(set(range(len(known))) - set(shots)))
    start = time.perf_counter()
    clf = PromptClassifier(task, model=lm, random_state=seed).fit(known.take(shots).rows, known.take(shots).labels)
    seconds = time.perf_counter() - start
    test, test_foreign = (thinned(split, limit) for split in parted(splits.test))
    scores = clf.class_scores(test.rows)
    probabilities = clf.calibration_.probabilities(scores)
    confidence = probabilities.max(axis=1)
    wrong = clf.classes_[probabilities.argmax(axis=1)] != np.array(test.labels)
    found: dict[str, Any] = {
        "n_train": len(shots),
        "n_test": len(test),
        "n_foreign": len(test_foreign),
        "n_held_out": len(clf.calibration_.right) + len(clf.calibration_.wrong),
        "fit_seconds": round(seconds, 1),
        "errors": int(wrong.sum()),
        "errors_at_coverage": [error_of_surest(confidence, wrong, coverage) for coverage in COVERAGES],
        "rates": {},
    }
    foreign_scores = None
    if len(test_foreign):
        foreign_scores = clf.class_scores(test_foreign.rows)
        tuning = [clf.class_scores(thinned(split, limit).rows) for split in (unused, foreign)]
        found["auroc"] = {"training rows": auroc(clf, *tuning), "test rows": auroc(clf, scores, foreign_scores)}
    for rate in RATES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a rate that cannot be kept: nothing is answered
            least = clf.rejection_threshold(rate)
        answered = confidence >= least
        found["rates"][str(rate)] = {"answered": int(answered.sum()), "wrong": int(wrong[answered].sum())}
        if foreign_scores is not None:
            highest = clf.calibration_.probabilities(foreign_scores).max(axis=1)
            found["rates"][str(rate)]["foreign_rejected"] = int((highest < least).sum())
    return found


def parted(split: Split) -> tuple[Split, Split]:
    """The rows that belong to a class, and those that belong to none."""
    foreign = [i for i, label in enumerate(split.labels) if label == NO_CLASS]
    return split.take(sorted(set(range(len(split))) - set(foreign))), split.take(foreign)


def thinned(split: Split, limit: int) -> Split:
    """At most so many rows, of every class in proportion."""
    by_class = np.argsort(split.labels, kind="stable")
    return split.take(by_class[np.linspace(0, len(split), min(limit, len(split)), endpoint=False, dtype=int)].tolist())


def auroc(clf: PromptClassifier, known: NDArray[np.float64], foreign: NDArray[np.float64]) -> dict[str, float]:
    """How well each of `SCORES` tells texts of a class from those of none, by their class scores."""
    scores = np.concatenate([known, foreign])
    p = clf.calibration_.probabilities(scores)
    every = (p.max(axis=1), xlogy(p, p).sum(axis=1), logsumexp(scores, axis=1))
    belongs = np.arange(len(scores)) < len(known)
    return {name: round(roc_auc_score(belongs, s), 4) for name, s in zip(SCORES, every, strict=True)}


def error_of_surest(confidence: NDArray[np.float64], wrong: NDArray[np.bool_], coverage: float) -> float:
    """The part that is wrong of so large a part of the texts, the surest ones."""
    surest = np.argsort(-confidence, kind="stable")[: max(1, round(coverage * len(wrong)))]
    return round(float(wrong[surest].mean()), 4)


@main.command()
def table() -> None:
    """Write `rejection.md` and its pictures from the records."""
    for model in MODELS:
        if records := recorded(model):
            draw(by_set(records), HERE / f"{name_of(model)}.png")
    PAGE.write_text(written(), "utf-8")


def written() -> str:
    """The page as the records want it."""
    blocks = [
        "# Answers that are not given",
        "Written by `python benchmarks/rejection.py table` from `benchmarks/records/rejection-*.json`. Each classifier "
        f"is fitted to {SHOTS} texts a class, drawn by the seeds {', '.join(map(str, SEEDS))}; the threshold of "
        "`reject_at` comes from these texts alone. At most 300 test texts a set, of every class in proportion. Of "
        "clinc150, the texts of the 150 intents are trained on; its rows `out of scope` belong to no class.",
    ]
    for model in MODELS:
        if records := recorded(model):
            blocks += [f"## {model}", *model_blocks(by_set(records), f"{name_of(model)}.png")]
    return "\n\n".join(blocks) + "\n"


def name_of(model: str) -> str:
    """Of a model's records and picture."""
    return f"rejection-{model.replace('/', '-')}"


def recorded(model: str) -> list[dict[str, Any]]:
    """The records of a model, if there are any."""
    path = HERE / "records" / f"{name_of(model)}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def by_set(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of each set, in the order of `TASKS`."""
    return {task: [record for record in records if record["task"] == task] for task in TASKS}


def draw(by_task: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Errors by the part of the texts that is answered."""
    curves = {
        task: [
            (100 * coverage, *mean_std([100 * record["errors_at_coverage"][i] for record in found]))
            for i, coverage in enumerate(COVERAGES)
        ]
        for task, found in by_task.items()
    }
    draw_curves(
        curves,
        main="clinc150",
        xlabel="test texts answered, the surest first (%)",
        ylabel="errors among them (%)",
        levels={f"an error rate of {rate:.0%}": 100 * rate for rate in RATES},
        logarithmic=False,
    ).savefig(path, dpi=110)


def model_blocks(by_task: dict[str, list[dict[str, Any]]], picture: str) -> list[str]:
    """A model's tables, picture, and what they say."""
    return [
        "### Is the error rate kept?",
        rates_table(by_task),
        verdict(by_task),
        f"![Errors by the part of the texts that is answered]({picture})",
        "### Which score tells texts of no class?",
        scores_table(by_task["clinc150"]),
        "The score was chosen on training rows. `reject_at` goes by the highest probability, although entropy is a "
        "little ahead: only the highest probability says by itself how many errors to expect.",
    ]


def rates_table(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """What `reject_at` did on the test texts."""
    lines = [
        "| set | errors without | `reject_at` | answered | errors among them | worst seed | no class: rejected |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, records in by_task.items():
        title = task if len(records) == len(SEEDS) else f"{task} ({len(records)} of {len(SEEDS)} seeds)"
        for rate in map(str, RATES):
            found = [record["rates"][rate] for record in records]
            coverage = [100 * f["answered"] / r["n_test"] for f, r in zip(found, records, strict=True)]
            foreign = [
                100 * f["foreign_rejected"] / r["n_foreign"]
                for f, r in zip(found, records, strict=True)
                if r["n_foreign"]
            ]
            lines.append(
                f"| {title} | {100 * sum(r['errors'] for r in records) / sum(r['n_test'] for r in records):.1f} % "
                f"| {float(rate):.0%} | {spelled(coverage)} | {errors(found)} | {errors([max(found, key=error_rate)])} "
                f"| {spelled(foreign) if foreign else ''} |"
            )
    return "\n".join(lines)


def scores_table(records: Sequence[dict[str, Any]]) -> str:
    """AUROC of clinc150's texts of a class against those of none."""
    lines = ["| AUROC | training rows that were not drawn | test rows |", "|---|---:|---:|"]
    for name in SCORES:
        cells = [[record["auroc"][rows][name] for record in records] for rows in ("training rows", "test rows")]
        lines.append(f"| {name} | " + " | ".join("{:.3f} ± {:.3f}".format(*mean_std(cell)) for cell in cells) + " |")
    return "\n".join(lines)


def verdict(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """How often the promise was kept, of all sets, seeds and rates."""
    every = [
        (f"{task} at {float(rate):.0%}, seed {record['seed']} ({errors([found])})", error_rate(found) <= float(rate))
        for task, records in by_task.items()
        for record in records
        for rate, found in record["rates"].items()
    ]
    broken = [where for where, kept in every if not kept]
    text = f"The rate is kept by {len(every) - len(broken)} of {len(every)} classifiers and rates."
    return f"{text} It is missed by {'; '.join(broken)}." if broken else text


def error_rate(found: dict[str, int]) -> float:
    """The part of the answers that is wrong; without answers none is."""
    return found["wrong"] / max(1, found["answered"])


def errors(found: Sequence[dict[str, int]]) -> str:
    """The errors among all answers."""
    wrong, answered = (sum(f[key] for f in found) for key in ("wrong", "answered"))
    return f"{100 * wrong / answered:.1f} % of {answered}" if answered else "no answers"


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spelled(percent: Sequence[float]) -> str:
    """Percentages over the seeds."""
    return "{:.0f} ± {:.0f} %".format(*mean_std(percent))


if __name__ == "__main__":
    main()
