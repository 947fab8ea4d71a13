"""The shape of the house: who may import whom, and what must never be in it."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

import verbtune

PACKAGE = Path(verbtune.__file__).parent
# Each module imports only from those above it. One that is not here has no place yet: give it one.
ORDER = [
    "builtin", "task", "prompt", "artifact", "encode", "batch", "verbalizer", "attention", "head", "pieces", "start",
    "loading", "backbone", "text_cache", "compiled", "labelled",
    "lint", "calibration", "rows", "data", "parameters", "rejection", "tuning", "contrast", "first_opinion", "deep",
    "soft", "plots", "card", "classifier", "bank",
    "baselines", "metrics", "summary", "bench", "document", "report", "answers", "cli",
]  # fmt: skip
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
EVERY = sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(module: ast.Module) -> set[str]:
    """The modules of this package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = {verbtune._HOMES.get(alias.name, alias.name) for alias in node.names}
            found |= {node.module.split(".")[0]} if node.module else names
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("verbtune"):
            found.add(".".join(node.module.split(".")[1:]) or "verbtune")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "verbtune"}
        assert not (isinstance(node, ast.ImportFrom) and node.level > 1)
    return found


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in FILES} | {"builtin"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_imports_only_those_above_it(path: Path) -> None:
    above = ORDER[: ORDER.index(path.stem)]
    assert imported(tree(path)) <= set(above)


def test_the_import_check_sees_every_form() -> None:
    source = "from . import a, TaskBank\nfrom .b import c\ndef f():\n  import verbtune.d\n  from verbtune.e import g\n"
    assert imported(ast.parse(source)) == {"a", "bank", "b", "verbtune.d", "e"}


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
    "os.popen", "subprocess.run", "subprocess.Popen", "print",
}  # fmt: skip
UNPICKLING = {"pickle", "_pickle", "joblib", "marshal"}


def calls(module: ast.Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}


def unpickling(module: ast.Module) -> set[str]:
    """Imports of modules that unpickle, and what is taken from them, as they are written."""
    found: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.Import(names):
                found |= {ast.unparse(alias) for alias in names if alias.name.split(".")[0] in UNPICKLING}
            case ast.ImportFrom(str(name)) | ast.Attribute(ast.Name(name)) if name.split(".")[0] in UNPICKLING:
                found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_runs_text_or_unpickles(path: Path) -> None:
    assert not calls(tree(path)) & FORBIDDEN
    allowed = {"pickle", "pickle.dumps"} if path.stem == "baselines" else set()  # how large a pickle would be
    assert unpickling(tree(path)) <= allowed


def test_the_pickle_check_sees_every_form() -> None:
    forms = {
        "pickle as p",
        "joblib",
        "pickle.Unpickler",
        "from pickle import loads",
        "from marshal import load as read",
    }
    source = "import pickle as p\ndef f():\n    import json, joblib\n    class A(pickle.Unpickler): ...\n"
    source += "from pickle import loads\nfrom marshal import load as read\nfrom json import loads as plain\n"
    assert unpickling(ast.parse(source)) == forms


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_what_is_written_in_the_code_is_formatted(path: Path) -> None:
    """`str.format` on a user's template would let `{text.__class__}` in."""
    formatted = {call for call in calls(tree(path)) if call.endswith((".format", ".format_map"))}
    assert all(call[0] in "'\"" for call in formatted)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_yaml_is_loaded_by_the_strict_loader_only(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all", "yaml.safe_load"):
            assert ast.unparse(node.keywords[0].value) == "_SpecLoader"


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_remote_code_is_never_trusted(path: Path) -> None:
    assert "trust_remote_code" not in path.read_text(encoding="utf-8")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    out = run("import sys, verbtune; print(*(m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules))")
    assert out.strip() == ""


def test_the_public_names_are_there_and_others_are_not() -> None:
    for name in verbtune.__all__:
        assert getattr(verbtune, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'verbtune' has no attribute 'nothing'"):
        verbtune.nothing  # noqa: B018


@pytest.mark.parametrize("collecting", [True, False])
def test_a_first_use_leaves_the_garbage_collector_as_it_was(collecting: bool) -> None:
    try:
        (gc.enable if collecting else gc.disable)()
        assert verbtune.Task
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_module_offers_is_in_it_and_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module)
    names = next(
        (
            ast.literal_eval(n.value)
            for n in module.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        ),
        None,
    )
    assert names is not None
    defined = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    constants = {t for n in module.body for t in _targets(n)}
    assert set(names) <= set(defined) | constants
    assert all(ast.get_docstring(defined[name]) for name in names if name in defined)


def _targets(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {ast.unparse(target) for target in node.targets}
    return {ast.unparse(node.target)} if isinstance(node, ast.AnnAssign) else set()
