"""Row intervals of a loop: what each row computes, what it carries, what it reads.

Rows run from the top.  Going back from the targets of row r, the rows of a value that are needed are the union over
its readers, ``[lo_r, hi_r)``.  Under the halo policy CARRY (two-phase sharing, 2PS) the rows above ``new_r = hi_{r-1}``
come from the row before; under RECOMPUTE (overlapping partitioning, OverL) all of them are computed again:

                 CARRY                                  RECOMPUTE
    row 0   |lo=======hi|                          |lo=======hi|
    row 1         |lo--|new====hi|                       |lo========hi|
    row 2                  |lo--|new====hi|                       |lo======hi|
              - carried   = computed

With CARRY each row is a little longer than the rows it was asked for, and the next one starts later (the skew of the
paper): what a target owns in row r is then what is newly computed.  With RECOMPUTE a target owns its share of rows.
A value that is read from its full map has no halo.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lrcnn_lightning.rules import Interval, RowGraph, RowRule

__all__ = ["Row", "Span", "row_intervals", "scaled_cuts"]

NOTHING = Interval(0, 0)


class Span(NamedTuple):
    """Rows ``[lo, hi)`` of a value are at hand in a row of the loop; ``[new, hi)`` of them are computed there."""

    lo: int
    new: int
    hi: int

    @property
    def computed(self) -> Interval:
        return Interval(self.new, self.hi)

    @property
    def carried(self) -> Interval:
        return Interval(self.lo, self.new)


@dataclass(frozen=True)
class Row:
    """One row of a loop.

    ``spans``: per node (position in the graph). ``reads``: per source value, the rows read from its full map.
    ``owned``: per target, the rows that this row writes, reduces or injects a gradient into; they partition the map.
    """

    spans: dict[int, Span]
    reads: dict[int, Interval]
    owned: dict[int, Interval]


class _Step:
    """A node in the backward walk: what is looked up once, and how far the rows so far have come."""

    __slots__ = ("carries", "maps", "needed", "outputs", "position", "reached", "targets")

    def __init__(self, graph: RowGraph, position: int, carries: bool, targets: Collection[int]) -> None:
        node, rule = graph.nodes[position], graph.rules[position]
        assert isinstance(rule, RowRule)
        self.position, self.outputs, self.carries, self.reached = position, node.outputs, carries, 0
        self.needed = rule.needed
        self.maps = graph.maps_read[position]
        self.targets = tuple(output for output in node.outputs if output in targets)


def scaled_cuts(cuts: Sequence[int], height: int) -> list[int]:
    """Cuts of the tallest map, ``0 < ... < H``, at the height of another."""
    tallest = cuts[-1]
    return [min(height, -(-cut * height // tallest)) for cut in cuts]


def row_intervals(
    graph: RowGraph,
    nodes: Sequence[int],
    targets: Collection[int],
    cuts: Sequence[int],
    carried: Collection[int],
) -> tuple[Row, ...]:
    """The rows of a loop over ``nodes`` (positions in topological order).

    ``targets`` are the values of which every row must be produced once; ``cuts`` the ends of the rows (the last one is
    the height) of the tallest target; ``carried`` the nodes whose halo policy is CARRY.
    """
    inside = {output for position in nodes for output in graph.nodes[position].outputs}
    ends = {target: [0, *scaled_cuts(cuts, graph.height(target))] for target in targets}
    steps = [_Step(graph, position, position in carried, targets) for position in reversed(nodes)]
    rows: list[Row] = []
    for r in range(len(cuts)):
        # Plain pairs, not intervals: this is the planner's innermost loop.
        need: dict[int, tuple[int, int]] = {}
        spans: dict[int, Span] = {}
        owned: dict[int, Interval] = {}
        for target in targets:
            own = Interval(ends[target][r], ends[target][r + 1])
            owned[target] = own
            if own.lo < own.hi:
                need[target] = own
        for step in steps:
            lo, hi = NOTHING
            for output in step.outputs:
                if output in need:
                    first, last = need[output]
                    lo, hi = (first, last) if lo >= hi else (min(lo, first), max(hi, last))
            if step.carries:
                new = step.reached
                if lo >= hi:
                    lo = hi = new
                span = Span(min(lo, new), new, max(new, hi))
                for output in step.targets:
                    owned[output] = span.computed
            else:
                new = lo
                span = Span(lo, lo, hi)
            step.reached = max(step.reached, span.hi)
            spans[step.position] = span
            if new >= span.hi:
                continue
            first, last = step.needed(Interval(new, span.hi))
            for index in step.maps:
                given = need.get(index)
                need[index] = (first, last) if given is None else (min(given[0], first), max(given[1], last))
        reads = {index: Interval(*pair) for index, pair in need.items() if index not in inside}
        rows.append(Row(spans, reads, owned))
    return _with_longer_carries(rows, nodes)


def _with_longer_carries(rows: list[Row], nodes: Sequence[int]) -> tuple[Row, ...]:
    """Make each row hold what a later one carries, also where the row itself does not need it."""
    for position in nodes:
        for r in range(len(rows) - 2, -1, -1):
            span, after = rows[r].spans[position], rows[r + 1].spans[position]
            if after.lo < after.new and after.lo < span.lo and span.new <= span.hi == after.new:
                rows[r].spans[position] = Span(after.lo, span.new, span.hi)
    return tuple(rows)
