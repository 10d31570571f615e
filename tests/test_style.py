"""The code's form and types are part of the tests.

Types are those of the releases in constraints.txt. Other releases of PyTorch, NumPy and Lightning declare other types.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]


def others() -> list[str]:
    """Which of the packages whose types matter are of another release than in constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines())
    named = {
        requirement.name: requirement
        for requirement in map(Requirement, filter(None, lines))
        if requirement.marker is None or requirement.marker.evaluate()
    }
    return [
        f"{name} {version}"
        for name in ("hydra-core", "lightning", "mypy", "numpy", "torch")
        if (version := importlib.metadata.version(name)).partition("+")[0] not in named[name].specifier
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        pytest.param(
            ["mypy", "--strict", "-p", "lrcnn_lightning"],
            marks=pytest.mark.skipif(bool(others()), reason=f"not those of constraints.txt: {', '.join(others())}"),
        ),
    ],
    ids=["ruff-check", "ruff-format", "mypy-strict"],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
