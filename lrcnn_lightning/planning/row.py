"""One row of a loop, simulated: the slabs that its operations make, and when the engine drops them."""

from __future__ import annotations

from collections.abc import Sequence

from lrcnn_lightning.planning.buffers import Buffers
from lrcnn_lightning.planning.footprint import Footprint, Footprints
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.memory import Memory
from lrcnn_lightning.planning.retained import bytes_of
from lrcnn_lightning.rules import RowGraph, RowRule

__all__ = ["SimulatedRow"]


class SimulatedRow:
    """Slabs of ``nodes`` (positions in the graph) in one row of so many ``samples``.

    ``buffers`` hold ``("slab", value)``, and ``("fresh", value)`` for what is computed and then joined to a carry.
    """

    def __init__(
        self, graph: RowGraph, footprints: Footprints, memory: Memory, nodes: Sequence[int], row: Row, samples: int
    ) -> None:
        self.graph, self.footprints, self.memory, self.row, self.samples = graph, footprints, memory, row, samples
        self.buffers = Buffers(memory)
        self.gaps: set[int] = set()
        """Values whose slab has gaps, being a part of what was computed."""
        self.waiting: dict[int, int] = {}
        """Value -> how many of the nodes have yet to read it."""
        for position in nodes:
            for value in graph.nodes[position].inputs:
                self.waiting[value] = self.waiting.get(value, 0) + 1

    def share(self, position: int) -> float:
        """The share of the batch that a node computes."""
        samples = self.graph.samples(self.graph.nodes[position].outputs[0])
        return self.samples / samples if samples else 1.0

    def copies(self, position: int) -> float:
        """Bytes of the dense copies that kernels make of what a node reads, where that has gaps."""
        graph, rule, computed = self.graph, self.graph.rules[position], self.row.spans[position].computed
        assert isinstance(rule, RowRule)
        rows = rule.needed(computed).length
        gaps = (value for value in graph.maps_read[position] if value in self.gaps or self._reads_part(value, rows))
        return sum(bytes_of(graph, value, rows, self.samples) for value in gaps)

    def _reads_part(self, value: int, rows: int) -> bool:
        """Whether so many rows are a part with gaps: of the map of a source, or of a slab."""
        span = self.row.spans.get(self.graph.producer.get(value, -1))
        there = self.graph.height(value) if span is None else span.hi - span.lo
        return self.footprints.cuts(value, rows, there, self.samples)

    def make(
        self, position: int, grad: bool, hollow: bool = False, unwanted: frozenset[int] = frozenset()
    ) -> Footprint | None:
        """Allocate what a node makes, to be differentiated or not, where nobody wants the gradients of its ``unwanted``
        inputs; returns its footprint if it computes anything.
        """
        graph, buffers = self.graph, self.buffers
        node, span = graph.nodes[position], self.row.spans[position]
        if span.computed.empty:
            for value in node.outputs:
                buffers.share(("slab", value), ("carry", value))  # the slab is the carry itself
            return None
        footprint, share = self.footprints.slab(position, span.computed, unwanted), self.share(position)
        if hollow:
            for value in node.outputs:
                buffers.share(("slab", value), ("carry", value))  # it has no memory
            return footprint
        passing = footprint.recompute + footprint.extra if grad else footprint.forward
        copies = self.copies(position) if footprint.copies[0] else 0.0
        self.memory.touch(share * (passing + sum(footprint.results)) + copies)
        joined = span.lo < span.new
        self.gaps.update(
            value for value, gaps in zip(node.outputs, footprint.gaps, strict=False) if gaps and not joined
        )
        for value, view, size in zip(node.outputs, footprint.views, footprint.results, strict=True):
            name = ("fresh" if joined else "slab", value)
            if size or view is None:
                buffers.make(name, share * size)
            else:
                buffers.share(name, ("slab", view))
            if joined:
                buffers.make(("slab", value), bytes_of(graph, value, span.hi - span.lo, self.samples))
        return footprint

    def drop_unread(self, position: int) -> None:
        """Drop what no later node reads, after a node."""
        node = self.graph.nodes[position]
        for value in node.inputs:
            self.waiting[value] -= 1
        for value in (*node.inputs, *node.outputs):
            if not self.waiting.get(value):
                self.buffers.drop(("slab", value))
        for value in node.outputs:
            self.buffers.drop(("fresh", value))
