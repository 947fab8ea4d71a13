"""A language model and its tokenizer, read from a folder or the hub, and what tells them from any others."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .builtin import builtin_path

__all__ = ["BackboneError", "Kind", "fingerprint", "kind_of", "load_model", "resolve_dtype"]

Kind = Literal["masked", "causal"]


class BackboneError(ValueError):
    """A language model that cannot be loaded or used."""


def kind_of(architecture: str) -> Kind | None:
    """Whether a model's class, by its name, is a masked or a causal LM, or None."""
    if "MaskedLM" in architecture or "ForPreTraining" in architecture:
        return "masked"
    if "CausalLM" in architecture or "LMHead" in architecture:
        return "causal"
    return None


def resolve_dtype(dtype: str, device: str) -> str:
    """The name of the precision that "auto", or another name, means on a device.

    Raises
    ------
    BackboneError
        If there is no such precision.
    """
    if dtype == "auto":
        return "bfloat16" if _fast_in_bfloat16(device) else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BackboneError(f"dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16")
    return dtype


def load_model(
    name: str, *, kind: Kind | None, revision: str | None, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Kind]:
    """Load a model with its language-model head, and its tokenizer; on the device "meta" it has no weights.

    Raises
    ------
    BackboneError
        In one line: what could not be loaded, why, and what to do.
    """
    path = str(builtin_path(name)) if name.startswith("builtin/") else os.path.expanduser(name)
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise BackboneError(f"cannot load the language model {name!r}: there is no such folder")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(
            f"device={device!r} cannot be used ({reason}); use cpu, or cuda where there is a GPU"
        ) from None
    missing: list[str] = []
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        kind = kind or kind_of(" ".join(config.architectures or []))
        if kind is None:
            raise BackboneError(
                f"{name}: its configuration says {config.architectures or 'no architecture'}, neither a masked "
                "nor a causal LM; pass kind='masked' or kind='causal' to Backbone.load"
            )
        auto = AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM
        if device == "meta":
            with torch.device(device):
                model = auto.from_config(config)  # type: ignore[no-untyped-call]
        else:
            model, info = auto.from_pretrained(  # type: ignore[misc]
                path, revision=revision, dtype=getattr(torch, dtype), output_loading_info=True
            )
            missing = sorted(info["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except BackboneError:
        raise
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot load the language model {name!r}: {reason} Use builtin/masked, builtin/causal, a folder "
            "with a transformers model, or a hub name that is cached or reachable."
        ) from error
    if missing:
        raise BackboneError(
            f"{name}: the weights lack {len(missing)} tensors of {type(model).__name__} (first: {missing[0]}), so "
            "it has no trained LM head; use a checkpoint saved with its language-model head"
        )
    return model.to(device), tokenizer, kind


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the weights and the tokenizer, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        # All as bfloat16: a file loaded as float32 on a CPU and as bfloat16 on a GPU is one LM.
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    # What a call leaves behind in a fast tokenizer is no part of what it is.
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _fast_in_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return True
    # AVX512-BF16 alone does not do: on a Xeon kept to it products took 1.4 times as long as in float32, on an EPYC
    # 0.3 times. Older versions of torch cannot tell.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    of_amd = able.get("avx512_bf16") and str(able.get("cpu_name")).startswith("AMD")
    return device == "cpu" and bool(able.get("amx_bf16") or of_amd)
