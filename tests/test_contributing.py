"""The worked example of CONTRIBUTING.md: an operation that gets a rule."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lrcnn_lightning.rules.rule import _REGISTRY
from tests import test_rules
from tests.oracle import assert_exact, check_rules, roles, row_graph
from tests.test_docs import REPOSITORY, blocks

BLOCKS = blocks((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
EXAMPLE = next(code for code in BLOCKS if "class Difference" in code)
LINES = next(code for code in BLOCKS if "Case(" in code)


class Differences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(torch.diff(self.before(x), dim=2))
        return y


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The code as a module, whose rule is taken away again."""
    module = ModuleType("tests.example_of_contributing")
    sys.modules[module.__name__] = module
    before = dict(_REGISTRY)
    try:
        exec(compile(EXAMPLE, str(Path("CONTRIBUTING.md")), "exec"), vars(module))
        yield module
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)
        del sys.modules[module.__name__]


IMAGES = torch.randn(2, 3, 13, 9, dtype=torch.float64)


def test_without_the_rule_it_runs_whole() -> None:
    assert roles(row_graph(Differences().double(), [IMAGES]))["whole"] == ["aten.diff.default"]


@pytest.mark.usefixtures("example")
def test_with_the_rule_it_runs_on_rows() -> None:
    graph = check_rules(Differences(), IMAGES, axis=2)
    assert "aten.diff.default" in roles(graph)["row"] and not roles(graph)["whole"]
    assert_exact(Differences(), IMAGES, axis=2)


@pytest.mark.usefixtures("example")
def test_the_lines_of_the_table() -> None:
    """They are cases as those of `test_rules` are."""
    names = vars(test_rules)
    cases = [
        eval(compile(ast.Expression(line.value), "CONTRIBUTING.md", "eval"), names) for line in ast.parse(LINES).body
    ]  # type: ignore[attr-defined]
    assert [case.name for (case,) in cases] == ["difference", "second difference"]
    for (case,) in cases:
        test_rules.verify(case)
