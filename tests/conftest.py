"""Tiny language models of many architectures, with random weights, built once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from verbtune.backbone import Backbone
from verbtune.task import Task

torch.set_num_threads(1)  # tiny models lose more to waiting for each other than two threads gain

SENTENCES = [
    "A great film, warm and funny, and it was good to the end.",
    "A terrible film: dull, slow and bad; it was awful, I want my two hours back.",
    "The plot is thin but the actors are wonderful and the music great.",
    "Please cancel my order and send the money back.",
    "When does the parcel arrive? I want to check its status.",
    "It was great. It was terrible. It was good. It was bad.",
    "Not bad at all, in summary a positive review of a negative person.",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _wordpiece() -> tf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _byte_bpe(special: bool) -> tf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<mask>"] if special else ["<|endoftext|>"]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=450, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    if not special:
        return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0], bos_token=names[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def _metaspace(masked: bool) -> tf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>", "<mask>"]
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=names))
    single = "<s> $A </s>" if masked else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    extra = {"mask_token": "<mask>"} if masked else {}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", **extra
    )


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROOM = {"max_position_embeddings": 160}


def _bert() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _wordpiece()
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(t), **SMALL, **ROOM)), t


def _roberta() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _byte_bpe(special=True)
    config = tf.RobertaConfig(vocab_size=len(t), pad_token_id=1, bos_token_id=0, eos_token_id=2, **SMALL, **ROOM)
    return tf.RobertaForMaskedLM(config), t


def _modernbert() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _wordpiece()
    config = tf.ModernBertConfig(
        vocab_size=len(t),
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        local_attention=16,
        global_attn_every_n_layers=2,
        **SMALL,
        **ROOM,
    )
    return tf.ModernBertForMaskedLM(config), t


def _distilbert() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _wordpiece()
    config = tf.DistilBertConfig(vocab_size=len(t), dim=32, n_layers=2, n_heads=4, hidden_dim=48, **ROOM)
    return tf.DistilBertForMaskedLM(config), t


def _deberta() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _metaspace(masked=True)
    config = tf.DebertaV2Config(
        vocab_size=len(t),
        pad_token_id=2,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        **SMALL,
        **ROOM,
    )
    return tf.DebertaV2ForMaskedLM(config), t


def _gpt2() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _byte_bpe(special=False)
    config = tf.GPT2Config(
        vocab_size=len(t), n_positions=160, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return tf.GPT2LMHeadModel(config), t


def _llama() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _metaspace(masked=False)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(t), num_key_value_heads=2, **SMALL, **ROOM)), t


def _qwen3() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _byte_bpe(special=False)
    config = tf.Qwen3Config(vocab_size=len(t), num_key_value_heads=2, head_dim=8, **SMALL, **ROOM)
    return tf.Qwen3ForCausalLM(config), t


def _opt() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _byte_bpe(special=True)
    config = tf.OPTConfig(
        vocab_size=len(t),
        hidden_size=32,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        pad_token_id=1,
        **ROOM,
    )
    return tf.OPTForCausalLM(config), t


def _bert_causal() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    t = _wordpiece()
    return tf.BertLMHeadModel(tf.BertConfig(vocab_size=len(t), is_decoder=True, **SMALL, **ROOM)), t


def _lm(
    name: str,
    tokenizer: Callable[[], tf.PreTrainedTokenizerFast],
    *,
    head: str = "ForCausalLM",
    config: str | None = None,
    **options: Any,
) -> Callable[[], tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]]:
    def build() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
        t = tokenizer()
        ids = {f"{token}_token_id": getattr(t, f"{token}_token_id") for token in ("pad", "bos", "eos", "mask")}
        made = getattr(tf, config or f"{name}Config")
        sizes = SMALL | ROOM | ids | options
        return getattr(tf, name + head)(made(vocab_size=len(t), **{k: v for k, v in sizes.items() if v is not None})), t

    return build


_of_bytes = functools.partial(_byte_bpe, special=False)
_of_bytes_with_mask = functools.partial(_byte_bpe, special=True)
_of_pieces = functools.partial(_metaspace, masked=False)
_grouped = {"num_key_value_heads": 2}
_gemma = _grouped | {"head_dim": 8}

MASKED = {
    "bert": _bert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "distilbert": _distilbert,
    "deberta-v2": _deberta,
}
CAUSAL = {"gpt2": _gpt2, "llama": _llama, "qwen3": _qwen3, "opt": _opt, "bert-causal": _bert_causal}
# These see the last 8 positions only, in all layers or in every other one.
CAUSAL |= {
    "mistral": _lm("Mistral", _of_pieces, sliding_window=8, **_grouped),
    "modernbert-decoder": _lm(
        "ModernBertDecoder", _of_bytes, pad_token_id=0, local_attention=16, global_attn_every_n_layers=2
    ),
}
ARCHITECTURES = MASKED | CAUSAL


# Asked less of: that they are read as they are.
OTHERS = {
    "camembert": _lm("Camembert", _of_bytes_with_mask, head="ForMaskedLM"),
    "electra": _lm("Electra", _wordpiece, head="ForMaskedLM", embedding_size=16),
    "eurobert": _lm("EuroBert", _wordpiece, head="ForMaskedLM"),
    "mpnet": _lm("MPNet", _of_bytes_with_mask, head="ForMaskedLM"),
    "nomic-bert": _lm("NomicBert", _wordpiece, head="ForMaskedLM"),
    "roformer": _lm("RoFormer", _wordpiece, head="ForMaskedLM", embedding_size=32),
    "xlm-roberta": _lm("XLMRoberta", _of_bytes_with_mask, head="ForMaskedLM"),
    "bloom": _lm("Bloom", _of_bytes),
    "cohere": _lm("Cohere", _of_bytes, **_grouped),
    "falcon": _lm("Falcon", _of_bytes),
    "gemma": _lm("Gemma", _of_pieces, **_gemma),
    "gemma2": _lm("Gemma2", _of_pieces, sliding_window=8, **_gemma),
    "gemma3": _lm(
        "Gemma3",
        _of_pieces,
        config="Gemma3TextConfig",
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **_gemma,
    ),
    "gpt-neo": _lm(
        "GPTNeo", _of_bytes, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=64
    ),
    "gpt-neox": _lm("GPTNeoX", _of_bytes),
    "granite": _lm("Granite", _of_bytes, logits_scaling=2.0, embedding_multiplier=3.0, **_grouped),
    "olmo2": _lm("Olmo2", _of_bytes, **_grouped),
    "phi": _lm("Phi", _of_bytes),
    "phi3": _lm("Phi3", _of_pieces, **_grouped),
    "qwen2": _lm("Qwen2", _of_bytes, **_grouped),
    "smollm3": _lm("SmolLM3", _of_bytes, pad_token_id=0, **_grouped),
    "stablelm": _lm("StableLm", _of_bytes, **_grouped),
}


@functools.cache
def tiny(architecture: str) -> Backbone:
    """A tiny backbone with random weights, larger than usual so that scores differ clearly."""
    torch.manual_seed(0)
    model, tokenizer = (ARCHITECTURES | OTHERS)[architecture]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0, 0.2)
    return Backbone(model, tokenizer)


@pytest.fixture(params=list(ARCHITECTURES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """One tiny model of every architecture in turn."""
    return tiny(request.param)


@pytest.fixture
def masked() -> Backbone:
    return tiny("bert")


@pytest.fixture
def causal() -> Backbone:
    return tiny("gpt2")


@pytest.fixture
def task() -> Task:
    return Task.from_dict(
        {
            "task": "tone",
            "template": "{text} It was {answer}.",
            "verbalizer": {"negative": ["bad", "terrible"], "positive": ["good", "great"]},
        }
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
