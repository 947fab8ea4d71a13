"""How fast verbtune is, beside the bare language model and beside the other ways to do the same job.

    python benchmarks/speed.py run            # --quick: sentences only, fewer of them
    python benchmarks/speed.py run --size base
    python benchmarks/speed.py report         # tables and charts from the record, once more

All systems of a row run in turn, A B C A B C …, in one process, and every ratio is of two times of the same
round. `run` writes `benchmarks/records/speed.json` (`speed-quick.json`, `speed-cuda.json`), and `report` writes
the generated part of `benchmarks/speed.md` and the charts. What the systems are is told in `speed.md`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from speed_report import BARS, FLOOR, HARNESS, OPENPROMPT, OURS, PEFT, PLAIN, shown, write
from speed_systems import (
    AFTER,
    IN_FRONT,
    TRAINING_BATCH,
    WORDS,
    Job,
    PeftPrompt,
    build,
    classifier,
    draw_texts,
    fitted,
    floor_predict,
    harness_scorer,
    labels,
    lay_open,
    moved,
    openprompt,
    plain_predict,
    score_candidates,
    train_epoch,
)

from verbtune import Backbone, PromptClassifier, artifact
from verbtune.baselines import InContext
from verbtune.batch import by_length
from verbtune.data import load_splits
from verbtune.task import Task

HERE = Path(__file__).parent
RECORDS = HERE / "records"
PROFILES = ("sentences", "reviews")
OURS_16 = f"{OURS} bf16"

Predict = Callable[[], Any]
Seconds = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    bar : str
        Key of `BARS`.
    setting : str
    values : list of float
        What the bar is about, one of each round.
    seconds : dict
        Seconds of each system in each round.
    items : int
        Texts or steps of a round, which the seconds are divided by.
    note : str
    """

    bar: str
    setting: str
    values: list[float]
    seconds: Seconds = dataclasses.field(default_factory=dict)
    items: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[str, ...]
    profiles: tuple[str, ...]
    rounds: int
    texts: dict[str, int]  # of each profile, for a small model
    streamed: tuple[int, int]
    tasks: int  # of a bank
    device: str
    bf16: bool  # whether the processor has instructions for it
    openprompt: str | None  # a Python that has it

    def n(self, profile: str, size: str = "small") -> int:
        """Texts of a round: a quarter as many for a base model, which takes eight times as long for each."""
        return self.texts[profile] // (4 if size == "base" else 1)


def interleaved(systems: Mapping[str, Predict], rounds: int, device: str) -> Seconds:
    """Seconds of every system in every round, after one round that does not count."""
    seconds: Seconds = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, work in systems.items():
            gc.collect()
            start = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def elsewhere(plan: Plan, job: Job, texts: Sequence[str], work: str) -> Iterator[dict[str, Predict]]:
    """OpenPrompt at work, if there is one and the LM is masked."""
    if plan.openprompt is None or job.backbone.kind == "causal":
        yield {}
        return
    with openprompt(plan.openprompt, job, texts) as ask:
        yield {OPENPROMPT: functools.partial(ask, work)}


def ratios(measured: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """A system's seconds, or megabytes, over those of another, round by round."""
    return [a / b for a, b in zip(measured[over], measured[under], strict=True)]


def peak_megabytes(work: Predict, device: str) -> float:
    """By how much the work raised the memory in use at most, beyond what was there before."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    before = held_megabytes()  # what is freed but kept would hide the next system's need
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is in use
    work()
    return _status("VmHWM") / 1e3 - before


def _status(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return float(line.split()[1])


class Outcome(NamedTuple):
    """Of a fresh Python: what it printed, its wall and processor seconds, and its peak in megabytes."""

    printed: str
    wall: float
    processor: float
    peak: float


def child(arguments: Sequence[str], threads: int) -> Outcome:
    """Run a fresh Python."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"python {' '.join(arguments)}: {printed[-500:]}")
    wall = time.perf_counter() - start
    return Outcome(printed, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def inference(plan: Plan) -> Iterator[Row]:
    """All systems on the same texts: masked and causal, fp32 and bf16."""
    for size in plan.sizes:
        for kind in ("masked", "causal"):
            backbone = build(kind, size, plan.device)
            half = Backbone(copy.deepcopy(backbone.model).to(torch.bfloat16), backbone.tokenizer, name="bf16")
            for profile in plan.profiles:
                texts = draw_texts(profile, plan.n(profile, size), backbone.tokenizer)
                clf = fitted(backbone, texts)
                clf16 = moved(clf, half)
                job = lay_open(clf)
                peft = PeftPrompt(job)
                systems: dict[str, Predict] = {
                    FLOOR: functools.partial(floor_predict, job, texts),
                    OURS: functools.partial(clf.predict, texts),
                    PLAIN: functools.partial(plain_predict, job, texts),
                    PEFT: functools.partial(peft.predict, texts),
                }
                if plan.bf16:
                    systems[OURS_16] = functools.partial(clf16.predict, texts)
                with elsewhere(plan, job, texts, "predict") as more:
                    seconds = interleaved(systems | more, plan.rounds, plan.device)
                words, _ = clf.compiled_.infer([{"text": text} for text in texts], clf.prompt_)
                apart = float((words - floor_predict(job, texts)).abs().max())
                agreed = (clf.predict(texts) == clf16.predict(texts)).mean()
                main = {name: times for name, times in seconds.items() if name != OURS_16}
                setting = f"{size} {kind}, {profile}"
                bar = "inference" if kind == "masked" else "shared prefix"
                note = f"label words' logits at most {apart:.0e} from the floor's"
                yield Row(bar, setting, ratios(seconds, FLOOR, OURS), main, len(texts), note)
                if OPENPROMPT in seconds:
                    yield Row("OpenPrompt", setting, ratios(seconds, OPENPROMPT, OURS))
                if plan.bf16:
                    note = f"{agreed:.1%} of predictions as in fp32 (random weights)"
                    pair = {name: seconds[name] for name in (FLOOR, OURS_16)}
                    yield Row("bf16", setting, ratios(seconds, FLOOR, OURS_16), pair, len(texts), note)


def bf16_agreement(plan: Plan) -> Iterator[Row]:
    """The built-in models on the bundled sentiment texts, in both precisions."""
    splits = load_splits(Task.load("sentiment"))
    for name in ("builtin/masked", "builtin/causal"):
        clf = PromptClassifier("sentiment", model=name, steps=0, device=plan.device, dtype="float32")
        clf.fit(splits.train.rows, splits.train.labels)
        half = moved(clf, Backbone.load(name, device=plan.device, dtype="bfloat16"))
        rows = splits.test.rows
        agreed = float((clf.predict(rows) == half.predict(rows)).mean())
        apart = abs(clf.predict_proba(rows) - half.predict_proba(rows)).max()
        note = f"{len(rows)} texts, probabilities at most {apart:.3f} apart"
        yield Row("bf16 agreement", f"{name}, bundled sentiment texts", [agreed], note=note)


def in_context(plan: Plan) -> Iterator[Row]:
    """Eight demonstrations in front of every text."""
    for size in plan.sizes:
        backbone = build("causal", size, plan.device)
        shots, texts = (draw_texts("sentences", n, backbone.tokenizer, n) for n in (32, plan.n("sentences", size) // 2))
        clf = InContext({"task": "speed", "template": "{text} It was {answer}.", "verbalizer": WORDS}, model=backbone)
        clf.fit(shots, labels(len(shots)))
        clf.prompt_ = None
        job = lay_open(clf)
        harness = harness_scorer(job) if importlib.util.find_spec("lm_eval") else None
        other, theirs_of = (
            (HARNESS, harness) if harness else ("plain scoring", functools.partial(score_candidates, job))
        )
        systems: dict[str, Predict] = {other: lambda: theirs_of(texts), OURS: lambda: clf.predict(texts)}  # noqa: B023
        seconds = interleaved(systems, plan.rounds, plan.device)
        words, _ = clf.compiled_.infer([{"text": text} for text in texts])
        theirs = theirs_of(texts)
        apart = (words.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()
        setting = f"{size} causal, sentences"
        note = f"against {other}; {len(job.before)} positions before the text"
        yield Row("in-context", setting, ratios(seconds, other, OURS), seconds, len(texts), note)
        yield Row("in-context scores", setting, [float(apart)], note=f"against {other}, over the two candidates")


def training(plan: Plan) -> Iterator[Row]:
    """Steps of batches of 16, the soft tokens in front."""
    for size in plan.sizes:
        for kind in ("masked", "causal"):
            backbone = build(kind, size, plan.device)
            for profile in plan.profiles:
                n = max(2 * TRAINING_BATCH, plan.n(profile, size) // 2 // TRAINING_BATCH * TRAINING_BATCH)
                texts = draw_texts(profile, n, backbone.tokenizer)
                job = lay_open(fitted(backbone, texts))
                peft = PeftPrompt(job)
                steps = n // TRAINING_BATCH
                ours = classifier(backbone, verbalizer="fixed", steps=steps, batch_size=TRAINING_BATCH)
                systems: dict[str, Predict] = {
                    FLOOR: functools.partial(train_epoch, job, texts, bare=True),
                    OURS: functools.partial(ours.fit, texts, labels(n)),
                    PLAIN: functools.partial(train_epoch, job, texts, bare=False),
                    PEFT: functools.partial(peft.train, texts),
                }
                with elsewhere(plan, job, texts, "train") as more:
                    seconds = interleaved(systems | more, plan.rounds, plan.device)
                setting = f"{size} {kind}, {profile}"
                yield Row("training step", setting, ratios(seconds, FLOOR, OURS), seconds, n)
                peaks: dict[str, list[float]] = {name: [] for name in systems}
                for _ in range(plan.rounds):
                    for name, work in systems.items():
                        peaks[name].append(peak_megabytes(work, plan.device))
                note = ", ".join(f"{name} {statistics.median(each):.0f} MB" for name, each in peaks.items())
                yield Row("training memory", setting, ratios(peaks, OURS, FLOOR), note=note)


def text_cache(plan: Plan) -> Iterator[Row]:
    """Epochs on reviews, the soft tokens before and after the text."""
    epochs = 11
    for size in plan.sizes:
        backbone = build("causal", size, plan.device)
        n = max(2 * TRAINING_BATCH, plan.n("reviews", size) // TRAINING_BATCH * TRAINING_BATCH)
        texts, steps = draw_texts("reviews", n, backbone.tokenizer), n // TRAINING_BATCH

        def fit(backbone: Backbone, texts: list[str], template: str, steps: int) -> None:
            clf = classifier(backbone, template, verbalizer="fixed", steps=steps, batch_size=TRAINING_BATCH)
            clf.fit(texts, labels(len(texts)))

        names = ("prompt in front", "after the text, first epoch", f"after the text, {epochs} epochs")
        work = [(IN_FRONT, steps), (AFTER, steps), (AFTER, epochs * steps)]
        systems = {name: functools.partial(fit, backbone, texts, *w) for name, w in zip(names, work, strict=True)}
        seconds = interleaved(systems, plan.rounds, plan.device)
        front, first, all_of_them = (seconds[name] for name in names)
        later = "after the text, a later epoch"
        seconds[later] = [(b - a) / (epochs - 1) for a, b in zip(first, all_of_them, strict=True)]
        kept = {name: seconds[name] for name in (*names[:2], later)}
        ten = statistics.median(10 * f / (a + 9 * x) for f, a, x in zip(front, first, seconds[later], strict=True))
        note = f"a later epoch; ten epochs with the first, which reads the texts: {ten:.1f} x"
        yield Row("text cache", f"{size} causal, reviews", ratios(seconds, names[0], later), kept, n, note)


def task_bank(plan: Plan) -> Iterator[Row]:
    """Eight tasks on one LM."""
    from verbtune.bank import TaskBank

    for kind, template, profile in (
        ("causal", AFTER, "sentences"),
        ("causal", AFTER, "reviews"),
        ("masked", IN_FRONT, "sentences"),
    ):
        backbone = build(kind, plan.sizes[0], plan.device)
        texts = draw_texts(profile, plan.n(profile), backbone.tokenizer)
        bank = TaskBank(backbone)
        tasks = {f"task {i}": fitted(backbone, texts, template, random_state=i) for i in range(8)}
        for name, clf in tasks.items():
            bank.add(name, clf)
        mixed = [(f"task {i % 8}", text) for i, text in enumerate(texts)]
        one = functools.partial(tasks["task 0"].predict, texts)
        systems = {
            "one task": one,
            "eight tasks, mixed": functools.partial(bank.predict, mixed),
            "eight tasks, all": functools.partial(bank.predict_all, texts),
        }
        if kind == "masked":
            del systems["eight tasks, all"]
        seconds = interleaved(systems, plan.rounds, plan.device)
        setting = (
            f"{plan.sizes[0]} {kind}, {profile}, soft tokens {'after the text' if template == AFTER else 'in front'}"
        )
        if kind == "causal":
            examples = tasks["task 0"].compiled_.encode([{"text": text} for text in texts])
            shared = sum(e.texts[0][1] for e in examples)
            whole = sum(len(e.ids) for e in examples)
            note = f"{(shared + 8 * (whole - shared)) / whole:.2f} x the positions of one task, if texts are read once"
            values = ratios(seconds, "eight tasks, all", "one task")
            yield Row("eight tasks", setting, values, seconds, len(texts), note)
        yield Row("mixed batch", setting, ratios(seconds, "eight tasks, mixed", "one task"), seconds, len(texts))


def many_tasks(plan: Plan) -> Iterator[Row]:
    """A thousand saved classifiers (quick: a hundred), each with rows and a deep prompt, on one LM."""
    from verbtune.bank import TaskBank

    count = plan.tasks
    backbone = build("masked", "small", plan.device)
    bank = TaskBank(backbone)
    texts = draw_texts("sentences", count, backbone.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(count)]
        fitted(backbone, texts, steps=None, tune_template=True).save_pretrained(folders[0])
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
        size = artifact.size(folders[0])
        bank.add("first", folders[0])
        bank.predict([("first", text) for text in texts])  # what a call needs for a while is there
        before = held_megabytes()
        swaps = []
        for i, folder in enumerate(folders):
            start = time.perf_counter()
            bank.add(str(i), folder)
            swaps.append(1e3 * (time.perf_counter() - start))
        bank.predict([(str(i), text) for i, text in enumerate(texts)])  # a file that is mapped is read at last
        grown = held_megabytes() - before
    note = f"{count} tasks: {size * count / 1e6:.0f} MB in files, {grown:.0f} MB in memory after one text for each"
    yield Row("task memory", "small masked", [1e6 * grown / (size * count)], note=note)
    yield Row("task swap", "small masked", [statistics.median(swaps)], note=f"the slowest {max(swaps):.0f} ms")


def held_megabytes() -> float:
    """Memory in use, without what is free but kept."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") / 1e3


def padding(plan: Plan) -> Iterator[Row]:
    """Positions computed in the batches of an inference, by the real ones among them."""
    backbone = build("masked", "tiny", plan.device)
    for profile in PROFILES:
        texts = draw_texts(profile, 1000, backbone.tokenizer)
        bare = [len(ids) for ids in backbone.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        examples = fitted(backbone, texts).compiled_.encode([{"text": text} for text in texts])
        lengths = [len(e.ids) for e in examples]
        batches = by_length(lengths, backbone.device)
        computed = sum(len(index) * max(lengths[i] for i in index) for index in batches)
        quarters = ", ".join(f"{q:.0f}" for q in statistics.quantiles(bare, n=4))
        note = f"1000 texts; tokens of a text: mean {statistics.mean(bare):.0f}, quartiles {quarters}, most {max(bare)}"
        yield Row("padding", profile, [computed / sum(lengths)], note=note)


def start_up(plan: Plan) -> Iterator[Row]:
    """Fresh processes: the first prediction, what it imports from other packages, and the help."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        texts = draw_texts("sentences", 32, build("masked", "tiny", "cpu").tokenizer)
        classifier("builtin/masked", device="cpu").fit(texts, labels(32)).save_pretrained(saved)
        timed = "import time\nstart = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"
        predict = (
            f"from verbtune import PromptClassifier\n"
            f"PromptClassifier.from_pretrained({str(saved)!r}, device='cpu').predict(['It works.'])"
        )
        imports = "import sklearn.base, torch\nfrom transformers import AutoTokenizer, BertForMaskedLM"
        (Path(folder) / "text").write_text("It works.\n")
        work = {
            "first prediction": ["-c", timed.format(predict)],
            "imports": ["-c", timed.format(imports)],
            "predict": ["-m", "verbtune", "predict", str(saved), "--input", str(Path(folder) / "text")],
            "help": ["-m", "verbtune", "--help"],
        }
        runs = [{name: child(arguments, threads) for name, arguments in work.items()} for _ in range(plan.rounds + 1)]
    found = {name: [outcome[name] for outcome in runs[1:]] for name in work}
    seconds = {name: [float(o.printed.split()[-1]) for o in found[name]] for name in ("first prediction", "imports")}
    command = statistics.median(outcome.wall for outcome in found["predict"])
    note = (
        f"importing torch, scikit-learn and a model of transformers alone takes "
        f"{statistics.median(seconds['imports']):.1f} s; `verbtune predict` from start to exit {command:.1f} s"
    )
    where = "fresh process, files in the page cache"
    yield Row("first prediction", where, seconds["first prediction"], note=note)
    processor = statistics.median(outcome.processor for outcome in found["help"])
    note = f"{processor:.2f} s of processor time"
    yield Row("help", where, [outcome.wall for outcome in found["help"]], note=note)


def stream(plan: Plan) -> Iterator[Row]:
    """Peak memory of `verbtune predict` over few and over many lines, with a tiny LM."""
    few, many = plan.streamed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = build("masked", "tiny", "cpu")
        backbone.model.save_pretrained(folder / "lm")
        backbone.tokenizer.save_pretrained(folder / "lm")
        texts = draw_texts("sentences", 10_000, backbone.tokenizer)
        fitted(str(folder / "lm"), texts).save_pretrained(folder / "saved")
        peaks = []
        for n in (few, many):
            with (folder / "lines.txt").open("w", encoding="utf-8") as lines:
                lines.writelines(texts[i % len(texts)] + "\n" for i in range(n))
            arguments = ["-m", "verbtune", "predict", *map(str, (folder / "saved", "--input", folder / "lines.txt"))]
            outcome = child([*arguments, "--output", str(folder / "out.txt")], torch.get_num_threads())
            peaks.append(outcome.peak)
    note = f"{peaks[0]:.0f} MB at {few:,} lines, {peaks[1]:.0f} MB at {many:,}, which took {outcome.wall:.0f} s"
    yield Row("stream", "LM of one layer, sentences", [peaks[1] / peaks[0]], note=note)


MEASUREMENTS = (
    padding,
    start_up,
    stream,
    bf16_agreement,
    inference,
    in_context,
    training,
    text_cache,
    task_bank,
    many_tasks,
)


@click.group()
def main() -> None:
    """Speed and memory, measured."""


@main.command()
@click.option("--quick", is_flag=True, help="Sentences only, few texts and rounds.")
@click.option(
    "--size", "sizes", multiple=True, default=["small"], type=click.Choice(["small", "base"]), help="Repeatable."
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", type=int, help="Rounds that count.  [default: 3, quick 1]")
@click.option(
    "--openprompt",
    type=click.Path(exists=True, dir_okay=False),
    help="The Python of an environment with OpenPrompt; speed.md says how to make one.",
)
@click.option("--only", multiple=True, type=click.Choice([m.__name__ for m in MEASUREMENTS]), help="Repeatable.")
def run(
    quick: bool,
    sizes: tuple[str, ...],
    device: str,
    threads: int,
    rounds: int | None,
    openprompt: str | None,
    only: tuple[str, ...],
) -> None:
    """Measure, and write the record; with --only, into the record that is there."""
    torch.set_num_threads(threads)
    here = machine(device, threads, os.getloadavg()[0])
    bf16 = bool(here["bf16"]) or device.startswith("cuda")
    profiles, rounds = (PROFILES[:1], rounds or 1) if quick else (PROFILES, rounds or 3)
    texts = {"sentences": 64, "reviews": 16} if quick else {"sentences": 128, "reviews": 32}
    streamed = (1_000, 5_000) if quick else (100_000, 1_000_000)
    plan = Plan(sizes, profiles, rounds, texts, streamed, 100 if quick else 1000, device, bf16, openprompt)
    path = RECORDS / f"speed{'-cuda' if device.startswith('cuda') else ''}{'-quick' if quick else ''}.json"
    old = json.loads(path.read_text()) if only and path.is_file() else {"rows": [], "skipped": {}}
    skipped, rows = dict(old["skipped"]), list(old["rows"])
    asked = [m for m in MEASUREMENTS if not only or m.__name__ in only]
    if inference in asked:
        skipped.pop(OPENPROMPT, None)
        if openprompt is None:
            skipped[OPENPROMPT] = "it needs transformers 4.30, so an environment of its own, which --openprompt names"
    if in_context in asked:
        skipped.pop(HARNESS, None)
        if not importlib.util.find_spec("lm_eval"):
            skipped[HARNESS] = "not installed; a loop that scores each candidate's full prompt stands in for it"
    for measure in asked:
        start = time.perf_counter()
        found = []
        try:
            for row in measure(plan):
                labelled = {"measurement": measure.__name__, "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}
                found.append(dataclasses.asdict(row) | labelled | {"machine": here})
                click.echo(f"{row.bar:18} {row.setting:45} {shown(row.values, BARS[row.bar])}  {row.note}")
            skipped.pop(measure.__name__, None)
        except ImportError as error:
            skipped[measure.__name__] = str(error)
        click.echo(f"-- {measure.__name__}: {time.perf_counter() - start:.0f} s", err=True)
        again = {(row["bar"], row["setting"]) for row in found}  # those of another size, or precision, stay
        rows = [row for row in rows if (row["bar"], row["setting"]) not in again] + found
        record = {"skipped": skipped, "rows": rows}
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
    if path.name == "speed.json":
        write(record)


@main.command()
@click.argument("record", default=RECORDS / "speed.json", type=click.Path(exists=True, path_type=Path))
def report(record: Path) -> None:
    """Write the generated part of `speed.md`, and the charts."""
    write(json.loads(record.read_text("utf-8")))


def machine(device: str, threads: int, load: float) -> dict[str, Any]:
    """Where and when."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16": sorted(set(flags) & {"avx512_bf16", "amx_bf16", "bf16"}),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "load before": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("verbtune", "torch", "transformers", "peft")},
    }


if __name__ == "__main__":
    main()
