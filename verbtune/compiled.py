"""A task compiled for a backbone: everything that is the same for every text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from .backbone import Backbone
from .encode import Example, Layout, Row, compile_layout, encode, shorten
from .task import Task
from .verbalizer import LabelWords, compile_words

__all__ = ["CompiledTask", "compile_task"]


@dataclasses.dataclass(frozen=True)
class CompiledTask:
    """A layout and label words, with the backbone that they are ids of.

    Attributes
    ----------
    backbone : Backbone
    layout : Layout
    words : LabelWords
    last : bool
        Whether texts are read in the LM's last layer, not at five sixths of its depth.
    """

    backbone: Backbone
    layout: Layout
    words: LabelWords
    last: bool = False

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Rows of texts as examples."""
        examples = encode(self.layout, rows, self.backbone.tokenizer)
        return [dataclasses.replace(example, last=self.last) for example in examples]

    def infer(
        self, rows: Sequence[Row], prompt: Tensor | None = None, *, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Word scores (N, W) and states (N, S) of rows of texts, without gradients."""
        return self.backbone.infer(self.encode(rows), self.words, prompt, deep=deep, n_prefix=self.layout.n_prefix)

    @property
    def by_beginnings(self) -> CompiledTask:
        """The same, but that the label words are heard by their beginnings."""
        return dataclasses.replace(self, words=self.words.beginnings)

    @property
    def for_states(self) -> CompiledTask:
        """The same with a single word, whose states, in one pass, are those that come with all of the words.

        A masked LM sees as many masks as the shortest words have pieces.
        """
        n = 1 if self.backbone.kind == "causal" else min(map(len, self.words.pieces))
        one = (self.words.pieces[0][:n],)
        words = dataclasses.replace(self.words, words=self.words.words[:1], pieces=one, owner=(0,), weights=(1.0,))
        return dataclasses.replace(self, words=words)


def compile_task(
    task: Task,
    backbone: Backbone,
    *,
    classes: Sequence[str] | None = None,
    multi_token: str = "exact",
    max_length: int | None = None,
    soft: bool = False,
    prompt_length: int = 0,
    tune_template: bool = False,
    demonstrations: Sequence[tuple[Row, str]] = (),
) -> CompiledTask:
    """Compile a task for a backbone.

    Parameters
    ----------
    classes : sequence of str, optional
        The classes wanted, in the order of the scores; default: all, sorted.
    multi_token : {"exact", "first", "refuse"}
        See `compile_words`.
    max_length : int, optional
        Most positions an example may take, at most what the backbone can read.
    soft, prompt_length, tune_template, demonstrations
        See `compile_layout`.

    Raises
    ------
    TaskError
        If template or label words do not fit the backbone.
    """
    layout = compile_layout(
        task,
        backbone.tokenizer,
        backbone.kind,
        max_length=backbone.most_positions(max_length),
        soft=soft,
        prompt_length=prompt_length,
        tune_template=tune_template,
        demonstrations=demonstrations,
    )
    words = compile_words(task, backbone.tokenizer, lead=layout.answer_lead, classes=classes, multi_token=multi_token)
    return CompiledTask(backbone, shorten(layout, words.longest - 1, task), words)
