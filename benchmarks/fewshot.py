"""What the built-in models are good for: 16 labelled texts a class on fourteen public sets.

    python benchmarks/accuracy.py run --data ../shared/data --model builtin/masked --group frozen --shots 16
    python benchmarks/fewshot.py run --data ../shared/data --model builtin/masked
    python benchmarks/fewshot.py table

The first command measures the methods on the model. `run` measures a probe on a twin of its architecture with random
weights, so that what training is worth can be seen; it resumes where it was interrupted, and its records go to
`benchmarks/records/fewshot-*.json`. `table` writes `benchmarks/fewshot.md` and the tables of the model cards from both.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from accuracy import FROZEN, GENERATED, MODELS, RECORDS, common, keep, measured
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from verbtune import Backbone
from verbtune.bench import SEEDS
from verbtune.bench import run as run_bench

PAGE = Path(__file__).parent / "fewshot.md"
PACKAGE = Path(__file__).parents[1] / "verbtune"
CARDS = {model.removeprefix("builtin/"): PACKAGE / model / "README.md" for model in MODELS}
TASKS = (
    *("sst2", "sst5", "cr", "uci_sentences", "imdb", "agnews", "trec6", "snips", "banking77", "clinc150", "emotion"),
    *("tweet_emotion", "sms_spam", "sib200_en"),
)
TWIN = "linear-probe, random twin"


@click.group()
def main() -> None:
    """Few-shot accuracy of the built-in models."""


@main.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with the public sets.")
@click.option("--model", type=click.Choice(MODELS), required=True)
@click.option("--limit", default=300, show_default=True, help="Most test texts of a set.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--tasks", default=",".join(TASKS), help="Some of the sets only, with commas.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True)
def run(data: Path, model: str, limit: int, work: Path, threads: int, tasks: str, seeds: str) -> None:
    """Measure a probe on the random twin of a model."""
    torch.set_num_threads(threads)
    slug = model.replace("/", "-")
    outcome = run_bench(
        tasks.split(","),
        [random_twin(model)],
        methods=["linear-probe"],
        seeds=[int(seed) for seed in seeds.split(",")],
        output=work / f"fewshot-{slug}",
        data=data,
        limit=limit,
    )
    keep(outcome.records, RECORDS / f"fewshot-{slug}.json")
    for failure in outcome.failures:
        click.echo(f"failed: {failure}", err=True)
    if outcome.failures:
        raise SystemExit(1)


def random_twin(model: str) -> Backbone:
    """The same architecture and tokenizer with random weights."""
    original = Backbone.load(model)
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if original.kind == "masked" else AutoModelForCausalLM
    twin = auto.from_config(AutoConfig.for_model(**original.model.config.to_dict()))
    return Backbone(twin, original.tokenizer, kind=original.kind, name=f"random twin of {model}")


@main.command()
def table() -> None:
    """Write `fewshot.md`, and the tables of the model cards, from the records."""
    PAGE.write_text(written(), "utf-8")
    for kind in CARDS:
        CARDS[kind].write_text(card(kind), "utf-8")


def written() -> str:
    """The page as the records want it."""
    blocks = [
        "# The built-in models with 16 labelled texts a class",
        "Written by `python benchmarks/fewshot.py table` from the records of `accuracy.py` and, for the twins, from "
        "`benchmarks/records/fewshot-*.json`. Accuracy in %, mean ± standard deviation over five seeds "
        f"({', '.join(map(str, SEEDS))}); each seed draws its own 16 training texts a class, and all methods see the "
        "same ones. Best of a row in bold. The published test sets are used, or the development sets that stand in for "
        "them, cut to at most 300 texts, class by class.",
    ]
    for model in MODELS:
        blocks += [f"## {model}", *model_blocks(model.removeprefix("builtin/"))]
    return "\n\n".join(blocks) + "\n"


def card(kind: str) -> str:
    """The model card as the records want it."""
    blocks = "\n\n".join(model_blocks(kind))
    return GENERATED.sub(lambda found: f"{found[1]}\n{blocks}\n\n{found[3]}", CARDS[kind].read_text("utf-8"))


def model_blocks(kind: str) -> list[str]:
    """A model's table, and what it says about the bar."""
    twin = RECORDS / f"fewshot-builtin-{kind}.json"
    if not twin.is_file():
        return ["Not measured."]
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    records = [r for r in measured("frozen", kind) if r["shots"] == 16 and r["task"] in TASKS and r["method"] in FROZEN]
    for record in common(records + [r | {"method": TWIN} for r in json.loads(twin.read_text("utf-8"))]):
        cells[record["task"], record["method"]].append(100 * record["accuracy"])
        sizes[record["task"]] = record["n_test"]
    methods = [m for m in (*FROZEN, TWIN) if any(m == method for _, method in cells)]
    tasks = [task for task in TASKS if (task, "verbtune") in cells]
    lines = ["| set | n test | " + " | ".join(methods) + " |", "|---|---:|" + "---:|" * len(methods)]
    means = {key: statistics.mean(values) for key, values in cells.items()}
    for task in tasks:
        best = max(means[task, method] for method in methods)
        n_seeds = min(len(cells[task, m]) for m in methods)
        spread = {m: f" ± {statistics.stdev(cells[task, m]):.1f}" if n_seeds > 1 else "" for m in methods}
        row = [f"{means[task, m]:.1f}{spread[m]}" for m in methods]
        row = [f"**{text}**" if means[task, m] == best else text for text, m in zip(row, methods, strict=True)]
        name = task if n_seeds == len(SEEDS) else f"{task} ({n_seeds} of {len(SEEDS)} seeds)"
        lines.append(f"| {name} | {sizes[task]} | " + " | ".join(row) + " |")
    overall = [f"{statistics.mean(means[task, m] for task in tasks):.1f}" for m in methods]
    lines.append("| *mean* | | " + " | ".join(overall) + " |")
    ours = [m for m in methods if m not in ("tfidf", TWIN)]
    won = [t for t in tasks if max(means[t, m] for m in ours) > means[t, "tfidf"]]
    main_won = [t for t in tasks if means[t, "verbtune"] > means[t, "tfidf"]]
    lost = [f"{t} (by {means[t, 'tfidf'] - max(means[t, m] for m in ours):.1f} points)" for t in tasks if t not in won]
    text = (
        f"The best method on this LM beats TF-IDF with logistic regression on {len(won)} of {len(tasks)} sets, "
        f"`verbtune` on {len(main_won)}."
    )
    if lost:
        text += f" TF-IDF wins on {', '.join(lost)}."
    reached, bar = means["sst2", "zero-shot+batch"], 70
    text += f" The untuned manual prompt, batch calibrated, reaches {reached:.1f} on sst2; the bar is {bar}"
    if reached < bar:
        text += (
            f", missed by {bar - reached:.1f}. As the training loss fell with the logarithm of time, another hour of "
            f"the same training would have taken {next_hour(kind):.2f} nats off it; what that is worth on sst2 was not "
            "measured"
        )
    text += "."
    if "linear-probe+last" not in methods:
        text += " `verbtune` was measured before texts were read in the last layer."
    return ["\n".join(lines), text]


def next_hour(kind: str) -> float:
    """Nats that one more hour would have taken off the training loss, on windows of fewer than 512 tokens."""
    lines = (RECORDS / f"pretrain-{kind}-curve.jsonl").read_text("utf-8").splitlines()
    curve = [point for point in map(json.loads, lines) if point["length"] < 512]
    hours = np.array([point["seconds"] / 3600 for point in curve])
    late = hours > hours[-1] / 3  # after the first fall
    slope, _ = np.polyfit(np.log(hours[late]), np.array([point["loss"] for point in curve])[late], 1)
    return float(-slope * np.log1p(1 / hours[-1]))


if __name__ == "__main__":
    main()
