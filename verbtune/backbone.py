"""The frozen language model: loading it, and asking it for label words, nothing more.

Only what is needed is computed. The output matrix is replaced, for the length of a call, by the rows
of the label words; the head runs at the answers only; and for a causal LM the stretch that all
examples start with becomes keys and values once. All of it goes through transformers' public
interfaces (`inputs_embeds`, `past_key_values`, output embeddings) and PyTorch's hooks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .builtin import builtin_path
from .encode import Batch, Example, collate
from .verbalizer import LabelWords

__all__ = ["Backbone", "BackboneError"]

Kind = Literal["masked", "causal"]

MAX_LENGTH = 512
TOKENS_PER_BATCH = 4096
LOGITS_PER_CHUNK = 1 << 25


class BackboneError(ValueError):
    """A language model that cannot be loaded or used."""


class _Head(nn.Module):
    """Stands in for the output embeddings; remembers the state that it was given."""

    bias = None  # some models copy it from their output embeddings

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = (weight, bias)
        self.states: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self.states = states  # (B, M, H)
        return F.linear(states, *self.matrix)  # (B, M, W)


class Backbone:
    """A frozen masked or causal LM and its tokenizer, shared by every estimator that is given it.

    Parameters
    ----------
    model : PreTrainedModel
        A transformers model with a masked or causal LM head; it is frozen and put in `eval` mode.
    tokenizer : PreTrainedTokenizerBase
        Its fast tokenizer.
    kind : {"masked", "causal"}, optional
        Read off the model's class where it is not given.
    name : str, optional
        What it can be loaded by again; without it, pickling carries the weights.

    Examples
    --------
    >>> backbone = Backbone.load("builtin/masked")
    >>> backbone.kind
    'masked'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: Kind | None = None,
        name: str | None = None,
    ) -> None:
        kind = kind or _kind_of(type(model).__name__)
        if kind is None:
            raise BackboneError(
                f"{type(model).__name__} is no masked or causal LM; load it with AutoModelForMaskedLM or "
                "AutoModelForCausalLM"
            )
        label = name or type(model).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise BackboneError(f"{label}: its tokenizer is not a fast one; convert it to tokenizer.json")
        if kind == "masked" and tokenizer.mask_token_id is None:
            raise BackboneError(f"{label}: a masked LM whose tokenizer has no mask token; set mask_token")
        if model.get_output_embeddings() is None:
            raise BackboneError(f"{label}: {type(model).__name__} has no output embeddings to score words with")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.kind: Kind = kind
        self.name = name
        self._origin: Callable[[], Backbone] | None = None
        self._lock = threading.RLock()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        name: str | Path | Backbone,
        *,
        kind: Kind | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> Backbone:
        """Load a language model, or find it if it is loaded already.

        Parameters
        ----------
        name : str, Path or Backbone
            `builtin/masked`, `builtin/causal`, a folder, or a model of the hub; a Backbone is returned as it is.
        kind : {"masked", "causal"}, optional
            For a folder or hub model whose configuration does not say.
        revision : str, optional
            Commit, tag or branch on the hub.
        device : str, optional
            A torch device; default: the GPU if there is one.
        dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
            "auto" is float32 on a CPU and bfloat16 on a GPU.

        Raises
        ------
        BackboneError
            In one line: what could not be loaded, why, and what to do.
        """
        if isinstance(name, Backbone):
            return name
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise BackboneError(f"dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16")
        key = (str(name), kind, revision, device, dtype)
        with _LOADING:
            backbone = _LOADED.get(key)
            if backbone is None:
                backbone = _LOADED[key] = cls._load(*key)
            _LATEST[:] = [backbone]
        return backbone

    @classmethod
    def _load(cls, name: str, kind: Kind | None, revision: str | None, device: str, dtype: str) -> Backbone:
        path = str(builtin_path(name)) if name.startswith("builtin/") else name
        where = {"revision": revision}
        try:
            config = AutoConfig.from_pretrained(path, **where)
            kind = kind or _kind_of(" ".join(config.architectures or []))
            if kind is None:
                raise BackboneError(
                    f"{name}: its configuration says {config.architectures or 'no architecture'}, neither a masked "
                    "nor a causal LM; pass kind='masked' or kind='causal' to Backbone.load"
                )
            auto = AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM
            model, info = auto.from_pretrained(
                path, **where, dtype=getattr(torch, dtype), output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, **where)
        except BackboneError:
            raise
        except Exception as error:  # transformers raises many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BackboneError(
                f"cannot load the language model {name!r}: {reason} Use builtin/masked, builtin/causal, a folder "
                "with a transformers model, or a hub name that is cached or reachable."
            ) from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise BackboneError(
                f"{name}: the weights lack {len(missing)} tensors of {type(model).__name__} (first: {missing[0]}), so "
                "it has no trained LM head; use a checkpoint saved with its language-model head"
            )
        backbone = cls(model.to(device), tokenizer, kind=kind, name=name)
        backbone._origin = functools.partial(
            cls.load, name, kind=kind, revision=revision, device=device, dtype=dtype
        )
        return backbone

    def __sklearn_clone__(self) -> Backbone:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is not None:
            return self._origin, ()
        return functools.partial(Backbone, kind=self.kind, name=self.name), (self.model, self.tokenizer)

    def __repr__(self) -> str:
        return f"Backbone({self.name or type(self.model).__name__}, {self.kind})"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def width(self) -> int:
        """Size H of the state that the output matrix reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @functools.cached_property
    def max_length(self) -> int:
        """Most positions a sequence may take, at most 512 unless asked for more."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
        for module in self.model.modules():
            # RoBERTa and its kin count positions from padding_idx + 1.
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:
                limit = table.num_embeddings - table.padding_idx - 1
        return min(limit, self.tokenizer.model_max_length, MAX_LENGTH)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this LM from any other: SHA-256 of its weights as they are in memory."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of token ids, scaled as the model wants them."""
        embedding: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return embedding

    def embedding_table(self) -> Tensor:
        """The input embeddings of the whole vocabulary, of shape (V, H), in float32."""
        size = self.model.get_input_embeddings().weight.shape[0]
        return self.embed(torch.arange(size)).detach().float()

    def word_scores(
        self,
        examples: Sequence[Example],
        words: LabelWords,
        prompt: Tensor | None = None,
        *,
        prefix: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all label words after each example, in one padded batch.

        A word of several pieces is scored whole: on a causal LM by the exact log-probability of its
        pieces one after the other, on a masked LM by the sum over as many masks as it has pieces.

        Parameters
        ----------
        examples : sequence of Example
        words : LabelWords
        prompt : Tensor of shape (P, H), optional
            The vectors at the soft slots.
        prefix : Cache, optional
            What `encode_prefix` made of the examples' common start.

        Returns
        -------
        scores : Tensor of shape (B, W)
            Up to a constant for each example where all words have one piece. float32.
        states : Tensor of shape (B, H)
            What the output matrix reads at the (first) answer position. float32.
        """
        with self._lock:
            if words.longest == 1:
                rows = torch.tensor([p[0] for p in words.pieces], device=self.device)
                logits, states, _ = self._run(self._collate(examples), prompt, rows=rows, prefix=prefix)
                return logits[:, 0].float(), states[:, 0].float()
            if self.kind == "masked":
                return self._masked_words(examples, words, prompt)
            return self._causal_words(examples, words, prompt, prefix)

    def encode_prefix(self, example: Example, length: int, prompt: Tensor | None) -> Cache | None:
        """Keys and values of the first `length` positions of an example, for all that start like it."""
        if self.kind != "causal" or length < 1:
            return None
        start = Example(example.ids[:length], example.slots[:length], length - 1)
        with self._lock:
            *_, cache = self._run(self._collate([start]), prompt, rows=torch.zeros(1, dtype=torch.long), cached=True)
        return cache

    def infer(
        self, examples: Sequence[Example], words: LabelWords, prompt: Tensor | None = None, *, n_prefix: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`word_scores` of any number of examples, without gradients, in batches of similar length.

        Parameters
        ----------
        n_prefix : int
            Length of the stretch that all examples start with.

        Returns
        -------
        scores : Tensor of shape (N, W), on the CPU
        states : Tensor of shape (N, H), on the CPU
        """
        scores = torch.empty(len(examples), len(words.words))
        states = torch.empty(len(examples), self.width)
        if not examples:
            return scores, states
        with torch.inference_mode():
            length = min(n_prefix, min(e.answer for e in examples))
            prefix = self.encode_prefix(examples[0], length, prompt)
            budget = TOKENS_PER_BATCH
            pending = list(_by_length([len(e.ids) for e in examples], budget))
            while pending:
                index = pending.pop()
                try:
                    batch = [examples[i] for i in index]
                    scores[index], states[index] = (
                        t.cpu() for t in self.word_scores(batch, words, prompt, prefix=prefix)
                    )
                except RuntimeError as error:
                    if "out of memory" not in str(error).lower() and "allocate" not in str(error).lower():
                        raise
                    if len(index) == 1:
                        raise
                    half = len(index) // 2
                    pending += [index[:half], index[half:]]
        return scores, states

    def _collate(self, examples: Sequence[Example], n_masks: int = 1) -> Batch:
        pad = self.tokenizer.pad_token_id
        mask = self.tokenizer.mask_token_id if self.kind == "masked" else None
        batch = collate(examples, pad_id=0 if pad is None else pad, mask_id=mask, n_masks=n_masks)
        return Batch(*(t.to(self.device) for t in (batch.ids, batch.attention, batch.slots, batch.answers)))

    def _run(
        self,
        batch: Batch,
        prompt: Tensor | None,
        *,
        rows: Tensor | None = None,
        prefix: Cache | None = None,
        cached: bool = False,
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Logits (B, M, W or V) and states (B, M, H) at the answers, and the keys and values if asked."""
        size, offset = len(batch.ids), 0
        inputs: dict[str, Any] = {}
        if prefix is not None:
            offset = prefix.get_seq_length()
            inputs["past_key_values"] = _select(prefix, torch.zeros(size, dtype=torch.long, device=self.device))
        elif cached:
            inputs["past_key_values"] = DynamicCache(config=self.model.config)
        embeds = self.embed(batch.ids[:, offset:])  # (B, T', H)
        slots = batch.slots[:, offset:]  # (B, T')
        if prompt is not None and bool((slots >= 0).any()):
            soft = prompt.to(embeds.dtype)[slots.clamp(min=0)]  # (B, T', H)
            embeds = torch.where((slots >= 0)[..., None], soft, embeds)
        # Without padding no mask is passed: attention then takes its faster kernel.
        attention = None if bool(batch.attention.all()) else batch.attention
        head = self._head(rows)
        with self._only_at(batch.answers - offset, head):
            output = self.model(
                inputs_embeds=embeds, attention_mask=attention, use_cache=cached or prefix is not None, **inputs
            ) if self.kind == "causal" else self.model(inputs_embeds=embeds, attention_mask=attention)
        assert head.states is not None
        logits, states = output.logits, head.states
        if logits.shape[1] != batch.answers.shape[1]:
            at = (batch.answers - offset)[..., None]
            logits = logits.gather(1, at.expand(-1, -1, logits.shape[2]))
            states = states.gather(1, at.expand(-1, -1, states.shape[2]))
        return logits, states, inputs.get("past_key_values")

    def _head(self, rows: Tensor | None) -> _Head:
        output = self.model.get_output_embeddings()
        bias = getattr(output, "bias", None)
        if rows is None:
            return _Head(output.weight, bias)
        rows = rows.to(self.device)
        return _Head(output.weight[rows], None if bias is None else bias[rows])

    @contextlib.contextmanager
    def _only_at(self, answers: Tensor, head: _Head) -> Iterator[None]:
        """While open: the trunk hands on its states at `answers` (B, M) only, and `head` replaces the output matrix."""

        def gather(module: nn.Module, args: Any, output: Any) -> Any:
            states = output.last_hidden_state  # (B, T, H)
            output.last_hidden_state = states.gather(1, answers[..., None].expand(-1, -1, states.shape[2]))
            return output

        original = self.model.get_output_embeddings()
        hook = self.model.get_decoder().register_forward_hook(gather)
        self.model.set_output_embeddings(head)
        try:
            yield
        finally:
            self.model.set_output_embeddings(original)
            hook.remove()

    def _masked_words(
        self, examples: Sequence[Example], words: LabelWords, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        lengths = [len(p) for p in words.pieces]
        columns: list[Tensor] = [torch.empty(0)] * len(lengths)
        first: Tensor | None = None
        for n in sorted(set(lengths)):
            logits, states, _ = self._run(self._collate(examples, n), prompt)
            logs = logits.float().log_softmax(-1)  # (B, n, V)
            first = states[:, 0] if first is None else first
            for w, pieces in enumerate(words.pieces):
                if len(pieces) == n:
                    columns[w] = sum(logs[:, j, piece] for j, piece in enumerate(pieces))  # type: ignore[assignment]
        assert first is not None
        return torch.stack(columns, dim=1), first.float()

    def _causal_words(
        self, examples: Sequence[Example], words: LabelWords, prompt: Tensor | None, prefix: Cache | None
    ) -> tuple[Tensor, Tensor]:
        batch = self._collate(examples)
        logits, states, cache = self._run(batch, prompt, prefix=prefix, cached=True)
        assert cache is not None
        logs = logits[:, 0].float().log_softmax(-1)  # (B, V)
        scores = logs[:, [p[0] for p in words.pieces]]  # (B, W)
        longer = [w for w, p in enumerate(words.pieces) if len(p) > 1]
        width = words.longest - 1
        pieces = torch.zeros(len(longer), width, dtype=torch.long, device=self.device)  # (W', N)
        known = torch.zeros_like(pieces, dtype=torch.bool)
        targets = torch.zeros_like(pieces)
        for i, w in enumerate(longer):
            n = len(words.pieces[w]) - 1
            pieces[i, :n] = torch.tensor(words.pieces[w][:-1])
            targets[i, :n] = torch.tensor(words.pieces[w][1:])
            known[i, :n] = True
        # Every (example, word) pair goes on from its example's keys and values.
        row, word = (t.flatten() for t in torch.meshgrid(
            torch.arange(len(examples), device=self.device), torch.arange(len(longer), device=self.device), indexing="ij"
        ))
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, LOGITS_PER_CHUNK // (width * vocabulary))
        sums = []
        for r, w in zip(row.split(step), word.split(step), strict=True):
            attention = torch.cat([batch.attention[r], known[w].long()], dim=1)  # (R, T + N)
            inputs: dict[str, Any] = {}
            if self._takes_positions:
                inputs["position_ids"] = batch.attention[r].sum(1, keepdim=True) + torch.arange(width, device=self.device)
            output = self.model(
                inputs_embeds=self.embed(pieces[w]),
                attention_mask=attention,
                past_key_values=_select(cache, r),
                use_cache=True,
                **inputs,
            )
            token_logs = output.logits.float().log_softmax(-1).gather(2, targets[w][..., None])[..., 0]  # (R, N)
            sums.append((token_logs * known[w]).sum(1))
        rest = torch.zeros_like(scores)
        rest[:, longer] = torch.cat(sums).view(len(examples), len(longer))
        return scores + rest, states[:, 0].float()


_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], Backbone] = weakref.WeakValueDictionary()
_LATEST: list[Backbone] = []  # keeps the last one alive between the clones of a grid search
_LOADING = threading.RLock()


def _kind_of(architecture: str) -> Kind | None:
    if "MaskedLM" in architecture or "ForPreTraining" in architecture:
        return "masked"
    if "CausalLM" in architecture or "LMHead" in architecture:
        return "causal"
    return None


def _select(cache: Cache, rows: Tensor) -> Cache:
    """A cache of the given rows of another, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `budget` positions when padded, longest last."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
