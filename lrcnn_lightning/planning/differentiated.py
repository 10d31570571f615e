"""One row of a backward pass, simulated: computed again with autograd, differentiated, dropped."""

from __future__ import annotations

from typing import Any

from lrcnn_lightning.planning.footprint import Footprint, Footprints
from lrcnn_lightning.planning.loop import BackwardPass
from lrcnn_lightning.planning.memory import Memory
from lrcnn_lightning.planning.retained import bytes_of, sum_bytes
from lrcnn_lightning.planning.row import SimulatedRow
from lrcnn_lightning.rules import RowGraph, RowRule

__all__ = ["BackwardRow"]


class BackwardRow(SimulatedRow):
    """Row ``r`` of a chunk of a backward pass; the gradient of a slab is the buffer ``("slab gradient", value)``."""

    def __init__(
        self, graph: RowGraph, footprints: Footprints, memory: Memory, run: BackwardPass, chunk: int, r: int
    ) -> None:
        samples = run.loop.chunks[chunk].length
        super().__init__(graph, footprints, memory, run.nodes, run.loop.rows[r], samples)
        self.run, self.r = run, r
        self.injections: dict[int, list[int]] = {}
        for position in run.injections:
            self.injections.setdefault(graph.nodes[position].inputs[0], []).append(position)
        self.found: dict[int, Footprint] = {}
        self.held: dict[int, list[Any]] = {}
        """What autograd saved for a node: buffers."""
        self.sliced: set[int] = set()
        """Values whose slab gradient is a slice of a gradient map, or of what the loss has handed down."""
        self.unreceived: dict[int, int] = {}
        """Source map -> differentiated nodes that have yet to give it a gradient."""

    def differentiate(self, from_below: dict[int, float]) -> dict[int, float]:
        """Value -> bytes of the gradient of its carry, for the row above; ``from_below``: those for this row."""
        for position in self.run.nodes:
            self._recompute(position)
        self._inject_into_sources()
        handed: dict[int, float] = {}
        for position in reversed(self.run.nodes):
            if position in self.found:
                self._back(position, from_below, handed)
        self.buffers.drop_all()
        return handed

    # ---------------------------------------------------------------- computing again

    def _recompute(self, position: int) -> None:
        graph, run = self.graph, self.run
        node, differentiated = graph.nodes[position], position in run.differentiated
        hollow = position in run.hollow
        footprint = self.make(position, differentiated, hollow, self.run.unwanted(graph, position))
        if differentiated:
            if footprint is not None:
                self._save(position, footprint, hollow)
            for value in node.outputs:
                if value in self.injections and not self.row.owned[value].empty:
                    self._inject(value)
        self.drop_unread(position)

    def _save(self, position: int, footprint: Footprint, hollow: bool) -> None:
        span, buffers = self.row.spans[position], self.buffers
        self.found[position] = footprint
        held = [buffers.hold(("slab", value)) for value in footprint.saved_inputs]
        if not hollow:
            made = "fresh" if span.lo < span.new else "slab"
            held += [buffers.hold((made, value)) for value in footprint.saved_results]
        self.held[position] = held
        if footprint.extra:
            buffers.make(("extra", position), footprint.extra * self.share(position))
        for value in footprint.gradients:
            if value in self.run.maps:
                self.unreceived[value] = self.unreceived.get(value, 0) + 1

    def _inject(self, value: int) -> None:
        """What the reductions of a value add to its gradient: made now, and held until the end of the row."""
        owned = self.row.owned[value].length
        for position in self.injections[value]:
            footprint = self.footprints.reduction(position, owned, self.samples)
            self.memory.touch(footprint.inject)
            self.buffers.make(("seed", value, position), footprint.gradient)

    def _inject_into_sources(self) -> None:
        for value in self.injections:
            owned = self.row.owned[value]
            if value in self.run.maps and not owned.empty:
                for position in self.injections[value]:
                    self.memory.touch(self.footprints.reduction(position, owned.length, self.samples).inject)
                self.memory.allocate(("gradient", value), self.graph.values[value].bytes)

    # ---------------------------------------------------------------- backward

    def _back(self, position: int, from_below: dict[int, float], handed: dict[int, float]) -> None:
        """The gradients of a node's results come, those of its inputs are made, what was saved is dropped.

        Autograd adds gradients to what is there when a node's own ones and what it saved are gone.
        """
        graph, buffers = self.graph, self.buffers
        node, footprint, share = graph.nodes[position], self.found[position], self.share(position)
        for value in node.outputs:
            self._collect(position, value, from_below)
        received = []
        if any(("slab gradient", value) in buffers for value in node.outputs):
            for value in node.inputs:
                if value in self.run.wholes and (size := sum_bytes(graph, value)):
                    self.memory.allocate(("gradient", value), size)
            copies = self._copies_backward(position) if footprint.copies[1] else 0.0
            self.memory.touch(share * footprint.backward + footprint.whole + copies)
            for value, size in footprint.gradients.items():
                if value in self.run.maps or graph.producer.get(value) in self.run.differentiated:
                    received.append(value)
                    if (passed := footprint.passed_on.get(value)) is None:
                        buffers.make(("made", value), share * size)
                    else:
                        buffers.share(("made", value), ("slab gradient", passed))
            for buffer in self.held[position]:
                buffers.release(buffer)
            buffers.drop(("extra", position))
        span = self.row.spans[position]
        for value in node.outputs:
            if span.lo < span.new and ("slab gradient", value) in buffers:
                handed[value] = bytes_of(graph, value, span.new - span.lo, self.samples)
                self.memory.allocate(("handed", value, self.r), handed[value])
            buffers.drop(("slab gradient", value))
        for value in received:
            self._receive(position, value)
        for value in footprint.gradients:
            if value in self.unreceived:
                self.unreceived[value] -= 1
                if not self.unreceived[value]:
                    self._add_to_map(value)

    def _collect(self, position: int, value: int, from_below: dict[int, float]) -> None:
        """Add to the gradient of a result what comes from its map, from reductions and from the row below."""
        span, name = self.row.spans[position], ("slab gradient", value)
        size = bytes_of(self.graph, value, span.hi - span.lo, self.samples)
        owned = self.row.owned.get(value)
        if owned is not None and not owned.empty:
            whole = owned.length == span.computed.length
            seeds: list[tuple[Any, ...]] = [("seed", value, p) for p in self.injections.get(value, ())]
            if value in self.run.outputs:
                seeds.append(("gradient", value))
            for seed in seeds:
                self._add(name, 0.0 if whole else size, size, seed)
            if whole and seeds == [("gradient", value)] and value not in from_below:
                height = self.graph.height(value)
                if value in self.footprints.outside or self.footprints.cuts(value, owned.length, height, self.samples):
                    self.sliced.add(value)
        if value in from_below:
            self._add(name, size, size, None)  # it is a part: in zeros of the slab's size

    def _copies_backward(self, position: int) -> float:
        """Bytes of dense copies: of the inputs, and of gradients that are parts of larger ones, with gaps."""
        span, total = self.row.spans[position], self.copies(position)
        for value in self.graph.nodes[position].outputs:
            rows, joined = span.computed.length, span.lo < span.new
            # The gradient of what was computed is a part of that of the slab with its carry. Where what was computed
            # was itself cut to the slab, its gradient comes in zeros, which are dense.
            part = (
                self.footprints.cuts(value, rows, span.hi - span.lo, self.samples) if joined else value in self.sliced
            )
            if part and value not in self.gaps:
                total += bytes_of(self.graph, value, rows, self.samples)
        return total

    def _add(self, name: tuple[Any, ...], made: float, size: float, shared: tuple[Any, ...] | None) -> None:
        """Add to a gradient of ``size`` bytes one that takes ``made`` more, or is another's memory.

        Autograd adds to what is there in a new tensor.
        """
        if name in self.buffers:
            self.memory.touch(made + size)
            self.buffers.make(name, size)
        elif made or shared is None:
            self.buffers.make(name, made)
        else:
            self.buffers.share(name, shared)

    def _receive(self, position: int, value: int) -> None:
        """The gradient of an input of a node, which has been made, is added to what is there."""
        graph, rule, buffers = self.graph, self.graph.rules[position], self.buffers
        assert isinstance(rule, RowRule)
        needed = rule.needed(self.row.spans[position].computed).length
        producer = graph.producer.get(value)
        if value not in self.run.maps and producer is not None:
            span = self.row.spans[producer]
            there = span.hi - span.lo
        else:
            there = self.row.reads[value].length
        size, made = bytes_of(graph, value, there, self.samples), ("made", value)
        if there != needed:
            # It is the gradient of a part of the slab: in zeros of the slab's size.
            buffers.make(made, size)
        if ("slab gradient", value) in buffers:
            self.memory.touch(size)
            buffers.make(("slab gradient", value), size)
        else:
            buffers.share(("slab gradient", value), made)
        buffers.drop(made)

    def _add_to_map(self, value: int) -> None:
        """The gradient of the rows of a source map is complete: it is added to the map's."""
        size = bytes_of(self.graph, value, self.row.reads[value].length, self.samples)
        full = self.graph.values[value].bytes
        if size >= full:
            self.buffers.drop(("slab gradient", value))  # which is the map's
        self.memory.allocate(("gradient", value), full)
        self.buffers.drop(("slab gradient", value))
