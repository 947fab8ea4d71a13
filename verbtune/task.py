"""Task specs: what a task asks, as data.

A spec names a template, the label words of every class and, if the data is on the hub, where it is.
It is read from YAML, from a dict or by the name of a bundled task, validated once and never changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import string
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "Answer",
    "DatasetSource",
    "Field",
    "Literal",
    "Segment",
    "Soft",
    "Task",
    "TaskError",
    "Template",
    "bundled_tasks",
    "tasks_folder",
]

MAX_SPEC_BYTES = 1_000_000
MAX_WEIGHT = 1_000_000
TRUNCATE_SIDES = ("tail", "head", "middle")
METRICS = ("accuracy", "macro_f1")


class TaskError(ValueError):
    """A task spec that cannot be used: names the file, the key, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Literal:
    """Text that the template itself contributes."""

    text: str


@dataclasses.dataclass(frozen=True)
class Field:
    """A slot for one of the example's texts."""

    name: str


@dataclasses.dataclass(frozen=True)
class Soft:
    """Soft tokens: `length` of them, or one for each token of `text`; with neither, `prompt_length`."""

    length: int | None = None
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """Where the label word stands."""


Segment = Literal | Field | Soft | Answer


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt as a sequence of typed segments.

    Parameters
    ----------
    segments : tuple of Segment
        In reading order; exactly one `Answer` and at least one `Field`.

    Examples
    --------
    >>> Template.parse("{text} It was {answer}.").fields
    ('text',)
    >>> str(Template.parse("{soft:8} {text} It was {answer}."))
    '{soft:8} {text} It was {answer}.'
    """

    segments: tuple[Segment, ...]

    @classmethod
    def parse(cls, template: str, *, where: str = "template") -> Template:
        """Read a template string; `{{` and `}}` stand for braces.

        Parameters
        ----------
        template : str
            Pieces are `{field}`, `{soft}`, `{soft:8}`, `{soft:some text}` and `{answer}`.
        where : str
            How error messages call the place it came from.

        Raises
        ------
        TaskError
            If a piece is malformed, no field or not exactly one answer is there.
        """
        if not isinstance(template, str):
            raise TaskError(f"{where}: expected a string, got {template!r}; quote it")
        segments: list[Segment] = []
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError as error:
            raise TaskError(
                f"{where}: {template!r} does not parse ({error}); write {{{{ and }}}} for literal braces"
            ) from None
        for literal, name, spec, conversion in pieces:
            if literal and segments and isinstance(segments[-1], Literal):  # a brace was between them
                segments[-1] = Literal(segments[-1].text + literal)
            elif literal:
                segments.append(Literal(literal))
            if name is None:
                continue
            if conversion is not None:
                raise TaskError(f"{where}: {{{name}!{conversion}}} has a conversion; remove '!{conversion}'")
            if name == "soft":
                segments.append(_soft(spec or "", where))
                continue
            if spec:
                raise TaskError(f"{where}: {{{name}:{spec}}}: only {{soft:…}} takes a value after the colon")
            if name == "answer":
                segments.append(Answer())
            elif name.isidentifier():
                segments.append(Field(name))
            else:
                raise TaskError(f"{where}: {{{name}}} is not a field name; use letters, digits and '_', as in {{text}}")
        answers = segments.count(Answer())
        if answers != 1:
            raise TaskError(f"{where}: {template!r} has {answers} {{answer}} pieces; write exactly one")
        if not any(isinstance(s, Field) for s in segments):
            raise TaskError(f"{where}: {template!r} has no field; write {{text}} where the text goes")
        return cls(tuple(segments))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order of first use."""
        return tuple(dict.fromkeys(s.name for s in self.segments if isinstance(s, Field)))

    @property
    def answer_index(self) -> int:
        """Index of the answer among the segments."""
        return self.segments.index(Answer())

    def ending_at_answer(self) -> Template:
        """The same template, cut after its answer: what a causal LM can read."""
        return Template(self.segments[: self.answer_index + 1])

    def __str__(self) -> str:
        return "".join(_spell(segment) for segment in self.segments)


def _soft(spec: str, where: str) -> Soft:
    spec = spec.strip()
    if not spec:
        return Soft()
    if re.fullmatch(r"[0-9]+", spec):
        if not 1 <= int(spec) <= 1000:
            raise TaskError(f"{where}: {{soft:{spec}}}: the number of soft tokens must be from 1 to 1000")
        return Soft(length=int(spec))
    if re.fullmatch(r"[-+]?[0-9.]+", spec):
        raise TaskError(f"{where}: {{soft:{spec}}}: the number of soft tokens must be from 1 to 1000")
    return Soft(text=spec)


def _spell(segment: Segment) -> str:
    match segment:
        case Literal(text):
            return text.replace("{", "{{").replace("}", "}}")
        case Field(name):
            return f"{{{name}}}"
        case Soft(length, text):
            value = text if length is None else str(length)
            return "{soft}" if value is None else f"{{soft:{value}}}"
        case Answer():
            return "{answer}"


@dataclasses.dataclass(frozen=True)
class DatasetSource:
    """Where the task's data is on the hub, in the words of `datasets.load_dataset`."""

    path: str
    fields: Mapping[str, str]
    label: str = "label"
    name: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str = "test"
    validation: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task: a template, and the label words of every class.

    Parameters
    ----------
    task : str
        Its name.
    template : Template
        For masked LMs; for causal ones too if nothing but punctuation follows the answer.
    verbalizer : mapping of str to mapping of str to float
        Class → label word → weight. The order of the classes is the integer order of a hub data set.
        A spec may list the classes alone: then their names are their words, with spaces for underscores.
    template_causal : Template, optional
        The template for causal LMs, whose answer must come last.
    truncate : mapping of str to {"tail", "head", "middle"}
        Which part of a field is cut when the example is too long; "tail" where nothing is said.
    dataset : DatasetSource, optional
    metric : {"accuracy", "macro_f1"}
    version : int
    description : str
    source : str
        The file or name it was read from, for messages.

    Examples
    --------
    >>> task = Task.from_dict({"task": "tone", "template": "{text} It was {answer}.",
    ...                        "verbalizer": {"bad": ["terrible"], "good": ["great"]}})
    >>> task.classes
    ('bad', 'good')
    """

    task: str
    template: Template
    verbalizer: Mapping[str, Mapping[str, float]]
    template_causal: Template | None = None
    truncate: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dataset: DatasetSource | None = None
    metric: str = "accuracy"
    version: int = 1
    description: str = ""
    source: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the spec."""
        return tuple(self.verbalizer)

    @property
    def fields(self) -> tuple[str, ...]:
        """The texts an example has."""
        return self.template.fields

    @property
    def label_words(self) -> list[tuple[str, str, float]]:
        """All (class, word, weight), in the order of the spec."""
        return [(c, w, x) for c, words in self.verbalizer.items() for w, x in words.items()]

    def template_for(self, kind: str) -> Template:
        """The template a masked or causal LM reads.

        Parameters
        ----------
        kind : {"masked", "causal"}

        Raises
        ------
        TaskError
            If a causal LM would have to read words after the answer.
        """
        if kind == "masked":
            return self.template
        template = self.template_causal or self.template
        after = template.segments[template.answer_index + 1 :]
        if any(not isinstance(s, Literal) or re.search(r"\w", s.text) for s in after):
            key = "template_causal" if self.template_causal else "template"
            rest = "".join(map(_spell, after))
            raise TaskError(
                f"{self.source or self.task}: {key}: a causal LM cannot read {rest!r} after {{answer}}; "
                "give a template_causal that ends with {answer}"
            )
        return template.ending_at_answer()

    @classmethod
    def load(cls, spec: str | Path | Mapping[str, Any] | Task) -> Task:
        """A task from a bundled name, the path of a YAML file, a dict, or a `Task` as it is.

        Raises
        ------
        TaskError
            If there is no such task or file, or the spec is wrong.
        """
        if isinstance(spec, Task):
            return spec
        if isinstance(spec, Mapping):
            return cls.from_dict(spec)
        if not isinstance(spec, str | Path):
            raise TaskError(f"a task is a name, a path, a dict or a Task, not {spec!r}")
        path = Path(spec)
        if path.suffix in (".yaml", ".yml"):
            return cls.from_yaml(path)
        bundled = tasks_folder() / f"{spec}.yaml"
        if re.fullmatch(r"[\w-]+", str(spec)) and bundled.is_file():
            return cls.from_yaml(bundled)
        raise TaskError(
            f"no task called {str(spec)!r}; `verbtune tasks` lists the bundled ones, "
            "and a spec of your own is given as a path ending in .yaml"
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Task:
        """Read a spec from a file.

        Raises
        ------
        TaskError
            If the file cannot be read, is no YAML, or the spec is wrong.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TaskError(f"{path}: cannot be read ({error.strerror})") from None
        return cls.from_text(data, source=str(path))

    @classmethod
    def from_text(cls, data: bytes | str, *, source: str) -> Task:
        """Read a spec from the text of a YAML file."""
        if len(data) > MAX_SPEC_BYTES:
            raise TaskError(f"{source}: {len(data)} bytes; a task spec has at most {MAX_SPEC_BYTES}")
        try:
            mapping = yaml.load(data, Loader=_SpecLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise TaskError(f"{source}: not a readable YAML file {_unreadable(error)}") from None
        return cls.from_dict(mapping, source=source)

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any], *, source: str = "task spec") -> Task:
        """Validate a spec given as a dict; the keys are those of the YAML file.

        Raises
        ------
        TaskError
            Naming the key, the value and the remedy.
        """
        if not isinstance(spec, Mapping):
            raise TaskError(f"{source}: expected keys such as task:, template:, verbalizer:, got {spec!r:.80}")
        known = [f.name for f in dataclasses.fields(cls) if f.name != "source"]
        _known_keys(spec, known, source)
        for key in ("task", "template", "verbalizer"):
            if key not in spec:
                raise TaskError(f"{source}: the key {key!r} is missing; add it")
        name = spec["task"]
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise TaskError(f"{source}: task: {name!r} is not a name; use letters, digits, '_' and '-'")
        version = spec.get("version", 1)
        if type(version) is not int or version < 1:
            raise TaskError(f"{source}: version: {version!r} is not a whole number from 1")
        description = spec.get("description", "")
        if not isinstance(description, str):
            raise TaskError(f"{source}: description: {description!r} is not a string; quote it")
        metric = spec.get("metric", "accuracy")
        if metric not in METRICS:
            raise TaskError(f"{source}: metric: {metric!r} is unknown; use one of {', '.join(METRICS)}")
        template = Template.parse(spec["template"], where=f"{source}: template")
        causal = spec.get("template_causal")
        if causal is not None:
            causal = Template.parse(causal, where=f"{source}: template_causal")
            if set(causal.fields) != set(template.fields):
                raise TaskError(
                    f"{source}: template_causal has the fields {', '.join(causal.fields)} but template has "
                    f"{', '.join(template.fields)}; use the same ones in both"
                )
        return cls(
            task=name,
            template=template,
            verbalizer=_verbalizer(spec["verbalizer"], source),
            template_causal=causal,
            truncate=_truncate(spec.get("truncate") or {}, template.fields, source),
            dataset=_dataset(spec.get("dataset"), template.fields, source),
            metric=metric,
            version=version,
            description=description,
            source=source,
        )

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data: `Task.from_dict(task.to_dict()) == task`."""
        plain: dict[str, Any] = {"task": self.task, "version": self.version}
        if self.description:
            plain["description"] = self.description
        plain["template"] = str(self.template)
        if self.template_causal:
            plain["template_causal"] = str(self.template_causal)
        plain["verbalizer"] = {
            name: list(words) if set(words.values()) == {1.0} else dict(words)
            for name, words in self.verbalizer.items()
        }
        if self.truncate:
            plain["truncate"] = dict(self.truncate)
        if self.dataset:
            plain["dataset"] = {k: v for k, v in dataclasses.asdict(self.dataset).items() if v is not None}
        return plain | {"metric": self.metric}

    def to_yaml(self) -> str:
        """The spec as the text of a YAML file."""
        return yaml.dump(self.to_dict(), Dumper=_SpecDumper, sort_keys=False, allow_unicode=True, width=100)


class _SpecDumper(yaml.SafeDumper):
    """Escapes the line breaks that PyYAML would otherwise fold into spaces."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_SpecDumper.add_representer(str, _SpecDumper.represent_str)


class _SpecLoader(yaml.SafeLoader):
    """Plain data only: no aliases (nine lines of them can hold a billion nodes), no repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"the alias *{event.anchor} is not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.YAMLError(f"the key {key!r} is repeated or no plain value")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _unreadable(error: Exception) -> str:
    """What the YAML parser says, in short; unquoted braces at the start of a template are a mapping to it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"({' '.join(str(error).split()) or type(error).__name__})"
    line = error.problem_mark.get_snippet(indent=0, max_length=2 * MAX_SPEC_BYTES) or ""
    remedy = "; put the template in quotes" if line.startswith("template") else ""
    return f"(line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())}){remedy}"


def _known_keys(spec: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TaskError(f"{where}: unknown key {key!r}{hint}; the keys are {', '.join(known)}")


def _verbalizer(spec: Any, source: str) -> dict[str, dict[str, float]]:
    where = f"{source}: verbalizer"
    if isinstance(spec, str) or not isinstance(spec, Mapping | Sequence) or len(spec) < 2:
        raise TaskError(f"{where}: expected at least two classes with their label words, got {spec!r:.80}")
    if isinstance(spec, Mapping):
        classes = list(spec.items())
    else:  # names alone, which are then the label words
        classes = [(name, name.replace("_", " ") if isinstance(name, str) else name) for name in spec]
    verbalizer: dict[str, dict[str, float]] = {}
    for name, words in classes:
        if isinstance(name, str) and name in verbalizer:
            raise TaskError(f"{where}: the class {name!r} is repeated; write it once")
        if not isinstance(name, str):
            raise TaskError(f"{where}: the class {name!r} is not a string; quote it, as in {_yaml_word(name)!r}")
        if not name.strip():
            raise TaskError(f"{where}: the class {name!r} is empty; give it a name")
        if isinstance(words, str):
            words = [words]
        if not isinstance(words, Mapping | Sequence):
            raise TaskError(f"{where}: {name}: expected a list of label words, got {words!r}")
        pairs = list(words.items()) if isinstance(words, Mapping) else [(word, 1.0) for word in words]
        for word, weight in pairs:
            if not isinstance(word, str):
                raise TaskError(
                    f"{where}: {name}: the label word {word!r} is not a string; quote it, as in {_yaml_word(word)!r}"
                )
            if not word.strip():
                raise TaskError(f"{where}: {name}: an empty label word; remove it")
            good = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not good or not 0 < weight <= MAX_WEIGHT:
                raise TaskError(
                    f"{where}: {name}: the weight {weight!r:.40} of {word!r} is no number above 0 (a million at most)"
                )
        if not pairs:
            raise TaskError(f"{where}: {name}: no label words; give at least one")
        verbalizer[name] = {word.strip(): float(weight) for word, weight in pairs}
        if len(verbalizer[name]) < len(pairs):
            raise TaskError(f"{where}: {name}: a label word is repeated in {list(words)}; write it once")
    owner: dict[str, str] = {}
    for name, words in verbalizer.items():
        for word in words:
            if word in owner:
                raise TaskError(
                    f"{where}: the label word {word!r} stands under both {owner[word]!r} and {name!r}; "
                    "a word can belong to one class"
                )
            owner[word] = name
    return verbalizer


def _yaml_word(value: Any) -> str:
    return (
        {True: "yes", False: "no", None: "null"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _truncate(spec: Any, fields: Sequence[str], source: str) -> dict[str, str]:
    where = f"{source}: truncate"
    if not isinstance(spec, Mapping):
        raise TaskError(f"{where}: expected a side for each field, as in {{text: tail}}, got {spec!r}")
    _known_keys(spec, fields, where)
    for name, side in spec.items():
        if side not in TRUNCATE_SIDES:
            raise TaskError(f"{where}: {name}: {side!r} is unknown; use one of {', '.join(TRUNCATE_SIDES)}")
    return dict(spec)


def _dataset(spec: Any, fields: Sequence[str], source: str) -> DatasetSource | None:
    if spec is None:
        return None
    where = f"{source}: dataset"
    if not isinstance(spec, Mapping):
        raise TaskError(f"{where}: expected keys such as path:, fields:, label:, got {spec!r}")
    _known_keys(spec, [f.name for f in dataclasses.fields(DatasetSource)], where)
    columns = spec.get("fields", {name: name for name in fields})
    if not isinstance(columns, Mapping) or set(columns) != set(fields):
        raise TaskError(f"{where}: fields: give a column for each of {', '.join(fields)}, got {columns!r}")
    if "path" not in spec:
        raise TaskError(f"{where}: the key 'path' is missing; give the data set's name on the hub")
    for key, value in (*spec.items(), *columns.items()):
        if key != "fields" and not isinstance(value, str):
            raise TaskError(f"{where}: {key}: {value!r} is not a string; quote it")
    return DatasetSource(**{**spec, "fields": dict(columns)})


def tasks_folder() -> Path:
    """The folder of the bundled specs: inside the installed package, or `tasks/` of a checkout."""
    installed = Path(str(resources.files("verbtune"))) / "tasks"
    return installed if installed.is_dir() else installed.parent.parent / "tasks"


def bundled_tasks() -> Iterator[Task]:
    """The bundled specs, by name."""
    for path in sorted(tasks_folder().glob("*.yaml")):
        yield Task.from_yaml(path)
