"""The command line, as a user sees it: what it prints where, exit codes, files, and bad calls."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import tiny
from transformers.utils import logging

from verbtune import PromptClassifier, answers, bench, cli, soft
from verbtune.tuning import History

SPEC_DICT = {
    "task": "tone",
    "template": "{text} It was {answer}.",
    "verbalizer": {"negative": ["bad"], "positive": ["good"]},
}
SPEC = """
task: tone
version: 1
description: Good or bad
template: "{text} It was {answer}."
verbalizer:
  negative: [bad, terrible]
  positive: [good, great]
"""
PAIR = """
task: pair
template: "{text_a} {text_b} It was {answer}."
verbalizer: {a: bad, b: good}
"""
ROWS = [
    ("A great film, warm and funny.", "positive"),
    ("It was awful: dull, slow and bad.", "negative"),
    ("The music is great.", "positive"),
    ("I want my two hours back.", "negative"),
]

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny masked and a tiny causal language model."""
    folder = tmp_path_factory.mktemp("models")
    for name, architecture in (("masked", "bert"), ("causal", "gpt2")):
        tiny(architecture).model.save_pretrained(folder / name)
        tiny(architecture).tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in a process of its own, where the command line comes before transformers and tells it to be quiet."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a spec and labelled texts."""
    monkeypatch.chdir(tmp_path)
    Path("tone.yaml").write_text(SPEC)
    Path("pair.yaml").write_text(PAIR)
    Path("train.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS))
    for split in ("train", "test"):
        Path("data/tone").mkdir(parents=True, exist_ok=True)
        Path(f"data/tone/{split}.jsonl").write_text(Path("train.jsonl").read_text())
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """Call a command; unless an exit code is expected, it must be 0."""

    def call(*arguments: Any, code: int = 0, **more: Any) -> Result:
        result = CliRunner().invoke(cli.main, list(map(str, arguments)), **more)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture(scope="session")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that `fit` saved."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tone.yaml").write_text(SPEC)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS))
    arguments = ["fit", folder / "tone.yaml", "--train", folder / "train.jsonl", "--output", folder / "clf"]
    result = CliRunner().invoke(
        cli.main, [*map(str, arguments), "--model", str(models / "masked"), "--param", "steps=2"]
    )
    assert result.exit_code == 0, result.output
    return folder / "clf"


def one_line(result: Result) -> str:
    """What a failed command says: one line on standard error, nothing on standard output."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# All commands --------------------------------------------------------------------------------------


def test_help_needs_no_language_model_library() -> None:
    code = "import sys, verbtune.cli; sys.exit(bool({'torch', 'transformers', 'sklearn', 'datasets'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(run: Run, arguments: list[str]) -> None:
    output = run(*arguments).stdout
    assert all(f"\n  {command} " in output for command in ("bench", "check", "fit", "predict", "show", "tasks"))
    assert "..." not in output.split("Commands:")[1]


@pytest.mark.parametrize("command", ["bench", "check", "fit", "predict", "show", "tasks"])
def test_help_of_a_command(run: Run, command: str) -> None:
    assert run(command, "--help").stdout.startswith("Usage: ")


def test_version(run: Run) -> None:
    assert run("--version").stdout.startswith("verbtune 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "Error: No such command 'nonsense'."),
        (["--nonsense"], "Error: No such option '--nonsense'."),
        (["show"], "Error: Missing argument 'TASK'."),
        (["show", "nope"], "Error: no task called 'nope'; `verbtune tasks` lists the bundled ones"),
        (["show", "nope.yaml"], "Error: nope.yaml: cannot be read (No such file or directory)"),
        (["show", "tone.yaml"], "Error: the task 'tone' brings no texts along; give --text TEXT or --data FOLDER"),
        (["show", "pair.yaml", "--text", "x"], "Error: the task 'pair' reads text_a, text_b; give one --text for each"),
        (
            ["show", "tone.yaml", "--data", "nope"],
            "Error: Invalid value for '--data': Directory 'nope' does not exist.",
        ),
        (
            ["show", "tone.yaml", "--text", "x", "--model", "builtin/x"],
            "Error: no built-in model 'builtin/x'; there are ",
        ),
        (["show", "tone.yaml", "--text", "x", "--model", "data"], "Error: cannot load the language model 'data': "),
        (["check", "nope.yaml"], "Error: nope.yaml: cannot be read"),
        (["check", "nope"], "Error: no task called 'nope'"),
        (["check", "tone.yaml", "--model", "data"], "Error: cannot load the language model 'data': "),
        (
            ["fit", "tone.yaml", "--train", "nope", "--output", "x"],
            "Error: Invalid value for '--train': File 'nope' does",
        ),
        (["predict", "nope"], "Error: Invalid value for 'FOLDER': Directory 'nope' does not exist."),
        (["bench", "nope"], "Error: no task called 'nope'"),
        (["bench", "--methods", "magic,tfidf"], "Error: no method called 'magic'; there are majority, tfidf, "),
        (["bench", "--shots", "4,x"], "Error: Invalid value for '--shots': 'x' is not a valid integer range."),
        (["bench", "--shots", "0"], "Error: Invalid value for '--shots': 0 is not in the range x>=1."),
        (["bench", "--data", "data/tone"], "Error: data/tone: no folder of a bundled task in it; name the tasks"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    assert one_line(run(*arguments, code=2)).startswith(message)


def test_an_unexpected_error_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "bundled_tasks", lambda: int("x"))
    result = CliRunner().invoke(cli.main, ["tasks"])
    assert type(result.exception) is ValueError


@pytest.mark.parametrize("error", [ImportError("LoRA needs PEFT; install it"), OSError("the disk is full")])
def test_an_expected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "bundled_tasks", fail)
    assert one_line(run("tasks", code=1)) == f"Error: {error}"


def test_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "bundled_tasks", interrupt)
    assert run("tasks", code=130).stderr.strip() == "Interrupted"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m verbtune tasks | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("task ")
    assert result.stderr == ""


# tasks, show, check ---------------------------------------------------------------------------------


def test_tasks(run: Run) -> None:
    lines = run("tasks").stdout.splitlines()
    assert lines[0].split() == ["task", "classes", "texts", "description"]
    (sentiment,) = [line for line in lines if line.startswith("sentiment ")]
    assert " 2  " in sentiment
    assert " train, " in sentiment
    assert "hub: stanfordnlp/sst2 " in "\n".join(lines)


def test_tasks_as_json(run: Run, repository: Path) -> None:
    found = {entry["task"]: entry for entry in json.loads(run("tasks", "--json").stdout)}
    assert found.keys() == {path.stem for path in (repository / "tasks").glob("*.yaml")}
    bundled = found["sentiment"]["data"]["bundled"]
    assert bundled["train"] == len((repository / "tasks/sentiment/train.jsonl").read_text().splitlines())
    assert found["sentiment"]["classes"] == ["negative", "positive"]
    assert found["sst2"]["data"] == {"hub": "stanfordnlp/sst2"}


def test_show_on_a_masked_model(run: Run, models: Path) -> None:
    output = run("show", "tone.yaml", "--model", models / "masked", "--text", "great [MASK]").stdout
    ids = tiny("bert").tokenizer.convert_tokens_to_ids
    pieces = tiny("bert").tokenizer.tokenize("mask")
    tokens = ["[CLS]", "great", "[UNK]", *pieces, "[UNK]", "it", "was", "[MASK]", ".", "[SEP]"]
    notes = ["", *["text"] * (3 + len(pieces)), "", "", "the answer", "", ""]
    words = [("negative", "bad"), ("negative", "terrible"), ("positive", "good"), ("positive", "great")]
    assert [" ".join(line.split()) for line in output.splitlines()] == [
        f"tone on {models}/masked: a masked language model that reads 160 tokens",
        "template: {text} It was {answer}.",
        "label: not given",
        "",
        "piece content",
        "{text} 'great [MASK]'",
        "words ' It was '",
        "{answer} a label word",
        "words '.'",
        "",
        "position id token note",
        *(
            f"{i} {ids(token)} {token} {note}".strip()
            for i, (token, note) in enumerate(zip(tokens, notes, strict=True))
        ),
        "",
        "class label word tokens ids",
        *(f"{name} {word} {word} {ids(word)}" for name, word in words),
        "",
        "The linter finds nothing wrong.",
    ]


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    cli._echo_table(("name", "n", "note"), [("a", "10", "so"), ("bcdef", "9", "")])
    assert capsys.readouterr().out == "name    n  note\na      10  so\nbcdef   9\n"


def test_show_on_a_causal_model(run: Run, models: Path) -> None:
    Path("tone.yaml").write_text(SPEC.replace("{text} It", "{soft:2} {text} {soft:In a} It"))
    output = run("show", "tone.yaml", "--model", models / "causal", "--data", "data").stdout
    assert "label: positive\n" in output
    assert "soft tokens  2\n" in output
    assert "soft tokens  'In a'\n" in output
    assert "Soft tokens are tuned with steps=; by default" in output
    assert "         soft 1\n" in output
    assert "  soft 3, starts as this token\n" in output
    assert "  the answer follows\n" in output
    assert ": {answer}" not in output


def test_show_takes_no_bundled_text_for_a_spec_that_has_data_of_its_own(run: Run) -> None:
    Path("tone.yaml").write_text(SPEC.replace("task: tone", "task: sentiment") + "dataset: {path: some/where}\n")
    assert "the task 'sentiment' brings no texts along; give --text" in one_line(run("show", "tone.yaml", code=2))


def test_show_tells_what_the_linter_says(run: Run, models: Path) -> None:
    Path("tone.yaml").write_text(SPEC.replace("was {answer}", "was{answer}"))
    output = run("show", "tone.yaml", "--model", models / "masked", "--text", "x").stdout
    assert "\nwarning: template: no space between 'was' and '{answer}'" in output


def test_show_a_pair(run: Run, models: Path) -> None:
    output = run("show", "pair.yaml", "--model", models / "masked", "--text", "It", "--text", "was").stdout
    assert "{text_a}  'It'\n" in output
    assert "was     text_b\n" in output


def test_show_an_empty_text(run: Run, models: Path) -> None:
    assert "text is empty" in one_line(run("show", "tone.yaml", "--text", " ", code=1))


def test_check_a_good_spec(run: Run, models: Path) -> None:
    result = run("check", "tone.yaml", "--model", models / "masked", "--train", "train.jsonl")
    assert result.stdout == "tone.yaml: 0 errors, 0 warnings\n"


def test_check_on_several_models(run: Run, models: Path) -> None:
    Path("tone.yaml").write_text(
        SPEC.replace("{text} It was {answer}.", "It was {answer}: {text}").replace("bad", "badly")
    )
    masked, causal = models / "masked", models / "causal"
    result = run("check", "tone.yaml", "--model", masked, "--model", causal, code=1)
    assert f"tone.yaml: warning: {masked}: verbalizer: several tokens for 1 of 4 label words: " in result.stdout
    assert f"tone.yaml: error: {causal}: template: a causal LM cannot read ': {{text}}'" in result.stdout
    assert result.stdout.endswith("tone.yaml: 1 error, 1 warning\n")
    assert result.stderr == ""


def test_check_says_once_what_two_models_share(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models / "masked", "again")
    monkeypatch.setattr("verbtune.builtin.NAMES", (str(models / "masked"), "again", "builtin/gone"))
    Path("tone.yaml").write_text(SPEC.replace("{text} It was", "{soft:140} {text}It was"))
    report = json.loads(run("check", "tone.yaml", "--json").stdout)
    assert (report["file"], report["errors"], report["warnings"]) == ("tone.yaml", 0, 3)
    space, room, gone = report["problems"]
    assert space["models"] == []
    assert space["message"].startswith("template: no space")
    assert room["models"] == [str(models / "masked"), "again"]
    assert room["message"].startswith("template, soft tokens and label words take ")
    assert gone["models"] == ["builtin/gone"]
    assert gone["message"].startswith("not checked: ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC + "colour: red\n", "unknown key 'colour'"),
        (SPEC.replace("negative:", "no:"), "the class False is not a string; quote it"),
        ("a: [", "not a readable YAML file"),
    ],
)
def test_check_a_broken_spec(run: Run, spec: str, message: str) -> None:
    Path("tone.yaml").write_text(spec)
    lines = run("check", "./tone.yaml", code=1).stdout.splitlines()
    assert lines[0].startswith("./tone.yaml: error: ")
    assert message in lines[0]
    assert lines[1:] == ["./tone.yaml: 1 error, 0 warnings"]


def test_check_on_data(run: Run, models: Path) -> None:
    with Path("train.jsonl").open("a") as stream:
        stream.write('{"text": "x", "label": "neutral"}\n')
    result = run("check", "tone.yaml", "--model", models / "masked", "--train", "train.jsonl", code=1)
    assert "tone.yaml: error: train.jsonl:5: the label 'neutral' is no class of the task 'tone'" in result.stdout


# fit ------------------------------------------------------------------------------------------------


def fit_arguments(models: Path, *more: Any) -> list[Any]:
    return ["fit", "tone.yaml", "--train", "train.jsonl", "--model", models / "masked", "--output", "clf", *more]


def test_fit(run: Run, models: Path) -> None:
    parameters = ("--param", "steps=3", "--param", "tune_template=no", "--param", "max_length=none")
    result = run(*fit_arguments(models, "--shots", 1, "--seed", 5, "--validation", "train.jsonl", *parameters))
    texts, numbers, seconds, validation, saved = result.stdout.splitlines()
    clf = PromptClassifier.from_pretrained("clf")
    assert texts == "texts       2 of 2 classes: negative, positive"
    assert numbers == f"trained     {clf.trained_parameters_:,} numbers on the frozen {models / 'masked'}"
    assert seconds.startswith("time        ")
    assert seconds.endswith(" s, 3 steps, kept step 3")
    right = clf.score(*zip(*ROWS, strict=True))
    assert validation == f"validation  accuracy {right:.3f} on 4 texts"
    assert saved == f"saved       clf, {sum(p.stat().st_size for p in Path('clf').iterdir()):,} bytes"
    assert (clf.steps, clf.tune_template, clf.max_length, clf.random_state) == (3, False, None, 5)


def test_fit_warns_of_what_the_linter_finds(run: Run, models: Path) -> None:
    result = run(*fit_arguments(models, "--param", "steps=1", "--param", "max_length=20"))
    assert result.stderr.startswith("Warning: template, soft tokens and label words take 6 of 20 tokens")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("steps", "Error: --param steps: write NAME=VALUE"),
        ("steps=x", "Error: --param steps: 'x' is not a valid integer."),
        ("batch_size=none", "Error: --param batch_size: 'none' is not a valid integer."),
        ("stepz=1", "Error: --param stepz: no such parameter; there are prompt_length, tune_template, "),
        ("verbose=1", "Error: --param verbose: no such parameter; there are "),
        ("model=x", "Error: --param model: give it as --model"),
        ("random_state=1", "Error: --param random_state: give it as --seed"),
        ("tune_template=perhaps", "Error: --param tune_template: 'perhaps' is not a valid boolean."),
        ("learning_rate=-1", "Error: learning_rate=-1.0 must be a number from 0 to inf"),
        ("init=magic", "Error: init='magic' is unknown; use one of vocab, labels, random"),
        (
            "prompt_length=4",
            "Error: prompt_length=4 has nowhere to go: the template of 'tone' says {soft:2}; write",
        ),
        ("dtype=float8", "Error: dtype='float8' is unknown; use auto, float32, bfloat16 or float16"),
    ],
)
def test_fit_with_a_bad_parameter(run: Run, models: Path, pair: str, message: str) -> None:
    Path("soft.yaml").write_text(SPEC.replace("{text}", "{soft:2} {text}"))
    command, _, *more = fit_arguments(models, "--param", pair)
    assert one_line(run(command, "soft.yaml", *more, code=2)).startswith(message)
    assert not Path("clf").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": "neutral"}', "train.jsonl:5: the label 'neutral' is no class of the task 'tone'"),
        ('{"text": "x"}', "train.jsonl:5: no 'label'"),
        ('{"text": "x", "label": "positive"', "train.jsonl:5: not a line of JSON"),
        ('{"text": "", "label": "positive"}', "train.jsonl:5: text is empty"),
        ('["x"]', "train.jsonl:5: expected an object"),
        ('{"text": "\\ud800", "label": "positive"}', "train.jsonl:5: text has a lone surrogate"),
    ],
)
def test_fit_on_a_bad_row(run: Run, models: Path, line: str, message: str) -> None:
    with Path("train.jsonl").open("a") as stream:
        stream.write(line + "\n")
    assert one_line(run(*fit_arguments(models), code=1)).startswith(f"Error: {message}")
    assert not Path("clf").exists()


def test_fit_on_one_class(run: Run, models: Path) -> None:
    Path("train.jsonl").write_text('{"text": "x", "label": "positive"}\n')
    result = run(*fit_arguments(models), code=1)
    assert result.stderr.splitlines()[-1].startswith("Error: all labels are one class, 'positive'")


def test_fit_into_a_folder_that_is_something_else(run: Run, models: Path) -> None:
    Path("clf").mkdir()
    Path("clf/thesis.txt").write_text("years of work")
    assert one_line(run(*fit_arguments(models), code=1)).startswith("Error: clf: holds something that is not a saved")
    assert Path("clf/thesis.txt").read_text() == "years of work"


def test_fit_into_a_folder_that_cannot_be_made(run: Run, models: Path) -> None:
    arguments = [*fit_arguments(models)[:-1], "train.jsonl/clf"]
    assert "train.jsonl is no folder that you may write to" in one_line(run(*arguments, code=1))


@pytest.mark.filterwarnings("default::UserWarning")
def test_an_interrupted_fit_saves_and_says_so(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **more: Any) -> History:
        history = tune(*arguments, **{**more, "steps": 3})
        history.interrupted = True
        return history

    tune = soft.tune
    monkeypatch.setattr(soft, "tune", interrupted)
    result = run(*fit_arguments(models, "--param", "steps=5"), code=130)
    assert "Warning: training was interrupted after 3 of 5 steps; the prompt of step 3 is kept" in result.stderr
    assert PromptClassifier.from_pretrained("clf").predict(["good"]).shape == (1,)


# predict --------------------------------------------------------------------------------------------


def expected(trained: Path, texts: list[str]) -> list[str]:
    return PromptClassifier.from_pretrained(trained).predict(texts).tolist()


def test_predict_lines(run: Run, trained: Path) -> None:
    texts = ["good", "Ein Ü und ein [MASK]", "{answer}"]
    labels = expected(trained, texts)
    assert run("predict", trained, input="\n".join(texts)).stdout.splitlines() == labels
    lines = run("predict", trained, "--proba", input="\n".join(texts) + "\r\n").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == labels
    assert all(0.5 <= float(line.split("\t")[1]) <= 1 for line in lines)


def test_predict_jsonl_keeps_the_columns(run: Run, trained: Path) -> None:
    rows = [{"id": 7, "text": "good", "label": "positive"}, {"id": 8, "text": "naïve\n日本"}]
    source = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    lines = [
        json.loads(line)
        for line in run("predict", trained, "--format", "jsonl", "--proba", input=source).stdout.splitlines()
    ]
    for row, line, label in zip(rows, lines, expected(trained, [row["text"] for row in rows]), strict=True):
        probabilities = line.pop("probabilities")
        assert line == {**row, "prediction": label}
        assert max(probabilities, key=probabilities.__getitem__) == label
        assert sum(probabilities.values()) == pytest.approx(1)


def test_predict_csv(run: Run, trained: Path) -> None:
    Path("in.csv").write_text('id,text\n1,"good, ""really"""\n2,"two\nlines"\n', encoding="utf-8")
    run("predict", trained, "--input", "in.csv", "--output", "out.csv", "--proba")
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines(keepends=True)))
    assert list(rows[0]) == ["id", "text", "prediction", "p(negative)", "p(positive)"]
    assert [row["text"] for row in rows] == ['good, "really"', "two\nlines"]
    assert [row["prediction"] for row in rows] == expected(trained, ['good, "really"', "two\nlines"])
    assert sorted(p.name for p in Path().iterdir() if "out" in p.name) == ["out.csv"]


def test_predict_from_text_to_jsonl(run: Run, trained: Path) -> None:
    Path("in.txt").write_text("good\nbad\n")
    Path("out.jsonl").write_text("old")
    assert run("predict", trained, "--input", "in.txt", "--output", "out.jsonl").stdout == ""
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["good", "bad"]


def test_predict_reads_a_file_of_an_unknown_suffix_if_told_how(run: Run, trained: Path) -> None:
    Path("in.dump").write_text('id,text\n1,"good, really"\n')
    message = one_line(run("predict", trained, "--input", "in.dump", code=2))
    assert message.startswith("Error: in.dump: the suffix .dump says no format; use one of .txt, .csv, ")
    assert message.endswith(", or say --format")
    assert one_line(run("predict", trained, "--output", "out.tsv", code=2)).startswith(
        "Error: out.tsv: the suffix .tsv"
    )
    label = expected(trained, ["good, really"])[0]
    result = run("predict", trained, "--input", "in.dump", "--format", "csv")
    assert result.stdout == f'id,text,prediction\n1,"good, really",{label}\n'


def test_predict_is_not_told_a_format_in_vain(run: Run, trained: Path) -> None:
    Path("in.csv").write_text("text\ngood\n")
    message = one_line(run("predict", trained, "--input", "in.csv", "--output", "out.txt", "--format", "jsonl", code=2))
    assert message == "Error: --format jsonl: in.csv is csv and out.txt is text; leave --format out"
    assert json.loads(run("predict", trained, "--input", "in.csv", "--format", "jsonl").stdout)["text"] == "good"


@pytest.fixture(scope="session")
def half_sure(trained: Path) -> tuple[Path, list[str], list[str | None]]:
    """A classifier that answers at a rate of 0.9 about as many of these texts as not; and its answers."""
    texts = [text for text, _ in ROWS] + ["good", "bad film", "Money back.", "so so"]
    clf = PromptClassifier.from_pretrained(trained)
    confidence = clf.predict_proba(texts).max(axis=1)
    middle = (confidence.min() + confidence.max()) / 2
    clf.calibration_ = dataclasses.replace(clf.calibration_, right=np.full(400, middle), wrong=np.empty(0))
    clf.save_pretrained(trained.parent / "half-sure")
    labels = [label if sure else None for label, sure in zip(clf.predict(texts), confidence >= middle, strict=True)]
    assert len({label is None for label in labels}) == 2
    return trained.parent / "half-sure", texts, labels


def test_predict_with_a_rate_leaves_lines_empty(run: Run, half_sure: Any) -> None:
    folder, texts, labels = half_sure
    source, plain = "\n".join(texts), [label or "" for label in labels]
    assert run("predict", folder, "--reject-at", 0.9, input=source).stdout.split("\n") == [*plain, ""]
    lines = run("predict", folder, "--reject-at", 0.9, "--proba", input=source).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == plain
    every = run("predict", folder, "--proba", input=source).stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == [line.split("\t")[1] for line in every]


def test_predict_with_a_rate_writes_null_and_empty_cells(run: Run, half_sure: Any) -> None:
    folder, texts, labels = half_sure
    with Path("in.csv").open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([["text"], *([text] for text in texts)])
    for name in ("out.csv", "out.jsonl"):
        run("predict", folder, "--input", "in.csv", "--output", name, "--reject-at", "0.9", "--proba")
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["prediction"] for row in rows] == [label or "" for label in labels]
    assert all(0 <= float(row["p(negative)"]) <= 1 for row in rows)
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == labels
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in found)


def test_predict_with_a_rate_that_is_not_reached_warns_once(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ROWS_PER_CHUNK", 1)
    result = run("predict", trained, "--reject-at", "0.001", input="good\nbad\n")
    assert result.stdout == "\n\n"
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("Warning: reject_at=0.001 is less than the held-out training texts can show")


@pytest.mark.parametrize("rate", ["0", "1", "-1", "x"])
def test_predict_with_a_rate_that_is_none(run: Run, trained: Path, rate: str) -> None:
    message = one_line(run("predict", trained, f"--reject-at={rate}", input="good", code=2))
    assert message.startswith(
        f"Error: Invalid value for '--reject-at': '{rate}' is not" if rate == "x" else "Error: Inv"
    )


def test_predict_copies_a_lone_surrogate_of_another_column(run: Run, trained: Path) -> None:
    line = run("predict", trained, "--format", "jsonl", input='{"id": "\\ud800", "text": "good"}\n').stdout
    assert json.loads(line)["id"] == "\ud800"


def test_output_in_an_encoding_that_lacks_letters() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "iso8859-5"}
    command = [sys.executable, "-m", "verbtune", "tasks", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"agendar_reuni\\xe3o" in result.stdout


def test_predict_nothing(run: Run, trained: Path) -> None:
    assert run("predict", trained, input="").stdout == ""


def test_predict_with_another_path_to_the_model(run: Run, trained: Path, models: Path) -> None:
    run("predict", trained, "--model", models / "masked", input="good")
    message = one_line(run("predict", trained, "--model", models / "causal", input="good", code=1))
    assert f"Error: {trained}: trained on {models}/masked (masked, " in message


def test_predict_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a chunk of rows is read before its results are there."""
    monkeypatch.setattr(answers, "ROWS_PER_CHUNK", 3)
    clf = PromptClassifier(SPEC_DICT, model=tiny("bert"), steps=0).fit(*zip(*ROWS, strict=True))
    read = 0

    def endless() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
        nonlocal read
        while True:
            read += 1
            yield f"x:{read}", {"n": read}, {"text": f"good {read}"}

    results = answers._answers(clf, endless(), proba=False, least=None, on_screen=False)
    assert [next(results)[0]["n"] for _ in range(3)] == [1, 2, 3]
    assert read == 3
    assert [next(results)[0]["n"] for _ in range(4)] == [4, 5, 6, 7]
    assert read == 9


def test_predict_in_chunks_says_the_same(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "".join(f"{text} {i}\n" for i in range(5) for text, _ in ROWS)
    whole = run("predict", trained, input=source).stdout
    monkeypatch.setattr(answers, "ROWS_PER_CHUNK", 3)
    assert run("predict", trained, input=source).stdout == whole
    assert whole.count("\n") == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"good\n\nbad\n", "in.txt:2: text is empty"),
        ("in.txt", b"good\nb\xe4d\n", "in.txt:2: not UTF-8 (byte 0xe4 at character 1)"),
        ("in.jsonl", b'{"text": "good"}\n{"text": \n', "in.jsonl:2: not a line of JSON"),
        ("in.jsonl", b'{"text": "good"}\n{"body": "bad"}\n', "in.jsonl:2: the field 'text' is missing; it has body"),
        ("in.jsonl", b'{"text": "good"}\n{"text": null}\n', "in.jsonl:2: text is None (NoneType), not a text"),
        ("in.csv", b"body\ngood\n", "in.csv:2: the field 'text' is missing; it has body"),
        ("in.csv", b"id,text\n1,good\n2\n", "in.csv:3: text is None (NoneType), not a text"),
    ],
)
def test_predict_on_a_bad_row(run: Run, trained: Path, name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    Path("out.txt").write_text("old")
    before = sorted(Path().iterdir())
    assert one_line(run("predict", trained, "--input", name, "--output", "out.txt", code=1)).startswith(
        f"Error: {message}"
    )
    assert sorted(Path().iterdir()) == before
    assert Path("out.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("form", "column", "message"),
    [
        ("csv", "id", "in.jsonl:3: the column 'id' is not in the first row, as CSV wants it; write JSONL"),
        (
            "csv",
            "prediction",
            "in.jsonl:3: the column 'prediction' would be overwritten with what predict says; rename",
        ),
        ("csv", "p(negative)", "in.jsonl:3: the column 'p(negative)' would be overwritten"),
        ("jsonl", "prediction", "in.jsonl:3: the column 'prediction' would be overwritten"),
        ("jsonl", "probabilities", "in.jsonl:3: the column 'probabilities' would be overwritten"),
    ],
)
def test_predict_loses_no_column(
    run: Run, trained: Path, form: str, column: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ROWS_PER_CHUNK", 1)  # so that something is written before
    rows = [{"text": "good"}, {"text": "bad"}, {"text": "so so", column: 1}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(Path().iterdir())
    result = run("predict", trained, "--input", "in.jsonl", "--output", f"out.{form}", "--proba", code=1)
    assert one_line(result).startswith(f"Error: {message}")
    assert sorted(Path().iterdir()) == before
    run("predict", trained, "--input", "in.jsonl", "--proba")


def test_predict_jsonl_may_have_columns_later_on(run: Run, trained: Path) -> None:
    rows = [{"text": "good", "probabilities": 1}, {"text": "bad", "p(negative)": 1, "id": 3}]
    source = "".join(json.dumps(row) + "\n" for row in rows)
    lines = run("predict", trained, "--format", "jsonl", input=source).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {**row, "prediction": label} for row, label in zip(rows, expected(trained, ["good", "bad"]), strict=True)
    ]


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("text", b"good\n \n", "standard input:2: text is empty"),
        ("text", b"good\nb\xe4d\n", "standard input:2: not UTF-8 (byte 0xe4 at character 1)"),
        ("jsonl", b'{"text": "good"}\n{', "standard input:2: not a line of JSON"),
    ],
)
def test_predict_a_bad_line_of_standard_input(run: Run, trained: Path, form: str, content: bytes, message: str) -> None:
    assert run("predict", trained, "--format", form, input=content, code=1).stderr.startswith(f"Error: {message}")


@pytest.mark.parametrize("output", ["nowhere/out.txt", "train.jsonl/out.txt"])
def test_predict_to_where_nothing_can_be_written(run: Run, trained: Path, output: str) -> None:
    message = one_line(run("predict", trained, "--output", output, input="good", code=1))
    assert message.startswith("Error: ")
    assert f"{output}: cannot be written (" in message


def test_predict_to_a_device(run: Run, trained: Path) -> None:
    run("predict", trained, "--output", "/dev/null", input="good")
    assert not Path("/dev/null").is_file()


def test_predict_with_a_folder_that_is_no_classifier(run: Run) -> None:
    message = one_line(run("predict", "data", input="good", code=1))
    assert message.startswith("Error: data/verbtune.json: cannot be read (No such file or directory)")


# bench ----------------------------------------------------------------------------------------------


def bench_arguments(models: Path, *more: Any) -> list[Any]:
    return [
        "bench",
        "tone.yaml",
        "--data",
        "data",
        "--model",
        models / "masked",
        "--shots",
        1,
        "--output",
        "out",
        *more,
    ]


def test_bench(run: Run, models: Path) -> None:
    result = run(*bench_arguments(models, "--methods", "majority,zero-shot", "--seeds", 2))
    assert "majority" in result.stdout
    assert "zero-shot" in result.stdout
    assert result.stderr == "Report: out/report.html\n"
    records = json.loads(Path("out/results.json").read_text())["records"]
    assert [(r["task"], r["method"], r["shots"], r["seed"]) for r in records] == [
        ("tone", method, 1, seed) for seed in (13, 21) for method in ("majority", "zero-shot")
    ]
    assert Path("out/report.md").is_file()


def test_bench_as_json(run: Run, models: Path) -> None:
    result = run(*bench_arguments(models, "--methods", "majority", "--seeds", "3,4", "--limit", 2, "--json"))
    assert [(r["seed"], r["n_test"]) for r in json.loads(result.stdout)["records"]] == [(3, 2), (4, 2)]


def test_bench_passes_on_what_it_is_told(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def record(tasks: Any, backbones: Any, **more: Any) -> bench.Outcome:
        told.update(more, tasks=[task.task for task in tasks], models=[backbone.kind for backbone in backbones])
        raise bench.BenchError("enough")

    monkeypatch.setattr(bench, "run", record)
    monkeypatch.setattr("verbtune.builtin.NAMES", (str(models / "masked"), str(models / "causal")))
    assert one_line(run("bench", "--shots", "4, 16", "--prompt-length", "1,5", code=1)) == "Error: enough"
    assert told == {
        "tasks": ["intencao", "sentiment", "sentimento", "support_intent"],
        "models": ["masked", "causal"],
        "output": Path("bench-results"),
        "methods": tuple(bench.baselines.METHODS),
        "shots": (4, 16),
        "seeds": bench.SEEDS,
        "data": None,
        "prompt_lengths": (1, 5),
        "limit": None,
    }


def test_bench_exits_with_1_if_a_method_fails(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench.baselines.make

    def fail(method: str, *arguments: Any, **more: Any) -> Any:
        if method == "tfidf":
            raise RuntimeError("no such luck")
        return make(method, *arguments, **more)

    monkeypatch.setattr(bench.baselines, "make", fail)
    result = run(*bench_arguments(models, "--methods", "majority,tfidf", "--seeds", 1), code=1)
    assert "majority" in result.stdout
    message = f"Error: tone, tfidf, {models}/masked, seed 13: RuntimeError: no such luck"
    assert result.stderr.splitlines() == ["Report: out/report.html", message]


def test_an_interrupted_bench_says_how_to_go_on(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    message = one_line(run(*bench_arguments(models), code=130))
    assert message == "Interrupted; the same command goes on from what is in out"


def test_bench_into_a_folder_that_cannot_be_made(run: Run, models: Path) -> None:
    arguments = [*bench_arguments(models), "--output", "train.jsonl/out"]
    assert "train.jsonl/out: cannot be written" in one_line(run(*arguments, code=1))


def test_seeds() -> None:
    assert cli._seeds(None, (1, 2, 3)) == (1, 2, 3)
    assert cli._seeds((2,), (1, 2, 3)) == (1, 2)
    assert cli._seeds((42, 7), (1, 2, 3)) == (42, 7)
