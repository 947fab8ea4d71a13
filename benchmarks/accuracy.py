"""How accurate a few labels make each way of using the same language model.

    python benchmarks/accuracy.py all --data ../shared/data         # the whole comparison: days on two cores

or a part of it:

    python benchmarks/accuracy.py rates --data ../shared/data --model builtin/masked
    python benchmarks/accuracy.py run --data ../shared/data --model builtin/masked --group frozen --shots 4,16,64
    python benchmarks/accuracy.py run --data ../shared/data --model builtin/masked --group trained --tasks sst2,cr
    python benchmarks/accuracy.py report

Every step resumes where it was interrupted. `rates` chooses the learning rates of all that is trained by gradient
steps, on the tuning sets and a seed that is used nowhere else. The records go to
`benchmarks/records/accuracy-*.json`, and `report` writes the tables of `benchmarks/accuracy.md` from them. PEFT and
SetFit come from their released packages (`pip install peft setfit`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor

from verbtune import Backbone, PromptClassifier, deep, rows
from verbtune.attention import AROUND
from verbtune.baselines import METHODS, Factory, FineTuned
from verbtune.bench import SEEDS
from verbtune.bench import run as run_bench
from verbtune.plots import draw_curves
from verbtune.summary import Record
from verbtune.task import Task

HERE = Path(__file__).parent
RECORDS = HERE / "records"
PAGE = HERE / "accuracy.md"
MODELS = ("builtin/masked", "builtin/causal")
TUNING = ("sst2", "trec6", "snips", "emotion", "banking77", "sentiment")
REPORTED = (
    *("cr", "uci_sentences", "imdb", "agnews", "tweet_emotion", "sib200_en", "clinc150", "sms_spam", "rte", "mrpc"),
    *("sst5", "pt_sentiment_multi", "pt_tweet_sentiment", "support_intent", "intencao", "sentimento"),
)
BUNDLED = ("sentiment", "support_intent", "intencao", "sentimento")
MANY_CLASSES = ("banking77", "clinc150")  # methods that train take hours there: the group `many` has some of them
TRAINED_ON_MANY = ("lora", "fine-tuning", "setfit")
RATE_SETS = ("sst2", "trec6")
RATE_SEED = 7
STEPS = 100
EPOCHS = 10  # no fewer: of more than 160 texts these are more steps
TEXTS_A_STEP = 16
SOFT_PROMPT = METHODS["soft-prompt"]  # as the bench has it; `register` puts another one in its place
FROZEN = ("tfidf", "zero-shot+batch", "linear-probe", "linear-probe+text", "linear-probe+last", "verbtune")
RATES = {
    "soft-prompt": (5e-3, 2e-2, 1e-1, 3e-1, 1.0),
    "lora": (3e-4, 1e-3, 3e-3),
    "fine-tuning": (2e-5, 5e-5, 2e-4),
    "peft prompt-tuning": (3e-3, 3e-2, 3e-1),
    "peft p-tuning": (1e-4, 1e-3, 1e-2),
    "peft prefix-tuning": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "setfit": (2e-5, 5e-5),
}
DEFAULT = " (documented rate)"
ROWS_ONLY = "rows only"


class KeysAndValuesOnly(deep._Parts):
    """A deep prompt whose factors and shifts stay as they are."""

    def __init__(self, start: Tensor, against: Any) -> None:
        super().__init__(start, against)
        self.deep.scale[..., -AROUND:, :] = 0


DEEP_ABLATION: dict[str, dict[str, Any]] = {  # of the second opinion
    "without contrast": {"CONTRAST": 0.0},
    "contrast only, one deep prompt": {"MANY_CLASSES": 0},
    "two folds": {"FOLDS": 2},
    "at most thirty steps": {"MOST_STEPS": 30},
    "steps of sixteen texts": {"BATCH_SIZE": 16},
    "without factors and shifts": {"_Parts": KeysAndValuesOnly},
}
JOINT = "rows and soft tokens tuned together"
FIVE_SIXTHS = "texts at five sixths only"
ABLATION: dict[str, dict[str, Any]] = {  # of the rows
    "the likeliest reading": {"STEP": 0.0},
    "without the label words": {"CANDIDATES": tuple((0.0, strength) for strength in (1.0, 0.25, 0.05))},
    "reads the text only": {"SHARES": (0.0, 1.0)},
    "reads the answer only": {"SHARES": (1.0, 0.0)},
    "no cross-validation": {"CANDIDATES": (rows.UNCHOSEN,)},
}
LENGTHS = {"verbtune": (1, 2, 8, 16, 32, 100), "soft-prompt": (1, 20, 100), "peft prompt-tuning": (1, 20, 100)}
CURVE_SETS = ("sst2", "trec6", "emotion")
WHOLE: tuple[tuple[str, list[int], str | None], ...] = (  # groups, labels a class, and sets if not all
    ("frozen", [4, 16, 64], None),
    ("frozen", [256], ",".join(CURVE_SETS)),
    ("trained", [4, 16, 64], None),
    ("many", [16], None),
    ("ablation", [16], None),
    ("length", [16], None),
)
MOST_BELOW = 0.01  # below the better of manual prompt and probe, at most
KEPT = (
    *("task", "method", "shots", "seed", "n_train", "n_test", "accuracy", "macro_f1", "nll", "ece", "brier"),
    *("trained_parameters", "artifact_bytes", "fit_seconds", "predict_seconds", "split_checksum", "model_fingerprint"),
)
GENERATED = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)


# -- the methods that the bench does not bring -------------------------------------------------------------------------


def trained(method: str, rate: float) -> Factory:
    """A method that takes gradient steps, at a learning rate: `STEPS`, or `EPOCHS` where that is more."""

    def make(task: Task, lm: Backbone, seed: int, prompt_length: int | None) -> Any:
        if method in ("lora", "fine-tuning"):
            kind = "lora" if method == "lora" else "full"
            return FineTuned(task, model=lm, method=kind, learning_rate=rate, random_state=seed)
        if method == "soft-prompt":
            return SOFT_PROMPT(task, lm, seed, prompt_length).set_params(learning_rate=rate)
        import peers

        if method == "setfit":
            return peers.SetFit(task, model=lm, learning_rate=rate, random_state=seed)
        kind = peers.PeftHead if lm.kind == "masked" else peers.PeftWords
        asked = {"method": method.removeprefix("peft "), "learning_rate": rate, "random_state": seed}
        return kind(task, model=lm, **asked | ({} if prompt_length is None else {"n_tokens": prompt_length}))

    def make_for_any_number(task: Task, lm: Backbone, seed: int, prompt_length: int | None) -> Any:
        clf = make(task, lm, seed, prompt_length)
        fit = clf.fit

        def fit_long_enough(X: Any, y: Any) -> Any:
            clf.set_params(steps=max(STEPS, math.ceil(EPOCHS * len(X) / TEXTS_A_STEP)))
            return fit(X, y)

        if "steps" in clf.get_params():  # SetFit has rules of its own
            clf.fit = fit_long_enough
        return clf

    return make_for_any_number


def documented(method: str) -> float:
    """The learning rate of PEFT's guides and SetFit's defaults."""
    import peers

    return peers.DOCUMENTED_RATES[method.removeprefix("peft ")]


def ablated(module: ModuleType, changes: dict[str, Any], **parameters: Any) -> Factory:
    """`verbtune` with other constants of a module."""

    def make(task: Task, lm: Backbone, seed: int, prompt_length: int | None) -> Any:
        clf = PromptClassifier(task, model=lm, random_state=seed, **parameters)
        fit = clf.fit

        def fit_changed(X: Any, y: Any) -> Any:
            with mock.patch.multiple(module, **changes):
                return fit(X, y)

        clf.fit = fit_changed  # type: ignore[method-assign]
        return clf

    return make


def of_length(method: str, n: int, rate: float) -> Factory:
    """A method with a prompt of `n` vectors; those of `verbtune` stand in every layer."""
    if method == "verbtune":
        return ablated(deep, {"LENGTH": n})
    return lambda task, lm, seed, _: trained(method, rate)(task, lm, seed, n)


def named(method: str, n: int) -> str:
    """Name of a method with a prompt of `n` vectors."""
    return f"{method} of length {n}"


def register(model: str, group: str) -> list[str]:
    """Add a group's methods to the bench's, and give their names."""
    METHODS[ROWS_ONLY] = lambda task, lm, seed, n: PromptClassifier(task, model=lm, steps=0, random_state=seed)
    if group == "frozen":
        return [*FROZEN, ROWS_ONLY]
    if group == "ablation":
        METHODS.update({f"rows only, {name}": ablated(rows, c, steps=0) for name, c in ABLATION.items()})
        METHODS.update({name: ablated(deep, changes) for name, changes in DEEP_ABLATION.items()})
        METHODS[JOINT] = lambda task, lm, seed, n: PromptClassifier(task, model=lm, steps=STEPS, random_state=seed)
        METHODS[FIVE_SIXTHS] = ablated(rows, {"STEP_TO_LAST": 1e9})
        return [ROWS_ONLY, JOINT, FIVE_SIXTHS, *DEEP_ABLATION, *(f"rows only, {name}" for name in ABLATION)]
    chosen = json.loads((RECORDS / "accuracy-rates.json").read_text("utf-8"))[model]["chosen"]
    if group == "length":
        every = {named(m, n): of_length(m, n, chosen.get(m, 0.0)) for m, lengths in LENGTHS.items() for n in lengths}
        METHODS.update(every)
        return list(every)
    if group == "many":
        METHODS.update({method: trained(method, chosen[method]) for method in TRAINED_ON_MANY})
        return list(TRAINED_ON_MANY)
    names = ["in-context+batch"]  # trains nothing, but is as slow
    for method, rate in chosen.items():
        METHODS[method] = trained(method, rate)
        names.append(method)
        if (method.startswith("peft") or method == "setfit") and documented(method) != rate:
            METHODS[method + DEFAULT] = trained(method, documented(method))
            names.append(method + DEFAULT)
    return names


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    tasks: Sequence[str],
    model: str,
    methods: Sequence[str],
    *,
    data: Path,
    work: Path,
    shots: Sequence[int],
    seeds: Sequence[int],
    limit: int,
) -> list[Record]:
    """Records of bundled and public sets; what fails is printed and left out."""
    found: list[Record] = []
    for names, folder in (
        ([t for t in tasks if t in BUNDLED], None),
        ([t for t in tasks if t not in BUNDLED], data),
    ):
        # Set by set, so that an interruption loses nothing of the others.
        for name in names:
            outcome = run_bench(
                [name], [model], output=work, methods=methods, shots=shots, seeds=seeds, data=folder, limit=limit
            )
            found += outcome.records
            for failure in outcome.failures:
                click.echo(f"failed: {failure.task}, {failure.method}, seed {failure.seed}: {failure.error}", err=True)
    return found


def keep(records: Iterable[Record], path: Path) -> None:
    """Add records to a file, in place of those of the same measurement."""
    old = json.loads(path.read_text("utf-8")) if path.is_file() else []
    kept = {(r["task"], r["method"], r["shots"], r["seed"]): r for r in old}
    for record in records:
        line = {key: value for key, value in dataclasses.asdict(record).items() if key in KEPT}
        kept[line["task"], line["method"], line["shots"], line["seed"]] = line
    lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


@click.group()
def main() -> None:
    """Few-label accuracy of all methods."""


data_option = click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Folder with the public sets."
)
work_option = click.option("--work", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
threads_option = click.option("--threads", default=2, show_default=True)
numbers: Callable[[Any, Any, str], list[int]] = lambda context, option, value: [int(n) for n in value.split(",")]  # noqa: E731


@main.command()
@data_option
@work_option
@threads_option
@click.option("--model", type=click.Choice(MODELS), required=True)
@click.option("--limit", default=200, show_default=True, help="Most test texts of a set.")
def rates(data: Path, work: Path, threads: int, model: str, limit: int) -> None:
    """Choose learning rates on tuning sets."""
    torch.set_num_threads(threads)
    names = {}
    for method, candidates in RATES.items():
        if method == "setfit" and importlib.util.find_spec("setfit") is None:
            continue
        for rate in candidates:
            names[f"{method} at {rate:g}"] = (method, rate)
            METHODS[f"{method} at {rate:g}"] = trained(method, rate)
    records = measure(
        RATE_SETS,
        model,
        list(names),
        data=data,
        work=work / "accuracy-rates",
        shots=[16],
        seeds=[RATE_SEED],
        limit=limit,
    )
    keep(records, RECORDS / f"accuracy-rates-{model.replace('/', '-')}.json")
    means: dict[str, dict[float, float]] = defaultdict(dict)
    for name, (method, rate) in names.items():
        scores = [r.accuracy for r in records if r.method == name]
        if len(scores) == len(RATE_SETS):
            means[method][rate] = round(statistics.mean(scores), 4)
    path = RECORDS / "accuracy-rates.json"
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    content[model] = {
        "sets": RATE_SETS,
        "seed": RATE_SEED,
        "accuracy": means,
        "chosen": {method: max(found, key=found.__getitem__) for method, found in means.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


@main.command()
@data_option
@work_option
@threads_option
@click.option("--model", type=click.Choice(MODELS), required=True)
@click.option("--group", type=click.Choice(["frozen", "trained", "many", "ablation", "length"]), required=True)
@click.option("--shots", default="16", show_default=True, callback=numbers)
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, callback=numbers)
@click.option("--tasks", default=None, help="Some of the sets only, with commas.")
@click.option("--method", "methods", multiple=True, help="One of the group's methods only; can be repeated.")
@click.option("--limit", default=300, show_default=True, help="Most test texts of a set.")
def run(
    data: Path,
    work: Path,
    threads: int,
    model: str,
    group: str,
    shots: list[int],
    seeds: list[int],
    tasks: str | None,
    methods: tuple[str, ...],
    limit: int,
) -> None:
    """Measure a group of methods; ablation and prompt lengths on tuning sets only."""
    torch.set_num_threads(threads)
    sets = {"ablation": TUNING, "length": CURVE_SETS, "many": MANY_CLASSES}.get(group, (*TUNING, *REPORTED))
    if group == "trained":
        sets = tuple(name for name in sets if name not in MANY_CLASSES)
    if tasks:
        sets = tuple(tasks.split(","))
    every = register(model, group)
    slug = model.replace("/", "-")
    for name in sets:
        records = measure(
            [name],
            model,
            methods or every,
            data=data,
            work=work / f"accuracy-{group}-{slug}",
            shots=shots,
            seeds=seeds,
            limit=limit,
        )
        keep(records, RECORDS / f"accuracy-{group}-{slug}.json")


@main.command("all")
@data_option
@work_option
@threads_option
@click.pass_context
def everything(context: click.Context, data: Path, work: Path, threads: int) -> None:
    """Measure the whole comparison on both models, and write the page."""
    always: dict[str, Any] = {"data": data, "work": work, "threads": threads}
    for model in MODELS:
        context.invoke(rates, **always, model=model)
        for group, shots, tasks in WHOLE:
            context.invoke(run, **always, model=model, group=group, shots=shots, seeds=list(SEEDS), tasks=tasks)
    context.invoke(report)


# -- telling -----------------------------------------------------------------------------------------------------------


@main.command()
def report() -> None:
    """Write the generated parts of the page, and the pictures."""
    PAGE.write_text(written(), "utf-8")
    for kind in ("masked", "causal"):
        draw(kind)


def written() -> str:
    """The page as the records want it."""
    return GENERATED.sub(lambda match: match[1] + block(match["name"]) + match[3], PAGE.read_text("utf-8"))


def measured(group: str, kind: str) -> list[dict[str, Any]]:
    """The records of a group."""
    path = RECORDS / f"accuracy-{group}-builtin-{kind}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def block(name: str) -> str:
    """A generated part: GROUP-KIND, such as `frozen-masked`, `bars-masked` or `together-masked`."""
    group, kind = name.split("-")
    records = measured({"bars": "frozen", "together": "trained"}.get(group, group), kind)
    if not records:
        return "Not measured yet.\n"
    if group == "bars":
        return "\n".join(["", *bars(records), ""])
    if group == "together":
        return "\n".join(["", *together(records, measured("frozen", kind)), ""])
    both = group in ("frozen", "trained", "many")  # tuning sets and reported ones
    if group != "frozen":  # beside the others, or the default, on the same sets and seeds
        asked = {(r["task"], r["shots"], r["seed"]) for r in records}
        beside = FROZEN if both else ("verbtune",)
        frozen = [r for r in measured("frozen", kind) if r["method"] in beside]
        records += [r for r in frozen if (r["task"], r["shots"], r["seed"]) in asked]
    return "\n".join(tables(records, split=both))


def bars(records: Sequence[dict[str, Any]]) -> list[str]:
    """What was promised of the default, and what was measured, on all sets that every method has."""
    lines = [
        "| shots | sets | accuracy above the next best by | below manual prompt or probe by more than a point "
        "| spread, ours and the probe's | ECE | NLL, ours and the next best | slowest fit, s | most trained numbers |",
        "|---:|---:|---|---|---|---:|---|---:|---:|",
    ]
    for shots in sorted({r["shots"] for r in records}):
        here = [r for r in records if r["shots"] == shots]
        cells = {(r["method"], r["task"], r["seed"]): r for r in here}
        methods = [m for m in FROZEN if any(r["method"] == m for r in here)]
        runs = [
            (task, seed)
            for task, seed in dict.fromkeys((r["task"], r["seed"]) for r in here)
            if all((method, task, seed) in cells for method in methods)
        ]
        if not runs:
            continue
        tasks = list(dict.fromkeys(task for task, _ in runs))

        def mean(method: str, key: str) -> float:
            return mean_of([[cells[method, t, s] for t, s in runs if t == task] for task in tasks], key)  # noqa: B023

        def spread(method: str) -> str:
            each = [[cells[method, t, s]["accuracy"] for t, s in runs if t == task] for task in tasks]  # noqa: B023
            deviations = [statistics.stdev(values) for values in each if len(values) > 1]
            return f"{100 * statistics.mean(deviations):.1f}" if deviations else "one seed"

        others = [m for m in methods if m != "verbtune"]
        second = max(others, key=lambda m: mean(m, "accuracy"))
        ahead = mean("verbtune", "accuracy") - mean(second, "accuracy")
        floors = {run: max(cells[m, *run]["accuracy"] for m in ("zero-shot+batch", "linear-probe")) for run in runs}
        below = {run: round(floor - cells["verbtune", *run]["accuracy"], 6) for run, floor in floors.items()}
        fallen = sorted((run for run in runs if below[run] > MOST_BELOW), key=lambda run: -below[run])
        worst = f"; worst {100 * below[fallen[0]]:.1f} on {fallen[0][0]}, seed {fallen[0][1]}" if fallen else ""
        likely = min(others, key=lambda m: mean(m, "nll"))
        ours = [cells["verbtune", *run] for run in runs]
        lines.append(
            f"| {shots} | {len(tasks)} | {100 * ahead:+.1f} ({second}) | {len(fallen)} of {len(runs)}{worst} "
            f"| {spread('verbtune')}, {spread('linear-probe')} | {mean('verbtune', 'ece'):.3f} "
            f"| {mean('verbtune', 'nll'):.2f}, {mean(likely, 'nll'):.2f} ({likely}) "
            f"| {max(r['fit_seconds'] for r in ours):.0f} | {max(r['trained_parameters'] for r in ours):,} |"
        )
    return lines


def mean_of(cells: Sequence[Sequence[dict[str, Any]]], key: str) -> float:
    """The mean over sets of the means over seeds, from the records of each set."""
    return statistics.mean(statistics.mean(record[key] for record in cell) for cell in cells)


def together(trained: Sequence[dict[str, Any]], frozen: Sequence[dict[str, Any]]) -> list[str]:
    """Those that train and those that do not, over all sets and seeds that all of a number of shots have."""
    heads: dict[int, str] = {}
    found: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for shots in sorted({r["shots"] for r in trained}):
        asked = {(r["task"], r["seed"]) for r in trained if r["shots"] == shots}
        beside = [r for r in frozen if r["shots"] == shots and (r["task"], r["seed"]) in asked]
        here = common([r for r in trained if r["shots"] == shots] + [r for r in beside if r["method"] in FROZEN])
        runs = {(r["task"], r["seed"]) for r in here}
        tasks = sorted({task for task, _ in runs})
        heads[shots] = f"{shots} labels: {len(tasks)} sets, {len(runs)} runs"
        here += [r for r in beside if r["method"] == ROWS_ONLY and (r["task"], r["seed"]) in runs]
        for method in dict.fromkeys(r["method"] for r in here):
            cells = [[r for r in here if r["method"] == method and r["task"] == task] for task in tasks]
            found[method][shots] = mean_of(cells, "accuracy"), mean_of(cells, "nll")
    main = max(heads, key=lambda shots: len({m for m in found if shots in found[m]}))
    lines = ["| method | " + " | ".join(heads.values()) + " |", "|---|" + "---:|" * len(heads)]
    for method in sorted(found, key=lambda m: -found[m].get(main, (0.0, 0.0))[0]):
        each = (
            f"{100 * found[method][s][0]:.1f}, {found[method][s][1]:.2f}" if s in found[method] else "" for s in heads
        )
        lines.append(f"| {method} | " + " | ".join(each) + " |")
    return lines


def draw(kind: str) -> None:
    """Accuracy by texts a class, by the prompt's length, and by trained numbers."""
    frozen, lengths, trained = (measured(group, kind) for group in ("frozen", "length", "trained"))
    every = [r for r in frozen + trained if not r["method"].endswith(DEFAULT)]
    curves = by_x(every, CURVE_SETS, lambda r: (r["method"], r["shots"]))
    save(curves, f"accuracy-shots-{kind}", "texts a class", logarithmic=True)
    places: dict[str, tuple[str, float | None]] = {named(m, n): (m, n) for m, ns in LENGTHS.items() for n in ns}
    places["verbtune"] = ("verbtune", deep.LENGTH)
    runs = {(r["task"], r["seed"], r["shots"]) for r in lengths}
    default = [r for r in frozen if r["method"] == "verbtune" and (r["task"], r["seed"], r["shots"]) in runs]
    curves = by_x(lengths + default, CURVE_SETS, lambda r: places[r["method"]])
    save(curves, f"accuracy-length-{kind}", "vectors of the prompt", logarithmic=True)
    trained = [r for r in trained if r["shots"] == 16]
    beside = {(r["task"], r["seed"]) for r in trained}
    both = trained + [r for r in frozen if r["shots"] == 16 and (r["task"], r["seed"]) in beside]
    numbers = {
        m: statistics.mean(r["trained_parameters"] for r in both if r["method"] == m)
        for m in {r["method"] for r in both}
    }
    curves = by_x(both, {t for t, _ in beside}, lambda r: (r["method"], max(1.0, numbers[r["method"]])))
    save(curves, f"accuracy-parameters-{kind}", "trained numbers (1: none)", logarithmic=True)


def by_x(
    records: Iterable[dict[str, Any]],
    sets: Iterable[str],
    place: Callable[[dict[str, Any]], tuple[str, float | None]],
) -> dict[str, list[tuple[float, float, float]]]:
    """Points (x, mean, deviation over seeds) of each label; only of x that all sets have."""
    cells: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        label, x = place(record)
        if record["task"] in sets and x is not None:
            cells[label, x][record["task"]].append(100 * record["accuracy"])
    curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for (label, x), found in sorted(cells.items(), key=lambda item: item[0][1]):
        if len(found) == len(set(sets)):
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
            mean = statistics.mean(map(statistics.mean, found.values()))
            curves[label].append((x, mean, statistics.mean(deviations)))
    return dict(curves)


def save(curves: dict[str, list[tuple[float, float, float]]], name: str, xlabel: str, *, logarithmic: bool) -> None:
    """Draw curves, unless all there is stands above one x."""
    if len({x for curve in curves.values() for x, _, _ in curve}) > 1:
        drawing = draw_curves(
            curves, main="verbtune", xlabel=xlabel, ylabel="accuracy, %", levels={}, logarithmic=logarithmic
        )
        drawing.savefig(HERE / f"{name}.png", dpi=110)


def tables(records: Sequence[dict[str, Any]], *, split: bool) -> list[str]:
    """A table for each number of shots: means over seeds and sets."""
    lines: list[str] = []
    for shots in sorted({r["shots"] for r in records}):
        here = [r for r in records if r["shots"] == shots]
        parts = (("tuning sets", TUNING), ("reported sets", REPORTED)) if split else (("tuning sets", TUNING),)
        for title, sets in parts:
            some = common([r for r in here if r["task"] in sets])
            if some:
                lines += ["", f"**{shots} texts a class, {title}**", "", *table(some)]
    return [*lines, ""]


def common(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the sets and seeds that every method has."""
    methods: dict[tuple[str, int], set[str]] = defaultdict(set)
    for record in records:
        methods[record["task"], record["seed"]].add(record["method"])
    every = set().union(*methods.values())
    return [r for r in records if methods[r["task"], r["seed"]] == every]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """One row a method."""
    methods = list(dict.fromkeys(r["method"] for r in records))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        cells[record["method"], record["task"]].append(record)
    tasks = list(dict.fromkeys(r["task"] for r in records))

    def mean(method: str, key: str) -> float:
        return mean_of([cells[method, task] for task in tasks], key)

    def spread(method: str) -> float:
        seeds = [[r["accuracy"] for r in cells[method, t]] for t in tasks]
        return statistics.mean(statistics.stdev(each) for each in seeds if len(each) > 1)

    n_seeds = sorted({len(found) for found in cells.values()})
    seeds = f"{' or '.join(map(str, n_seeds))} seed{'s' * (n_seeds[-1] > 1)}"
    lines = [
        f"Means over {len(tasks)} set{'s' * (len(tasks) > 1)} ({', '.join(tasks)}), {seeds} each.",
        "",
        "| method | accuracy, % | ± over seeds | NLL | ECE | trained numbers | fit, s | " + " | ".join(tasks) + " |",
        "|---|" + "---:|" * (6 + len(tasks)),
    ]
    for method in sorted(methods, key=lambda m: -mean(m, "accuracy")):
        each = " | ".join(f"{100 * statistics.mean(r['accuracy'] for r in cells[method, t]):.1f}" for t in tasks)
        deviation = f"{100 * spread(method):.1f}" if n_seeds[-1] > 1 else ""
        lines.append(
            f"| {method} | {100 * mean(method, 'accuracy'):.1f} | {deviation} | {mean(method, 'nll'):.2f} "
            f"| {mean(method, 'ece'):.3f} | {mean(method, 'trained_parameters'):,.0f} "
            f"| {mean(method, 'fit_seconds'):.1f} | {each} |"
        )
    return lines


if __name__ == "__main__":
    main()
