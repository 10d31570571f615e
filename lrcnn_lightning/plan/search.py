"""Choosing a plan: candidates are built and priced by the cost model, and one is chosen by what was asked for.

With a budget: the fastest plan predicted to fit. Without: the plan of least memory whose extra work is within
``max_overhead``. Numbers that the user gave are not varied.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import torch

from lrcnn_lightning.config import RowConfig, format_size
from lrcnn_lightning.errors import ConfigError, PlanError
from lrcnn_lightning.plan.keeping import Keeping
from lrcnn_lightning.plan.plan import Choices, Plan, build_plan, plain_plan
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["choose_plan", "free_bytes"]

_ROWS = (2, 4, 8, 16, 32)
_SEGMENTS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARE_OF_FREE = 0.8


def choose_plan(
    graph: RowGraph, leaves: Collection[int], training: bool, config: RowConfig, device: torch.device
) -> Plan:
    """The plan for a configuration.

    Raises `ConfigError` when more rows are asked for than the input has, and `PlanError` when nothing fits a budget.
    """
    height = max((graph.height(value.index) for value in graph.graph.inputs), default=0)
    if isinstance(config.rows, int) and config.rows > height:
        shapes = ", ".join(str(list(v.shape)) for v in graph.graph.inputs)
        raise ConfigError(
            f"rows={config.rows} is more than the {height} rows of the input (shapes {shapes}): "
            f"allowed are 1 to {height}, or 'auto'"
        )
    budget = config.budget_bytes
    free_choice = config.rows == config.segments == config.batch_chunks == "auto"
    if budget == "auto":
        if config.mode == "auto" and free_choice:
            budget = int(free_bytes(device) * _SHARE_OF_FREE)
        else:
            budget = None
    best: Plan | None = None
    least: Plan | None = None
    if config.mode == "auto" and free_choice and budget is not None:
        plain = plain_plan(graph, leaves, training)
        if plain.peak_bytes <= budget:
            return plain
    for choices in _candidates(graph, config, height, training):
        plan = build_plan(graph, leaves, training, choices)
        if least is None or plan.peak_bytes < least.peak_bytes:
            least = plan
        if budget is not None:
            if plan.peak_bytes <= budget and (best is None or plan.cost.seconds < best.cost.seconds):
                best = plan
        elif plan.overhead <= config.max_overhead and (best is None or plan.peak_bytes < best.peak_bytes):
            best = plan
    assert least is not None
    if best is None and budget is not None:
        raise PlanError(
            f"no plan fits memory_budget={format_size(budget)}: the least peak of activation memory that was found is "
            f"{format_size(least.peak_bytes)} ({least.choices.rows} rows, {least.choices.segments} segments); plain "
            f"PyTorch would take {format_size(least.plain_peak_bytes)}. What helps: a smaller batch or image, half "
            "precision, freezing the first layers, or a larger budget"
        )
    return best or least


def _candidates(graph: RowGraph, config: RowConfig, height: int, training: bool) -> Iterator[Choices]:
    modes = ("two_phase", "overlap") if config.mode == "auto" else (config.mode,)
    if config.mode == "auto" and config.rows == "auto":
        modes = ("two_phase",)
    rows = [config.rows] if isinstance(config.rows, int) else [r for r in _ROWS if 2 * r <= height] or [1]
    segments = [config.segments] if isinstance(config.segments, int) else list(_SEGMENTS)
    samples = max((graph.samples(value.index) for value in graph.graph.inputs), default=1)
    chunks = [config.batch_chunks] if isinstance(config.batch_chunks, int) else [1]
    if config.batch_chunks == "auto" and samples > 1 and graph.batch_splits:
        chunks = sorted({1, min(samples, 4), samples} if samples <= 8 else {1, 4, samples // 2})
    barriers = training and any(role is Role.REDUCE for role in graph.roles[:-1])
    keeps: tuple[Keeping, ...] = ("lean", "narrow", "borders") if barriers else ("borders",)
    if not training:
        segments = segments[:1]
    for mode in modes:
        for count in rows:
            for parts in segments:
                for chunk in chunks:
                    for keep in keeps:
                        yield Choices(mode, count, parts, chunk, keep)


def free_bytes(device: torch.device) -> int:
    """What the device has free, in bytes."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
