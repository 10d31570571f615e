r"""Using the room below the peak: less work for no memory.

Only at one step of a plan is as much alive as at its peak. At the others there is room left:

    bytes  |              _peak_____________________________________
           |            __|  |__            room
           |         __/        \__   ____
           |______ _/               \_/    \____________
                forward               backward            time

Two things are done with it. What is computed on the way to a map that is restored stays for when it is due (`restore`),
and loops are divided into fewer rows: every row costs the calls of its operations and a pass over their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lrcnn_lightning.planning.builder import ProgramBuilder
from lrcnn_lightning.planning.footprint import Footprints
from lrcnn_lightning.planning.limit import largest_of_loop
from lrcnn_lightning.planning.loop import Loop, redivide
from lrcnn_lightning.planning.memo import Memo
from lrcnn_lightning.planning.program import BackwardRows, RunRows, SegmentProgram, Step, Sweep
from lrcnn_lightning.rules import RowGraph

if TYPE_CHECKING:
    from lrcnn_lightning.planning.plan import Plan

__all__ = ["with_room"]

_MARGIN = 1.1
"""Slabs are taken to be so many times larger than in proportion to the height of their rows: they have halos, too."""


def with_room(plan: Plan, builders: Mapping[int, ProgramBuilder]) -> Plan:
    """The plan made to use the room below its peak; ``builders`` are those of its segments, by their numbers."""
    segments = list(plan.segments)
    if plan.training:
        for number, builder in builders.items():
            if builder.on_demand and builder.restores_twice:
                room = [plan.peak_bytes - peak for peak in plan.cost.step_peaks[builder.name]]
                segments[number] = builder.with_room(room)
        plan = _better(plan, segments)
    if plan.choices.rows_where_needed:
        fewer = _fewer_rows(plan)
        if fewer:
            plan = _better(plan, _divided(plan, fewer).segments)
    return plan


def _better(plan: Plan, segments: Sequence[SegmentProgram]) -> Plan:
    """The plan with other segments, if it has less work and no higher peak then."""
    if tuple(segments) == plan.segments:
        return plan
    other = replace(plan, segments=tuple(segments))
    if other.oversized is not None:
        return plan
    return other if other.peak_bytes <= plan.peak_bytes and other.cost.seconds < plan.cost.seconds else plan


def _divided(plan: Plan, rows: Mapping[str, int]) -> Plan:
    """The plan with some loops, by their names, in so many rows."""
    assert plan.memo is not None
    memo, segments = plan.memo, []
    for segment in plan.segments:
        own = tuple((name, rows[name]) for name in dict.fromkeys(loop.name for loop in segment.loops()) if name in rows)
        if own and (segment, own) not in memo.divided:
            memo.divided[segment, own] = _redivided(plan.graph, segment, dict(own), memo)
        segments.append(memo.divided[segment, own] if own else segment)
    return replace(plan, segments=tuple(segments))


def _redivided(graph: RowGraph, segment: SegmentProgram, rows: Mapping[str, int], memo: Memo) -> SegmentProgram:
    divided = _Redivided(graph, rows, memo).of

    def changed(step: Step) -> Step:
        if isinstance(step, (RunRows, Sweep)):
            return replace(step, loop=divided(step.loop))
        if isinstance(step, BackwardRows):
            return replace(step, run=replace(step.run, loop=divided(step.run.loop)))
        return step

    return replace(
        segment, forward=tuple(map(changed, segment.forward)), backward=tuple(map(changed, segment.backward))
    )


class _Redivided:
    """Loops with so many rows, by their names."""

    def __init__(self, graph: RowGraph, rows: Mapping[str, int], memo: Memo) -> None:
        self.graph, self.rows, self.memo = graph, rows, memo
        self.made: dict[str, Loop] = {}

    def of(self, loop: Loop) -> Loop:
        """The loop, the same one if its name is not among those with other rows."""
        if loop.name not in self.rows:
            return loop
        if loop.name not in self.made:
            other = redivide(self.graph, loop, self.rows[loop.name], self.memo)
            self.made[loop.name] = loop if other.carries else other  # other cuts may lie where something is carried
        return self.made[loop.name]


def _fewer_rows(plan: Plan) -> dict[str, int]:
    """Loops, by name, that are faster with fewer rows and stay below the peak with these.

    Tried are the fewest rows that the peak allows and, where large results cost more, the fewest with slabs that are
    not large. Each loop takes what is best for it.
    """
    seconds = _seconds(plan, {})
    best: dict[str, int] = {}
    for limit in dict.fromkeys((math.inf, plan.machine.large_bytes)):
        fewest = _fewest_rows(plan, limit)
        if not fewest:
            break
        for name, trial in _seconds(plan, fewest).items():
            if trial < seconds[name]:
                seconds[name], best[name] = trial, fewest[name]
    return best


def _seconds(plan: Plan, rows: Mapping[str, int]) -> dict[str, float]:
    """How long the loops of each name take, some of them, by name, in so many rows."""
    loops = plan.cost.loops  # by whose costs the durations have become known
    assert plan.memo is not None and plan.memo.durations is not None
    redivided = _Redivided(plan.graph, rows, plan.memo)
    seconds: dict[str, float] = {}
    for run, _, _, known in loops:
        name, other = run.loop.name, redivided.of(run.loop)
        needed = known if other is run.loop else plan.memo.durations.of(run.through(other))
        seconds[name] = seconds.get(name, 0.0) + needed
    return seconds


def _fewest_rows(plan: Plan, limit: float) -> dict[str, int]:
    """Loops that carry nothing, by name, and the fewest rows with which each stays below the peak of the plan, and its
    slabs below the limit (bytes).

    Loops with carries are left alone: those of the forward and the backward pass have to have the same rows.
    """
    needed: dict[str, int] = {}
    present: dict[str, int] = {}
    assert plan.memo is not None
    footprints, most = Footprints.of(plan.graph, plan.differentiable, plan.machine), plan.machine.most_elements
    for (loop, *_), fixed, slabs, _ in plan.cost.loops:
        count = present[loop.name] = len(loop.rows)
        left = max(min(plan.peak_bytes - fixed, limit), 1)
        rows = count if loop.carries else math.ceil(count * slabs * _MARGIN / left)
        if rows < count:
            elements = largest_of_loop(plan.graph, footprints, loop, plan.memo).elements
            rows = max(rows, min(count, math.ceil(count * elements * _MARGIN / most)))
        needed[loop.name] = max(needed.get(loop.name, 1), rows)
    return {name: rows for name, rows in needed.items() if rows < present[name]}
