"""Peers, by the public interfaces of their released packages, as classifiers that the bench can call.

PEFT's prompt tuning, P-tuning and prefix tuning: under a classification head, as its guides have it for encoders,
or on label words after a manual prompt, as they have it for causal LMs. SetFit on the same LM as an encoder.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from verbtune import Backbone
from verbtune.attention import quick_gradients
from verbtune.batch import by_length
from verbtune.compiled import CompiledTask, compile_task
from verbtune.data import check_labels, check_rows
from verbtune.encode import Row
from verbtune.task import Task
from verbtune.tuning import in_rounds, tune
from verbtune.verbalizer import Verbalizer

__all__ = ["DOCUMENTED_RATES", "PEFT_METHODS", "PeftHead", "PeftWords", "SetFit"]

FLOAT_BYTES = 4
MAX_LENGTH = 256
PEFT_METHODS = ("prompt-tuning", "p-tuning", "prefix-tuning")
# Of PEFT's guides and SetFit's defaults.
DOCUMENTED_RATES = {"prompt-tuning": 3e-2, "p-tuning": 1e-3, "prefix-tuning": 1e-2, "setfit": 2e-5}


def peft_config(method: str, task_type: str, n_tokens: int, task: Task, backbone: Backbone) -> peft.PeftConfig:
    """Virtual tokens, all else as PEFT has it; a causal LM's prompt starts at a text, as in its guide."""
    common: dict[str, Any] = {"task_type": task_type, "num_virtual_tokens": n_tokens}
    if method == "prompt-tuning" and task_type == "CAUSAL_LM":
        text = task.description or " ".join(task.classes)
        return peft.PromptTuningConfig(
            **common,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=backbone.model.config.name_or_path,
        )
    if method == "prompt-tuning":
        return peft.PromptTuningConfig(**common)
    if method == "p-tuning":
        return peft.PromptEncoderConfig(**common, encoder_hidden_size=128)
    return peft.PrefixTuningConfig(**common)


class Peft(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What PEFT's methods are asked for."""

    def __init__(
        self,
        task: Any,
        *,
        model: Any,
        method: str,
        learning_rate: float,
        steps: int = 100,
        n_tokens: int = 20,
        random_state: int = 0,
    ) -> None:
        self.task = task
        self.model = model
        self.method = method
        self.n_tokens = n_tokens
        self.learning_rate = learning_rate
        self.steps = steps
        self.random_state = random_state


class PeftHead(Peft):
    """PEFT on a sequence-classification head: the text alone, no template and no label words.

    The head that transformers puts on a masked LM is trained too, its pooler included: the built-in model has none,
    and PEFT would leave a random one as it is.
    """

    def fit(self, X: Any, y: Any) -> PeftHead:
        """Train virtual tokens and head."""
        self.task_ = Task.load(self.task)
        rows = check_rows(X, self.task_.fields)
        self.classes_, names, codes = check_labels(y, len(rows), self.task_)
        self.backbone_ = Backbone.load(self.model)
        torch.manual_seed(self.random_state)
        plain = classification_model(self.backbone_, len(names))
        config = peft_config(self.method, "SEQ_CLS", self.n_tokens, self.task_, self.backbone_)
        config.modules_to_save = ["classifier", "score", "pooler"]
        self.peft_ = peft.get_peft_model(plain, config)
        self.trained_parameters_, self.artifact_bytes_ = train(
            self.peft_,
            lambda index: F.cross_entropy(
                self.logits([rows[i] for i in index]), torch.tensor(codes[list(index)], device=self.backbone_.device)
            ),
            lengths=[len(text) for text in joined(rows)],
            learning_rate=self.learning_rate,
            steps=self.steps,
            seed=self.random_state,
        )
        return self

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Of shape (B, C)."""
        batch = self.backbone_.tokenizer(
            [" ".join(row.values()) for row in rows],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(self.backbone_.device)
        with autocast(self.backbone_), quick_gradients(self.backbone_.device):
            logits: Tensor = self.peft_(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.float()

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        return in_batches(self.logits, check_rows(X, self.task_.fields), len(self.classes_))


class PeftWords(Peft):
    """PEFT on a causal LM, manual template and label words: trained on the words' likelihood, as its guide has it.

    Classes are told by the total log-likelihood of their words, which is more than the guide's free generation.
    """

    def fit(self, X: Any, y: Any) -> PeftWords:
        """Train virtual tokens."""
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, names, codes = check_labels(y, len(rows), task)
        backbone = Backbone.load(self.model)
        torch.manual_seed(self.random_state)
        self.task_ = task
        self.compiled_ = compile_task(task, backbone, classes=names, max_length=MAX_LENGTH)
        self.verbalizer_ = Verbalizer(self.compiled_.words, backbone.state_width)
        config = peft_config(self.method, "CAUSAL_LM", self.n_tokens, task, backbone)
        self.peft_ = peft.get_peft_model(float_copy(backbone.model), config)
        first = [self.compiled_.words.owner.index(c) for c in range(len(names))]  # a class's first word
        self.trained_parameters_, self.artifact_bytes_ = train(
            self.peft_,
            lambda index: -self.log_likelihood([rows[i] for i in index], [first[codes[i]] for i in index]).mean(),
            lengths=[len(text) for text in joined(rows)],
            learning_rate=self.learning_rate,
            steps=self.steps,
            seed=self.random_state,
        )
        return self

    def log_likelihood(self, rows: Sequence[Row], words: Sequence[int]) -> Tensor:
        """Of one word after each text, of shape (B,)."""
        compiled: CompiledTask = self.compiled_
        device = compiled.backbone.device
        pieces = [list(compiled.words.pieces[w]) for w in words]
        ids = [e.ids[: e.answer] + p for e, p in zip(compiled.encode(rows), pieces, strict=True)]
        longest = max(map(len, ids))
        inputs = torch.zeros(len(ids), longest, dtype=torch.long)  # (B, T)
        wanted = torch.zeros(len(ids), longest, dtype=torch.bool)  # (B, T)
        attention = torch.zeros(len(ids), longest, dtype=torch.long)  # (B, T)
        for i, (line, p) in enumerate(zip(ids, pieces, strict=True)):
            inputs[i, : len(line)] = torch.tensor(line)
            attention[i, : len(line)] = 1
            wanted[i, len(line) - len(p) : len(line)] = True
        with autocast(compiled.backbone), quick_gradients(compiled.backbone.device):
            output = self.peft_(input_ids=inputs.to(device), attention_mask=attention.to(device))
        logits = output.logits[:, -longest:-1].float()  # (B, T - 1, V), without the virtual tokens
        logs = logits.log_softmax(-1).gather(2, inputs[:, 1:, None].to(device))[..., 0]  # (B, T - 1)
        return (logs * wanted[:, 1:].to(device)).sum(1)

    def class_scores(self, rows: Sequence[Row]) -> Tensor:
        """Of shape (B, C)."""
        n_words = len(self.compiled_.words.words)
        scores = torch.stack([self.log_likelihood(rows, [w] * len(rows)) for w in range(n_words)], dim=1)  # (B, W)
        return self.verbalizer_(scores.cpu(), torch.zeros(len(rows), 0))  # type: ignore[no-any-return]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        return in_batches(self.class_scores, check_rows(X, self.task_.fields), len(self.classes_))


class SetFit(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """SetFit on the LM's trunk with mean pooling, all its settings as released but the learning rate.

    `max_steps` bounds the pairs where there are many classes: SetFit's own default takes all pairs of texts.
    """

    def __init__(
        self, task: Any, *, model: Any, learning_rate: float, max_steps: int = 500, random_state: int = 0
    ) -> None:
        self.task = task
        self.model = model
        self.learning_rate = learning_rate
        self.max_steps = max_steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SetFit:
        """Train the encoder on pairs of texts, then a logistic regression on its states."""
        task = Task.load(self.task)
        rows = check_rows(X, task.fields)
        self.classes_, _, codes = check_labels(y, len(rows), task)
        self.task_ = task
        backbone = Backbone.load(self.model)
        with tempfile.TemporaryDirectory() as folder:
            float_copy(backbone.model.base_model).save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
            transformer = Transformer(folder, max_seq_length=MAX_LENGTH)
            pooling = Pooling(backbone.model.config.hidden_size)
            encoder = SentenceTransformer(modules=[transformer, pooling], device=str(backbone.device))
            self.setfit_ = SetFitModel(encoder, LogisticRegression())
            pairs = len(rows) * (len(rows) + 1) // 2
            arguments = TrainingArguments(
                output_dir=str(Path(folder) / "out"),
                body_learning_rate=self.learning_rate,
                max_steps=self.max_steps if pairs > 16 * self.max_steps else -1,
                seed=self.random_state,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                show_progress_bar=False,
            )
            data = Dataset.from_dict({"text": joined(rows), "label": codes.tolist()})
            Trainer(model=self.setfit_, args=arguments, train_dataset=data).train()
        self.trained_parameters_ = sum(p.numel() for p in encoder.parameters())
        self.artifact_bytes_ = FLOAT_BYTES * self.trained_parameters_
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Class probabilities (N, C)."""
        texts = joined(check_rows(X, self.task_.fields))
        return np.asarray(self.setfit_.predict_proba(texts, as_numpy=True, show_progress_bar=False), dtype=np.float64)


def joined(rows: Sequence[Row]) -> list[str]:
    """A row's fields as one text."""
    return [" ".join(row.values()) for row in rows]


def float_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own in float32: training in 16 bits loses small steps."""
    return copy.deepcopy(model).float()


def autocast(backbone: Backbone) -> torch.autocast:
    """The precision that the shared LM computes in, around a float32 model."""
    low = backbone.model.dtype != torch.float32
    return torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=low)


def classification_model(backbone: Backbone, n_classes: int) -> nn.Module:
    """The LM's trunk under the head that transformers puts on it."""
    config = copy.deepcopy(backbone.model.config)
    config.num_labels = n_classes
    model = AutoModelForSequenceClassification.from_config(config).float()
    model.base_model.load_state_dict(backbone.model.base_model.state_dict(), strict=False)
    return model.to(backbone.device)  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    loss: Callable[[Sequence[int]], Tensor],
    *,
    lengths: Sequence[int],
    learning_rate: float,
    steps: int,
    seed: int,
) -> tuple[int, int]:
    """AdamW with warm-up and linear decay, as in PEFT's guides; returns trained numbers and their bytes."""
    model.train()
    tune(
        model,
        lambda index, _: loss(index),
        in_rounds(lengths, 16, seed),
        prompt=None,
        learning_rate=learning_rate,
        steps=steps,
        warmup=0.06,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    model.eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, FLOAT_BYTES * trained


def in_batches(scores: Callable[[Sequence[Row]], Tensor], rows: Sequence[Row], n_classes: int) -> NDArray[np.float64]:
    """Probabilities (N, C) of batches of similar length, in the caller's order."""
    found = torch.empty(len(rows), n_classes)
    with torch.inference_mode():
        for index in by_length([len(text) for text in joined(rows)], torch.device("cpu")):
            found[index] = scores([rows[i] for i in index]).float().cpu()
    probabilities: NDArray[np.float64] = found.double().softmax(dim=1).numpy()
    return probabilities
