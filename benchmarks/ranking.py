"""Predicted against measured time of many plans: whether the planner ranks them as the machine does.

    python benchmarks/ranking.py                      # every network, under a grid of plans: minutes
    python benchmarks/ranking.py resnet50 --steps 3   # one network, each plan timed in three steps

Alone on the machine: steps with several threads take many times longer beside any other process. The last line is
Spearman's rank correlation of the ratios to plain PyTorch, 1 where the order is the same.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import CASES
from torch import nn

from lrcnn_lightning.config import RowConfig, format_count
from lrcnn_lightning.engine.execute import Execution
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.rowwise import RowwiseForward


@dataclass(frozen=True)
class Grid:
    """A network's input, and plans that differ in what costs time."""

    shape: tuple[int, int, int, int]
    plans: tuple[Choices, ...]


GRIDS = {
    "resnet50": Grid(
        (1, 3, 1024, 1024),
        (
            Choices("two_phase", 8, 1, 1, "lean"),
            Choices("two_phase", 16, 1, 1, "lean"),
            Choices("two_phase", 8, 1, 1, "lean", rows_where_needed=True),
            Choices("two_phase", 4, 2, 1, "lean", rows_where_needed=True),
            Choices("two_phase", 4, 1, 1, "narrow", rows_where_needed=True),
            Choices("overlap", 8, 6, 1, "borders"),
        ),
    ),
    "vgg16": Grid(
        (1, 3, 1024, 1024),
        (Choices("two_phase", 8, 1), Choices("overlap", 4, 4), Choices("two_phase", 4, 8)),
    ),
    "unet": Grid(
        (1, 3, 512, 512),
        (
            Choices("two_phase", 4, 1),
            Choices("two_phase", 8, 2, rows_where_needed=True),
            Choices("two_phase", 2, 4, 1, "narrow"),
            Choices("two_phase", 24, 1, 1, "demand"),
        ),
    ),
    "resnet50-frozen-bn": Grid(
        (1, 3, 768, 768),
        (Choices("two_phase", 8, 1), Choices("two_phase", 4, 4)),
    ),
    "resnet50-batch": Grid(
        (8, 3, 224, 224),
        (Choices("two_phase", 1, 1, 4), Choices("two_phase", 4, 1, 1, rows_where_needed=True)),
    ),
}


def _shortest(run: Callable[[], torch.Tensor], module: nn.Module, steps: int) -> float:
    """Seconds of the shortest of some steps; the one before them is not timed."""
    seconds = []
    for _ in range(steps + 1):
        module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        run().sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _ranks(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers).argsort().argsort().double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*GRIDS, []], default=[], help="networks (default: all)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each plan (default: 2)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    predicted, measured = [], []
    print("| network | plan | seconds | predicted | of plain | predicted | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.networks or GRIDS:
        grid = GRIDS[name]
        torch.manual_seed(0)
        module, images = CASES[name].build(), torch.randn(grid.shape)
        plain = _shortest(lambda m=module, x=images: m(x), module, arguments.steps)  # type: ignore[misc]
        graph, leaves, _, device = RowwiseForward(module, RowConfig()).situation((images,), {})
        for choices in grid.plans:
            plan = Planner(Problem(graph, leaves, True, Machine.of(device))).plan(choices)
            execution, fresh = Execution(plan), copy.deepcopy(module)
            seconds = _shortest(lambda e=execution, m=fresh, x=images: e(m, [x]), fresh, arguments.steps)  # type: ignore[misc]
            measured.append(seconds / plain)
            predicted.append(1 + plan.overhead)
            numbers = f"{format_count(choices.rows, 'row')}, {format_count(choices.segments, 'segment')}"
            text = f"{choices.mode}, {numbers}, {choices.keeping}"
            text += ", where needed" if choices.rows_where_needed else ""
            print(
                f"| {name} | {text} | {seconds:.2f} | {plan.cost.seconds:.2f} | {measured[-1]:.2f} "
                f"| {predicted[-1]:.2f} | {plan.plain_peak_bytes / plan.peak_bytes:.1f} times less |",
                flush=True,
            )
    correlation = torch.corrcoef(torch.stack([_ranks(predicted), _ranks(measured)]))[0, 1]
    errors = sorted(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    print(
        f"rank correlation {correlation:.2f}, error of the ratio {100 * errors[len(errors) // 2]:.0f} % in the median"
    )


if __name__ == "__main__":
    main()
