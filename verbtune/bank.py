"""Many tasks on one frozen LM, asked in one pass.

A task's own part is small: a prompt, label words, and what makes classes of them. So the prompts of the
tasks in a batch are stacked to one table, their label words become one list, and every example's
scores are read by its own task. What several examples start with, a task's prompt or a text that
many tasks are asked about, a causal LM reads once.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from .backbone import Backbone
from .batch import by_length
from .calibration import Calibration
from .classifier import PromptClassifier
from .compiled import CompiledTask
from .data import DataError, check_row, check_rows
from .deep import SecondOpinion
from .encode import Example, Row
from .loading import BackboneError
from .rejection import least_confidence, most_probable
from .task import TaskError
from .verbalizer import LabelWords, Verbalizer

__all__ = ["TaskBank"]

Probabilities = NDArray[np.float64]
_Heard: TypeAlias = tuple[Tensor, Tensor]  # word scores (N, W) and states (N, S)


@dataclasses.dataclass(frozen=True)
class _Served:
    """What the bank keeps of a classifier; fitting that one again changes nothing here."""

    classes: NDArray[Any]  # (C,)
    compiled: CompiledTask
    prompt: Tensor | None  # (P, H)
    verbalizer: Verbalizer
    calibration: Calibration
    fields: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]  # of the W label words, as far as they are read
    second: SecondOpinion | None

    def probabilities(self, first: _Heard, second: Sequence[_Heard]) -> Probabilities:
        """Class probabilities (N, C) of what the LM says of N texts, and says behind each deep prompt."""
        scores: NDArray[np.float64] = self.verbalizer(*first).double().cpu().numpy()  # (N, C)
        if self.second is not None:
            scores = scores + self.second.scores(self.verbalizer, second)
        return self.calibration.probabilities(scores)


_Answer: TypeAlias = tuple[_Served, Probabilities, float | None]


class TaskBank:
    """Fitted classifiers that share one frozen LM and answer in mixed batches.

    Tasks come and go while other threads predict: a call answers with the tasks that were there when it began.
    Its answers are those of the classifiers by themselves.

    Parameters
    ----------
    model : str, Path or Backbone, default="builtin/masked"
        The LM that all of the classifiers were fitted on.
    device : str, optional
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"

    Attributes
    ----------
    backbone : Backbone

    Examples
    --------
    >>> clf = PromptClassifier("sentiment").fit(["Great, I love it.", "It broke at once."], ["positive", "negative"])
    >>> bank = TaskBank()
    >>> bank.add("mood", clf)
    >>> bank.predict([("mood", "Great, I love it.")])
    ['positive']
    """

    def __init__(
        self, model: str | Path | Backbone = "builtin/masked", *, device: str | None = None, dtype: str = "auto"
    ) -> None:
        self.backbone = Backbone.load(model, device=device, dtype=dtype)
        # Never changed, only replaced, so that a call may go on with the one that it began with.
        self._tasks: dict[str, _Served] = {}
        self._replacing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_replacing"}  # locks stay here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._replacing = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The tasks' names, in the order in which they came."""
        return list(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, name: str, classifier: PromptClassifier | str | Path) -> None:
        """Serve a task from now on, in place of an earlier one of that name.

        Parameters
        ----------
        name : str
        classifier : PromptClassifier, str or Path
            One that is fitted, or the folder of a saved one.

        Raises
        ------
        BackboneError
            If it was fitted on another LM.
        ArtifactError
            If the folder is incomplete or damaged, or its classifier was trained on another LM.
        """
        if not isinstance(name, str) or not name:
            raise TaskError(f"a task in a bank has a name, not {name!r:.60}; give a str that is not empty")
        if isinstance(classifier, str | Path):
            classifier = PromptClassifier.from_pretrained(classifier, model=self.backbone)
        if not isinstance(classifier, PromptClassifier):
            raise TypeError(
                f"{name}: got {type(classifier).__name__}; give a fitted PromptClassifier or the folder of a saved one"
            )
        served = _serve(classifier, self.backbone, name)
        with self._replacing:
            self._tasks = {**self._tasks, name: served}

    def remove(self, name: str) -> None:
        """Serve a task no longer; calls that began with it go on with it.

        Raises
        ------
        TaskError
            If there is no task of that name.
        """
        with self._replacing:
            if name not in self._tasks:
                raise TaskError(_unknown(name, self._tasks))
            self._tasks = {other: served for other, served in self._tasks.items() if other != name}

    def predict_proba(self, pairs: Iterable[tuple[str, Any]]) -> list[Probabilities]:
        """Class probabilities for texts, each by the task it comes with.

        Parameters
        ----------
        pairs : iterable of (name, text)
            Of any tasks in any order; for a task of several fields the text is a dict.

        Returns
        -------
        list of ndarray of shape (C,)
            In the order of the pairs; C are the classes of the pair's own task.

        Raises
        ------
        TaskError
            If there is no task of a name.
        DataError
            Naming row and task, and what is wrong with the text.
        """
        return [found for _, found, _ in self._ask(pairs)]

    def predict(self, pairs: Iterable[tuple[str, Any]], *, reject_at: float | None = None) -> list[Any]:
        """The most probable class for each (name, text), or `None` where it is too unsure.

        Parameters
        ----------
        pairs : iterable of (name, text)
            See `predict_proba`.
        reject_at : float, optional
            The part of a task's answers that may be wrong; see `PromptClassifier.rejection_threshold`.
        """
        answers = self._ask(pairs, reject_at)
        return [most_probable(served.classes, found[None], least).tolist()[0] for served, found, least in answers]

    def predict_proba_all(self, texts: Any) -> dict[str, Probabilities]:
        """Class probabilities of every task for every text.

        Parameters
        ----------
        texts : list, ndarray or Series of str of length N; list of dict or DataFrame
            With every field that any of the tasks reads.

        Returns
        -------
        dict of str to ndarray of shape (N, C)
            The columns follow the task's own classes.

        Raises
        ------
        DataError
            Naming task and row, and what is wrong with the text.
        """
        return {name: found for name, (_, found, _) in self._ask_all(texts).items()}

    def predict_all(self, texts: Any, *, reject_at: float | None = None) -> dict[str, NDArray[Any]]:
        """The most probable class of every task for every text, as arrays (N,), or `None` where it is too unsure.

        See `predict_proba_all` for the texts and `predict` for `reject_at`.
        """
        answers = self._ask_all(texts, reject_at)
        return {name: most_probable(served.classes, found, least) for name, (served, found, least) in answers.items()}

    def _ask(self, pairs: Iterable[tuple[str, Any]], reject_at: float | None = None) -> list[_Answer]:
        """Task, class probabilities (C,) and the confidence that is wanted, of every pair."""
        tasks = self._tasks
        if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Iterable):
            raise DataError(f"expected a list of (task, text), got {type(pairs).__name__}; put pairs in a list")
        rows: list[Row] = []
        places: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(f"row {i}: {pair!r:.60} is no pair; give (task, text)")
            name, text = pair
            if not isinstance(name, str) or name not in tasks:
                raise TaskError(f"row {i}: {_unknown(name, tasks)}")
            rows.append(check_row(text, tasks[name].fields, f"row {i}: task {name!r}"))
            places.setdefault(name, []).append(i)
        least: dict[str, float | None] = dict.fromkeys(places)
        if reject_at is not None:
            for name in places:
                least[name] = least_confidence(tasks[name].calibration, reject_at, f"task {name!r}: ")
        found = _probabilities(self.backbone, [(tasks[name], [rows[i] for i in at]) for name, at in places.items()])
        answers = {
            i: (tasks[name], row, least[name])
            for (name, at), each in zip(places.items(), found, strict=True)
            for i, row in zip(at, each, strict=True)
        }
        return [answers[i] for i in range(len(rows))]

    def _ask_all(self, texts: Any, reject_at: float | None = None) -> dict[str, _Answer]:
        """Every task, its class probabilities (N, C) and the confidence that is wanted."""
        tasks = self._tasks
        if isinstance(texts, Iterator):
            texts = list(texts)
        empty = isinstance(texts, Sized) and not len(texts)
        asked: list[tuple[_Served, list[Row]]] = []
        least: dict[str, float | None] = dict.fromkeys(tasks)
        for name, served in tasks.items():
            if reject_at is not None:
                least[name] = least_confidence(served.calibration, reject_at, f"task {name!r}: ")
            try:
                asked.append((served, [] if empty else check_rows(texts, served.fields)))
            except DataError as error:
                raise DataError(f"task {name!r}: {error}") from None
        found = _probabilities(self.backbone, asked)
        return {name: (tasks[name], each, least[name]) for name, each in zip(tasks, found, strict=True)}


def _unknown(name: object, tasks: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), tasks, n=3)
    hint = f"; near to it: {', '.join(near)}" if near else ""
    remedy = "give one of bank.names" if tasks else "add it first"
    return f"no task called {name!r:.60}{hint}; the bank has {len(tasks)}; {remedy}"


def _serve(clf: PromptClassifier, backbone: Backbone, name: str) -> _Served:
    check_is_fitted(clf)
    own = clf.compiled_.backbone
    if own is not backbone and own.fingerprint != backbone.fingerprint:
        raise BackboneError(
            f"{name}: fitted on {own} ({own.fingerprint[:12]}…), but this bank's LM is {backbone} "
            f"({backbone.fingerprint[:12]}…); give the bank and its classifiers one model="
        )
    verbalizer = clf.verbalizer_.settled().to(backbone.device)
    pieces = clf.compiled_.words.pieces
    if not verbalizer.hears_words:
        # Only the states are read.
        n = clf.compiled_.for_states.words.longest
        pieces = tuple(word[:n] for word in pieces)
    return _Served(
        classes=clf.classes_,
        compiled=dataclasses.replace(clf.compiled_, backbone=backbone),
        prompt=None if clf.prompt_ is None else clf.prompt_.to(backbone.device),
        verbalizer=verbalizer,
        calibration=clf.calibration_,
        fields=clf.task_.fields,
        pieces=pieces,
        second=clf.second_opinion_,
    )


@dataclasses.dataclass(frozen=True)
class _Alike:
    """Examples, as indices, of which the first positions are the same."""

    index: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Positions that need not be read again."""
        return (len(self.index) - 1) * self.length


def _probabilities(backbone: Backbone, asked: Sequence[tuple[_Served, list[Row]]]) -> list[Probabilities]:
    """Class probabilities (N, C) for the rows of each task."""
    first = _heard(backbone, [(served.compiled, served.pieces, served.prompt, rows) for served, rows in asked], None)
    seconds: list[list[_Heard]] = [[] for _ in asked]
    by_shape: dict[torch.Size, list[tuple[int, Tensor, CompiledTask]]] = {}
    for i, (served, _) in enumerate(asked):
        if served.second is not None:
            for deep, compiled in served.second.asked(served.compiled):
                by_shape.setdefault(deep.shape, []).append((i, deep, compiled))
    for alike in by_shape.values():
        parts = [(compiled, compiled.words.pieces, None, asked[i][1]) for i, _, compiled in alike]
        deep = torch.cat([one for _, one, _ in alike]).to(backbone.device)
        for (i, *_), heard in zip(alike, _heard(backbone, parts, deep), strict=True):
            seconds[i].append(heard)
    return [served.probabilities(first[i], seconds[i]) for i, (served, _) in enumerate(asked)]


def _heard(
    backbone: Backbone,
    asked: Sequence[tuple[CompiledTask, tuple[tuple[int, ...], ...], Tensor | None, list[Row]]],
    deep: Tensor | None,
) -> list[_Heard]:
    """What the LM says of each task's rows.

    Parameters
    ----------
    asked : sequence of (task, label words' pieces, soft prompt (P, H) or None, rows), length K
    deep : Tensor of shape (K, L, 2, A, D + 2, E), optional
        The tasks' deep prompts.
    """
    examples: list[Example] = []
    by_task: list[list[int]] = []
    by_text: dict[tuple[bool, *tuple[str, ...]], list[int]] = {}
    prompts: list[Tensor] = []
    n_slots = 0
    lots: dict[Hashable, dict[tuple[int, ...], int]] = {}  # words that are scored together, and their columns
    keys: list[Hashable] = []
    for number, (compiled, pieces, prompt, rows) in enumerate(asked):
        index = list(range(len(examples), len(examples) + len(rows)))
        by_task.append(index)
        for i, row in zip(index, rows, strict=True):
            by_text.setdefault((compiled.last, *row.values()), []).append(i)
        examples += [_moved(example, n_slots, 0 if deep is None else number) for example in compiled.encode(rows)]
        if prompt is not None:
            prompts.append(prompt)
            n_slots += len(prompt)
        keys.append(_lot(backbone, pieces, number))
        columns = lots.setdefault(keys[-1], {})
        for word in pieces:
            columns.setdefault(word, len(columns))
    if not examples:
        return [(torch.empty(0, len(pieces)), torch.empty(0, backbone.state_width)) for _, pieces, *_ in asked]
    alike: list[_Alike] = []
    if backbone.kind == "causal":
        choices = (_alike(examples, groups) for groups in (by_task, by_text.values()))
        alike = max(choices, key=lambda groups: sum(group.saved for group in groups))
    scores, states = _infer(
        backbone,
        examples,
        [key for key, index in zip(keys, by_task, strict=True) for _ in index],
        {key: _words(columns) for key, columns in lots.items()},
        torch.cat(prompts) if prompts else None,  # (ΣP, H)
        deep,
        alike,
    )
    scores, states = scores.to(backbone.device), states.to(backbone.device)  # (N, W), (N, S)
    return [
        (scores[index][:, [lots[key][word] for word in pieces]], states[index])
        for (_, pieces, *_), key, index in zip(asked, keys, by_task, strict=True)
    ]


def _lot(backbone: Backbone, pieces: tuple[tuple[int, ...], ...], number: int) -> Hashable:
    """What tasks have in common whose label words are scored together at no further cost.

    A masked LM makes a pass for each number of pieces. A causal one goes on from every example with every word of
    several pieces, so a task with such words stays alone.
    """
    lengths = frozenset(map(len, pieces))
    alone = backbone.kind == "causal" and max(lengths) > 1
    return lengths, number if alone else None


def _words(pieces: Iterable[tuple[int, ...]]) -> LabelWords:
    """Words of which nothing but the pieces counts."""
    every = tuple(pieces)
    return LabelWords(("",), ("",) * len(every), every, (0,) * len(every), (1.0,) * len(every))


def _moved(example: Example, n_slots: int, deep: int) -> Example:
    """An example of the deep prompt of that number, whose soft slots count from `n_slots`."""
    slots = [slot if slot < 0 else slot + n_slots for slot in example.slots]
    return dataclasses.replace(example, slots=slots, deep=deep)


def _alike(examples: Sequence[Example], groups: Iterable[list[int]]) -> list[_Alike]:
    """Those of the groups that start alike, and for how long."""
    found = [_Alike(index, _common([examples[i] for i in index])) for index in groups if len(index) > 1]
    return [group for group in found if group.length > 0]


def _common(examples: Sequence[Example]) -> int:
    """How many positions all examples start with, at most up to the answer."""
    first, *others = examples
    return min(_shared(first, other) for other in others)


def _shared(one: Example, other: Example) -> int:
    # Of two prompts that start with the same tokens these may be text in one only: `part` knows of that too.
    lengths = range(1, min(one.answer, other.answer) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: one.part(0, n) != other.part(0, n))


def _infer(
    backbone: Backbone,
    examples: Sequence[Example],
    lots: Sequence[Hashable],
    words: Mapping[Hashable, LabelWords],
    prompt: Tensor | None,
    deep: Tensor | None,
    alike: Sequence[_Alike],
) -> tuple[Tensor, Tensor]:
    """`Backbone.infer` of examples that have different words and may start alike.

    Parameters
    ----------
    lots : sequence of length N
        The key of each example's words.
    words : mapping
    alike : sequence of _Alike
        Groups that share no example.

    Returns
    -------
    scores : Tensor of shape (N, W)
        In the first columns those of the example's own words.
    states : Tensor of shape (N, S)
    """
    scores = torch.zeros(len(examples), max(len(each.words) for each in words.values()))
    states = torch.empty(len(examples), backbone.state_width)
    rest = set(range(len(examples)))

    def by_lot(index: Iterable[int]) -> Iterator[tuple[LabelWords, list[int]]]:
        found: dict[Hashable, list[int]] = {}
        for i in index:
            found.setdefault(lots[i], []).append(i)
        return ((words[key], members) for key, members in found.items())

    with torch.inference_mode():
        for chunk in by_length([group.length for group in alike], backbone.device):
            groups = [alike[g] for g in chunk]
            row = {i: r for r, group in enumerate(groups) for i in group.index}
            # What does not fit in memory is left to `infer`, which halves its batches.
            with contextlib.suppress(torch.OutOfMemoryError):
                start = backbone.encode_start(
                    [examples[g.index[0]] for g in groups], [g.length for g in groups], prompt, deep=deep
                )
                assert start is not None
                for lot, index in by_lot(row):
                    for batch in by_length([len(examples[i].ids) for i in index], backbone.device):
                        here = [index[j] for j in batch]
                        onward = start.select([row[i] for i in here])
                        found = backbone.word_scores([examples[i] for i in here], lot, prompt, deep=deep, start=onward)
                        scores[here, : len(lot.words)], states[here] = (t.cpu() for t in found)
                        rest.difference_update(here)
        for lot, index in by_lot(sorted(rest)):
            found = backbone.infer([examples[i] for i in index], lot, prompt, deep=deep)
            scores[index, : len(lot.words)], states[index] = found
    return scores, states
