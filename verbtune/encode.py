"""Texts become token ids whose every position is known by construction.

A `Layout` is a template compiled for one tokenizer: constant stretches, field slots, one answer. Each
stretch is tokenized on its own, so no token straddles two of them, the answer is never searched for,
and a field that is too long loses tokens of its own and of nothing else. Special tokens are added as
ids; user text is tokenized with `split_special_tokens=True`, so "[MASK]" in a review stays text. The
tokenizer keeps that setting from call to call, so every call here makes the same one: another would
reach into texts that a thread beside it is tokenizing.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from .task import Answer, Field, Literal, Segment, Soft, Task, TaskError

__all__ = ["Example", "Layout", "Row", "compile_layout", "encode", "shorten", "tokenize"]

Row: TypeAlias = Mapping[str, str]

DEMONSTRATION_SEPARATOR = "\n\n"
MIN_FIELD_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class _Constant:
    ids: tuple[int, ...]
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _FieldSlot:
    name: str
    lead: bool
    side: str


@dataclasses.dataclass(frozen=True)
class _AnswerSlot:
    pass


@dataclasses.dataclass(frozen=True)
class Layout:
    """A template compiled for one tokenizer and one kind of LM.

    Attributes
    ----------
    kind : {"masked", "causal"}
    parts : tuple
        Constant stretches, field slots and the answer, in reading order, special tokens included.
    slot_tokens : tuple of int or None
        For each of the P soft slots the token id it starts from, or None if an initialiser decides.
    answer_lead : bool
        Whether a space stands before the answer, which then belongs to the label word.
    max_length : int
        Most positions an example may take.
    """

    kind: str
    parts: tuple[_Constant | _FieldSlot | _AnswerSlot, ...]
    slot_tokens: tuple[int | None, ...]
    answer_lead: bool
    max_length: int

    @property
    def n_constant(self) -> int:
        """Positions that are there whatever the texts are, one for the answer of a masked LM included."""
        fixed = sum(len(p.ids) for p in self.parts if isinstance(p, _Constant))
        return fixed + (self.kind == "masked")

    @property
    def n_prefix(self) -> int:
        """Length of the leading stretch that is the same for every example."""
        length = 0
        for part in self.parts:
            if not isinstance(part, _Constant):
                break
            length += len(part.ids)
        return length

    @property
    def n_soft_prefix(self) -> int | None:
        """P if the prompt is one stretch in the part that all examples start with, else None."""
        slots = [s for p in self.parts if isinstance(p, _Constant) for s in p.slots]
        soft = [i for i, s in enumerate(slots) if s >= 0]
        front = soft and soft == list(range(soft[0], soft[0] + len(soft))) and soft[-1] < self.n_prefix
        return len(soft) if front else None

    @property
    def before_prompt(self) -> tuple[int, ...]:
        """The fixed ids that all examples start with, up to the first soft slot."""
        first = self.parts[0]
        if not isinstance(first, _Constant):
            return ()
        return tuple(
            id for id, _ in itertools.takewhile(lambda pair: pair[1] < 0, zip(first.ids, first.slots, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class Example:
    """One rendered example.

    Attributes
    ----------
    ids : list of int, length T
        Token ids; at a soft slot the id is a filler that is never looked up.
    slots : list of int, length T
        Index of the prompt vector that stands at a position, or -1.
    answer : int
        Position of the mask, or for a causal LM of the last token, whose logits predict the answer.
    texts : tuple of (start, stop)
        Where the fields' texts stand.
    deep : int
        Index of the deep prompt that it is read with, where there are some.
    last : bool
        Whether the texts' tokens are read in the LM's last layer, not at five sixths of its depth.
    """

    ids: list[int]
    slots: list[int]
    answer: int
    texts: tuple[tuple[int, int], ...] = ()
    deep: int = 0
    last: bool = False

    def part(self, start: int, stop: int | None = None) -> Example:
        """The positions from `start` to `stop` as an example; an answer after them moves to the end."""
        ids = self.ids[start:stop]
        stop = start + len(ids)
        texts = ((max(a, start) - start, min(b, stop) - start) for a, b in self.texts)
        return Example(
            ids,
            self.slots[start:stop],
            min(self.answer, stop - 1) - start,
            tuple((a, b) for a, b in texts if a < b),
            self.deep,
            self.last,
        )

    def cropped(self, most: int) -> Example:
        """The example with no more than the first `most` tokens of each of its texts."""
        dropped = {i for start, stop in self.texts for i in range(start + most, stop)}
        kept = [i for i in range(len(self.ids)) if i not in dropped]
        starts = [bisect.bisect_left(kept, start) for start, _ in self.texts]
        texts = tuple((at, at + min(most, stop - start)) for at, (start, stop) in zip(starts, self.texts, strict=True))
        return dataclasses.replace(
            self,
            ids=[self.ids[i] for i in kept],
            slots=[self.slots[i] for i in kept],
            answer=sum(i <= self.answer for i in kept) - 1,
            texts=texts,
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, lead: bool) -> list[list[int]]:
    """Token ids of texts as they stand inside a prompt, without special tokens.

    Parameters
    ----------
    lead : bool
        Whether a space stands before the text; tokenizers that put one there anyway get no second one.
    """
    if not texts:
        return []
    space = " " if lead and not _adds_space(tokenizer) else ""
    encoded = tokenizer(
        [space + text for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.tokenize("a", split_special_tokens=True)
    return bool(tokens) and tokens[0][:1] in ("▁", "Ġ")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True, split_special_tokens=True)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise TaskError(f"the tokenizer {type(tokenizer).__name__} changes 'a' when it adds its special tokens")


def compile_layout(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    *,
    max_length: int,
    soft: bool = False,
    prompt_length: int = 0,
    tune_template: bool = False,
    demonstrations: Sequence[tuple[Row, str]] = (),
) -> Layout:
    """Compile a task's template for a tokenizer.

    Parameters
    ----------
    kind : {"masked", "causal"}
    max_length : int
        Most positions an example may take; must leave room for a few tokens of every field.
    soft : bool, default=False
        Whether there are soft slots at all; without them `{soft}` pieces are left out, except that those
        with a text stand as that text: the manual prompt.
    prompt_length : int, default=0
        Number of soft tokens where the template says `{soft}`, or in front if it has no such piece.
    tune_template : bool, default=False
        Whether the template's own tokens are soft slots too, which start as what they are.
    demonstrations : sequence of (texts, label word)
        Solved examples to put before the template, constant text like any other.

    Raises
    ------
    TaskError
        If the template does not fit the kind of LM, or leaves no room for the text.
    """
    template = task.template_for(kind)
    before, after = _special_ids(tokenizer)
    compiler = _Compiler(tokenizer, task, soft, prompt_length, tune_template)
    compiler.add_ids(before)
    for row, word in demonstrations:
        filled = [Literal(row[s.name].strip()) if isinstance(s, Field) else s for s in template.segments]
        filled = [Literal(word) if isinstance(s, Answer) else s for s in filled if not isinstance(s, Soft)]
        compiler.add(_merge_literals([*filled, Literal(DEMONSTRATION_SEPARATOR)]), fixed=True)
    segments = list(template.segments)
    if not any(isinstance(s, Soft) for s in segments):
        segments.insert(0, Soft())
    compiler.add(segments)
    if kind == "masked":
        compiler.add_ids(after)
    layout = Layout(kind, tuple(compiler.parts), tuple(compiler.slot_tokens), compiler.answer_lead, max_length)
    return shorten(layout, 0, task)


def shorten(layout: Layout, n: int, task: Task) -> Layout:
    """Keep `n` positions free, for the further pieces of label words.

    Raises
    ------
    TaskError
        If that leaves no room for the text.
    """
    shorter = dataclasses.replace(layout, max_length=layout.max_length - n)
    if shorter.max_length - layout.n_constant < MIN_FIELD_TOKENS * len(task.fields):
        words = f" and label words {n}" if n else ""
        raise TaskError(
            f"{task.source or task.task}: template, prompt and demonstrations take {layout.n_constant}{words} of "
            f"{layout.max_length} positions and leave no room for the text; use fewer of them, or a larger max_length"
        )
    return shorter


def _merge_literals(segments: Sequence[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if merged and isinstance(segment, Literal) and isinstance(merged[-1], Literal):
            merged[-1] = Literal(merged[-1].text + segment.text)
        else:
            merged.append(segment)
    return merged


class _Compiler:
    """Collects the parts of a layout; white space at a literal's end moves to what follows it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: Task, soft: bool, prompt_length: int, tune_template: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.soft = soft
        self.prompt_length = prompt_length
        self.tune_template = tune_template
        self.parts: list[_Constant | _FieldSlot | _AnswerSlot] = []
        self.slot_tokens: list[int | None] = []
        self.answer_lead = True
        self.lead = False

    def add(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        for segment in segments:
            match segment:
                case Literal(text):
                    self._add_text(text, soft=self.soft and self.tune_template and not fixed)
                case Soft(text=str(text)) if not self.soft:
                    self._add_text(f" {text} ", soft=False)
                case Soft() if not self.soft:
                    pass
                case Soft(length, None):
                    self._add_soft([None] * (self.prompt_length if length is None else length))
                case Soft(_, text):
                    self._add_soft(list(tokenize(self.tokenizer, [str(text)], lead=True)[0]))
                    self.lead = True  # as where it stands as text
                case Field(name):
                    self.parts.append(_FieldSlot(name, self.lead, self.task.truncate.get(name, "tail")))
                    self.lead = False
                case Answer():
                    self.answer_lead = self.lead
                    self.parts.append(_AnswerSlot())
                    self.lead = False

    def add_ids(self, ids: Sequence[int]) -> None:
        self._constant(ids, [-1] * len(ids))

    def _add_text(self, text: str, *, soft: bool) -> None:
        body = text.strip(" ")
        lead = self.lead or text.startswith(" ")
        self.lead = text.endswith(" ")
        if not body:
            self.lead = lead
            return
        (ids,) = tokenize(self.tokenizer, [body], lead=lead)
        if soft:
            self._add_soft(list(ids))
        else:
            self.add_ids(ids)

    def _add_soft(self, tokens: Sequence[int | None]) -> None:
        first = len(self.slot_tokens)
        self.slot_tokens += tokens
        filler = self.tokenizer.pad_token_id or 0
        self._constant([filler if t is None else t for t in tokens], list(range(first, first + len(tokens))))

    def _constant(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, _Constant):
            self.parts[-1] = _Constant(last.ids + tuple(ids), last.slots + tuple(slots))
        elif ids:
            self.parts.append(_Constant(tuple(ids), tuple(slots)))


def encode(layout: Layout, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Render rows of texts as examples.

    Parameters
    ----------
    layout : Layout
    rows : sequence of mapping
        Field name → text.
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    list of Example
        In the order of the rows, each at most `layout.max_length` positions long.
    """
    slots = [part for part in layout.parts if isinstance(part, _FieldSlot)]
    columns = [tokenize(tokenizer, [row[s.name].strip() for row in rows], lead=s.lead) for s in slots]
    room = layout.max_length - layout.n_constant
    mask = tokenizer.mask_token_id if layout.kind == "masked" else None
    examples = []
    for tokens in zip(*columns, strict=True):
        budgets = _share(room, [len(t) for t in tokens])
        fields = iter([_cut(t, n, s.side) for t, n, s in zip(tokens, budgets, slots, strict=True)])
        ids: list[int] = []
        marks: list[int] = []
        texts: list[tuple[int, int]] = []
        answer = -1
        for part in layout.parts:
            if isinstance(part, _Constant):
                ids += part.ids
                marks += part.slots
            elif isinstance(part, _FieldSlot):
                text = next(fields)
                texts.append((len(ids), len(ids) + len(text)))
                ids += text
                marks += [-1] * len(text)
            elif mask is not None:
                answer = len(ids)
                ids.append(mask)
                marks.append(-1)
        examples.append(Example(ids, marks, len(ids) - 1 if mask is None else answer, tuple(texts)))
    return examples


def _share(room: int, lengths: Sequence[int]) -> list[int]:
    """How many tokens each field may keep: short ones all, long ones equal parts of the rest."""
    budgets = list(lengths)
    left = room
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for rank, i in enumerate(order):
        budgets[i] = min(lengths[i], left // (len(order) - rank))
        left -= budgets[i]
    return budgets


def _cut(tokens: list[int], n: int, side: str) -> list[int]:
    if len(tokens) <= n:
        return tokens
    if side == "head":
        return tokens[-n:]
    if side == "middle":
        return tokens[: n - n // 2] + tokens[len(tokens) - n // 2 :]
    return tokens[:n]
