"""OpenPrompt's part in `speed.py`, by a Python of its own: it needs transformers 4.30.

It gets one line of JSON that says what to work on, and then a line for every piece of work, `predict` or `train`, which
it answers when that is done. `speed.md` says how to make the environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from openprompt import PromptDataLoader, PromptForClassification  # type: ignore[import-not-found]
from openprompt.data_utils import InputExample  # type: ignore[import-not-found]
from openprompt.plms.mlm import MLMTokenizerWrapper  # type: ignore[import-not-found]
from openprompt.prompts import ManualVerbalizer, SoftTemplate  # type: ignore[import-not-found]
from transformers import BertConfig, BertForMaskedLM, BertTokenizer


class OpenPrompt:
    """A soft template in front of the text and a manual verbalizer, on a BERT with random weights."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.texts, self.asked = asked["texts"], asked
        self.tokenizer = BertTokenizer(asked["vocabulary"])
        model = BertForMaskedLM(BertConfig(**asked["config"]))
        text = '{"placeholder": "text_a", "shortenable": True} It was {"mask"}.'
        self.template = SoftTemplate(model=model, tokenizer=self.tokenizer, text=text, num_tokens=asked["soft"])
        verbalizer = ManualVerbalizer(self.tokenizer, num_classes=2, label_words=asked["words"])
        self.model = PromptForClassification(
            plm=model, template=self.template, verbalizer=verbalizer, freeze_plm=True, plm_eval_mode=True
        )
        # It pads everything to one length: that of the longest example is the best there is.
        longest = max(map(len, self.tokenizer(self.texts)["input_ids"])) + len(
            self.tokenizer.tokenize("It was [MASK].")
        )
        self.length = min(longest, asked["limit"] - asked["soft"])

    def batches(self, size: int) -> Any:
        """The texts, tokenized and padded."""
        examples = [InputExample(guid=i, text_a=text, label=i % 2) for i, text in enumerate(self.texts)]
        return PromptDataLoader(
            dataset=examples,
            template=self.template,
            tokenizer=self.tokenizer,
            tokenizer_wrapper_class=MLMTokenizerWrapper,
            max_seq_length=self.length,
            batch_size=size,
            truncate_method="tail",
        )

    @torch.no_grad()
    def predict(self) -> list[Sequence[float]]:
        """Class scores of all texts."""
        self.model.eval()
        return [row for batch in self.batches(self.asked["batch"]) for row in self.model(batch).tolist()]

    def train(self) -> None:
        """One epoch."""
        self.model.train()
        learned = [p for p in self.template.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-3)
        for batch in self.batches(self.asked["training batch"]):
            torch.nn.functional.cross_entropy(self.model(batch), batch["label"]).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    """Do what standard input says."""
    answers, sys.stdout = sys.stdout, sys.stderr  # OpenPrompt prints
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    system = OpenPrompt(asked)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        {"predict": system.predict, "train": system.train}[line.strip()]()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
