"""What a loop takes: its slabs, carries and maps, allocation by allocation.

The memory of the forward pass of a loop, and of a backward pass over it, is simulated row by row as the engine runs
them. Rows in the middle of a map, and chunks of a batch, are alike: one stands for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from lrcnn_lightning.planning.differentiated import BackwardRow
from lrcnn_lightning.planning.duration import alike_chunks
from lrcnn_lightning.planning.footprint import Footprints
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass, Loop
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.memory import Memory
from lrcnn_lightning.planning.retained import bytes_of, sum_bytes
from lrcnn_lightning.planning.row import SimulatedRow
from lrcnn_lightning.rules import RowGraph

__all__ = ["Passages"]


class Passages:
    """Simulates loops; allocates in ``memory``."""

    def __init__(self, graph: RowGraph, differentiable: Collection[int], machine: Machine) -> None:
        self.graph = graph
        self.footprints = Footprints.of(graph, differentiable, machine)
        self.memory = Memory(machine)

    def rows(self, loop: Loop, kept_carries: Collection[int], stored: bool) -> None:
        """The forward pass of a loop."""
        graph, memory = self.graph, self.memory
        for chunk, times in alike_chunks(len(loop.chunks)):
            previous = 0
            for r, alike in _sampled_rows(loop.cuts):
                self._forward_row(loop, chunk, r, kept_carries, stored, times * alike)
                if r:
                    self._drop_carries(loop, chunk, previous)
                previous = r
            self._drop_carries(loop, chunk, previous)
        for position in loop.reductions:
            for output in graph.nodes[position].outputs:
                memory.allocate(("map", output), graph.values[output].bytes)

    def _forward_row(
        self, loop: Loop, chunk: int, r: int, kept_carries: Collection[int], stored: bool, alike: int
    ) -> None:
        graph, memory, row = self.graph, self.memory, loop.rows[r]
        samples = loop.chunks[chunk].length
        simulated = SimulatedRow(graph, self.footprints, memory, loop.nodes, row, samples)
        following = loop.rows[r + 1] if r + 1 < len(loop.rows) else None
        readers = {graph.nodes[position].inputs[0]: position for position in loop.reductions if stored}
        for value, position in readers.items():
            if value in loop.sources:
                self._reduce(position, value, row, samples)
        for position in loop.nodes:
            simulated.make(position, grad=False)
            for value in graph.nodes[position].outputs:
                if following is not None:
                    after = following.spans[position]
                    if after.lo < after.new:
                        key = ("keep" if position in kept_carries else "carry", loop.name, chunk, r, value)
                        size = bytes_of(graph, value, after.new - after.lo, samples)
                        memory.allocate_alike(key, size, alike if key[0] == "keep" else 1)
                if value in readers:
                    self._reduce(readers[value], value, row, samples)
                if stored and value in loop.stored:
                    if len(loop.rows) * len(loop.chunks) == 1:
                        simulated.buffers.drop(("slab", value))  # which is the map
                    memory.allocate(("map", value), graph.values[value].bytes)
            simulated.drop_unread(position)
        simulated.buffers.drop_all()

    def _reduce(self, position: int, value: int, row: Row, samples: int) -> None:
        owned = row.owned[value]
        if not owned.empty:
            self.memory.touch(self.footprints.reduction(position, owned.length, samples).partial)

    def _drop_carries(self, loop: Loop, chunk: int, r: int) -> None:
        for position in loop.nodes:
            for value in self.graph.nodes[position].outputs:
                self.memory.free(("carry", loop.name, chunk, r, value))

    def backward_rows(self, run: BackwardPass, dropped: str | None) -> None:
        """A backward pass; ``dropped``: the loop whose kept carries it drops."""
        for chunk, _ in alike_chunks(len(run.loop.chunks)):
            handed: dict[int, float] = {}
            below = 0
            rows = _sampled_rows(run.loop.cuts)
            for i, (r, _) in reversed(list(enumerate(rows))):
                row = BackwardRow(self.graph, self.footprints, self.memory, run, chunk, r)
                given = row.differentiate(handed)
                for value in handed:
                    self.memory.free(("handed", value, below))
                handed, below = given, r
                if dropped is not None:
                    self._drop_kept(dropped, chunk, r)
                    if i and rows[i - 1][1] == 1:
                        self._drop_kept(dropped, chunk, rows[i - 1][0])
            for value in handed:
                self.memory.free(("handed", value, below))
        for index in run.maps:
            self.memory.allocate(("gradient", index), self.graph.values[index].bytes)
        for value in run.wholes:
            if size := sum_bytes(self.graph, value):
                self.memory.allocate(("gradient", value), size)

    def _drop_kept(self, loop: str, chunk: int, r: int) -> None:
        """The carries that row ``r`` (and those it stands for) kept."""
        self.memory.free_matching("keep", (loop, chunk, r))


def _sampled_rows(cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Rows to simulate, and how many each stands for: those of the middle that are alike but for a line more or less.

    Balanced rows are of several heights, and of each there is one.
    """
    rows = len(cuts)
    if rows <= 6:
        return [(r, 1) for r in range(rows)]
    heights = [after - before for before, after in itertools.pairwise((0, *cuts))]
    groups: list[list[int]] = [[2]]
    for r in range(3, rows - 2):
        if abs(heights[r] - heights[groups[-1][0]]) <= 1:
            groups[-1].append(r)
        else:
            groups.append([r])
    middle = [(max(group, key=lambda r: (heights[r], -abs(r - rows // 2))), len(group)) for group in groups]
    return [(0, 1), (1, 1), *middle, (rows - 2, 1), (rows - 1, 1)]
