"""A saved classifier as a folder: safetensors, JSON and YAML, never a pickle.

It takes and gives plain data, so it knows nothing of estimators. A folder is written under a temporary
name and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .task import Task

__all__ = ["Artifact", "ArtifactError", "check_folder", "read", "size", "write"]

FORMAT = 2
PROMPT_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
DEEP_FILE = "deep_prompts.safetensors"
VERBALIZER_FILE = "verbalizer.safetensors"
STATE_FILE = "verbtune.json"
TASK_FILE = "task.yaml"
CARD_FILE = "README.md"
FILES = {PROMPT_FILE, DEEP_FILE, PEFT_FILE, VERBALIZER_FILE, STATE_FILE, TASK_FILE, CARD_FILE}


class ArtifactError(ValueError):
    """A saved classifier that cannot be read or written."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What is saved of a classifier.

    Attributes
    ----------
    task : Task
    prompt : Tensor of shape (P, H) or None
        The learned vectors; for a pure prefix of a causal LM, the embeddings of the special tokens
        before them included, as PEFT wants.
    second : dict of str to Tensor
        What the second opinion learned, its "deep_prompts" of shape (K, L, 2, A, D + 2, E) and "rows" (C, H).
    verbalizer : dict of str to Tensor
        What the verbalizer learned.
    state : dict
        Everything else, as plain JSON data.
    peft : dict or None
        PEFT's configuration, where the prompt is one that PEFT can load.
    card : str
        The model card, in Markdown.
    """

    task: Task
    prompt: Tensor | None
    second: dict[str, Tensor]
    verbalizer: dict[str, Tensor]
    state: dict[str, Any]
    peft: dict[str, Any] | None
    card: str


def write(folder: Path, artifact: Artifact) -> None:
    """Write all of it or nothing; an earlier classifier in the folder is replaced.

    Raises
    ------
    ArtifactError
        If the folder cannot be written, or holds something that is not a saved classifier.
    """
    files = {TASK_FILE: artifact.task.to_yaml().encode(), CARD_FILE: artifact.card.encode()}
    if artifact.prompt is not None:
        files[PROMPT_FILE] = safetensors.torch.save({"prompt_embeddings": artifact.prompt.contiguous()})
    for name, tensors in ((DEEP_FILE, artifact.second), (VERBALIZER_FILE, artifact.verbalizer)):
        if tensors:
            files[name] = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
    if artifact.peft:
        files[PEFT_FILE] = json.dumps(artifact.peft, indent=2).encode()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != CARD_FILE}
    state = {"format": FORMAT, **artifact.state, "files": hashes}
    state["checksum"] = _checksum(state)
    files[STATE_FILE] = json.dumps(state, indent=2, ensure_ascii=False, allow_nan=False).encode()
    check_folder(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Find out whether a classifier can be written to a folder, before the work whose result it is.

    Raises
    ------
    ArtifactError
        If something else is there, it cannot be replaced, or nothing may be written there.
    """
    try:
        if os.path.lexists(folder) and not _replaceable(folder):
            raise ArtifactError(f"{folder}: holds something that is not a saved classifier; choose another folder")
        if folder.exists() and (folder.samefile(Path.cwd()) or os.path.ismount(folder)):
            raise ArtifactError(
                f"{folder}: the current folder or a mount point, which cannot be replaced; choose a folder inside it"
            )
        parent = next(p for p in folder.absolute().parents if p.exists())
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise _unwritable(folder, f"{parent} is no folder that you may write to")


def read(folder: Path) -> Artifact:
    """Read a saved classifier and check that it is whole.

    Raises
    ------
    ArtifactError
        Naming the file that is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; give the folder that save_pretrained wrote")
    data = _bytes(folder, STATE_FILE)
    try:
        state = json.loads(data.decode())
        found, checksum = state["format"], state.pop("checksum", None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{folder / STATE_FILE}: damaged ({type(error).__name__}); save the classifier again"
        ) from None
    if found != FORMAT:
        earlier = isinstance(found, int) and found < FORMAT
        remedy = "fit and save the classifier again" if earlier else "update verbtune"
        raise ArtifactError(f"{folder}: format {found!r:.40}, this version reads {FORMAT}; {remedy}")
    if checksum != _checksum(state):
        raise ArtifactError(f"{folder / STATE_FILE}: damaged or changed; save the classifier again")
    hashes = state.get("files")
    if not isinstance(hashes, dict):
        raise ArtifactError(f"{folder / STATE_FILE}: does not say which files there are; save the classifier again")
    files: dict[str, bytes] = {}
    for name, expected in hashes.items():
        if name not in (TASK_FILE, PROMPT_FILE, DEEP_FILE, VERBALIZER_FILE, PEFT_FILE):
            raise ArtifactError(f"{folder / STATE_FILE}: lists the unknown file {name!r}; save the classifier again")
        files[name] = _bytes(folder, name)
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise ArtifactError(
                f"{folder / name}: damaged or changed (SHA-256 {found[:12]}…, expected {str(expected)[:12]}…); "
                "save the classifier again"
            )
    try:
        task = Task.from_text(files[TASK_FILE], source=str(folder / TASK_FILE))
        prompt = safetensors.torch.load(files[PROMPT_FILE])["prompt_embeddings"] if PROMPT_FILE in files else None
        second, verbalizer = (
            safetensors.torch.load(files[name]) if name in files else {} for name in (DEEP_FILE, VERBALIZER_FILE)
        )
        peft = json.loads(files[PEFT_FILE]) if PEFT_FILE in files else None
        if second and second.keys() != {"deep_prompts", "rows"}:
            raise ValueError(f"{DEEP_FILE} has {', '.join(second)} in place of deep_prompts and rows")
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder}: damaged ({error}); save the classifier again") from None
    for name, tensor in (("prompt", prompt), *second.items(), *verbalizer.items()):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{folder}: {name} holds numbers that are not finite; train it again")
    return Artifact(task, prompt, second, verbalizer, state, peft, "")


def _replaceable(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return not names or (STATE_FILE in names and names <= FILES)


def _unwritable(folder: Path, reason: str | None) -> ArtifactError:
    return ArtifactError(f"{folder}: cannot be written ({reason}); choose a folder you may write")


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def size(folder: Path) -> int:
    """Bytes of a saved classifier on disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder / name}: cannot be read ({error.strerror}); is the folder complete?") from None
