"""The linter: what would go wrong with a task spec, found before anything is trained."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal as OneOf

from transformers import PreTrainedTokenizerBase

from .backbone import Backbone
from .encode import MIN_FIELD_TOKENS, Layout, Row, compile_layout, tokenize
from .task import Answer, Field, Literal, Segment, Soft, Task, TaskError, Template

__all__ = ["Problem", "lint", "spell"]

ROOM_PER_FIELD = 32  # fewer tokens than this hold less than a sentence or two
PIECES_APART = 2  # classes whose words differ by so many pieces start far apart
ROWS_READ = 1000
EXAMPLES_NAMED = 3
UNSPACED_SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a spec.

    Attributes
    ----------
    level : {"error", "warning"}
        An error cannot be trained or scored; a warning can, but hardly as meant.
    message : str
        The key, the value and the remedy.
    """

    level: OneOf["error", "warning"]
    message: str


def lint(
    task: Task,
    backbone: Backbone | None = None,
    *,
    rows: Sequence[Row] = (),
    labels: Sequence[str] = (),
    max_length: int | None = None,
    soft: bool = True,
    prompt_length: int = 0,
) -> list[Problem]:
    """Find what is wrong with a task: by itself, on a language model, and on data.

    Parameters
    ----------
    task : Task
    backbone : Backbone, optional
        The LM to read it with, of which only the tokenizer and the sizes are used, so that it may have been loaded
        with `weights=False`; without one only the spec and the labels are looked at.
    rows : sequence of mapping, optional
        Texts, to see how many are too long for the LM; the first thousand are looked at.
    labels : sequence of str, optional
        Labels of the data, to compare with the spec's classes.
    max_length, prompt_length : int
        As of `PromptClassifier`.
    soft : bool, default=True
        Whether soft tokens take room, as with `steps=` of `PromptClassifier`; by default it has none.

    Returns
    -------
    list of Problem
        Errors first.

    Examples
    --------
    >>> task = Task.from_dict({"task": "tone", "template": "{text} It was{answer}.",
    ...                        "verbalizer": {"bad": ["terrible"], "good": ["great"]}})
    >>> [problem.level for problem in lint(task)]
    ['warning']
    """
    problems = [*_spacing(task), *_coverage(task, labels)]
    if backbone is not None:
        try:
            problems += _on_model(task, backbone, rows, max_length, soft, prompt_length)
        except TaskError as error:
            problems.append(Problem("error", str(error).removeprefix(f"{task.source or task.task}: ")))
    return sorted(problems, key=lambda problem: problem.level)


def spell(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as people read them: a space is `▁`, and bytes are letters where they are whole ones.

    Examples
    --------
    >>> spell(Backbone.load("builtin/causal").tokenizer, [])
    []
    """
    spelled = []
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = str(tokenizer.decode([i]))
        if token.startswith("▁") or not text or "\ufffd" in text:
            text = token
        spelled.append(text.replace(" ", "▁").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r"))
    return spelled


def _spacing(task: Task) -> Iterator[Problem]:
    """Words that touch a text or the answer, where people would write a space."""
    for key, template in (("template", task.template), ("template_causal", task.template_causal)):
        for left, right in itertools.pairwise(_visible(template) if template else []):
            match left, right:
                case Literal(text), Field() | Answer() if _needs_space(text[-1], ":.,;?!"):
                    before, after = text.split()[-1], _slot(right)
                case Field() | Answer(), Literal(text) if _needs_space(text[0], ""):
                    before, after = _slot(left), text.split()[0]
                case Field() | Answer(), Field() | Answer():
                    before, after = _slot(left), _slot(right)
                case _:
                    continue
            yield Problem(
                "warning",
                f"{key}: no space between {before!r} and {after!r}, so their words are glued together; "
                f"write '{before} {after}'",
            )


def _visible(template: Template) -> list[Segment]:
    """Keep the segments that are text: soft tokens without a text stand between words unseen."""
    spelled = [Literal(f" {s.text} ") if isinstance(s, Soft) and s.text else s for s in template.segments]
    return [s for s in spelled if not isinstance(s, Soft)]


def _needs_space(character: str, marks: str) -> bool:
    if unicodedata.name(character, "").partition(" ")[0] in UNSPACED_SCRIPTS:
        return False
    return character.isalnum() or character in marks


def _slot(segment: Segment) -> str:
    return f"{{{segment.name}}}" if isinstance(segment, Field) else "{answer}"


def _coverage(task: Task, labels: Sequence[str]) -> Iterator[Problem]:
    """Classes that only the data or only the spec has."""
    counts = Counter(labels)
    unknown = [f"{name!r} ({n} rows)" for name, n in counts.items() if name not in task.classes]
    if unknown:
        yield Problem(
            "error",
            f"verbalizer: the data has classes that the spec lacks: {_some(unknown)}; "
            f"add them, or correct the labels to {_some(list(task.classes))}",
        )
    absent = [repr(name) for name in task.classes if labels and name not in counts]
    if absent:
        yield Problem(
            "warning", f"verbalizer: the data has no rows of {_some(absent)}; what is trained on it never answers so"
        )


@dataclasses.dataclass(frozen=True)
class _Word:
    owner: str
    word: str
    ids: tuple[int, ...]


def _on_model(
    task: Task, backbone: Backbone, rows: Sequence[Row], max_length: int | None, soft: bool, prompt_length: int
) -> Iterator[Problem]:
    """Find what only shows in the tokens of one language model."""
    tokenizer = backbone.tokenizer
    layout = compile_layout(
        task, tokenizer, backbone.kind, max_length=sys.maxsize, soft=soft, prompt_length=prompt_length
    )
    pieces = tokenize(tokenizer, [word for _, word, _ in task.label_words], lead=layout.answer_lead)
    words = []
    for (name, word, _), ids in zip(task.label_words, pieces, strict=True):
        if not ids or _unknown(tokenizer, ids):
            yield Problem("error", f"verbalizer: {name}: the tokenizer does not know {word!r}; use another word")
        else:
            words.append(_Word(name, word, tuple(ids)))
    if words:
        yield from _words(words, backbone)
        yield from _room(task, layout, backbone, max(len(w.ids) for w in words), rows, max_length)
    yield from _template(task, layout, backbone)


def _words(words: Sequence[_Word], backbone: Backbone) -> Iterator[Problem]:
    """Label words that split, or that are more alike in tokens than in letters."""
    split = [f"{w.word!r} ({_joined(backbone, w.ids)})" for w in words if len(w.ids) > 1]
    if split:
        yield Problem(
            "warning",
            f"verbalizer: several tokens for {len(split)} of {len(words)} label words: {_some(split)}; they are scored "
            "whole, which is exact but slower than with words of one token",
        )
    for short, long in itertools.combinations(sorted(words, key=lambda w: len(w.ids)), 2):
        if short.owner == long.owner or long.ids[: len(short.ids)] != short.ids:
            continue
        if short.ids == long.ids:
            yield Problem(
                "error",
                f"verbalizer: {short.word!r} ({short.owner}) and {long.word!r} ({long.owner}) are the same tokens; "
                "choose words that differ",
            )
        elif backbone.kind == "causal":
            yield Problem(
                "warning",
                f"verbalizer: {long.word!r} goes on where {short.word!r} ends, so a causal LM never scores it higher; "
                "choose words that part earlier",
            )
    starts: dict[int, list[_Word]] = {}
    for word in words:
        starts.setdefault(word.ids[0], []).append(word)
    shared = [
        f"{_joined(backbone, [first])!r} ({_some([repr(w.word) for w in group])})"
        for first, group in starts.items()
        if len({w.owner for w in group}) > 1
    ]
    if shared:
        yield Problem(
            "warning",
            f"verbalizer: words of different classes start with the same token: {_some(shared)}; "
            "with multi_token='first' they cannot be told apart",
        )
    lengths: dict[str, list[int]] = {}
    for word in words:
        lengths.setdefault(word.owner, []).append(len(word.ids))
    means = {name: sum(numbers) / len(numbers) for name, numbers in lengths.items()}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if means[most] - means[least] >= PIECES_APART:
        yield Problem(
            "warning",
            f"verbalizer: words differ in tokens, from {means[least]:.3g} for {least!r} to {means[most]:.3g} for "
            f"{most!r}; scores are sums over tokens and favour {least!r} until calibrated or tuned",
        )


def _template(task: Task, layout: Layout, backbone: Backbone) -> Iterator[Problem]:
    """Template text that the tokenizer does not know, or cuts otherwise next to a label word."""
    tokenizer = backbone.tokenizer
    template = task.template_for(backbone.kind)
    key = "template_causal" if backbone.kind == "causal" and task.template_causal else "template"
    for segment in template.segments:
        if isinstance(segment, Literal):
            (ids,) = tokenize(tokenizer, [segment.text.strip(" ")], lead=segment.text.startswith(" "))
            if _unknown(tokenizer, ids):
                yield Problem(
                    "warning", f"{key}: the tokenizer does not know all of {segment.text.strip()!r}; rephrase it"
                )
    before = template.segments[template.answer_index - 1] if template.answer_index else None
    if not isinstance(before, Literal) or not before.text.strip() or not layout.answer_lead:
        return
    lead, body, word = before.text.startswith(" "), before.text.strip(" "), task.label_words[0][1]
    (context,), (answer,) = tokenize(tokenizer, [body], lead=lead), tokenize(tokenizer, [word], lead=True)
    (together,) = tokenize(tokenizer, [f"{body} {word}"], lead=lead)
    apart = context + answer
    if together != apart:
        same = next(i for i, (one, other) in enumerate(itertools.zip_longest(together, apart)) if one != other)
        yield Problem(
            "warning",
            f"{key}: this tokenizer cuts '…{body.split()[-1]} {word}' as {_joined(backbone, together[same:])} in "
            f"running text but as {_joined(backbone, apart[same:])} around {{answer}}; expect poor scores",
        )


def _room(
    task: Task, layout: Layout, backbone: Backbone, longest: int, rows: Sequence[Row], max_length: int | None
) -> Iterator[Problem]:
    """Too few tokens left for the texts; the answer itself is never cut off."""
    limit = backbone.most_positions(max_length)
    room = limit - layout.n_constant - (longest - 1)
    if room < ROOM_PER_FIELD * len(task.fields):
        level: OneOf["error", "warning"] = "error" if room < MIN_FIELD_TOKENS * len(task.fields) else "warning"
        yield Problem(
            level,
            f"template, soft tokens and label words take {limit - room} of {limit} tokens and leave {max(room, 0)} for "
            f"the text; shorten them, or use a language model that reads more",
        )
        return
    sample = rows[:ROWS_READ]
    fields = [s.name for s in task.template_for(backbone.kind).segments if isinstance(s, Field)]
    columns = [tokenize(backbone.tokenizer, [row[name].strip() for row in sample], lead=False) for name in fields]
    long = sum(sum(map(len, texts)) > room for texts in zip(*columns, strict=True))
    if long:
        sides = ", ".join(f"{name}: {task.truncate.get(name, 'tail')}" for name in task.fields)
        yield Problem(
            "warning",
            f"{long} of {len(sample)} texts are longer than the {room} tokens that the template leaves; "
            f"they are cut (truncate: {{{sides}}})",
        )


def _some(items: Sequence[str]) -> str:
    more = len(items) - EXAMPLES_NAMED
    return ", ".join(items[:EXAMPLES_NAMED]) + (f" and {more} more" if more > 0 else "")


def _unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids


def _joined(backbone: Backbone, ids: Sequence[int]) -> str:
    return "|".join(spell(backbone.tokenizer, ids))
