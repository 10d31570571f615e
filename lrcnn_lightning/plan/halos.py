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
    inside = {output: position for position in nodes for output in graph.nodes[position].outputs}
    ends = {target: [0, *scaled_cuts(cuts, graph.height(target))] for target in targets}
    reached = dict.fromkeys(nodes, 0)
    rows: list[Row] = []
    for r in range(len(cuts)):
        need: dict[int, Interval] = {}
        spans: dict[int, Span] = {}
        owned: dict[int, Interval] = {}
        for target in targets:
            own = Interval(ends[target][r], ends[target][r + 1])
            owned[target] = own
            if not own.empty:
                need[target] = own
        for position in reversed(nodes):
            node, rule = graph.nodes[position], graph.rules[position]
            assert isinstance(rule, RowRule)
            out = NOTHING
            for output in node.outputs:
                out = out.union(need.get(output, NOTHING))
            if position in carried:
                new = reached[position]
                hi = max(new, out.hi)
                span = Span(new if out.empty else min(out.lo, new), new, hi)
                for output in node.outputs:
                    if output in targets:
                        owned[output] = span.computed
            else:
                span = Span(out.lo, out.lo, out.hi)
                hi = max(reached[position], out.hi)
            reached[position] = hi
            spans[position] = span
            if span.computed.empty:
                continue
            needed = rule.needed(span.computed)
            for index in node.inputs:
                if graph.is_map(index):
                    need[index] = need.get(index, NOTHING).union(needed)
        reads = {index: interval for index, interval in need.items() if index not in inside}
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
