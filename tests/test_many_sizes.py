"""Inputs of many sizes: decisions are taken over from near ones, and everything stays exact and within its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import RowConfig
from lrcnn_lightning.forward import RowwiseForward
from lrcnn_lightning.models.resnet import resnet18
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.planning.machine import CPU
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.search import choose_plan
from lrcnn_lightning.planning.workspace import Workspaces
from lrcnn_lightning.recent import Recent
from tests.oracle import requires_grad_leaves, row_graph
from tests.twins import image, twins, walk

SIZES = [(96, 64), (104, 72), (88, 80), (120, 64), (96, 96), (128, 100)]


def block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


def network() -> nn.Sequential:
    return nn.Sequential(block(3, 8), block(8, 8), block(8, 8))


def planned(net: nn.Module, sizes: list[tuple[int, int]], **options: Any) -> list[Plan]:
    """The plans for images of several sizes, one after another."""
    forward = RowwiseForward(net, RowConfig.from_options(**options), notify=lambda text: None)
    return [forward.plan_for((torch.empty(1, 3, *size),), {}) for size in sizes]


def test_near_sizes_take_over_what_was_decided() -> None:
    sizes = [(4 * height, 4 * width) for height, width in SIZES[:4]]
    plans = planned(resnet18(width=0.25), sizes, mode="two_phase", memory_budget=None, max_overhead=1.0)
    assert [plan.is_transferred for plan in plans] == [False, True, True, True]
    first = plans[0].explicit
    for plan in plans[1:]:
        assert [(p.first, p.mode, p.keeping) for p in plan.explicit.parts] == [
            (p.first, p.mode, p.keeping) for p in first.parts
        ]
        assert plan.peak_bytes / plan.plain_peak_bytes <= 1.1 * plans[0].peak_bytes / plans[0].plain_peak_bytes


def test_steps_at_many_sizes_are_exact() -> None:
    for options in ({"mode": "two_phase", "rows": 4}, {"mode": "overlap", "segments": 2}, {"memory_budget": None}):
        plain, ours = twins(network, max_overhead=50, **options)
        for size in SIZES:

            def step(module: nn.Module, x: Tensor, size: tuple[int, int] = size) -> Any:
                return module(image(shape=(2, 3, *size))).square().sum().backward()

            walk(plain, ours, step, steps=1)
        assert any(plan.is_transferred for plan, _ in ours.forward._plans.values())


def test_a_budget_holds_for_each_size() -> None:
    """As far as any plan can keep it; where the decisions of another size do not, there is a search."""
    net = network()
    budget = int(0.45 * lrcnn_lightning.plan(net, torch.empty(1, 3, *SIZES[-1])).plain_peak_bytes)
    plans = planned(net, SIZES[1:], memory_budget=budget, mode="two_phase")
    assert all(plan.peak_bytes <= budget for plan in plans)
    assert any(plan.is_transferred for plan in plans)
    for size, plan in zip(SIZES[1:], plans, strict=True):
        ours = lrcnn_lightning.rowwise(net, plan=plan)
        assert measure_fake(ours, torch.empty(1, 3, *size)).peak_bytes <= budget, size
        lrcnn_lightning.restore(ours)


def test_a_size_that_is_far_is_searched_for() -> None:
    near, far, between = (64, 64), (256, 256), (180, 180)
    plans = planned(network(), [near, far, between], mode="two_phase", rows=2)
    assert [plan.is_transferred for plan in plans] == [False, False, True]


def test_sizes_do_not_drift() -> None:
    """What was taken over is not taken over again, so that a size is never far from what was searched for."""
    plans = planned(network(), [(64, 64 + 50 * i) for i in range(5)], mode="two_phase", rows=2, axis=2)
    assert [plan.is_transferred for plan in plans] == [False, True, True, True, False]


class Choosy(nn.Module):
    """Does something else with small images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x if x.shape[-1] > 70 else nn.functional.avg_pool2d(x, 3, 1, 1))
        return y


def test_a_module_that_does_something_else_is_searched_for() -> None:
    plans = planned(Choosy(), [(96, 80), (96, 64), (96, 76), (96, 60)], mode="two_phase", rows=2)
    assert [plan.is_transferred for plan in plans] == [False, False, True, True]


def test_on_a_device_whose_workspaces_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that was searched for has those of its own rows; others are taken from a few heights while they are made.
    A size that keeps the budget by these alone is divided further.
    """
    gpu = replace(CPU, caching=True, device=torch.device("cuda", 0))
    module = network().double()
    problems = []
    for size in ((96, 64), (100, 64)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        graph = row_graph(module, [x], 2)
        problems.append(Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True, gpu))
    monkeypatch.setattr(Workspaces, "_found", lambda self, call: 1024)
    config, cpu = RowConfig(mode="two_phase", memory_budget=512 * 1024), torch.device("cpu")
    first = choose_plan(problems[0], config, cpu)
    second = choose_plan(problems[1], config, cpu, [first])
    assert not first.machine.interpolates and second.is_transferred and second.machine == first.machine
    assert second.peak_bytes <= 512 * 1024


def test_what_was_used_of_late_is_remembered() -> None:
    recent: Recent[str, int] = Recent(10, 2)
    for key, weight in (("a", 4), ("b", 4), ("c", 2)):
        recent.put(key, len(recent), weight)
    assert list(recent) == ["a", "b", "c"] and recent.get("a") == 0
    recent.put("d", 3, 3)  # "b" has not been used for longest
    assert list(recent) == ["c", "a", "d"] and recent.get("b") is None
    recent.put("e", 4, 100)  # two stay, whatever they weigh
    assert list(recent) == ["d", "e"] and list(recent.values()) == [3, 4]
    recent.put("d", 5, 3)
    assert list(recent) == ["e", "d"] and len(recent) == 2
