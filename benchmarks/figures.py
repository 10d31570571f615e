"""Activation memory and time of row-wise steps against plain PyTorch, side by side in one run.

    python benchmarks/figures.py                       # every network
    python benchmarks/figures.py vgg16 --size 1024     # one network at another size
    python benchmarks/figures.py --no-time             # memory alone: on fake tensors, any size in seconds

Memory is the deterministic measure of `lrcnn_lightning.monitor`, so its figures are the same on every machine. Time is
the ratio of medians of alternating steps; run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning.config import format_count, format_size
from lrcnn_lightning.models import resnet50, unet, vgg16
from lrcnn_lightning.monitor import measure_fake


def _frozen_batch_norm(module: nn.Module) -> nn.Module:
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval().requires_grad_(False)
    return module


@dataclass(frozen=True)
class Case:
    """A network, its input, and the options of the plan."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "vgg16": Case(vgg16, (1, 3, 2048, 2048), {"memory_budget": None}),
    "resnet50-frozen-bn": Case(lambda: _frozen_batch_norm(resnet50()), (1, 3, 1024, 1024), {"memory_budget": None}),
    "resnet50": Case(resnet50, (1, 3, 1024, 1024), {"memory_budget": None}),
    "unet": Case(unet, (1, 3, 1024, 1024), {"memory_budget": None}),
    "resnet50-batch": Case(resnet50, (32, 3, 224, 224), {"memory_budget": None}),
}


def _step(module: nn.Module, images: torch.Tensor) -> float:
    module.zero_grad(set_to_none=True)
    start = time.perf_counter()
    module(images).sum().backward()
    return time.perf_counter() - start


def _time_ratio(plain: nn.Module, ours: nn.Module, shape: tuple[int, ...], repeats: int) -> float:
    images = torch.randn(shape)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for i in range(repeats + 1):
        for name, module in (("plain", plain), ("ours", ours)):
            seconds = _step(module, images)
            if i:  # the first step captures, plans and warms up
                times[name].append(seconds)
    return statistics.median(times["ours"]) / statistics.median(times["plain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[], help="networks (default: all)")
    parser.add_argument("--size", type=int, help="another height and width, in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each (default: 3)")
    parser.add_argument("--no-time", action="store_true", help="memory only")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="options of rowwise()")
    arguments = parser.parse_args()
    given = {name: int(v) if v.isdigit() else v for name, v in (o.split("=", 1) for o in arguments.options)}
    print("| network | input | plain | row-wise | times less | time | plan |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.cases or CASES:
        case = CASES[name]
        size = (arguments.size,) * 2 if arguments.size else case.shape[2:]
        shape = (*case.shape[:2], *size)
        torch.manual_seed(0)
        plain, ours = case.build(), case.build()
        lrcnn_lightning.rowwise(ours, **{**case.options, **given})
        images = torch.empty(shape, device="meta")
        before, after = measure_fake(plain, images).peak_bytes, measure_fake(ours, images).peak_bytes
        ratio = "" if arguments.no_time else f"{_time_ratio(plain, ours, shape, arguments.repeats):.2f}"
        plan = ours.forward.training_plan  # type: ignore[union-attr]
        choices = plan.choices
        counts = {"row": choices.rows, "segment": choices.segments, "chunk": choices.batch_chunks}
        text = ", ".join([choices.mode, *(format_count(number, noun) for noun, number in counts.items())])
        print(
            f"| {name} | {' x '.join(map(str, shape))} | {format_size(before)} | {format_size(after)} "
            f"| {before / after:.1f} | {ratio} | {text} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
