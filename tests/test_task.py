"""Task specs: what is read, what is refused and how, and that nothing is lost on the way back to YAML."""

from __future__ import annotations

import copy
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verbtune import task as task_module
from verbtune.task import (
    MAX_SPEC_BYTES,
    Answer,
    Field,
    Literal,
    Soft,
    Task,
    TaskError,
    Template,
    bundled_tasks,
    tasks_folder,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)

SPEC: dict[str, Any] = {
    "task": "tone",
    "template": "{text} It was {answer}.",
    "verbalizer": {"negative": ["bad", "terrible"], "positive": ["good", "great"]},
}


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(SPEC) | changes


# -- templates ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_piece_becomes_its_segment() -> None:
    template = Template.parse("{{{soft}{soft:8} {soft:in short} {text_a}?{text_b}}} {answer}.")
    assert template.segments == (
        Literal("{"),
        Soft(),
        Soft(length=8),
        Literal(" "),
        Soft(text="in short"),
        Literal(" "),
        Field("text_a"),
        Literal("?"),
        Field("text_b"),
        Literal("} "),
        Answer(),
        Literal("."),
    )
    assert template.fields == ("text_a", "text_b")
    assert template.segments[template.answer_index] == Answer()


def test_a_field_used_twice_is_one_field() -> None:
    assert Template.parse("{b}{a}{b}{answer}").fields == ("b", "a")


def test_ending_at_answer_cuts_what_follows() -> None:
    assert str(Template.parse("{text} It was {answer}.").ending_at_answer()) == "{text} It was {answer}"


def test_a_literal_brace_does_not_split_a_literal() -> None:
    """Each literal is tokenized on its own, so "a {b} c" must be one of them."""
    assert Template.parse("{text} a {{b}} c {answer}").segments[1] == Literal(" a {b} c ")


# All that YAML and templates could trip over; drawing from all of Unicode costs seconds and finds no more.
LETTERS = "aé中🙂 \t\n\r\x85\u2028\u2029\ufeff\x07{}[]():#'\"\\-?!&*%@`|>,.0~="
pieces = st.one_of(
    st.text(LETTERS, max_size=8).map(lambda s: s.replace("{", "{{").replace("}", "}}")),
    st.sampled_from(["{text}", "{text_b}", "{naïve}", "{soft}", "{soft:1}", "{soft:1000}", "{soft:in short: yes!}"]),
)


@quick
@given(before=st.lists(pieces, max_size=6), after=st.lists(pieces, max_size=6))
def test_a_template_survives_its_own_spelling(before: list[str], after: list[str]) -> None:
    template = Template.parse("".join(["{text}", *before, "{answer}", *after]))
    assert Template.parse(str(template)) == template


@quick
@given(st.text(alphabet="{}[]!:.softaner 019", max_size=24))
def test_a_template_parses_or_is_refused_as_a_task_error(text: str) -> None:
    try:
        template = Template.parse(text)
    except TaskError:
        return
    assert Template.parse(str(template)) == template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (3, "expected a string, got 3; quote it"),
        (None, "expected a string, got None; quote it"),
        ("{text} {answer} {answer}", "has 2 {answer} pieces; write exactly one"),
        ("{text}", "has 0 {answer} pieces; write exactly one"),
        ("It was {answer}", "has no field; write {text}"),
        ("{soft:4} {answer}", "has no field; write {text}"),
        ("{text.__class__} {answer}", "{text.__class__} is not a field name"),
        ("{text[0]} {answer}", "{text[0]} is not a field name"),
        ("{0} {answer}", "{0} is not a field name"),
        ("{} {answer}", "{} is not a field name"),
        ("{te xt} {answer}", "{te xt} is not a field name"),
        ("{text!r} {answer}", "{text!r} has a conversion; remove '!r'"),
        ("{text} {answer!s}", "{answer!s} has a conversion"),
        ("{text:>9} {answer}", "only {soft:…} takes a value after the colon"),
        ("{text} {answer:3}", "only {soft:…} takes a value after the colon"),
        ("{text} {answer", "does not parse"),
        ("{text}} {answer}", "write {{ and }} for literal braces"),
        ("{soft:0} {text} {answer}", "{soft:0}: the number of soft tokens must be from 1 to 1000"),
        ("{soft:1001} {text} {answer}", "{soft:1001}: the number of soft tokens must be from 1 to 1000"),
        ("{soft:-3} {text} {answer}", "{soft:-3}: the number of soft tokens must be from 1 to 1000"),
        ("{soft:2.5} {text} {answer}", "{soft:2.5}: the number of soft tokens must be from 1 to 1000"),
    ],
)
def test_a_bad_template_is_refused_by_name_and_remedy(template: Any, message: str) -> None:
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        Task.from_dict(changed(template=template), source="my.yaml")
    assert str(caught.value).startswith("my.yaml: template: ")
    assert "\n" not in str(caught.value)


def test_a_bad_causal_template_is_named_as_such() -> None:
    with pytest.raises(TaskError, match=r"^my.yaml: template_causal: .*exactly one"):
        Task.from_dict(changed(template_causal="{text}"), source="my.yaml")
    with pytest.raises(TaskError, match=r"^my.yaml: template_causal has the fields other but template has text; use"):
        Task.from_dict(changed(template_causal="{other} {answer}"), source="my.yaml")


# -- which template an LM reads ----------------------------------------------------------------------------------------


def test_a_masked_lm_reads_all_and_a_causal_lm_up_to_the_answer() -> None:
    task = Task.from_dict(SPEC)
    assert str(task.template_for("masked")) == "{text} It was {answer}."
    assert str(task.template_for("causal")) == "{text} It was {answer}"


def test_the_causal_template_wins_for_causal_lms_only() -> None:
    task = Task.from_dict(changed(template="{answer}: {text}", template_causal="{text} Tone: {answer}"))
    assert str(task.template_for("causal")) == "{text} Tone: {answer}"
    assert str(task.template_for("masked")) == "{answer}: {text}"


@pytest.mark.parametrize("template", ["{answer}: {text}", "{text} {answer} it was.", "{text} {answer} {soft:2}"])
def test_a_causal_lm_is_refused_text_after_the_answer(template: str) -> None:
    task = Task.from_dict(changed(template=template), source="my.yaml")
    with pytest.raises(TaskError, match=r"^my.yaml: template: a causal LM cannot read .* give a template_causal that"):
        task.template_for("causal")


# -- specs -------------------------------------------------------------------------------------------------------------


def test_a_full_spec_is_read_as_written() -> None:
    task = Task.from_text(
        """
        task: nli
        version: 3
        description: "Follows?"
        template: "{text_a}? {answer}, {text_b}"
        template_causal: "{text_a} {text_b} {answer}"
        verbalizer:
          entails: {"yes": 2, Indeed: 0.5}
          other: "no"
        truncate: {text_a: head, text_b: middle}
        dataset: {path: nyu-mll/glue, name: rte, fields: {text_a: sentence1, text_b: sentence2}, validation: validation}
        metric: macro_f1
        """,
        source="nli.yaml",
    )
    assert task.classes == ("entails", "other")
    assert task.label_words == [("entails", "yes", 2.0), ("entails", "Indeed", 0.5), ("other", "no", 1.0)]
    assert task.fields == ("text_a", "text_b")
    assert task.truncate == {"text_a": "head", "text_b": "middle"}
    assert task.dataset is not None
    assert (task.dataset.path, task.dataset.name, task.dataset.label) == ("nyu-mll/glue", "rte", "label")
    assert (task.dataset.train, task.dataset.test, task.dataset.validation) == ("train", "test", "validation")
    assert (task.version, task.metric, task.description, task.source) == (3, "macro_f1", "Follows?", "nli.yaml")


def test_classes_alone_are_their_own_label_words() -> None:
    named = HEAD + "verbalizer: [play_music, weather]\n"
    words = HEAD + "verbalizer:\n  play_music: [play music]\n  weather: [weather]\n"
    assert Task.from_text(named, source="a.yaml") == Task.from_text(words, source="b.yaml")


NAN = float("nan")
BAD_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"extra": 1}, "unknown key 'extra'; the keys are task, template, verbalizer"),
    ({"source": "x"}, "unknown key 'source'"),
    ({True: 1}, "unknown key True"),
    ({"verbaliser": 1}, "unknown key 'verbaliser' (did you mean 'verbalizer'?); the keys are task, template, "),
    ({"Version": 1}, "unknown key 'Version' (did you mean 'version'?); the keys are"),
    ({"dataset": {"path": "x", "tests": "y"}}, "dataset: unknown key 'tests' (did you mean 'test'?)"),
    ({"task": "two words"}, "task: 'two words' is not a name; use letters"),
    ({"task": "../x"}, "task: '../x' is not a name"),
    ({"task": 3}, "task: 3 is not a name"),
    ({"version": 0}, "version: 0 is not a whole number from 1"),
    ({"version": "1"}, "version: '1' is not a whole number"),
    ({"version": True}, "version: True is not a whole number"),
    ({"description": 3}, "description: 3 is not a string; quote it"),
    ({"metric": "f1"}, "metric: 'f1' is unknown; use one of accuracy, macro_f1"),
    ({"metric": ["accuracy"]}, "metric: ['accuracy'] is unknown"),
    ({"verbalizer": "auto"}, "expected at least two classes"),
    ({"verbalizer": ["a"]}, "expected at least two classes"),
    ({"verbalizer": ["a", "b", "a"]}, "the class 'a' is repeated; write it once"),
    ({"verbalizer": ["a", ["b"]]}, "the class ['b'] is not a string; quote it"),
    ({"verbalizer": ["a", False]}, "the class False is not a string; quote it, as in 'no'"),
    ({"verbalizer": ["a_b", "a b"]}, "the label word 'a b' stands under both 'a_b' and 'a b'"),
    ({"verbalizer": {"a": ["x"]}}, "expected at least two classes"),
    ({"verbalizer": {False: ["x"], "yes": ["y"]}}, "the class False is not a string; quote it, as in 'no'"),
    ({"verbalizer": {1: ["x"], "b": ["y"]}}, "the class 1 is not a string; quote it, as in '1'"),
    ({"verbalizer": {None: ["x"], "b": ["y"]}}, "the class None is not a string; quote it, as in 'null'"),
    ({"verbalizer": {" ": ["x"], "b": ["y"]}}, "the class ' ' is empty; give it a name"),
    ({"verbalizer": {"a": [False], "b": ["y"]}}, "a: the label word False is not a string; quote it, as in 'no'"),
    ({"verbalizer": {"a": [["x"]], "b": ["y"]}}, "is not a string; quote it"),
    ({"verbalizer": {"a": [], "b": ["y"]}}, "a: no label words; give at least one"),
    ({"verbalizer": {"a": {}, "b": ["y"]}}, "a: no label words; give at least one"),
    ({"verbalizer": {"a": None, "b": ["y"]}}, "a: expected a list of label words, got None"),
    ({"verbalizer": {"a": 7, "b": ["y"]}}, "a: expected a list of label words, got 7"),
    ({"verbalizer": {"a": ["x", "x"], "b": ["y"]}}, "a: a label word is repeated"),
    ({"verbalizer": {"a": ["x", " x"], "b": ["y"]}}, "a: a label word is repeated"),
    ({"verbalizer": {"a": ["  "], "b": ["y"]}}, "a: an empty label word; remove it"),
    ({"verbalizer": {"a": ["x"], "b": ["x"]}}, "stands under both 'a' and 'b'; a word can belong to one class"),
    ({"verbalizer": {"a": ["x "], "b": [" x"]}}, "the label word 'x' stands under both 'a' and 'b'"),
    ({"verbalizer": {"a": {"x": 0}, "b": ["y"]}}, "a: the weight 0 of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": -1}, "b": ["y"]}}, "the weight -1 of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": NAN}, "b": ["y"]}}, "the weight nan of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": float("inf")}, "b": ["y"]}}, "the weight inf of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": 10**400}, "b": ["y"]}}, "of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": True}, "b": ["y"]}}, "the weight True of 'x' is no number above 0"),
    ({"verbalizer": {"a": {"x": "2"}, "b": ["y"]}}, "the weight '2' of 'x' is no number above 0"),
    ({"truncate": "head"}, "truncate: expected a side for each field, as in {text: tail}, got 'head'"),
    ({"truncate": {"other": "head"}}, "truncate: unknown key 'other'; the keys are text"),
    ({"truncate": {"text": "left"}}, "truncate: text: 'left' is unknown; use one of tail, head, middle"),
    ({"truncate": {"text": ["head"]}}, "truncate: text: ['head'] is unknown"),
    ({"dataset": "glue"}, "dataset: expected keys such as path:, fields:, label:, got 'glue'"),
    ({"dataset": {"name": "x"}}, "dataset: the key 'path' is missing; give the data set's name on the hub"),
    ({"dataset": {"path": "x", "split": "y"}}, "dataset: unknown key 'split'"),
    ({"dataset": {"path": 3}}, "dataset: path: 3 is not a string; quote it"),
    ({"dataset": {"path": "x", "fields": {"other": "y"}}}, "dataset: fields: give a column for each of text, got"),
    ({"dataset": {"path": "x", "fields": {"text": 3}}}, "dataset: text: 3 is not a string; quote it"),
    ({"dataset": {"path": "x", "fields": ["text"]}}, "dataset: fields: give a column for each of text"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SPECS, ids=[m[:60] for _, m in BAD_SPECS])
def test_a_bad_spec_is_one_line_with_file_key_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        Task.from_dict(SPEC | changes, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["task", "template", "verbalizer"])
def test_a_required_key_that_is_missing_is_named(key: str) -> None:
    spec = changed()
    del spec[key]
    with pytest.raises(TaskError, match=f"^my.yaml: the key '{key}' is missing; add it"):
        Task.from_dict(spec, source="my.yaml")


@pytest.mark.parametrize("spec", [None, [], "task", 3, [SPEC]])
def test_what_is_no_mapping_is_refused(spec: Any) -> None:
    with pytest.raises(TaskError, match="expected keys such as task:, template:, verbalizer:"):
        Task.from_dict(spec)


# -- YAML --------------------------------------------------------------------------------------------------------------

HEAD = 'task: tone\ntemplate: "{text} {answer}"\n'
BOMB = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)
BAD_YAML = [
    (HEAD + "verbalizer:\n  no: [bad]\n  yes: [good]\n", "the class False is not a string; quote it, as in 'no'"),
    (HEAD + "verbalizer:\n  a: [no]\n  b: [good]\n", "the label word False is not a string; quote it, as in 'no'"),
    (HEAD + "verbalizer:\n  a: [x]\n  b: [y]\n  a: [z]\n", "the key 'a' is repeated"),
    (HEAD + "task: other\nverbalizer: {a: [x], b: [y]}\n", "the key 'task' is repeated"),
    (HEAD + "verbalizer: {a: {x: 1, x: 2}, b: [y]}\n", "the key 'x' is repeated"),
    (HEAD + "verbalizer: {a: &w [x], b: *w}\n", "the alias *w is not allowed; write the value out"),
    (HEAD + "verbalizer: {a: [x], b: [y]}\n<<: {metric: accuracy}\n", "my.yaml: "),
    (BOMB, "the alias *a0 is not allowed"),
    (HEAD + "verbalizer: {? [a] : [x], b: [y]}\n", "the key ['a'] is repeated or no plain value"),
    (HEAD + "verbalizer: {a: [x, b: [y]}\n", "not a readable YAML file"),
    (HEAD + "x: !!python/object/apply:os.system [true]\n", "not a readable YAML file"),
    (HEAD + "x: !unknown 3\n", "not a readable YAML file"),
    (HEAD + "version: " + "1" * 5000, "not a readable YAML file"),
    (HEAD + "x: \0", "not a readable YAML file"),
    (HEAD + "when: 2020-99-99\n", "not a readable YAML file"),
    (
        "task: tone\ntemplate: {text} It was {answer}.\n",
        "but found '<scalar>'); put the template in quotes",
    ),
    (
        "template_causal: Text: {text} {answer}",
        "(line 1: mapping values are not allowed here); put the",
    ),
    (
        b"template: [MASK] " + b"{text} " * 99,
        "(line 1: expected <block end>, but found '{'); put the",
    ),
    ("[" * 20_000, "not a readable YAML file"),
    ("{a: " * 20_000, "not a readable YAML file"),
    ("- " * 20_000, "not a readable YAML file"),
    (b"\xff\xfe\xfa", "not a readable YAML file"),
    (HEAD.encode() + b"description: \xe9\n", "not a readable YAML file"),
    ("", "expected keys such as task:"),
    ("just words", "expected keys such as task:"),
    ("--- {}\n--- {}\n", "not a readable YAML file"),
    ("#" * (MAX_SPEC_BYTES + 1), f"my.yaml: {MAX_SPEC_BYTES + 1} bytes; a task spec has at most {MAX_SPEC_BYTES}"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_bad_yaml_is_one_line_that_names_the_file(text: str | bytes, message: str) -> None:
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        Task.from_text(text, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_never_grows() -> None:
    """Twelve lines that would hold 4 · 9¹¹ nodes."""
    tracemalloc.start()
    try:
        with pytest.raises(TaskError):
            Task.from_text(BOMB, source="bomb.yaml")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


class Counted(str):
    """A string that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_the_search_for_repeated_keys_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec of a megabyte can hold 100,000 keys; comparing all pairs would take an hour."""

    class Loader(task_module._SpecLoader):
        pass

    Loader.add_constructor("tag:yaml.org,2002:str", lambda self, node: Counted(self.construct_scalar(node)))
    monkeypatch.setattr(task_module, "_SpecLoader", Loader)
    Counted.compared = 0
    with pytest.raises(TaskError, match="unknown key"):
        Task.from_text("\n".join(f"k{i}: v" for i in range(500)), source="many.yaml")
    assert Counted.compared < 500 * 100


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gone.yaml: cannot be read \(No such file"):
        Task.load(tmp_path / "gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(TaskError, match=r"folder.yaml: cannot be read"):
        Task.load(tmp_path / "folder.yaml")


def test_load_takes_a_task_a_dict_a_path_and_a_bundled_name(tmp_path: Path) -> None:
    task = Task.load(SPEC)
    path = tmp_path / "tone.yml"
    path.write_text(task.to_yaml(), encoding="utf-8")
    assert Task.load(task) is task
    assert Task.load(path) == Task.load(str(path)) == task
    assert Task.load("sentiment").task == "sentiment"


@pytest.mark.parametrize("name", ["no_such_task", "../tasks/sentiment", "", "sentiment.json", "sentiment\0"])
def test_an_unknown_name_is_refused_with_the_way_to_the_list(name: str) -> None:
    with pytest.raises(TaskError, match="verbtune tasks"):
        Task.load(name)


@pytest.mark.parametrize("spec", [None, 3, ["sentiment"], b"sentiment"])
def test_what_is_no_spec_is_refused(spec: Any) -> None:
    with pytest.raises(TaskError, match="a task is a name, a path, a dict or a Task, not "):
        Task.load(spec)


# -- round trips -------------------------------------------------------------------------------------------------------

word = st.text(LETTERS, min_size=1, max_size=12).filter(str.strip)
# Words must differ within a task once white space around them is gone.
verbalizers = (
    st.lists(word, min_size=2, max_size=8, unique_by=str.strip)
    .flatmap(
        lambda words: st.tuples(
            st.just(words),
            st.lists(word, min_size=2, max_size=2, unique=True),
            st.lists(st.floats(1e-6, 1e6), min_size=8, max_size=8),
            st.booleans(),
        )
    )
    .map(
        lambda d: {
            d[1][0]: dict(zip(d[0][:1], d[2], strict=False)) if d[3] else d[0][:1],
            d[1][1]: dict(zip(d[0][1:], d[2], strict=False)) if d[3] else d[0][1:],
        }
    )
)


@quick
@given(
    verbalizer=verbalizers,
    literal=st.text(LETTERS, max_size=20),
    description=st.text(LETTERS, max_size=20),
    truncate=st.sampled_from([{}, {"text": "head"}, {"text": "middle"}]),
    dataset=st.sampled_from([None, {"path": "a/b"}, {"path": "a", "name": "no", "revision": "1", "label": "y"}]),
    metric=st.sampled_from(["accuracy", "macro_f1"]),
)
def test_a_task_survives_dict_and_yaml(literal: str, **rest: Any) -> None:
    template = "{text}" + literal.replace("{", "{{").replace("}", "}}") + "{answer}"
    task = Task.from_dict({"task": "t", "template": template, **rest})
    assert Task.from_dict(task.to_dict()) == task
    read = Task.from_text(task.to_yaml(), source="t.yaml")
    assert read == task
    assert read.label_words == task.label_words  # the order too


def test_source_is_no_part_of_what_a_task_is() -> None:
    assert Task.from_dict(SPEC, source="a") == Task.from_dict(SPEC, source="b")


# -- the bundled specs -------------------------------------------------------------------------------------------------

BUNDLED = sorted(path.stem for path in tasks_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_spec_loads_and_survives_yaml(name: str) -> None:
    task = Task.load(name)
    assert task.task == name
    assert task.description
    again = Task.from_text(task.to_yaml(), source=name)
    assert again == task
    assert again.classes == task.classes


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_spec_works_for_both_kinds_of_lm(name: str) -> None:
    task = Task.load(name)
    assert task.template_for("masked").fields
    causal = task.template_for("causal")
    assert causal.segments[-1] == Answer()
    for template in (task.template, causal):
        answer = template.answer_index
        before = template.segments[answer - 1]
        assert isinstance(before, Literal)
        assert before.text[-1] in " \n\"“'("  # a label word is a word of its own


def test_all_bundled_specs_are_listed_in_order() -> None:
    assert [task.task for task in bundled_tasks()] == BUNDLED
    assert {"sentiment", "support_intent", "intencao", "sentimento", "sst2", "mnli", "clinc150"} <= set(BUNDLED)
