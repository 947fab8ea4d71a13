"""The command line: parses and prints, nothing else.

What is slow to import is imported inside the commands. Results go to standard output, all else to standard
error. Exit codes: 0, 1 for a job that failed, 2 for a wrong call, 130 after Ctrl-C.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import inspect
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from .task import Answer, Field, Literal, Soft, Task, TaskError, bundled_tasks, tasks_folder

if TYPE_CHECKING:
    from .backbone import Backbone
    from .encode import Row
    from .lint import Problem

__all__ = ["main"]

OWN_OPTIONS = {"task": "the argument TASK", "model": "--model", "random_state": "--seed"}
ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Products in bfloat16 are compiled for each shape. The layers of a batch share these, other batches seldom: the
    # 1024 that are kept otherwise are memory that grows with the input.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Commands(click.Group):
    """A group whose errors are one line each, without usage and without traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        atexit.register(gc.freeze)  # or the exit takes a second to look for garbage in what was imported
        kwargs["standalone_mode"] = False
        code: int
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                code = super().main(*args, **kwargs) or 0
        except click.Abort:
            code = _complain("Interrupted", 130)
        except click.ClickException as error:
            code = _complain(f"Error: {error.format_message()}", error.exit_code)
        except (ImportError, OSError) as error:
            code = _complain(f"Error: {error}", 1)
        except ValueError as error:
            if not type(error).__module__.startswith("verbtune."):
                raise
            code = _complain(f"Error: {error}", 1)
        sys.exit(code)


def _complain(message: str, code: int) -> int:
    click.echo(message, err=True)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    if issubclass(category, UserWarning):
        click.echo(f"Warning: {message}", err=True)


def _task(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Turn what a task is called into the task, or each of several."""
    if isinstance(value, tuple):
        return tuple(_task(ctx, parameter, name) for name in value)
    try:
        return Task.load(value)
    except TaskError as error:
        raise click.UsageError(str(error)) from None


def _commas(kind: click.ParamType[Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Make a callback that splits an option's value at its commas."""

    def split(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        return None if value is None else tuple(kind.convert(v.strip(), parameter, ctx) for v in value.split(","))

    return split


_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)

_model_option = click.option(
    "--model", default="builtin/masked", show_default=True, help="Language model: builtin/…, a folder, or a hub name."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="verbtune", message="verbtune %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Text classification by prompt tuning on frozen language models."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@_json_option
def tasks(as_json: bool) -> None:
    """List the bundled tasks."""
    found = [(task, _data_of(task)) for task in bundled_tasks()]
    if as_json:
        keys = ("task", "version", "description", "fields", "classes", "metric")
        _echo_json([{**{k: getattr(task, k) for k in keys}, "data": data, "path": task.source} for task, data in found])
        return
    _echo_table(
        ("task", "classes", "texts", "description"),
        [(task.task, str(len(task.classes)), _spell_data(data), task.description) for task, data in found],
    )
    click.echo(
        "\nTexts come with the package, from the hub, or from your folder: FOLDER/TASK/train.jsonl and test.jsonl."
    )


def _data_of(task: Task) -> dict[str, Any]:
    """Say where a task's texts are: how many come with the package, what the hub calls them, or nothing."""
    if task.dataset:
        return {"hub": " ".join(filter(None, [task.dataset.path, task.dataset.name]))}
    files = sorted((tasks_folder() / task.task).glob("*.jsonl"))
    return {"bundled": {path.stem: len(path.read_bytes().splitlines()) for path in files}} if files else {}


def _spell_data(data: Mapping[str, Any]) -> str:
    if "bundled" in data:
        return "{train} train, {test} test".format_map(data["bundled"])
    return f"hub: {data['hub']}" if data else "your folder"


@main.command()
@click.argument("task", callback=_task)
@_model_option
@click.option("--text", "texts", multiple=True, help="Text of the example; for a pair, once for each.")
@click.option("--data", type=_EXISTING_FOLDER, help="Folder with TASK/train.jsonl, whose first row is the example.")
def show(task: Task, model: str, texts: tuple[str, ...], data: Path | None) -> None:
    """Show an example as the language model reads it.

    Prints the pieces of the template, every token with its position, where soft tokens and the answer are,
    the tokens of the label words, and what the linter says. The example is --text, or else the first
    training text.
    """
    row, label = _example(task, texts, data)
    from .compiled import compile_task
    from .lint import lint, spell

    backbone = _load(model, weights=False)
    tokenizer = backbone.tokenizer
    compiled = compile_task(task, backbone, soft=True)
    (example,) = compiled.encode([row])
    template = task.template_for(backbone.kind)
    click.echo(f"{task.task} on {model}: a {backbone.kind} language model that reads {backbone.max_length} tokens")
    click.echo(f"template: {template}")
    click.echo(f"label: {label or 'not given'}\n")

    pieces = []
    for segment in template.segments:
        match segment:
            case Literal(text):
                pieces.append(("words", repr(text)))
            case Field(name):
                pieces.append((f"{{{name}}}", repr(_shorten(row[name]))))
            case Soft(length, text):
                pieces.append(("soft tokens", repr(text) if text else str(length or "as many as prompt_length says")))
            case Answer():
                pieces.append(("{answer}", "a label word"))
    _echo_table(("piece", "content"), pieces)
    if any(isinstance(segment, Soft) for segment in template.segments):
        click.echo("Soft tokens are tuned with steps=; by default their text stands there, or nothing.")

    fields = [segment.name for segment in template.segments if isinstance(segment, Field)]
    tokens = []
    for position, token in enumerate(spell(tokenizer, example.ids)):
        slot = example.slots[position]
        notes = [name for name, (start, stop) in zip(fields, example.texts, strict=True) if start <= position < stop]
        if slot >= 0 and compiled.layout.slot_tokens[slot] is None:
            token, notes = "", [f"soft {slot}"]
        elif slot >= 0:
            notes = [f"soft {slot}, starts as this token"]
        if position == example.answer:
            notes.append("the answer" if backbone.kind == "masked" else "the answer follows")
        tokens.append((str(position), str(example.ids[position]), token, "; ".join(notes)))
    click.echo()
    _echo_table(("position", "id", "token", "note"), tokens)

    words = compiled.words
    click.echo()
    _echo_table(
        ("class", "label word", "tokens", "ids"),
        [
            (words.classes[owner], word, "|".join(spell(tokenizer, ids)), " ".join(map(str, ids)))
            for owner, word, ids in zip(words.owner, words.words, words.pieces, strict=True)
        ],
    )
    problems = lint(task, backbone)
    click.echo("" if problems else "\nThe linter finds nothing wrong.")
    for problem in problems:
        click.echo(f"{problem.level}: {problem.message}")


def _example(task: Task, texts: Sequence[str], data: Path | None) -> tuple[Row, str | None]:
    """Take an example, and its label if there is one, from the command line or the training texts."""
    if texts and len(texts) != len(task.fields):
        raise click.UsageError(f"the task {task.task!r} reads {', '.join(task.fields)}; give one --text for each")
    if not texts and not data and "bundled" not in _data_of(task):
        raise click.UsageError(f"the task {task.task!r} brings no texts along; give --text TEXT or --data FOLDER")
    from .data import check_rows, load_splits

    if texts:
        return check_rows([dict(zip(task.fields, texts, strict=True))], task.fields)[0], None
    train = load_splits(task, data).train
    return train.rows[0], train.labels[0]


@main.command()
@click.argument("spec", metavar="FILE.yaml")
@click.option("--model", "models", multiple=True, help="Language model to check it on; can be repeated.")
@click.option("--train", type=_EXISTING_FILE, help="Labelled texts to check it on, JSONL or CSV.")
@_json_option
@click.pass_context
def check(ctx: click.Context, spec: str, models: tuple[str, ...], train: Path | None, as_json: bool) -> None:
    """Check a task spec before anything is trained.

    Prints a line for each problem and exits with 1 if one is an error, with 0 if there are at most
    warnings. Without --model, the spec is checked on the two built-in language models.
    """
    from .lint import Problem

    try:
        found = _problems(Task.load(spec), models, train)
    except TaskError as error:
        if not Path(spec).is_file():
            raise click.UsageError(str(error)) from None
        found = {Problem("error", str(error).removeprefix(f"{Path(spec)}: ")): []}
    errors = sum(problem.level == "error" for problem in found)
    if as_json:
        problems = [{**dataclasses.asdict(problem), "models": on} for problem, on in found.items()]
        _echo_json({"file": spec, "errors": errors, "warnings": len(found) - errors, "problems": problems})
    else:
        for problem, on in found.items():
            click.echo(": ".join(filter(None, [spec, problem.level, ", ".join(on), problem.message])))
        click.echo(f"{spec}: {_count(errors, 'error')}, {_count(len(found) - errors, 'warning')}")
    ctx.exit(1 if errors else 0)


def _problems(task: Task, models: Sequence[str], train: Path | None) -> dict[Problem, list[str]]:
    """Lint a task by itself and on models; say for each problem on which of them it shows."""
    from .builtin import NAMES
    from .data import DataError, Split, read_split
    from .lint import Problem, lint

    found: dict[Problem, list[str]] = {}
    split = Split([], [])
    try:
        split = read_split(train, task) if train else split
    except DataError as error:
        found[Problem("error", str(error))] = []
    alone = lint(task, labels=split.labels)
    found |= {problem: [] for problem in alone}
    for model in models or NAMES:
        try:
            backbone = _load(model, weights=False)
        except (click.UsageError, OSError) as error:
            if models:
                raise
            found[Problem("warning", f"not checked: {error}")] = [model]
        else:
            for problem in lint(task, backbone, rows=split.rows, labels=split.labels):
                if problem not in alone:
                    found.setdefault(problem, []).append(model)
    return found


@main.command()
@click.argument("task", callback=_task)
@click.option("--train", required=True, type=_EXISTING_FILE, help="Labelled texts, JSONL or CSV.")
@click.option("--output", required=True, type=_FOLDER, help="Folder for the trained classifier.")
@_model_option
@click.option("--shots", type=click.IntRange(min=1), help="Train on so many texts of each class only.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides everything random.")
@click.option("--validation", type=_EXISTING_FILE, help="Labelled texts to measure the accuracy on.")
@click.option(
    "--param", "pairs", multiple=True, metavar="NAME=VALUE", help="Parameter of PromptClassifier; can be repeated."
)
@click.pass_context
def fit(
    ctx: click.Context,
    task: Task,
    train: Path,
    output: Path,
    model: str,
    shots: int | None,
    seed: int,
    validation: Path | None,
    pairs: tuple[str, ...],
) -> None:
    """Train a classifier and save it to a folder.

    Ctrl-C ends the training early; the best prompt so far is saved.
    """
    from . import PromptClassifier, artifact
    from .data import read_split, sample_shots
    from .lint import lint
    from .parameters import ParameterError, check_parameters

    clf = PromptClassifier(task, random_state=seed, verbose=True, **_parameters(pairs))
    try:
        check_parameters(clf, task)
    except ParameterError as error:
        raise click.UsageError(str(error)) from None
    artifact.check_folder(output)
    split = read_split(train, task)
    held_out = read_split(validation, task) if validation else None
    if shots:
        split = split.take(sample_shots(split.labels, shots, seed))
    backbone = _load(model, device=clf.device, dtype=clf.dtype)
    for problem in lint(
        task,
        backbone,
        rows=split.rows,
        labels=split.labels,
        max_length=clf.max_length,
        soft=clf.steps is not None,
        prompt_length=clf.prompt_length,
    ):
        if problem.level == "warning":
            click.echo(f"Warning: {problem.message}", err=True)

    start = time.perf_counter()
    clf.set_params(model=backbone).fit(split.rows, split.labels)
    seconds = time.perf_counter() - start
    clf.save_pretrained(output)

    history = clf.history_
    click.echo(f"texts       {len(split)} of {_count(len(clf.classes_), 'class')}: {', '.join(map(str, clf.classes_))}")
    parts = ": rows and deep prompts" if clf.second_opinion_ is not None else ""
    click.echo(f"trained     {clf.trained_parameters_:,} numbers on the frozen {model}{parts}")
    click.echo(f"time        {seconds:.1f} s, {max(0, len(history.steps) - 1)} steps, kept step {history.best_step}")
    if held_out:
        accuracy = clf.score(held_out.rows, held_out.labels)
        click.echo(f"validation  accuracy {accuracy:.3f} on {len(held_out)} texts")
    click.echo(f"saved       {output}, {artifact.size(output):,} bytes")
    ctx.exit(130 if history.interrupted else 0)


def _parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs as arguments of `PromptClassifier`, each of the type that it wants."""
    from . import PromptClassifier

    wanted = {
        name: parameter.annotation
        for name, parameter in inspect.signature(PromptClassifier, eval_str=True).parameters.items()
        if name != "verbose" and name not in OWN_OPTIONS
    }
    types: dict[type, click.ParamType[Any]] = {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f"--param {pair}: write NAME=VALUE")
        if name in OWN_OPTIONS:
            raise click.UsageError(f"--param {name}: give it as {OWN_OPTIONS[name]}")
        if name not in wanted:
            raise click.UsageError(f"--param {name}: no such parameter; there are {', '.join(wanted)}")
        kinds = get_args(wanted[name]) or (wanted[name],)
        if type(None) in kinds and value.lower() == "none":
            parameters[name] = None
            continue
        try:
            parameters[name] = types[kinds[0]].convert(value, None, None)
        except click.BadParameter as error:
            raise click.UsageError(f"--param {name}: {error.message}") from None
    return parameters


@main.command()
@click.argument("folder", type=_EXISTING_FOLDER)
@click.option(
    "--input", "source", type=_EXISTING_FILE, help="Texts: CSV, JSONL, or one a line. [default: standard input]"
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="File for the results. [default: standard output]"
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "csv", "jsonl"]),
    help="Format of standard input and output, and of files whose name does not tell it. [default: text]",
)
@click.option("--model", help="The language model, if it is not where it was when the classifier was trained.")
@click.option("--proba", is_flag=True, help="Give the probabilities as well.")
@click.option(
    "--reject-at",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="RATE",
    help="Answer only so many texts that no larger part of the answers is wrong, such as 0.05.",
)
def predict(
    folder: Path,
    source: Path | None,
    output: Path | None,
    form: str | None,
    model: str | None,
    proba: bool,
    reject_at: float | None,
) -> None:
    """Classify texts with a trained classifier.

    FOLDER is what fit saved. Results keep the order of the input: as text a label on each line, as CSV and
    JSONL with the input's columns, none of which may have the name of one that is added. A text that --reject-at
    leaves without an answer has an empty label, in JSONL null. If the input has an error, no --output file is
    left behind.
    """
    from . import PromptClassifier
    from .answers import stream_answers
    from .data import DataError, form_of

    try:
        form_in, form_out = (form_of(path, form) if path else form or "text" for path in (source, output))
    except DataError as error:
        raise click.UsageError(f"{error}, or say --format") from None
    if form and form not in (form_in, form_out):
        raise click.UsageError(f"--format {form}: {source} is {form_in} and {output} is {form_out}; leave --format out")
    clf = PromptClassifier.from_pretrained(folder, model=_load(model) if model else None)
    least = None if reject_at is None else clf.rejection_threshold(reject_at)
    if source is None and sys.stdin.isatty():
        click.echo("Reading texts from the terminal, one a line; Ctrl-D ends them.", err=True)
    stream_answers(clf, source, output, form_in=form_in, form_out=form_out, proba=proba, least=least)


@main.command()
@click.argument("tasks", metavar="[TASK]...", nargs=-1, callback=_task)
@click.option(
    "--model", "models", multiple=True, help="Language model; can be repeated. [default: the two built-in ones]"
)
@click.option("--methods", metavar="NAME,…", callback=_commas(click.STRING), help="Methods to compare. [default: all]")
@click.option(
    "--shots",
    metavar="K,…",
    default="16",
    show_default=True,
    callback=_commas(click.IntRange(min=1)),
    help="Training texts of each class.",
)
@click.option(
    "--seeds",
    metavar="N",
    callback=_commas(click.IntRange(min=0)),
    help="How many of the usual seeds, or a list such as 1,2. [default: 5]",
)
@click.option(
    "--prompt-length",
    "lengths",
    metavar="P,…",
    callback=_commas(click.IntRange(min=0)),
    help="Numbers of soft tokens, for methods that have some.",
)
@click.option("--output", default="bench-results", show_default=True, type=_FOLDER, help="Folder for the results.")
@click.option("--data", type=_EXISTING_FOLDER, help="Folder with TASK/train.jsonl and TASK/test.jsonl.")
@click.option("--limit", type=click.IntRange(min=1), help="Most test texts of a task.")
@_json_option
@click.pass_context
def bench(
    ctx: click.Context,
    tasks: tuple[Task, ...],
    models: tuple[str, ...],
    methods: tuple[str, ...] | None,
    shots: tuple[int, ...],
    seeds: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
    output: Path,
    data: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Compare methods on tasks, on the same few labelled texts.

    Without TASK, all bundled tasks whose texts are at hand. Prints a table; the folder gets results.json,
    report.md and report.html. Measurements that the folder already has are not repeated.
    """
    tasks = tasks or tuple(task for task in bundled_tasks() if _at_hand(task, data))
    if not tasks:
        raise click.UsageError(f"{data}: no folder of a bundled task in it; name the tasks")
    from . import baselines, report
    from . import bench as benchmark
    from .builtin import NAMES
    from .summary import label, summarize

    methods = methods or tuple(baselines.METHODS)
    for method in methods:
        if method not in baselines.METHODS:
            raise click.UsageError(f"no method called {method!r}; there are {', '.join(baselines.METHODS)}")
    backbones = [_load(model) for model in models or NAMES]
    try:
        outcome = benchmark.run(
            tasks,
            backbones,
            output=output,
            methods=methods,
            shots=shots,
            seeds=_seeds(seeds, benchmark.SEEDS),
            data=data,
            prompt_lengths=lengths or (None,),
            limit=limit,
        )
    except KeyboardInterrupt:
        ctx.exit(_complain(f"Interrupted; the same command goes on from what is in {output}", 130))
    report.write(outcome, output)
    if as_json:
        click.echo((output / "results.json").read_text(encoding="utf-8"))
    else:
        click.echo(report.table(summarize(outcome.records)), nl=False)
    click.echo(f"Report: {output / 'report.html'}", err=True)
    for failure in outcome.failures:
        name = label(failure.method, failure.prompt_length)
        click.echo(f"Error: {failure.task}, {name}, {failure.model}, seed {failure.seed}: {failure.error}", err=True)
    ctx.exit(1 if outcome.failures else 0)


def _at_hand(task: Task, data: Path | None) -> bool:
    return (data / task.task).is_dir() if data else "bundled" in _data_of(task)


def _seeds(given: tuple[int, ...] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Turn one number into that many of the usual seeds; a list is a list."""
    if given is None:
        return usual
    if len(given) > 1:
        return given
    if 1 <= given[0] <= len(usual):
        return usual[: given[0]]
    raise click.UsageError(f"--seeds {given[0]}: give a number from 1 to {len(usual)}, or a list such as 13,21")


def _load(name: str, *, weights: bool = True, device: str | None = None, dtype: str = "auto") -> Backbone:
    """Load the language model that the user names."""
    from . import Backbone

    try:
        return Backbone.load(name, device=device, dtype=dtype, weights=weights)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _echo_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, columns side by side, numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell.isdigit() for cell in column[1:]) for column in columns]
    for row in (header, *rows):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        click.echo("  ".join(cells).rstrip())


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def _count(n: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"
