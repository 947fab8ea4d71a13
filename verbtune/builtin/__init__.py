"""The two language models that ship with verbtune, and the check that their weights are whole.

``benchmarks/pretrain.py`` in the repository made them; each folder's ``README.md`` tells how.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["NAMES", "ModelFileError", "builtin_path"]

NAMES = ("builtin/masked", "builtin/causal")

_FOLDER = Path(__file__).parent
_SUMS = "SHA256SUMS"


class ModelFileError(OSError):
    """A weight file of a built-in model is missing or damaged."""


def builtin_path(name: str) -> Path:
    """Return the folder of a built-in model, after checking its weight files.

    Parameters
    ----------
    name : str
        ``"builtin/masked"`` or ``"builtin/causal"``.

    Returns
    -------
    pathlib.Path
        A folder that transformers' ``from_pretrained`` methods load.

    Raises
    ------
    ValueError
        If no built-in model has that name.
    ModelFileError
        If a weight file is missing or its SHA-256 is not the one it was released with.

    Examples
    --------
    >>> builtin_path("builtin/masked").name
    'masked'
    """
    if name not in NAMES:
        raise ValueError(f"no built-in model {name!r}; there are {', '.join(NAMES)}")
    folder = _FOLDER / name.removeprefix("builtin/")
    for file, expected in _expected_sums().items():
        path = _FOLDER / file
        if path.parent in (folder, _FOLDER):  # its own weights, and those that both share
            _check(path, expected)
    return folder


def _expected_sums() -> dict[str, str]:
    """Read the table of weight files and the SHA-256 each must have."""
    table = _FOLDER / _SUMS
    if not table.is_file():
        raise ModelFileError(f"{table} is missing; reinstall verbtune")
    rows = (line.split() for line in table.read_text(encoding="ascii").splitlines())
    return {file: expected for expected, file in rows}


def _check(path: Path, expected: str) -> None:
    """Raise unless the file is there and has the SHA-256 expected."""
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        state = "missing"
    else:
        if found == expected:
            return
        state = f"damaged (its SHA-256 is {found})"
    raise ModelFileError(f"weight file {path} is {state}; expected SHA-256 {expected}; reinstall verbtune")
