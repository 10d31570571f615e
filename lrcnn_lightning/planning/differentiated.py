"""One row of a backward pass, simulated: computed again and recorded, differentiated call by call, dropped."""

from __future__ import annotations

from typing import Any

from lrcnn_lightning.graph import CustomFunction
from lrcnn_lightning.planning.footprint import Footprint, Footprints
from lrcnn_lightning.planning.loop import BackwardPass
from lrcnn_lightning.planning.memory import Memory
from lrcnn_lightning.planning.retained import bytes_of, is_half, sum_bytes
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
        self.recorded: dict[int, Footprint] = {}
        self.held: dict[int, list[Any]] = {}
        """What a formula or autograd saved for a node: buffers."""
        self.lent: dict[int, tuple[Any, ...] | None] = {}
        """Maps whose gradient is that of a slab, which others of this row may use: its memory."""
        self.sliced: set[int] = set()
        """Values whose slab gradient is a slice of a gradient map, or of what the loss has handed down."""

    def differentiate(self, from_below: dict[int, float]) -> dict[int, float]:
        """Value -> bytes of the gradient of its carry, for the row above; ``from_below``: those for this row."""
        for position in self.run.nodes:
            self._recompute(position)
        self._inject_into_sources()
        handed: dict[int, float] = {}
        for position in reversed(self.run.nodes):
            if position in self.run.differentiated:
                self._back(position, from_below, handed)
        self.buffers.drop_all()
        memories = list(self.lent.values())
        for value, memory in self.lent.items():
            if memory is not None and memories.count(memory) == 1:
                self.memory.free(("lent", value))
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
        self.recorded[position] = footprint
        held = [buffers.hold(("slab", value)) for value in footprint.saved_inputs]
        if not hollow:
            made = "fresh" if span.lo < span.new else "slab"
            held += [buffers.hold((made, value)) for value in footprint.saved_results]
        self.held[position] = held
        if footprint.extra:
            buffers.make(("extra", position), footprint.extra * self.share(position))

    def _inject(self, value: int) -> None:
        """What the reductions of a value add to the gradient of its slab."""
        owned, span = self.row.owned[value].length, self.row.spans[self.graph.producer[value]]
        for position in self.injections[value]:
            footprint = self.footprints.reduction(position, owned, self.samples)
            self.memory.touch(footprint.inject)
            made = ("made", value)
            self.buffers.make(
                made, footprint.gradient, footprint.gradient < bytes_of(self.graph, value, owned, self.samples)
            )
            self._add(value, owned == span.hi - span.lo, made)
            self.buffers.drop(made)

    def _inject_into_sources(self) -> None:
        for value in self.injections:
            owned = self.row.owned[value]
            if value in self.run.maps and not owned.empty:
                for position in self.injections[value]:
                    self.memory.touch(self.footprints.reduction(position, owned.length, self.samples).inject)
                self.memory.allocate(("gradient", value), self.graph.values[value].bytes)

    # ---------------------------------------------------------------- backward

    def _back(self, position: int, from_below: dict[int, float], handed: dict[int, float]) -> None:
        """The gradients of a node's results come, those of its inputs are made, what was saved is dropped."""
        graph, buffers, span = self.graph, self.buffers, self.row.spans[position]
        node, share = graph.nodes[position], self.share(position)
        for value in node.outputs:
            self._collect(position, value, from_below)
        if not any(("slab gradient", value) in buffers for value in node.outputs):
            return
        for value in node.outputs:
            if span.lo < span.new and ("slab gradient", value) in buffers:
                handed[value] = bytes_of(graph, value, span.new - span.lo, self.samples)
                self.memory.allocate(("handed", value, self.r), handed[value])
        received: list[int] = []
        footprint = self.recorded.get(position)
        if footprint is not None:
            whole = 0.0 if self._begin_sums(position) else footprint.whole
            copies = self._copies_backward(position) if footprint.copies[1] else 0.0
            self.memory.touch(share * footprint.backward + whole + copies)
            for value, size in footprint.gradients.items():
                if value in self.run.maps or graph.producer.get(value) in self.run.differentiated:
                    received.append(value)
                    if (passed := footprint.passed_on.get(value)) is None:
                        buffers.make(("made", value), share * size, self._is_loose(position, value, share * size))
                    else:
                        buffers.share(("made", value), ("slab gradient", passed))
            for buffer in self.held[position]:
                buffers.release(buffer)
            buffers.drop(("extra", position))
        for value in node.outputs:
            buffers.drop(("slab gradient", value))
        for value in received:
            self._receive(position, value)

    def _begin_sums(self, position: int) -> bool:
        """The sums of the gradients of the whole inputs of a node; whether its gradients become these."""
        graph, node = self.graph, self.graph.nodes[position]
        wholes = [value for value in node.inputs if value in self.run.wholes]
        first = all(("gradient", value) not in self.memory for value in wholes)
        for value in wholes:
            self.memory.allocate(("gradient", value), sum_bytes(graph, value))
        return first and self.recorded[position].by_formula and not any(is_half(graph, value) for value in wholes)

    def _is_loose(self, position: int, value: int, size: float) -> bool:
        """Whether elements of the gradient of an input of a node share memory, or others may have it."""
        rule = self.graph.rules[position]
        assert isinstance(rule, RowRule)
        needed = rule.needed(self.row.spans[position].computed).length
        is_expanded = size < bytes_of(self.graph, value, needed, self.samples) - 1
        return is_expanded or isinstance(self.graph.nodes[position].op, CustomFunction)

    def _collect(self, position: int, value: int, from_below: dict[int, float]) -> None:
        """Add to the gradient of a result what comes from its map and from the row below."""
        span, name = self.row.spans[position], ("slab gradient", value)
        owned, height = self.row.owned.get(value), self.graph.height(value)
        if owned is not None and not owned.empty and value in self.run.outputs:
            whole = owned.length == span.hi - span.lo
            alone = whole and name not in self.buffers and value not in from_below
            outside = value in self.footprints.outside
            if alone and (outside or self.footprints.cuts(value, owned.length, height, self.samples)):
                self.sliced.add(value)
            self._add(value, whole, None)
        if value in from_below:
            self._add(value, False, None)

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

    def _add(self, value: int, whole: bool, source: tuple[Any, ...] | None) -> None:
        """Add to the gradient of a slab: to all of it or a part, from a buffer or from elsewhere.

        What is added goes into the memory of what is there, if that is alone in it.
        """
        name, span = ("slab gradient", value), self.row.spans[self.graph.producer[value]]
        if name not in self.buffers and whole:
            self.buffers.share(name, source or ("elsewhere",))
        elif name not in self.buffers or not self.buffers.is_alone(name):
            self.buffers.make(name, bytes_of(self.graph, value, span.hi - span.lo, self.samples))

    def _receive(self, position: int, value: int) -> None:
        """The gradient of an input of a node, which has been made, is added to that of its slab or map."""
        graph, rule, buffers, made = self.graph, self.graph.rules[position], self.buffers, ("made", value)
        assert isinstance(rule, RowRule)
        needed = rule.needed(self.row.spans[position].computed).length
        if value not in self.run.maps:
            span = self.row.spans[graph.producer[value]]
            self._add(value, needed == span.hi - span.lo, made)
        elif ("gradient", value) not in self.memory:
            self._begin_map(value, bytes_of(graph, value, needed, self.samples), made)
        elif ("lent", value) in self.memory:
            self._duplicate(value)
        buffers.drop(made)

    def _begin_map(self, value: int, size: float, made: tuple[Any, ...]) -> None:
        """The first gradient of a source map, of ``size`` bytes: it becomes that of the map, if it is one of all of it
        and not a part of something larger. It may be that of others, too.
        """
        full, memory = self.graph.values[value].bytes, self.buffers.memory_of(made)
        self.memory.free(("lent", value))
        if size < full or (memory is not None and self.memory.size(memory) > self.memory.machine.rounded(full)):
            self.memory.allocate(("gradient", value), full)
            return
        if not self.buffers.is_alone(made):
            self.memory.allocate(("lent", value), 0)
            self.lent[value] = memory
        if memory is None:  # that of another map
            self.memory.allocate(("gradient", value), 0)
        else:
            self.memory.share(("gradient", value), memory)

    def _duplicate(self, value: int) -> None:
        """What others have, too, is copied before anything is added to it."""
        self.memory.allocate(("duplicate", value), self.graph.values[value].bytes)
        self.memory.free(("gradient", value))
        self.memory.rename(("duplicate", value), ("gradient", value))
        self.memory.free(("lent", value))
