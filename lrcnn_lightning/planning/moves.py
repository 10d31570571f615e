"""Moves: the plans that differ from one in a single thing, by which a search walks from plan to plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.planning.choices import Choices, Part
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.keeping import FORWARD_KEEPINGS, Keeping
from lrcnn_lightning.planning.price import exchanges
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.segments import cut_points
from lrcnn_lightning.rules import RowGraph

__all__ = ["Moves"]

_MOST_ROWS = 64
_KEEPINGS: tuple[Keeping, ...] = ("lean", "demand", "narrow", "borders")
"""Those to try first come first."""
_EXCHANGED = 4
"""Maps that are tried kept, and tried dropped, in place of what is done with them."""


class Moves:
    """Plans that differ from one in a single segment, those around the segment of the peak first."""

    def __init__(self, graph: RowGraph, config: RowConfig, start: Program | None) -> None:
        self.config = config
        nodes = [p for s in start.segments if not s.plain for p in s.nodes] if start else []
        self.points = cut_points(graph, nodes) if nodes else []
        self.first = nodes[0] if nodes else 0
        self.barriers = graph.barriers > 0
        rows = [part.rows for part in start.explicit.parts] if start else []
        self.most_rows = max(_MOST_ROWS, 2 * max(rows, default=1))
        self.samples = graph.input_samples if config.batch_chunks == "auto" and graph.batch_splits else 0

    def of(self, program: Program, cost: Cost) -> Iterator[Choices]:
        """The neighbours of a program with this cost."""
        choices = program.explicit
        parts = choices.parts
        if self.barriers:
            for value, residency in exchanges(program, _EXCHANGED):
                excepted = {**dict(choices.exceptions), value: residency}
                yield replace(choices, exceptions=tuple(sorted(excepted.items())))
        for chunks in (choices.batch_chunks * 2, choices.batch_chunks // 2):
            if 1 <= chunks <= self.samples:
                yield replace(choices, batch_chunks=chunks)
        peak = next((s.nodes[0] for s in program.segments[cost.peak_segment :] if not s.plain), parts[-1].first)
        order = sorted(range(len(parts)), key=lambda i: abs(parts[i].first - peak))
        forward_only = {s.nodes[0] for s in program.segments if not s.plain and not s.backward}
        for i in order:
            others = self._others(parts[i], FORWARD_KEEPINGS if parts[i].first in forward_only else _KEEPINGS)
            yield from (replace(choices, parts=(*parts[:i], part, *parts[i + 1 :])) for part in others)
            for changed in self._cuts(parts, i):
                yield replace(choices, parts=changed, segments=len(changed))

    def _others(self, part: Part, keepings: Sequence[Keeping]) -> Iterator[Part]:
        """The same segment with another choice."""
        if self.config.rows == "auto":
            for rows in (part.rows * 2, part.rows * 3 // 2, part.rows // 2):
                if 1 < rows <= self.most_rows:
                    yield replace(part, rows=rows)
        yield replace(part, heights="balanced" if part.heights == "even" else "even")
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
