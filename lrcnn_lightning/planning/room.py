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
from typing import Any

from lrcnn_lightning.planning.builder import SegmentBuilder
from lrcnn_lightning.planning.limit import Limit
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.loops import Loops
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.simulation import Simulator
from lrcnn_lightning.planning.steps import BackwardRows, RunRows, Segment, Step, Sweep

__all__ = ["Room"]

_MARGIN = 1.1
"""Slabs are taken to be so many times larger than in proportion to the height of their rows: they have halos, too."""


class Room:
    """The room of programs of one problem, made by the same ``loops`` and priced by the same ``simulator``."""

    def __init__(self, simulator: Simulator, loops: Loops, limit: Limit) -> None:
        self.simulator, self.loops, self.limit = simulator, loops, limit
        self._divided: dict[Any, Segment] = {}
        """Segments with other numbers of rows, by what they were and the rows of their loops."""

    def used(self, program: Program, builders: Mapping[int, SegmentBuilder]) -> Program:
        """The program made to use the room below its peak; ``builders`` are those of its segments, by their numbers."""
        if program.training:
            segments, cost = list(program.segments), self.simulator.cost(program)
            for number, builder in builders.items():
                if builder.on_demand and builder.restores_twice:
                    room = [cost.peak_bytes - peak for peak in cost.step_peaks[builder.name]]
                    segments[number] = builder.with_room(room)
            program = self._better(program, segments)
        if program.choices.rows_where_needed:
            fewer = self._fewer_rows(program)
            if fewer:
                program = self._better(program, [self._redivided(segment, fewer) for segment in program.segments])
        return program

    def _better(self, program: Program, segments: Sequence[Segment]) -> Program:
        """The program with other segments, if it has less work and no higher peak then."""
        if tuple(segments) == program.segments:
            return program
        other = replace(program, segments=tuple(segments))
        if self.limit.oversized(other) is not None:
            return program
        cost, before = self.simulator.cost(other), self.simulator.cost(program)
        return other if cost.peak_bytes <= before.peak_bytes and cost.seconds < before.seconds else program

    def _redivided(self, segment: Segment, rows: Mapping[str, int]) -> Segment:
        """A segment with some loops, by their names, in so many rows."""
        own = tuple((name, rows[name]) for name in dict.fromkeys(loop.name for loop in segment.loops()) if name in rows)
        if not own:
            return segment
        if (segment, own) not in self._divided:
            divided = _Redivided(self.loops, dict(own)).of

            def changed(step: Step) -> Step:
                if isinstance(step, (RunRows, Sweep)):
                    return replace(step, loop=divided(step.loop))
                if isinstance(step, BackwardRows):
                    return replace(step, run=replace(step.run, loop=divided(step.run.loop)))
                return step

            forward, backward = tuple(map(changed, segment.forward)), tuple(map(changed, segment.backward))
            self._divided[segment, own] = replace(segment, forward=forward, backward=backward)
        return self._divided[segment, own]

    def _fewer_rows(self, program: Program) -> dict[str, int]:
        """Loops, by name, that are faster with fewer rows and stay below the peak with these.

        Tried are the fewest rows that the peak allows and, where large results cost more, the fewest with slabs that
        are not large. Each loop takes what is best for it.
        """
        seconds = self._seconds(program, {})
        best: dict[str, int] = {}
        for limit in dict.fromkeys((math.inf, program.machine.large_bytes)):
            fewest = self._fewest_rows(program, limit)
            if not fewest:
                break
            for name, trial in self._seconds(program, fewest).items():
                if trial < seconds[name]:
                    seconds[name], best[name] = trial, fewest[name]
        return best

    def _seconds(self, program: Program, rows: Mapping[str, int]) -> dict[str, float]:
        """How long the loops of each name take, some of them, by name, in so many rows."""
        redivided = _Redivided(self.loops, rows)
        seconds: dict[str, float] = {}
        for run, _, _, before in self.simulator.cost(program).loops:
            name, other = run.loop.name, redivided.of(run.loop)
            needed = before if other is run.loop else self.simulator.durations.of(run.through(other))
            seconds[name] = seconds.get(name, 0.0) + needed
        return seconds

    def _fewest_rows(self, program: Program, limit: float) -> dict[str, int]:
        """Loops that carry nothing, by name, and the fewest rows with which each stays below the peak of the program,
        and its slabs below the limit (bytes).

        Loops with carries are left alone: those of the forward and the backward pass have to have the same rows.
        """
        needed: dict[str, int] = {}
        present: dict[str, int] = {}
        cost, most = self.simulator.cost(program), program.machine.most_elements
        for (loop, *_), fixed, slabs, _ in cost.loops:
            count = present[loop.name] = len(loop.rows)
            room = max(min(cost.peak_bytes - fixed, limit), 1)
            rows = count if loop.carries else math.ceil(count * slabs * _MARGIN / room)
            if rows < count:
                elements = self.limit.largest(loop).elements
                rows = max(rows, min(count, math.ceil(count * elements * _MARGIN / most)))
            needed[loop.name] = max(needed.get(loop.name, 1), rows)
        return {name: rows for name, rows in needed.items() if rows < present[name]}


class _Redivided:
    """Loops with so many rows, by their names."""

    def __init__(self, loops: Loops, rows: Mapping[str, int]) -> None:
        self.loops, self.rows = loops, rows
        self._others: dict[str, Loop] = {}

    def of(self, loop: Loop) -> Loop:
        """The loop, the same one if its name is not among those with other rows."""
        if loop.name not in self.rows:
            return loop
        if loop.name not in self._others:
            other = self.loops.redivide(loop, self.rows[loop.name])
            self._others[loop.name] = loop if other.carries else other  # other cuts may lie where something is carried
        return self._others[loop.name]
