"""The planner: what it predicts is what is measured, and what it chooses is as good as any of a grid of plans."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning import PlanError
from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.models import resnet50, unet, vgg16
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.keeping import KEEPINGS
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner, plain_plan
from lrcnn_lightning.planning.price import exchanges
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.residency import KEEP
from lrcnn_lightning.planning.search import choose_plan, search_plans
from lrcnn_lightning.rules import RowGraph
from tests.oracle import requires_grad_leaves, row_graph

CPU = torch.device("cpu")


def zoo() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks of other authors, and this project's, at sizes where maps outweigh weights."""
    nets = pytest.importorskip("monai.networks.nets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "vgg16": (vgg16(width=0.25), (1, 3, 192, 192)),
            "resnet50": (resnet50(width=0.25), (2, 3, 160, 160)),
            "unet": (unet(base_channels=8), (1, 3, 160, 160)),
            "UNet": (nets.UNet(2, 1, 2, (16, 32, 32), (2, 2), num_res_units=2), (1, 1, 192, 160)),
            "UNet3d": (nets.UNet(3, 1, 2, (8, 16), (2,), num_res_units=2, norm="BATCH"), (1, 1, 48, 32, 32)),
            "BasicUNet": (nets.BasicUNet(2, 1, 2, (8, 8, 16, 16, 32, 8)), (1, 1, 160, 160)),
            "DynUNet": (nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 16]), (1, 1, 160, 160)),
            "SegResNet": (nets.SegResNet(2, 8, 1, 2), (1, 1, 128, 128)),
            "VNet": (nets.VNet(2, 1, 2), (1, 1, 64, 64)),
            "AttentionUnet": (nets.AttentionUnet(2, 1, 2, (8, 16, 16), (2, 2)), (1, 1, 160, 128)),
            "DenseNet": (nets.DenseNet(2, 1, 2, 16, 8, (2, 3), 2), (1, 1, 160, 160)),
            "HighResNet": (nets.HighResNet(2, 1, 2), (1, 1, 96, 96)),
        }


OPTIONS: list[dict[str, Any]] = [
    {"mode": "two_phase", "rows": 4, "segments": 1},
    {"mode": "overlap", "rows": 3, "segments": 3},
    {"mode": "two_phase", "rows": 8, "segments": 4},
    {"memory_budget": None},
]


def quick(names: Sequence[str]) -> list[Any]:
    """All networks, those that are not named marked slow."""
    everything = ["vgg16", "resnet50", "unet", "UNet", "UNet3d", "BasicUNet", "DynUNet", "SegResNet", "VNet"]
    everything += ["AttentionUnet", "DenseNet", "HighResNet"]
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in everything]


@pytest.mark.parametrize("name", quick(["vgg16", "UNet", "UNet3d", "DenseNet"]))
def test_predicted_and_measured_peaks_agree(name: str) -> None:
    module, shape = zoo()[name]
    image = torch.empty(shape, device="meta")
    plain = measure_fake(module, image).peak_bytes
    predicted = lrcnn_lightning.plan(module, image, rows=2).plain_peak_bytes
    assert abs(predicted / plain - 1) <= 0.02, f"plain PyTorch: {predicted} predicted, {plain} measured"
    errors = {}
    for options in OPTIONS:
        lrcnn_lightning.rowwise(module, **options)
        measured = measure_fake(module, image).peak_bytes
        errors[str(options)] = module.__dict__["forward"].training_plan.peak_bytes / measured - 1
    table = "\n".join(f"{100 * error:+6.1f} %  {case}" for case, error in errors.items())
    assert statistics.median(map(abs, errors.values())) <= 0.10, table
    assert max(map(abs, errors.values())) <= 0.15, table


def situation(module: nn.Module, shape: tuple[int, ...]) -> tuple[RowGraph, frozenset[int]]:
    x = torch.randn(shape)
    graph = row_graph(module, [x], "auto")
    return graph, requires_grad_leaves(graph.graph, module, [x])


def grid(graph: RowGraph, leaves: frozenset[int]) -> list[Plan]:
    table = itertools.product(("two_phase", "overlap"), (1, 2, 4, 8), (1, 2, 4, 8), KEEPINGS)
    return [Planner(Problem(graph, leaves, True)).plan(Choices(mode, r, s, 1, keep)) for mode, r, s, keep in table]


@pytest.mark.parametrize("name", quick(["vgg16", "DynUNet"]))
def test_no_plan_of_a_grid_is_better(name: str) -> None:
    graph, leaves = situation(*zoo()[name])
    plans = grid(graph, leaves)
    least = min((plan for plan in plans if plan.overhead <= 0.35), key=lambda plan: plan.peak_bytes, default=None)
    chosen = choose_plan(Problem(graph, leaves, True), RowConfig(memory_budget=None), CPU)
    if least is not None:
        assert chosen.overhead <= 0.35
        assert chosen.peak_bytes <= least.peak_bytes, (chosen.explicit, least.choices)
    for share in (0.75, 0.5, 0.35):
        budget = int(chosen.plain_peak_bytes * share)
        fitting = [plan for plan in plans if plan.peak_bytes <= budget]
        if fitting:
            fastest = min(plan.cost.seconds for plan in fitting)
            ours = choose_plan(Problem(graph, leaves, True), RowConfig(memory_budget=budget), CPU)
            assert ours.peak_bytes <= budget
            assert ours.cost.seconds <= fastest * 1.0001, (share, ours.explicit, fastest)


class Deep(nn.Module):
    """A thousand operations: residual blocks of BatchNorm networks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_of_a_thousand_operations_few_plans_are_made() -> None:
    """Each takes in proportion to the operations, so a graph of many has fewer of them: planning takes seconds."""
    graph, leaves = situation(Deep(140), (1, 3, 64, 64))
    assert len(graph.nodes) >= 900
    budget = plain_plan(Problem(graph, leaves, True)).peak_bytes // 2
    tried: dict[Choices, tuple[float, float]] = {}
    planner = Planner(Problem(graph, leaves, True, Machine.of(CPU)))
    plan = search_plans(planner, RowConfig(memory_budget=budget), budget, 0.35, tried)
    assert plan.peak_bytes <= budget
    assert len(tried) * len(graph.nodes) <= 400_000


def test_the_frontier_is_monotone() -> None:
    module, shape = zoo()["unet"]
    frontier = lrcnn_lightning.frontier(module, torch.empty(shape, device="meta"))
    points = frontier.points
    assert len(points) >= 3 and frontier.checkpointing
    for less, more in itertools.pairwise(points):
        assert less.peak_bytes < more.peak_bytes and less.overhead > more.overhead
    assert points[0].peak_bytes < min(point.peak_bytes for point in frontier.checkpointing)
    assert frontier.to_dict()["plain"]["peak_bytes"] == frontier.plain.peak_bytes
    assert "checkpointing" in str(frontier)


def test_a_budget_that_nothing_fits_says_what_is_in_the_way() -> None:
    module, shape = vgg16(width=0.25), (1, 3, 128, 128)
    with pytest.raises(
        PlanError, match=r"least peak .* was found is .*At that peak live: \w+.* of features.*What helps"
    ):
        lrcnn_lightning.plan(module, torch.empty(shape, device="meta"), memory_budget="100KiB")


def measured(module: nn.Module, shape: tuple[int, ...], data: dict[str, Any]) -> int:
    return measure_fake(lrcnn_lightning.rowwise(module, plan=data), torch.empty(shape, device="meta")).peak_bytes


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_rows_of_unequal_heights_balance_the_skew(mode: str) -> None:
    module, shape = vgg16(width=0.25), (1, 3, 512, 256)
    graph, leaves = situation(module, shape)
    plans = [
        Planner(Problem(graph, leaves, True)).plan(Choices(mode, 4, 1, 1, "lean", heights=heights))
        for heights in ("even", "balanced")
    ]
    even, balanced = (measured(module, shape, plan.to_dict()) for plan in plans)
    assert balanced < (0.85 if mode == "two_phase" else 0.95) * even
    assert balanced == pytest.approx(plans[1].peak_bytes, rel=0.10)
    cuts = plans[1].loops()[0].cuts
    heights = [b - a for a, b in itertools.pairwise((0, *cuts))]
    assert cuts[-1] == 16 and sum(heights) == 16
    # Two-phase sharing: the first row goes beyond what it was asked for. Overlapping: the middle rows have two halos.
    assert heights[0] < heights[-1] if mode == "two_phase" else heights[1] < heights[0]
    assert ", ".join(map(str, (heights[0], heights[2], heights[-1]))) in str(plans[1])


def test_single_maps_are_kept_where_that_pays() -> None:
    """The pooled map of a residual network's stem is small, and pass after pass computes it from a much larger one."""
    module, shape = resnet50(), (1, 3, 1024, 1024)
    graph, leaves = situation(module, shape)
    pool = next(v.index for v in graph.values if "max_pool" in v.name)
    streamed = Planner(Problem(graph, leaves, True)).plan(Choices("two_phase", 8, 1, 1, "lean"))
    assert exchanges(streamed, 6)[0] == (pool, KEEP)
    kept = Planner(Problem(graph, leaves, True)).plan(Choices("two_phase", 8, 1, 1, "lean", exceptions=((pool, KEEP),)))
    assert kept.cost.seconds < 0.97 * streamed.cost.seconds
    assert kept.peak_bytes - streamed.peak_bytes <= 1.1 * graph.values[pool].bytes
    peak = measured(module, shape, kept.to_dict())
    assert peak == pytest.approx(kept.peak_bytes, rel=0.10)
