"""Imports run one way: the layers are drawn from the code, and an arrow that runs back up is a fault."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import lrcnn_lightning

PACKAGE = Path(lrcnn_lightning.__file__).parent
LAYERS = (
    ("errors", "fake", "recent"),
    ("config", "models", "stand_in"),
    ("graph", "monitor", "selection"),
    ("rules", "stepping_aside", "subclasses"),
    ("captures", "planning"),
    ("engine", "unrun"),
    ("messages",),
    ("forward", "outside"),
    ("rowwise", "session"),
    ("checking", "steps"),
    ("parallel", "single_device"),
    ("strategy",),
    ("__init__",),
    ("cli",),
)
"""From the ground up: a file may import from layers below its own, and from its own package."""


def modules() -> dict[str, ast.Module]:
    """The syntax of every module of the package, by its name."""
    files = (file for file in PACKAGE.rglob("*.py") if "conf" not in file.relative_to(PACKAGE).parts)
    names = {".".join(("lrcnn_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in files}
    return {name.removesuffix(".__init__"): ast.parse(file.read_text("utf-8")) for name, file in names.items()}


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, for types alone, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else str(node.module) for name in inner)


def unit(name: str) -> str:
    """The file or folder of the package that a module is, or is in."""
    return (*name.split("."), "__init__")[1]


def test_imports_run_down() -> None:
    trees = modules()
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert set(level) == {unit(name) for name in trees}
    wrong = [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in imported(tree, set(trees))
        if unit(name) != unit(other) and level[unit(name)] <= level[unit(other)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files() -> None:
    """The files of a package do not import one another, and its ``__init__`` only names what they have."""
    trees = modules()
    packages = {name for name in trees if any(other.startswith(f"{name}.") for other in trees)}
    edges = {name: set(imported(tree, set(trees))) - packages for name, tree in trees.items() if name not in packages}
    graphlib.TopologicalSorter(edges).prepare()


def test_who_imports_what_of_others() -> None:
    """Lightning is for the strategies and the callback, Hydra for the commands; the engine works with torch alone."""
    for name, tree in modules().items():
        top = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            str(node.module).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            if node.module
        }
        if "hydra" in top or "omegaconf" in top:
            assert unit(name) == "cli", name
        if "lightning" in top or "pytorch_lightning" in top:
            assert unit(name) in ("cli", "monitor", "parallel", "session", "single_device", "steps", "strategy"), name
