"""What a saved classifier says of itself: its model card, and what PEFT has to know of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .backbone import Backbone
from .compiled import CompiledTask
from .task import Task

__all__ = ["model_card", "peft_config"]


def model_card(
    task: Task, compiled: CompiledTask, classes: Sequence[Any], learned: Sequence[str], trained_parameters: int
) -> str:
    """The model card, in Markdown; `learned` names what was."""
    backbone = compiled.backbone
    peft = ""
    if backbone.kind == "causal" and compiled.layout.n_soft_prefix:
        peft = (
            "\nPEFT can load the soft prompt as well. It holds the embeddings of the leading special tokens, so encode "
            "the text with `add_special_tokens=False`; template and verbalizer are not part of PEFT's format.\n"
        )
    return (
        "---\nlibrary_name: verbtune\npipeline_tag: text-classification\n"
        f"base_model: {backbone.name or 'unknown'}\n---\n"
        f"# {task.task}\n\n{task.description}\n\n"
        f"{' and '.join(learned).capitalize() or 'The manual prompt'} for the frozen {backbone.kind} language model "
        f"`{backbone.name}` ({trained_parameters} trained numbers).\n\n"
        f"- Template: `{task.template_for(backbone.kind)}`\n"
        f"- Classes: {', '.join(map(str, classes))}\n\n"
        "```python\nfrom verbtune import PromptClassifier\n\n"
        'clf = PromptClassifier.from_pretrained("PATH OF THIS FOLDER")\n'
        'clf.predict_proba(["…"])\n```\n' + peft
    )


def peft_config(backbone: Backbone, n: int) -> dict[str, Any]:
    """PEFT's `adapter_config.json` for a soft prompt of `n` vectors."""
    config = backbone.model.config.get_text_config()
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone.name,
        "num_virtual_tokens": n,
        "token_dim": int(backbone.model.get_input_embeddings().weight.shape[1]),
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
