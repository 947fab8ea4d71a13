"""The frozen language model, asked for label words and nothing more.

Only what is needed is computed. The output matrix is replaced, for the length of a call, by the rows
of the label words; the head, and the last layer behind its attention, run at the answers only; and for
a causal LM the stretch that all examples start with becomes keys and values once. All of it goes through
transformers' public interfaces (`inputs_embeds`, `past_key_values`, output embeddings) and PyTorch's hooks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .attention import AroundAttention, behind, only_at, quick_gradients
from .batch import Batch, by_length, collate
from .encode import Example
from .head import Head, put_on
from .loading import BackboneError, Kind, fingerprint, kind_of, load_model, resolve_dtype
from .pieces import PieceTree, log_probabilities
from .start import Start, window
from .verbalizer import LabelWords

__all__ = ["Backbone"]

MAX_LENGTH = 512
LOGITS_PER_CHUNK = 1 << 25
UNLIKE = 0.25  # of the widest score: more than what 16 bits round off, less than what another head says


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
        What it is called in messages, and what a saved classifier loads it by again.

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
        kind = kind or kind_of(type(model).__name__)
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
        self._tried = False
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
        weights: bool = True,
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
            "auto" is bfloat16 on a GPU and on a CPU that has quick products in it (AMX, or AVX512-BF16 of AMD),
            where it is about twice as fast, and float32 elsewhere.
        weights : bool, default=True
            Without them it can encode texts but not score words: all that the linter needs.

        Raises
        ------
        BackboneError
            In one line: what could not be loaded, why, and what to do.
        """
        if isinstance(name, Backbone):
            return name
        given: dict[str, Any] = {
            "kind": kind,
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "weights": weights,
        }
        origin = functools.partial(cls.load, str(name), **given)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "meta":
            raise BackboneError("device='meta' holds no weights; use cpu, cuda, or weights=False")
        dtype = resolve_dtype(dtype, device)
        key = (str(name), kind, revision, device if weights else "meta", dtype)
        with _LOADING:
            backbone = _LOADED.get(key)
            if backbone is None:
                backbone = _LOADED[key] = cls._load(*key)
                backbone._origin = origin
            _LATEST[:] = [backbone]
        return backbone

    @classmethod
    def _load(cls, name: str, kind: Kind | None, revision: str | None, device: str, dtype: str) -> Backbone:
        where: dict[str, Any] = {"kind": kind, "revision": revision}
        model, tokenizer, kind = load_model(name, **where, device=device, dtype=dtype)
        backbone = cls(model, tokenizer, kind=kind, name=name)
        if dtype == "float16":  # the fingerprint is of bfloat16, and numbers rounded before would give another one
            exact, *_ = load_model(name, **where, device="cpu", dtype="float32")
            backbone.fingerprint = fingerprint(exact, tokenizer)
        return backbone

    def __sklearn_clone__(self) -> Backbone:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is not None:
            return self._origin, ()
        return functools.partial(Backbone, kind=self.kind, name=self.name), (self.copy_of_model(), self.tokenizer)

    def __repr__(self) -> str:
        return f"Backbone({self._called}, {self.kind})"

    @property
    def _called(self) -> str:
        """What messages call it."""
        return self.name or type(self.model).__name__

    def copy_of_model(self) -> PreTrainedModel:
        """A model of its own, as it is between two calls: during one it has another head, and hooks."""
        with self._lock:
            model: PreTrainedModel = copy.deepcopy(self.model)
        return model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        where: torch.device = self.model.device
        return where

    @functools.cached_property
    def width(self) -> int:
        """Size H of the state that the output matrix reads."""
        with self._lock:
            return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def _config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.model.config.get_text_config()
        return config

    @functools.cached_property
    def _layers(self) -> nn.ModuleList:
        depth = self._config.num_hidden_layers
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise BackboneError(f"{self._called}: no list of {depth} layers in it; this architecture is not supported")

    @property
    def _text_layer(self) -> nn.Module:
        """The layer whose states of the texts' tokens are averaged, unless the last one's are."""
        # What is meant is told best at five sixths; the last layer serves the prediction of words, and tells topics.
        return self._layers[max(1, 5 * len(self._layers) // 6) - 1]

    @functools.cached_property
    def _last_is_apart(self) -> bool:
        """Whether only the answer's state is read off the last layer, and the layers call PyTorch's attention."""
        if self._layers[-1] is self._text_layer:
            return False
        called: list[int] = []

        def count(attention: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
            called.append(1)
            return attention(*args, **named)

        with self._lock, torch.no_grad(), AroundAttention(count):
            self.model(inputs_embeds=self.embed(torch.zeros(1, 1, dtype=torch.long)))
        return len(called) == len(self._layers)

    @property
    def state_width(self) -> int:
        """Size S of what `word_scores` gives beside the scores."""
        return self.width + int(self._config.hidden_size)

    @functools.cached_property
    def max_length(self) -> int:
        """Most positions a sequence may take, at most 512."""
        config = self._config
        limit = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
        if "local" in getattr(config, "attention_layers", ()):
            # GPT-Neo's local layers count by places, whatever mask they are given: let them see all of these.
            limit = min(limit, config.window_size)
        for module in self.model.modules():
            # RoBERTa and its kin count positions from padding_idx + 1.
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:
                limit = table.num_embeddings - table.padding_idx - 1
        return min(limit, self.tokenizer.model_max_length, MAX_LENGTH)

    def most_positions(self, max_length: int | None) -> int:
        """Most positions an example may take where at most `max_length` are asked for."""
        return min(max_length or self.max_length, self.max_length)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this LM from any other: SHA-256 of its weights, in whichever precision it is loaded."""
        with self._lock:
            return fingerprint(self.model, self.tokenizer)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of token ids, scaled as the model wants them."""
        embedding: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return embedding

    def embedding_table(self) -> Tensor:
        """The input embeddings of the tokenizer's whole vocabulary, of shape (V, H), in float32."""
        size = min(self.model.get_input_embeddings().weight.shape[0], len(self.tokenizer))
        return self.embed(torch.arange(size)).detach().float()

    def word_scores(
        self,
        examples: Sequence[Example],
        words: LabelWords,
        prompt: Tensor | None = None,
        *,
        deep: Tensor | None = None,
        start: Start | None = None,
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
        deep : Tensor of shape (K, L, 2, A, D + 2, E), optional
            Deep prompts, of which every example says its own.
        start : Start, optional
            What `encode_start` made of how the examples begin, for a causal LM.

        Returns
        -------
        scores : Tensor of shape (B, W)
            Up to a constant for each example where all words have one piece. float32.
        states : Tensor of shape (B, S)
            What the output matrix reads at the (first) answer position, `width` numbers, and after them
            the mean state of the texts' tokens at five sixths of the LM's depth, or behind its last layer where an
            example says so. float32.
        """
        with self._lock:
            self._try_out()
            if words.longest == 1:
                rows = torch.tensor([p[0] for p in words.pieces], device=self.device)
                logits, states, _ = self._run(examples, prompt, deep, rows=rows, start=start)
                return logits[:, 0].float(), states
            if self.kind == "masked":
                return self._masked_words(examples, words, prompt, deep)
            return self._causal_words(examples, words, prompt, deep, start)

    def keys_and_values(self, vectors: Tensor) -> Tensor:
        """What every layer makes of vectors at the input, as a deep prompt starts.

        Parameters
        ----------
        vectors : Tensor of shape (D, H)
            Input embeddings, read by themselves.

        Returns
        -------
        Tensor of shape (L, 2, A, D, E)
            Keys and values of A heads in L layers, in float32.

        Raises
        ------
        BackboneError
            If attention is not PyTorch's own, which is where a deep prompt comes in.
        """
        layers: list[Tensor] = []

        def remember(attention: Callable[..., Tensor], query: Tensor, *pair: Tensor, **named: Any) -> Tensor:
            layers.append(torch.stack(pair)[:, 0])  # (2, A, D, E)
            return attention(query, *pair, **named)

        with self._lock, torch.no_grad(), AroundAttention(remember):
            self.model.base_model(inputs_embeds=vectors[None].to(self.model.dtype))
        if len({pair.shape for pair in layers}) != 1:
            raise BackboneError(
                f"{self._called}: takes no deep prompt, since its layers do not call "
                "PyTorch's attention alike; load it with attn_implementation='sdpa' where it has that, or use steps=0"
            )
        return torch.stack(layers).float()

    def encode_start(
        self,
        examples: Sequence[Example],
        lengths: Sequence[int],
        prompt: Tensor | None = None,
        *,
        deep: Tensor | None = None,
    ) -> Start | None:
        """Keys and values of the first positions of each example, which a causal LM need not see again.

        Parameters
        ----------
        examples : sequence of Example
            One that all others start like, or those of a batch.
        lengths : sequence of int
            How many positions of each; at most up to its answer.

        Returns
        -------
        Start or None
            None for a masked LM, where every position sees every other, or if there is nothing to keep.
        """
        if self.kind != "causal" or min(lengths) < 1:
            return None
        cut = [e.part(0, n) for e, n in zip(examples, lengths, strict=True)]
        with self._lock:
            self._try_out()
            *_, grown = self._run(cut, prompt, deep, rows=torch.zeros(1, dtype=torch.long), keep=True)
        return grown

    def infer(
        self,
        examples: Sequence[Example],
        words: LabelWords,
        prompt: Tensor | None = None,
        *,
        deep: Tensor | None = None,
        n_prefix: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`word_scores` of any number of examples, without gradients, in batches of similar length.

        Parameters
        ----------
        n_prefix : int
            Length of the stretch that all examples start with.

        Returns
        -------
        scores : Tensor of shape (N, W), on the CPU
        states : Tensor of shape (N, S), on the CPU
        """
        scores = torch.empty(len(examples), len(words.words))
        states = torch.empty(len(examples), self.state_width)
        if not examples:
            return scores, states
        with torch.inference_mode():
            start = self.encode_start(examples[:1], [min(n_prefix, min(e.answer for e in examples))], prompt, deep=deep)
            pending = list(by_length([len(e.ids) for e in examples], self.device))
            while pending:
                index = pending.pop()
                batch = [examples[i] for i in index]
                try:
                    scores[index], states[index] = (
                        t.cpu() for t in self.word_scores(batch, words, prompt, deep=deep, start=start)
                    )
                except RuntimeError as error:
                    if len(index) == 1 or not _out_of_memory(error):
                        raise
                    half = len(index) // 2
                    pending += [index[:half], index[half:]]
        return scores, states

    def _try_out(self) -> None:
        """Ask once, in all ways that are used here, what the model says of a few tokens.

        Raises
        ------
        BackboneError
            If that is no number, or not what it says when it is asked as everybody does: its head is no matrix, say.
        """
        if self._tried:
            return
        special = set(self.tokenizer.all_special_ids)
        known = [i for i in range(len(self.tokenizer)) if i not in special]
        some = known[:: max(1, len(known) // 8)][:8]
        rows = torch.tensor(some, device=self.device)
        mask = [self.tokenizer.mask_token_id] if self.kind == "masked" else []
        texts = [some + mask, some[:3] + mask]  # the second one is padded
        examples = [Example(ids, [-1] * len(ids), len(ids) - 1) for ids in texts]
        why = ""
        try:
            with torch.no_grad():
                found = [self._run(examples, None, None, rows=rows)[0][:, 0]]  # (B, W)
                if self.kind == "causal":
                    *_, start = self._run([e.part(0, e.answer) for e in examples], None, None, rows=rows, keep=True)
                    found.append(self._run(examples, None, None, rows=rows, start=start)[0][:, 0])
                plain = [self.model(input_ids=torch.tensor([e.ids], device=self.device)).logits for e in examples]
                wanted = torch.stack([logits[0, -1, rows] for logits in plain])  # (B, W)
            if not bool(wanted.isfinite().all()):
                raise BackboneError(
                    f"{self._called}: its scores, in {self.model.dtype}, are not finite; load it with "
                    "dtype='float32', or use another model"
                )
            wanted, *found = (f.float() - f.float().mean(dim=1, keepdim=True) for f in (wanted, *found))
            alike = all((f - wanted).abs().max() <= UNLIKE * wanted.abs().max() for f in found)
        except BackboneError:
            raise
        except Exception as error:  # whatever a model raises that takes no embeddings, no cache, or no other head
            if isinstance(error, RuntimeError) and _out_of_memory(error):
                raise
            alike, why = False, f" ({type(error).__name__})"
        if not alike:
            raise BackboneError(
                f"{self._called}: asked for label words only, {type(self.model).__name__} does not say what it says as "
                f"a whole{why}; this architecture is not supported, use another model"
            )
        self._tried = True

    def _run(
        self,
        examples: Sequence[Example],
        prompt: Tensor | None,
        deep: Tensor | None,
        *,
        rows: Tensor | None = None,
        n_masks: int = 1,
        start: Start | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, Start | None]:
        """Logits (B, M, W or V) at the answers, states (B, S); with `keep`, how to go on from there."""
        inputs: dict[str, Any] = {}
        known = torch.zeros(len(examples), 0, dtype=torch.long, device=self.device)
        if start is not None:
            start = start.of_size(len(examples))
            known = start.attention
            done = start.lengths.tolist()
            examples = [e.part(n) for e, n in zip(examples, done, strict=True)]
        batch = self._collate(examples, n_masks)
        embeds = self.embed(batch.ids)  # (B, T, H)
        if prompt is not None:
            soft = batch.slots >= 0  # (B, T)
            embeds[soft] = prompt.to(embeds.dtype)[batch.slots[soft]]
        attention = torch.cat([known, batch.attention], dim=1)  # (B, F + T)
        # Where no answer or text sees padding no mask is passed: attention then takes its faster kernel.
        unseen = known if self.kind == "causal" else attention  # padding is on the right
        mask: Any = None if bool(unseen.all()) else attention
        if start is not None:
            inputs["past_key_values"] = start.cache
            if self._takes_positions:
                inputs["position_ids"] = start.positions(batch.attention)
                if mask is not None and window(self._config) < attention.shape[1]:
                    size = batch.ids.shape[1]
                    earlier = torch.ones(size, size, dtype=torch.bool, device=self.device).tril()
                    mask = start.mask(earlier, inputs["position_ids"], config=self._config, dtype=self.model.dtype)
        elif keep:
            inputs["past_key_values"] = DynamicCache()  # without config no sliding layer drops positions
        if self.kind == "causal":
            inputs["use_cache"] = "past_key_values" in inputs
        head = Head.of(self.model.get_output_embeddings(), rows)
        # Of one position there is nothing to spare, and its heads may stand where the positions do.
        one_answer = batch.answers.shape[1] == 1 < batch.ids.shape[1]
        apart = not keep and one_answer and not bool(batch.last.any()) and self._last_is_apart
        spared = only_at(self._layers[-1], batch.answers) if apart else contextlib.nullcontext()
        worn = put_on(head, self.model, text_layer=self._text_layer, answers=batch.answers)
        with worn, quick_gradients(self.device), behind(deep, examples), spared:
            output = self.model(inputs_embeds=embeds, attention_mask=mask, **inputs)
        assert head.states is not None and head.layer is not None and head.last is not None
        text_sum = torch.einsum("bth,bt->bh", head.layer.float(), batch.texts)  # (B, H)
        if bool(batch.last.any()):
            of_last = torch.einsum("bth,bt->bh", head.last.float(), batch.texts)  # (B, H)
            of_last = F.pad(of_last, (0, text_sum.shape[1] - of_last.shape[1]))  # OPT may end on fewer numbers
            text_sum = torch.where(batch.last[:, None], of_last, text_sum)
        text_count = batch.texts.sum(1, keepdim=True)  # (B, 1)
        if start is not None:
            text_sum, text_count = text_sum + start.text_sum, text_count + start.text_count
        states = torch.cat([head.states[:, 0].float(), text_sum / text_count.clamp(min=1)], dim=1)  # (B, S)
        grown = Start(inputs["past_key_values"], attention, text_sum, text_count) if keep else None
        return output.logits, states, grown

    def _collate(self, examples: Sequence[Example], n_masks: int = 1) -> Batch:
        pad = self.tokenizer.pad_token_id
        mask = self.tokenizer.mask_token_id if self.kind == "masked" else None
        batch = collate(examples, pad_id=0 if pad is None else pad, mask_id=mask, n_masks=n_masks)
        return Batch(*(getattr(batch, f.name).to(self.device) for f in dataclasses.fields(batch)))

    def _masked_words(
        self, examples: Sequence[Example], words: LabelWords, prompt: Tensor | None, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores: dict[int, Tensor] = {}
        first: Tensor | None = None
        for n in sorted({len(pieces) for pieces in words.pieces}):
            logits, states, _ = self._run(examples, prompt, deep, n_masks=n)  # (B, n, V)
            first = states if first is None else first
            of_length = [w for w, pieces in enumerate(words.pieces) if len(pieces) == n]
            pieces = torch.tensor([words.pieces[w] for w in of_length], device=self.device)  # (W', n)
            each = log_probabilities(logits, torch.arange(n, device=self.device), pieces).sum(-1)  # (B, W')
            scores |= dict(zip(of_length, each.unbind(1), strict=True))
        assert first is not None
        return torch.stack([scores[w] for w in range(len(words.words))], dim=1), first

    def _causal_words(
        self,
        examples: Sequence[Example],
        words: LabelWords,
        prompt: Tensor | None,
        deep: Tensor | None,
        start: Start | None,
    ) -> tuple[Tensor, Tensor]:
        logits, states, context = self._run(examples, prompt, deep, start=start, keep=True)
        assert context is not None
        firsts = torch.tensor([pieces[0] for pieces in words.pieces], device=self.device)
        scores = log_probabilities(logits, torch.zeros_like(firsts), firsts)  # (B, W)
        tree = PieceTree.of(words.pieces, self.device)
        size = max(1, LOGITS_PER_CHUNK // (len(tree.ids) * logits.shape[2]))
        rest = []
        for at in range(0, len(examples), size):
            some = range(at, min(at + size, len(examples)))
            with behind(deep, [examples[i] for i in some]):
                rest.append(self._continue(tree, context.select(some)))
        return scores.index_add(1, tree.word, torch.cat(rest)), states

    def _continue(self, tree: PieceTree, start: Start) -> Tensor:
        """Log-probabilities (B, E) of the words' later pieces, all words of an example in one row of the batch."""
        if not self._takes_positions:
            raise BackboneError(
                f"{self._called} takes no position_ids, so words of several tokens cannot "
                "be scored; use label words of one token, or multi_token='first'"
            )
        positions = start.lengths[:, None] + tree.depth  # (B, T)
        output = self.model(
            inputs_embeds=self.embed(tree.ids.expand(len(positions), -1)),
            attention_mask=start.mask(tree.ancestors, positions, config=self._config, dtype=self.model.dtype),
            position_ids=positions,
            past_key_values=start.cache,
            use_cache=True,
        )
        return log_probabilities(output.logits, tree.node, tree.piece)


_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], Backbone] = weakref.WeakValueDictionary()
_LATEST: list[Backbone] = []  # keeps the last one alive between the clones of a grid search
_LOADING = threading.RLock()


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "allocate memory" in text
