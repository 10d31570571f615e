"""The loops of a graph, each made once: plans that differ in one thing have most loops in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lrcnn_lightning.planning.halos import Row, row_intervals
from lrcnn_lightning.planning.loop import Loop, balanced_cuts, even_cuts
from lrcnn_lightning.rules import Interval, RowGraph

__all__ = ["Loops"]


class Loops:
    """Makes loops; those that are equal are one object, and so are their rows."""

    def __init__(self, graph: RowGraph) -> None:
        self.graph = graph
        self._rows: dict[Any, tuple[tuple[int, ...], tuple[Row, ...]]] = {}
        """Cuts and rows by nodes, targets, cuts that were asked for, and carries."""
        self._loops: dict[Any, Loop] = {}
        """By the ``id`` of their rows, their name and whatever else they are."""
        self._redivided: dict[tuple[int, int], tuple[Loop, Loop]] = {}
        """By a loop's ``id`` and another number of rows: the loop, and the one with these rows."""

    def make(
        self,
        name: str,
        nodes: Sequence[int],
        sources: Collection[int],
        stored: Collection[int],
        reductions: Sequence[int],
        extra_targets: Collection[int],
        rows: int,
        carried: Collection[int],
        chunks: Sequence[Interval],
        balanced: bool = False,
    ) -> Loop:
        """Put a loop together in so many ``rows``, even or ``balanced``."""
        graph = self.graph
        reduced = [graph.nodes[position].inputs[0] for position in reductions]
        targets = tuple(sorted({*stored, *reduced, *extra_targets}))
        height = max(graph.height(target) for target in targets)
        lowest = min(graph.height(target) for target in targets)
        cuts = even_cuts(height, min(rows, lowest))
        mine = frozenset(carried) & frozenset(nodes)
        key = (tuple(nodes), targets, cuts, mine, balanced and len(cuts) > 1)
        if key not in self._rows:
            self._rows[key] = self._divided(*key)
        cuts, table = self._rows[key]
        read = tuple(sorted({*sources, *(index for row in table for index in row.reads)}))
        loop = Loop(
            name, key[0], read, targets, tuple(sorted(stored)), tuple(reductions), cuts, table, mine, tuple(chunks)
        )
        same = (id(table), name, loop.sources, loop.stored, loop.reductions, loop.chunks)
        return self._loops.setdefault(same, loop)

    def _divided(
        self,
        nodes: tuple[int, ...],
        targets: tuple[int, ...],
        cuts: tuple[int, ...],
        carried: frozenset[int],
        balanced: bool,
    ) -> tuple[tuple[int, ...], tuple[Row, ...]]:
        """The cuts, which are others than these if ``balanced``, and the rows."""
        rows = row_intervals(self.graph, nodes, targets, cuts, carried)
        if balanced:
            cuts = balanced_cuts(self.graph, cuts, rows)
            rows = row_intervals(self.graph, nodes, targets, cuts, carried)
        return cuts, rows

    def redivide(self, loop: Loop, rows: int) -> Loop:
        """The same loop in so many even rows."""
        key = id(loop), rows
        if key not in self._redivided:
            parts = (loop.name, loop.nodes, loop.sources, loop.stored, loop.reductions, loop.targets)
            self._redivided[key] = loop, self.make(*parts, rows, loop.carried, loop.chunks)
        return self._redivided[key][1]
