"""What `speed.py` compares: one job, done by verbtune, at the floor, by a plain loop, and by other packages.

The job: 20 soft tokens, a text, " It was", and which of two words comes next. `speed.md` tells what each system is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from verbtune import Backbone, PromptClassifier
from verbtune.batch import by_length
from verbtune.builtin import builtin_path
from verbtune.task import tasks_folder

SOFT = 20
LIMIT = 512  # positions, all included
CALLER_BATCH = 32  # of the systems that take texts as they come
TRAINING_BATCH = 16
SHAPES = {"tiny": (64, 1, 2), "small": (384, 6, 12), "base": (768, 12, 12)}  # width, layers, heads
WORDS = {"negative": ["terrible"], "positive": ["great"]}
IN_FRONT = "{soft:20} {text} It was {answer}."
AFTER = "{text} {soft:20} It was {answer}."


def draw_texts(profile: str, n: int, tokenizer: Any, seed: int = 0) -> list[str]:
    """Texts of real words with the lengths, in tokens, of SST-2's sentences or IMDb's reviews."""
    words, sizes = _word_sizes(tokenizer)
    rng = random.Random(f"{profile} {seed}")
    texts = []
    for _ in range(n):
        if profile == "sentences":
            wanted = min(60.0, max(3.0, rng.gammavariate(4.5, 4.6)))  # mean 21
        else:
            wanted = min(520.0, max(30.0, rng.lognormvariate(5.28, 0.58)))  # mean 230
        chosen: list[str] = []
        length = 0
        while length < wanted:
            at = rng.randrange(len(words))
            chosen.append(words[at])
            length += sizes[at]
        texts.append(" ".join(chosen))
    return texts


@functools.cache
def _word_sizes(tokenizer: Any) -> tuple[list[str], list[int]]:
    files = sorted(tasks_folder().glob("*/train.jsonl"))
    words = sorted({w for path in files for line in path.read_text("utf-8").splitlines() for w in _words(line)})
    return words, [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]


def _words(line: str) -> list[str]:
    text: str = json.loads(line)["text"]
    return text.split()


def build(kind: str, size: str, device: str) -> Backbone:
    """A language model with random weights and the tokenizer of a built-in one."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_path(f"builtin/{kind}"))
    width, depth, heads = SHAPES[size]
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "masked":
        shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        model = BertForMaskedLM(BertConfig(**common, **shape, intermediate_size=4 * width))
    else:
        shape = {"n_embd": width, "n_layer": depth, "n_head": heads}
        ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        model = GPT2LMHeadModel(GPT2Config(**common, **shape, **ends))
    return Backbone(model.to(device), tokenizer, name=f"{size} {kind}")


def classifier(backbone: Backbone | str, template: str = IN_FRONT, **parameters: Any) -> PromptClassifier:
    """A classifier that does the job of all rows; deep prompts beside it would read each text once more each."""
    task = {"task": "speed", "template": template, "verbalizer": WORDS}
    return PromptClassifier(task, model=backbone, **{"steps": 0, "tune_template": False} | parameters)


def fitted(backbone: Backbone | str, texts: Sequence[str], template: str = IN_FRONT, **parameters: Any) -> Any:
    """The same, ready to predict; that it has learned nothing of use costs the same time."""
    few = list(texts[:32])
    return classifier(backbone, template, **parameters).fit(few, labels(len(few)))


def moved(clf: PromptClassifier, backbone: Backbone) -> PromptClassifier:
    """The same classifier on the same LM in another precision."""
    with tempfile.TemporaryDirectory() as folder:
        clf.save_pretrained(Path(folder) / "saved")
        return PromptClassifier.from_pretrained(Path(folder) / "saved", model=backbone)


def labels(n: int) -> list[str]:
    """Two classes in turn."""
    return [sorted(WORDS)[i % 2] for i in range(n)]


@dataclass(frozen=True)
class Job:
    """What verbtune does for a classifier, laid open for those who do it without verbtune."""

    backbone: Backbone
    before: list[int]  # constant ids in front of the text, with fillers for the soft tokens
    after: list[int]
    soft: int  # where the soft tokens begin
    answer: int  # the answer's distance from the end
    words: list[int]
    prompt: Tensor  # (P, H)

    @property
    def model(self) -> PreTrainedModel:
        """The frozen LM with its head."""
        return self.backbone.model

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole examples."""
        room = LIMIT - len(self.before) - len(self.after)
        ids = self.backbone.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=room)
        return [[*self.before, *row, *self.after] for row in ids["input_ids"]]

    def inputs(self, ids: Sequence[Sequence[int]], prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, T, H) with the prompt in its place, attention mask (B, T) and answers (B,)."""
        device = self.backbone.device
        lengths = torch.tensor([len(row) for row in ids])  # (B,)
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)  # (B, T)
        for at, row in enumerate(ids):
            padded[at, : len(row)] = torch.tensor(row)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()  # (B, T)
        embeds = self.model.get_input_embeddings()(padded.to(device))  # (B, T, H)
        middle = prompt.expand(len(ids), -1, -1)  # (B, P, H)
        embeds = torch.cat([embeds[:, : self.soft], middle, embeds[:, self.soft + len(prompt) :]], dim=1)  # (B, T, H)
        return embeds, mask.to(device), (lengths - self.answer).to(device)

    def loss(self, scores: Tensor, index: Sequence[int]) -> Tensor:
        """Cross-entropy against labels that alternate."""
        return F.cross_entropy(scores.float(), torch.tensor([i % 2 for i in index], device=scores.device))


def lay_open(clf: PromptClassifier) -> Job:
    """A fitted classifier's job."""
    compiled = clf.compiled_
    (blank,) = compiled.encode([{"text": ""}])
    at = blank.texts[0][0]
    words = [pieces[0] for pieces in compiled.words.pieces]
    soft = next((i for i, slot in enumerate(blank.slots) if slot >= 0), 0)
    prompt = torch.empty(0, compiled.backbone.width) if clf.prompt_ is None else clf.prompt_
    return Job(
        compiled.backbone, blank.ids[:at], blank.ids[at:], soft, len(blank.ids) - blank.answer, words, prompt.clone()
    )


def floor_scores(job: Job, ids: Sequence[Sequence[int]], prompt: Tensor) -> Tensor:
    """Label words' logits (B, W) by the bare trunk."""
    embeds, mask, answers = job.inputs(ids, prompt)
    if job.backbone.kind == "causal":  # nothing looks at the padding, which is on the right
        states = job.model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # (B, T, H)
    else:
        states = job.model.base_model(inputs_embeds=embeds, attention_mask=None if mask.all() else mask)[0]
    states = states[torch.arange(len(ids)), answers]  # (B, H)
    if job.backbone.kind == "masked":
        states = job.model.cls.predictions.transform(states)  # type: ignore[union-attr,operator]
    head = job.model.get_output_embeddings()
    return F.linear(states, head.weight[job.words], None if head.bias is None else head.bias[job.words])  # type: ignore[index]


def plain_scores(job: Job, ids: Sequence[Sequence[int]], prompt: Tensor) -> Tensor:
    """The same from the whole model, which gives logits of the whole vocabulary at all positions."""
    embeds, mask, answers = job.inputs(ids, prompt)
    logits = job.model(inputs_embeds=embeds, attention_mask=mask).logits  # (B, T, V)
    return logits[torch.arange(len(ids)), answers][:, job.words]  # (B, W)


@torch.inference_mode()
def floor_predict(job: Job, texts: Sequence[str]) -> Tensor:
    """Scores (N, W) at the floor."""
    ids = job.tokens(texts)
    scores = torch.empty(len(ids), len(job.words))
    for index in by_length([len(row) for row in ids], job.backbone.device):
        scores[index] = floor_scores(job, [ids[i] for i in index], job.prompt).cpu()
    return scores


@torch.inference_mode()
def plain_predict(job: Job, texts: Sequence[str]) -> Tensor:
    """Scores (N, W) by the plain loop."""
    parts = [plain_scores(job, job.tokens(part), job.prompt).cpu() for part in chunks(texts, CALLER_BATCH)]
    return torch.cat(parts)


def train_epoch(job: Job, texts: Sequence[str], *, bare: bool) -> None:
    """One epoch at the floor, without an optimiser and in batches of similar length, or of the plain loop."""
    ids = job.tokens(texts)
    prompt = job.prompt.clone().requires_grad_()
    optimizer = torch.optim.AdamW([prompt], lr=1e-3)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if bare else list(range(len(ids)))
    batches = list(chunks(order, TRAINING_BATCH))
    random.Random(0).shuffle(batches)
    for index in batches:
        rows = [ids[i] for i in index]
        scores = floor_scores(job, rows, prompt) if bare else plain_scores(job, rows, prompt)
        job.loss(scores, index).backward()
        if not bare:
            optimizer.step()
        prompt.grad = None


class PeftPrompt:
    """PEFT's prompt tuning: a head on a masked LM's trunk, label words of a causal LM's logits."""

    def __init__(self, job: Job) -> None:
        from peft import PromptTuningConfig, get_peft_model

        self.job, self.masked = job, job.backbone.kind == "masked"
        model = BertForSequenceClassification(job.model.config) if self.masked else copy.deepcopy(job.model)
        config = PromptTuningConfig(task_type="SEQ_CLS" if self.masked else "CAUSAL_LM", num_virtual_tokens=SOFT)
        self.model = get_peft_model(model.to(job.backbone.device), config).eval()

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Class scores (B, 2)."""
        tokenizer, device = self.job.backbone.tokenizer, self.job.backbone.device
        if self.masked:
            encoded = tokenizer(
                list(texts), truncation=True, max_length=LIMIT - SOFT, padding=True, return_tensors="pt"
            )
            logits = self.model(input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"])
            return logits.logits  # type: ignore[no-any-return]
        soft = slice(self.job.soft, self.job.soft + SOFT)
        ids = self.job.tokens(texts)
        for row in ids:
            del row[soft]
        encoded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(device)
        last = SOFT + encoded["attention_mask"].sum(1) - 1  # (B,)
        logits = self.model(**encoded).logits  # (B, P + T, V)
        return logits[torch.arange(len(texts)), last][:, self.job.words]

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> Tensor:
        """Class scores (N, 2)."""
        return torch.cat([self.scores(part).cpu() for part in chunks(texts, CALLER_BATCH)])

    def train(self, texts: Sequence[str]) -> None:
        """One epoch."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        for index in chunks(range(len(texts)), TRAINING_BATCH):
            self.job.loss(self.scores([texts[i] for i in index]), index).backward()
            optimizer.step()
            optimizer.zero_grad()


@contextlib.contextmanager
def openprompt(python: str, job: Job, texts: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """OpenPrompt in an environment of its own, with the same texts: a function that has it `predict` or `train`."""
    config, vocabulary = job.model.config, job.backbone.tokenizer.get_vocab()
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    script = Path(__file__).with_name("speed_openprompt.py")
    process = subprocess.Popen(
        [python, "-W", "ignore", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(line: str) -> None:
        assert process.stdin is not None and process.stdout is not None
        print(line, file=process.stdin, flush=True)
        if not process.stdout.readline():
            raise RuntimeError(f"OpenPrompt ended with status {process.wait()}; its message is above")

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.writelines(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.__getitem__))
        file.flush()
        asked = {
            "texts": list(texts),
            "vocabulary": file.name,
            "config": {key: getattr(config, key) for key in shape},
            "soft": SOFT,
            "words": [WORDS[name] for name in sorted(WORDS)],
            "limit": LIMIT,
            "batch": CALLER_BATCH,
            "training batch": TRAINING_BATCH,
            "threads": torch.get_num_threads(),
        }
        ask(json.dumps(asked))
        yield ask
    process.communicate()


@torch.inference_mode()
def score_candidates(job: Job, texts: Sequence[str]) -> Tensor:
    """Log-probabilities (N, W), the whole prompt anew for every candidate, longest first."""
    pairs = [(row, w) for row in job.tokens(texts) for w in job.words]
    scores = torch.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
    for index in chunks(order, CALLER_BATCH):
        embeds, mask, answers = job.inputs([pairs[i][0] for i in index], job.prompt)
        logs = job.model(inputs_embeds=embeds, attention_mask=mask).logits.float().log_softmax(-1)  # (B, T, V)
        scores[index] = logs[torch.arange(len(index)), answers, [pairs[i][1] for i in index]].cpu()
    return scores.view(len(texts), -1)


def harness_scorer(job: Job) -> Callable[[Sequence[str]], Tensor]:
    """lm-evaluation-harness's scoring of a multiple choice, from the same token ids."""
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    device = str(job.backbone.device)
    lm = HFLM(pretrained=job.model, tokenizer=job.backbone.tokenizer, batch_size=CALLER_BATCH, device=device)

    def scores(texts: Sequence[str]) -> Tensor:
        requests = [((str(row), str(w)), row, [w]) for row in job.tokens(texts) for w in job.words]
        logs = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return torch.tensor([log for log, _ in logs]).view(len(texts), -1)  # (N, W)

    return scores


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Slices of at most `size`."""
    return (items[at : at + size] for at in range(0, len(items), size))
