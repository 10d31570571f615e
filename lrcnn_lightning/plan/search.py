"""Choosing a plan: candidates are built and priced by the cost model, and one is chosen by what was asked for.

With a budget: the fastest plan predicted to fit. Without: the plan of least memory whose extra work is within
``max_overhead``, or the fastest if none is. Numbers that the user gave are not varied.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.config import RowConfig, format_size
from lrcnn_lightning.errors import ConfigError, PlanError
from lrcnn_lightning.plan.cost import Machine
from lrcnn_lightning.plan.keeping import KEEPINGS, Keeping
from lrcnn_lightning.plan.notes import notes
from lrcnn_lightning.plan.plan import Choices, Part, Plan, build_plan, plain_plan
from lrcnn_lightning.plan.report import held_at_peak
from lrcnn_lightning.plan.segments import cut_points
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["choose_plan", "free_bytes", "search_plans", "usable_bytes"]

_ROWS = (2, 4, 8, 16, 32)
_SEGMENTS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARE_OF_FREE = 0.8
_MOST_ROWS = 64
_SMALL = 250
"""Nodes of a graph for which a whole grid of plans is tried in seconds."""
_REFINEMENTS = 48
_REFINED_NODES = 9_000
"""Plans that are tried at most when the best one is refined, and nodes that these have together."""


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
        chooses_freely = config.mode == "auto" and free_choice
        budget = usable_bytes(device) if chooses_freely else None
    if config.mode == "auto" and free_choice and budget is not None and not graph.communicates:
        plain = plain_plan(graph, leaves, training, Machine.of(device))
        if plain.peak_bytes <= budget:
            return plain
    best = search_plans(graph, leaves, training, config, Machine.of(device), budget, config.max_overhead)
    if budget is not None and best.peak_bytes > budget:
        raise PlanError(
            f"no plan fits memory_budget={format_size(budget)}: the least peak of activation memory that was found is "
            f"{format_size(best.peak_bytes)} ({best.choices.rows} rows, {best.choices.segments} segments); plain "
            f"PyTorch would take {format_size(best.plain_peak_bytes)}. At that peak live: "
            f"{held_at_peak(best)}. What helps: a smaller batch or image, half precision, freezing the first layers, "
            "or a larger budget"
        )
    found = notes(best, config, budget)
    return replace(best, notes=found) if found else best


def search_plans(
    graph: RowGraph,
    leaves: Collection[int],
    training: bool,
    config: RowConfig,
    machine: Machine,
    budget: int | None,
    max_overhead: float,
    tried: dict[Choices, tuple[int, float]] | None = None,
) -> Plan:
    """The best plan that is found; ``tried`` takes the peak (bytes) and the work (seconds) of every one tried."""
    height = max((graph.height(value.index) for value in graph.graph.inputs), default=0)
    search = _Search(graph, leaves, training, budget, max_overhead, machine)
    for options in _stages(graph, config, height, training):
        search.vary(options)
    if budget is not None:
        search.vary(_grid(graph, config, height, training))
    search.refine(_Moves(graph, config, search.best))
    assert search.best is not None
    if tried is not None:
        tried.update(search.tried)
    return search.best


class _Search:
    """Tries choices around the best ones so far."""

    def __init__(
        self,
        graph: RowGraph,
        leaves: Collection[int],
        training: bool,
        budget: int | None,
        max_overhead: float,
        machine: Machine,
    ) -> None:
        self.machine = machine
        self.graph, self.leaves, self.training = graph, leaves, training
        self.budget, self.max_overhead = budget, max_overhead
        self.tried: dict[Choices, tuple[int, float]] = {}
        self.best: Plan | None = None

    def refine(self, moves: _Moves) -> None:
        """Change the best plan segment by segment, as long as that makes it better."""
        limit = max(12, min(_REFINEMENTS, _REFINED_NODES // max(len(self.graph.nodes), 1)))
        improved = self.best is not None and self.best.mode != "plain" and self.training
        while improved and limit > 0:
            improved = False
            assert self.best is not None
            for choices in moves.of(self.best):
                if choices in self.tried:
                    continue
                limit -= 1
                if self._try(choices):
                    improved = True
                    break
                if limit <= 0:
                    break

    def _try(self, choices: Choices) -> bool:
        """Build and price a plan; whether it is the best one so far."""
        plan = build_plan(self.graph, self.leaves, self.training, choices, self.machine)
        self.tried[choices] = plan.cost.peak_bytes, plan.cost.seconds
        better = self.best is None or self._rank(plan) < self._rank(self.best)
        if better:
            self.best = plan
        return better

    def vary(self, options: dict[str, Sequence[Any]]) -> None:
        """Try all combinations of these options, the others being those of the best plan so far."""
        base = Choices() if self.best is None else self.best.choices
        for values in itertools.product(*options.values()):
            choices = replace(base, **dict(zip(options, values, strict=True)))
            if choices not in self.tried:
                self._try(choices)

    def _rank(self, plan: Plan) -> tuple[float, ...]:
        """Smaller is better. With a budget: fitting plans by time, others by memory. Without: plans within the
        allowed overhead by memory, others by time.
        """
        if self.budget is not None:
            fits = plan.peak_bytes <= self.budget
            return (0, plan.cost.seconds) if fits else (1, plan.peak_bytes)
        allowed = plan.overhead <= self.max_overhead
        return (0, plan.peak_bytes) if allowed else (1, plan.overhead)


class _Moves:
    """Plans that differ from one in a single segment, those around the segment of the peak first."""

    def __init__(self, graph: RowGraph, config: RowConfig, start: Plan | None) -> None:
        self.config = config
        nodes = [p for s in start.segments if not s.plain and s.backward for p in s.nodes] if start else []
        self.points = cut_points(graph, nodes) if nodes else []
        self.first = nodes[0] if nodes else 0
        self.barriers = any(role is Role.REDUCE for role in graph.roles)

    def of(self, plan: Plan) -> Iterator[Choices]:
        """The neighbours of a plan."""
        choices = plan.explicit
        parts = choices.parts
        peak = next((s.nodes[0] for s in plan.segments[plan.cost.peak_segment :] if not s.plain), parts[-1].first)
        order = sorted(range(len(parts)), key=lambda i: abs(parts[i].first - peak))
        for i in order:
            yield from (replace(choices, parts=(*parts[:i], part, *parts[i + 1 :])) for part in self._others(parts[i]))
            for changed in self._cuts(parts, i):
                yield replace(choices, parts=changed, segments=len(changed))

    def _others(self, part: Part) -> Iterator[Part]:
        """The same segment with another choice."""
        if self.config.rows == "auto":
            for rows in (part.rows * 2, part.rows * 3 // 2, part.rows // 2):
                if 1 < rows <= _MOST_ROWS:
                    yield replace(part, rows=rows)
        keepings: list[Keeping] = ["lean", "demand", "narrow", "borders"]
        yield from (replace(part, keeping=k) for k in keepings if k != part.keeping and self.barriers)
        if self.config.mode == "auto":
            yield replace(part, mode="overlap" if part.mode == "two_phase" else "two_phase")

    def _cuts(self, parts: tuple[Part, ...], i: int) -> Iterator[tuple[Part, ...]]:
        """Segment ``i`` begins elsewhere, is joined with the one before, or is divided."""
        part = parts[i]
        lower = parts[i - 1].first if i else self.first
        upper = parts[i + 1].first if i + 1 < len(parts) else math.inf
        if i and part.first > self.first:
            near = sorted(
                (p for p in self.points if lower < p < upper and p != part.first), key=lambda p: abs(p - part.first)
            )
            yield from ((*parts[:i], replace(part, first=p), *parts[i + 1 :]) for p in near[:6])
        if self.config.segments != "auto" or part.first < self.first:
            return
        if i and parts[i - 1].first >= self.first:
            yield (*parts[:i], *parts[i + 1 :])
        inside = [p for p in self.points if part.first < p < upper]
        step = max(1, len(inside) // 6)
        yield from ((*parts[: i + 1], replace(part, first=p), *parts[i + 1 :]) for p in inside[step // 2 :: step])


def _stages(graph: RowGraph, config: RowConfig, height: int, training: bool) -> Iterator[dict[str, Sequence[Any]]]:
    """Which options are varied together, in order: where borders stand and what is kept, then rows, then chunks."""
    rows = [config.rows] if isinstance(config.rows, int) else [r for r in _ROWS if 2 * r <= height] or [1]
    segments = [config.segments] if isinstance(config.segments, int) else list(_SEGMENTS if training else (1,))
    samples = max((graph.samples(value.index) for value in graph.graph.inputs), default=1)
    chunks = [config.batch_chunks] if isinstance(config.batch_chunks, int) else [1]
    if config.batch_chunks == "auto" and samples > 1 and graph.batch_splits:
        chunks = sorted({1, min(samples, 4), max(1, samples // 4), samples})
    barriers = training and any(role is Role.REDUCE for role in graph.roles)
    keepings: list[Keeping] = ["lean", "narrow", "demand", "borders"] if barriers else ["borders"]
    modes = [config.mode]
    if config.mode == "auto":
        modes = ["two_phase"]
    first_chunks = chunks[len(chunks) // 2]
    # A batch is divided first, since that needs no halos; rows are then tried on top.
    middle = 1 if first_chunks > 1 and config.rows == "auto" else rows[len(rows) // 2]
    yield {
        "mode": modes,
        "rows": [middle],
        "batch_chunks": [first_chunks],
        "segments": segments[::2] if len(segments) > 2 else segments,
        "keeping": keepings,
    }
    yield {"rows": [1, *rows] if config.rows == "auto" else rows, "batch_chunks": chunks}
    yield {"segments": segments}
    if config.mode == "auto":
        yield {"mode": ["two_phase", "overlap"]}
    yield {"rows": rows}


def _grid(graph: RowGraph, config: RowConfig, height: int, training: bool) -> dict[str, Sequence[Any]]:
    """For the fastest plan that fits, plans of every kind: with few rows, and with much or little kept.

    Of a large graph fewer, so that planning takes seconds.
    """
    fine = len(graph.nodes) <= _SMALL
    rows = (
        [r for r in ((1, 2, 4, 8, 16) if fine else (1, 4)) if r <= height] if config.rows == "auto" else [config.rows]
    )
    segments = list((1, 2, 3, 4, 6, 8) if fine else (2, 4, 8)) if config.segments == "auto" else [config.segments]
    barriers = training and any(role is Role.REDUCE for role in graph.roles)
    keepings = list(KEEPINGS) if barriers else ["borders"]
    modes = ["two_phase", "overlap"] if config.mode == "auto" and fine else [config.mode]
    modes = ["two_phase"] if modes == ["auto"] else modes
    return {"mode": modes, "rows": rows, "segments": segments if training else [1], "keeping": keepings}


def usable_bytes(device: torch.device) -> int:
    """What a step may take of what the device has free, in bytes."""
    return int(free_bytes(device) * _SHARE_OF_FREE)


def free_bytes(device: torch.device) -> int:
    """What the device has free, in bytes."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
