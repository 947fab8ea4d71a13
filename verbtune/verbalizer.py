"""Label words: from words to token pieces, and from word scores to class scores."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .encode import tokenize
from .task import Task, TaskError

__all__ = ["AGGREGATIONS", "MULTI_TOKEN", "LabelWords", "Verbalizer", "compile_words"]

AGGREGATIONS = ("mean", "max", "logsumexp")
MULTI_TOKEN = ("exact", "first", "refuse")


@dataclasses.dataclass(frozen=True)
class LabelWords:
    """The label words of a task as token pieces.

    Attributes
    ----------
    classes : tuple of str
        The C classes, in the order of the scores.
    words : tuple of str
        The W label words.
    pieces : tuple of tuple of int
        Token ids of every word.
    owner : tuple of int
        Index of the class that each word speaks for.
    weights : tuple of float
    """

    classes: tuple[str, ...]
    words: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    owner: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def longest(self) -> int:
        """Pieces of the longest word."""
        return max(map(len, self.pieces))

    @property
    def beginnings(self) -> LabelWords:
        """The words by the first piece at which they leave those of other classes, which takes one pass.

        The words themselves where two classes come to the same piece.
        """
        come: dict[tuple[int, ...], set[int]] = defaultdict(set)  # the classes that come to each beginning
        for pieces, owner in zip(self.pieces, self.owner, strict=True):
            for n in range(1, len(pieces) + 1):
                come[pieces[:n]].add(owner)
        first = tuple(
            (next((piece for n, piece in enumerate(p, start=1) if len(come[p[:n]]) == 1), p[-1]),) for p in self.pieces
        )
        apart = len(set(first)) == len(set(zip(first, self.owner, strict=True)))
        return dataclasses.replace(self, pieces=first) if apart else self


def compile_words(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lead: bool,
    classes: Sequence[str] | None = None,
    multi_token: str = "exact",
) -> LabelWords:
    """Tokenize the label words as they stand in the template.

    Parameters
    ----------
    lead : bool
        Whether a space stands before the answer.
    classes : sequence of str, optional
        The classes wanted, in the order of the scores; default: all, sorted.
    multi_token : {"exact", "first", "refuse"}, default="exact"
        What becomes of a word of several pieces: scored as a whole, by its first piece only, or refused.

    Raises
    ------
    TaskError
        If a word has no tokens or unknown ones, two classes share a word's pieces, or a word splits
        where that is refused.
    """
    where = task.source or task.task
    if multi_token not in MULTI_TOKEN:
        raise ValueError(f"multi_token={multi_token!r} is unknown; use one of {', '.join(MULTI_TOKEN)}")
    classes = tuple(sorted(task.classes) if classes is None else classes)
    entries = [entry for entry in task.label_words if entry[0] in classes]
    pieces = [tuple(p) for p in tokenize(tokenizer, [word for _, word, _ in entries], lead=lead)]
    if multi_token == "first":
        pieces = [p[:1] for p in pieces]
    seen: dict[tuple[int, ...], tuple[str, str]] = {}
    for (name, word, _), word_pieces in zip(entries, pieces, strict=True):
        if not word_pieces or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in word_pieces):
            raise TaskError(f"{where}: verbalizer: {name}: the tokenizer does not know {word!r}; use another word")
        if multi_token == "refuse" and len(word_pieces) > 1:
            split = " ".join(tokenizer.convert_ids_to_tokens(list(word_pieces)))
            raise TaskError(
                f"{where}: verbalizer: {name}: {word!r} is {len(word_pieces)} tokens ({split}); "
                "use a word that is one token, or multi_token='exact'"
            )
        other, other_word = seen.setdefault(word_pieces, (name, word))
        if other != name:
            raise TaskError(
                f"{where}: verbalizer: {other_word!r} ({other}) and {word!r} ({name}) are the same tokens here; "
                "choose words that differ" + (", or multi_token='exact'" if multi_token == "first" else "")
            )
    return LabelWords(
        classes=classes,
        words=tuple(word for _, word, _ in entries),
        pieces=tuple(pieces),
        owner=tuple(classes.index(name) for name, _, _ in entries),
        weights=tuple(weight for _, _, weight in entries),
    )


class Verbalizer(nn.Module):
    """Word scores `(B, W)` to class scores `(B, C)`.

    A class's score is the mean, the maximum or the log-sum-exp over its words. A learned verbalizer adds
    `z · Δ + β`, where z are the LM's states, centered and scaled, and Δ `(C, S)`, β `(C,)` start at zero: for
    words of one token that is the same as learning the class's own row of the output matrix, starting from
    the LM's rows and biases (WARP, Hambardzumyan et al. 2021, arXiv 2101.00121), and decay of Δ pulls back to
    them.

    Parameters
    ----------
    words : LabelWords
    width : int
        Size S of the LM's states.
    aggregate : {"mean", "max", "logsumexp"}, default="mean"
    learned : bool, default=False

    Examples
    --------
    >>> words = LabelWords(("bad", "good"), ("bad", "good", "great"), ((1,), (2,), (3,)), (0, 1, 1), (1.0,) * 3)
    >>> Verbalizer(words, 4)(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 4))
    tensor([[1., 3.]])
    """

    owner: Tensor
    weights: Tensor
    word_scale: Tensor
    center: Tensor
    gain: Tensor

    def __init__(self, words: LabelWords, width: int, *, aggregate: str = "mean", learned: bool = False) -> None:
        super().__init__()
        if aggregate not in AGGREGATIONS:
            raise ValueError(f"aggregate={aggregate!r} is unknown; use one of {', '.join(AGGREGATIONS)}")
        self.aggregate = aggregate
        self.n_classes = len(words.classes)
        self.register_buffer("owner", torch.tensor(words.owner))  # (W,)
        self.register_buffer("weights", torch.tensor(words.weights))  # (W,)
        self.rows = nn.Parameter(torch.zeros(self.n_classes, width)) if learned else None  # (C, S)
        self.bias = nn.Parameter(torch.zeros(self.n_classes)) if learned else None  # (C,)
        if learned:
            self.register_buffer("word_scale", torch.ones(()))
            self.register_buffer("center", torch.zeros(width))  # (S,)
            self.register_buffer("gain", torch.ones(width))  # (S,)

    @property
    def hears_words(self) -> bool:
        """Whether the word scores count at all."""
        return self.rows is None or bool(self.word_scale > 0)

    def forward(self, word_scores: Tensor, states: Tensor) -> Tensor:
        """Class scores.

        Parameters
        ----------
        word_scores : Tensor of shape (B, W)
            Log-probabilities of the words, up to a constant for each example.
        states : Tensor of shape (B, S)
            As `Backbone.word_scores` gives them.

        Returns
        -------
        Tensor of shape (B, C)
        """
        scores = self.of_words(word_scores)
        if self.rows is not None and self.bias is not None:
            read = (states - self.center) * self.gain  # (B, S)
            scores = self.word_scale * scores + read @ self.rows.T + self.bias  # (B, C)
        return scores

    def mix(self, own: float, manual: float, against: Tensor) -> None:
        """Let class scores become `own` times what they are, and `manual` times those of the words with a bias (C,)."""
        assert self.rows is not None and self.bias is not None
        with torch.no_grad():
            self.rows.mul_(own)
            self.bias.mul_(own).add_(manual * against)
            self.word_scale.mul_(own).add_(manual)

    def settled(self) -> Verbalizer:
        """A copy whose rows read the states as they are: the same scores by fewer numbers, no longer to be tuned."""
        made = copy.deepcopy(self).requires_grad_(False)
        if made.rows is not None and made.bias is not None:
            made.rows.mul_(made.gain)
            made.bias.sub_(made.rows @ made.center)
            made.center, made.gain = made.bias.new_zeros(()), made.bias.new_ones(())
        return made

    def of_words(self, word_scores: Tensor) -> Tensor:
        """Class scores (B, C) of the label words (B, W) alone."""
        shape = (len(word_scores), self.n_classes)
        owner = self.owner.expand(len(word_scores), -1)  # (B, W)
        if self.aggregate == "mean":
            totals = self.weights.new_zeros(self.n_classes).index_add(0, self.owner, self.weights)  # (C,)
            share = self.weights / totals[self.owner]  # (W,)
            return word_scores.new_zeros(shape).scatter_add(1, owner, word_scores * share)
        weighted = word_scores + self.weights.log()
        top = word_scores.new_zeros(shape).scatter_reduce(1, owner, weighted, "amax", include_self=False)
        if self.aggregate == "max":
            return top
        parts = (weighted - top.detach().gather(1, owner)).exp()
        return top.detach() + word_scores.new_zeros(shape).scatter_add(1, owner, parts).log()
