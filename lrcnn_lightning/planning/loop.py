"""A loop over rows: the unit of work of a stage, forward and backward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.rules import Interval, Role, RowGraph

__all__ = ["BackwardPass", "Loop", "LoopRun", "balanced_cuts", "closure", "even_cuts"]


@dataclass(frozen=True)
class Loop:
    """Compute ``nodes`` row by row (and, outside that, chunk by chunk of the batch).

    ``targets`` are produced completely: written to their full map (``stored``), or read by one of the ``reductions``
    (positions of nodes). ``sources`` are maps that are read. ``carried`` are the nodes under the CARRY policy.
    """

    name: str
    nodes: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    stored: tuple[int, ...]
    reductions: tuple[int, ...]
    cuts: tuple[int, ...]
    rows: tuple[Row, ...]
    carried: frozenset[int]
    chunks: tuple[Interval, ...]

    @cached_property
    def carries(self) -> bool:
        """Whether any row carries anything from the one before."""
        return any(span.lo < span.new for row in self.rows for span in row.spans.values())

    def same_rows(self, other: Loop) -> bool:
        """Whether the carries of ``other`` serve this loop: same chunks, and the same carried rows everywhere."""
        if self.chunks != other.chunks or len(self.rows) != len(other.rows):
            return False
        for mine, theirs in zip(self.rows, other.rows, strict=True):
            for position in self.carried & set(self.nodes):
                if position not in theirs.spans:
                    if mine.spans[position].lo < mine.spans[position].new:
                        return False
                elif mine.spans[position] != theirs.spans[position]:
                    return False
        return True


@dataclass(frozen=True)
class BackwardPass:
    """One differentiated run of a loop, rows from the bottom.

    Nodes in ``differentiated`` are recorded and differentiated, the others of the loop only run. Gradients enter at
    ``outputs`` (values with a gradient map) and through ``injections`` (reductions whose outputs' gradients are known),
    and are collected for ``maps`` (sources), for ``wholes`` (whole values, parameters). ``hollow`` nodes are not
    computed.
    """

    loop: Loop
    nodes: tuple[int, ...]
    differentiated: frozenset[int]
    outputs: tuple[int, ...]
    injections: tuple[int, ...]
    maps: tuple[int, ...]
    wholes: tuple[int, ...]
    hollow: frozenset[int] = field(default_factory=frozenset)
    _unwanted: dict[int, frozenset[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def unwanted(self, graph: RowGraph, position: int) -> frozenset[int]:
        """The inputs of a node of which this pass collects no gradient, and hands none on."""
        if position not in self._unwanted:
            wanted = {*self.maps, *self.wholes}
            self._unwanted[position] = frozenset(
                value
                for value in graph.nodes[position].inputs
                if value not in wanted and graph.producer.get(value) not in self.differentiated
            )
        return self._unwanted[position]


class LoopRun(NamedTuple):
    """One run of a loop: forward, where it may write what is to be ``stored``, or a ``backward`` pass, before which the
    gradient maps ``made`` are there.
    """

    loop: Loop
    stored: bool = False
    backward: BackwardPass | None = None
    made: frozenset[int] = frozenset()

    def through(self, loop: Loop) -> LoopRun:
        """The same run of the same loop with other rows."""
        return self._replace(loop=loop, backward=self.backward and replace(self.backward, loop=loop))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for runs that do the same, of loops whose ``rows`` are one and the same object."""
        loop, run = self.loop, self.backward
        if run is None:
            return id(loop.rows), loop.chunks, loop.stored, loop.reductions, self.stored
        what = (run.nodes, run.differentiated, run.outputs, run.injections, run.maps, run.wholes, run.hollow)
        return id(loop.rows), loop.chunks, *what, self.made


def even_cuts(height: int, rows: int) -> tuple[int, ...]:
    """``rows`` cuts that divide ``height`` as evenly as integers can; fewer if the map is lower."""
    rows = max(1, min(rows, height))
    return tuple(height * (r + 1) // rows for r in range(rows))


def balanced_cuts(graph: RowGraph, cuts: Sequence[int], rows: Sequence[Row]) -> tuple[int, ...]:
    """Cuts such that each row needs as much memory as any other; ``rows`` are those of the even ``cuts``.

    Rows of one height need unequal memory (the paper's skew). Under two-phase sharing the first row goes beyond what it
    was asked for, by the halo of every layer, and the last one falls short by as much; on the other hand the carries of
    all rows above a row wait for the backward pass while that row is differentiated:

        even        |======0======|===1===|===2===|=3=|        slabs
                                   .       ..      ...         carries of the rows above

    Under overlapping partitioning the rows in the middle have two halos, the first and the last one only one. Memory is
    taken as linear in the height of a row, which it nearly is; one step from even cuts is then enough.
    """
    made = [value for position in rows[0].spans for value in graph.nodes[position].outputs]
    a_line = {value: graph.values[value].bytes / graph.height(value) for value in made}
    per_line = sum(graph.values[value].bytes for value in made) / cuts[-1]
    needed, waiting = [], 0.0
    for row in rows:
        slabs = 0.0
        for position, span in row.spans.items():
            a_row = sum(a_line[value] for value in graph.nodes[position].outputs)
            slabs += a_row * (span.hi - span.lo)
            waiting += a_row * (span.new - span.lo)  # what the row above handed down
        needed.append(slabs + waiting)
    if not per_line:
        return tuple(cuts)
    mean = sum(needed) / len(needed)
    ideal: list[float] = []
    exact = 0.0
    for r, (before, cut) in enumerate(zip((0, *cuts), cuts, strict=False)):
        exact += max(0.25 * (cut - before), cut - before + (mean - needed[r]) / per_line)
        ideal.append(exact)
    scale, last = cuts[-1] / exact, len(cuts) - 1
    whole = [0]
    for r, edge in enumerate(ideal):
        whole.append(max(whole[-1] + 1, min(round(edge * scale), cuts[-1] - (last - r))))
    return tuple(whole[1:])


def closure(graph: RowGraph, targets: Collection[int], available: Collection[int]) -> tuple[tuple[int, ...], set[int]]:
    """The nodes that compute ``targets`` from ``available`` maps, in order, and the maps that they read."""
    found: set[int] = set()
    sources: set[int] = set()
    pending = list(targets)
    while pending:
        index = pending.pop()
        if not graph.is_map(index):
            continue
        if index in available or index not in graph.producer:
            sources.add(index)
            continue
        position = graph.producer[index]
        if position in found:
            continue
        assert graph.roles[position] is Role.ROW, f"{graph.nodes[position].name} is not computed by rows"
        found.add(position)
        pending.extend(graph.nodes[position].inputs)
    return tuple(sorted(found)), sources
