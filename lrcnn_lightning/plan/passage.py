"""What a loop costs: its slabs, carries and maps, allocation by allocation, and how long it takes.

The memory of the forward pass of a loop, and of a backward pass over it, is simulated row by row as the engine runs
them. Rows in the middle of a map, and chunks of a batch, are alike: one stands for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lrcnn_lightning.plan.duration import Durations, alike_chunks
from lrcnn_lightning.plan.halos import Span
from lrcnn_lightning.plan.loop import BackwardPass, Loop
from lrcnn_lightning.plan.machine import Machine
from lrcnn_lightning.plan.memory import Memory
from lrcnn_lightning.plan.retained import VIEWS, bytes_of, extra_bytes, passes_gradient_on, retains
from lrcnn_lightning.plan.work import Work, is_large, is_parameter
from lrcnn_lightning.rules import RowGraph, RowRule

__all__ = ["Passages"]


class Passages:
    """Simulates loops; adds up their ``seconds`` and allocates in ``memory``."""

    def __init__(self, graph: RowGraph, differentiable: Collection[int], machine: Machine) -> None:
        self.graph, self.differentiable = graph, differentiable
        self.work = Work(graph, machine, machine.seconds_a_slab)
        self.durations = Durations(graph, self.work, differentiable)
        self.memory = Memory()
        self.seconds = 0.0

    def rows(self, loop: Loop, kept_carries: Collection[int], stored: bool) -> None:
        """The forward pass of a loop."""
        graph, memory = self.graph, self.memory
        self.seconds += self.durations.forward(loop, stored)
        for chunk, times in alike_chunks(len(loop.chunks)):
            samples = loop.chunks[chunk].length
            previous = 0
            for r, alike in _sampled_rows(len(loop.rows)):
                row = loop.rows[r]
                waiting = _waiting(graph, loop.nodes)
                following = loop.rows[r + 1] if r + 1 < len(loop.rows) else None
                for position in loop.nodes:
                    node, span = graph.nodes[position], row.spans[position]
                    self._make(position, span, samples)
                    for value in node.outputs:
                        if following is not None:
                            after = following.spans[position]
                            if after.lo < after.new:
                                key = ("keep" if position in kept_carries else "carry", loop.name, chunk, r, value)
                                size = bytes_of(self.graph, value, after.new - after.lo, samples)
                                memory.allocate(key, size * times * alike if key[0] == "keep" else size)
                        if stored and value in loop.stored:
                            if len(loop.rows) * len(loop.chunks) == 1:
                                memory.free(("slab", value))  # which is the map
                            memory.allocate(("map", value), graph.values[value].bytes)
                    for value in (*node.inputs, *node.outputs):
                        if value in node.inputs:
                            waiting[value] -= node.inputs.count(value)
                        if not waiting.get(value):
                            memory.free(("slab", value))
                    for value in node.outputs:
                        memory.free(("fresh", value))
                for value in [v for v in waiting if v in graph.producer]:
                    memory.free(("slab", value))
                if r:
                    self._drop_carries(loop, chunk, previous, graph)
                previous = r
            self._drop_carries(loop, chunk, previous, graph)
        for position in loop.reductions:
            for output in graph.nodes[position].outputs:
                memory.allocate(("map", output), graph.values[output].bytes)

    def _drop_carries(self, loop: Loop, chunk: int, r: int, graph: RowGraph) -> None:
        for position in loop.nodes:
            for value in graph.nodes[position].outputs:
                self.memory.free(("carry", loop.name, chunk, r, value))

    def _make(self, position: int, span: Span, samples: int, hollow: bool = False) -> None:
        """Allocate what a node makes on one row."""
        graph, memory = self.graph, self.memory
        node = graph.nodes[position]
        if span.computed.empty or hollow:
            return
        rule = graph.rules[position]
        assert isinstance(rule, RowRule)
        for value in node.outputs:
            view = node.op in VIEWS
            has_carry = span.lo < span.new
            size = 0.0 if view else bytes_of(graph, value, span.computed.length, samples)
            memory.allocate(("fresh" if has_carry else "slab", value), size)
            if has_carry:
                memory.allocate(("slab", value), bytes_of(graph, value, span.hi - span.lo, samples))
        padded = getattr(rule, "geometry", None)
        if padded is not None and padded.symmetric(span.computed) is None:
            above, below = padded.missing(span.computed)
            rows = padded.needed(span.computed).length + above + below
            memory.touch(bytes_of(graph, node.inputs[0], rows, samples))

    def backward_rows(self, run: BackwardPass, dropped: str | None) -> None:
        """A backward pass; ``dropped``: the loop whose kept carries it drops."""
        made = {value for value in run.maps if ("gradient", value) in self.memory}
        self.seconds += self.durations.backward(run, made)
        for chunk, _ in alike_chunks(len(run.loop.chunks)):
            handed: dict[int, float] = {}
            rows = _sampled_rows(len(run.loop.rows))
            for i, (r, _) in reversed(list(enumerate(rows))):
                handed = self._backward_row(run, chunk, r, handed)
                if dropped is not None:
                    self._drop_kept(dropped, chunk, r)
                    if i and rows[i - 1][1] == 1:
                        self._drop_kept(dropped, chunk, rows[i - 1][0])
            for value in handed:
                self.memory.free(("handed", value))
        for value in run.wholes:
            # What becomes the gradient of a parameter is no activation memory.
            if not is_parameter(self.graph, value):
                self.memory.allocate(("gradient", value), self.graph.values[value].bytes)

    def _drop_kept(self, loop: str, chunk: int, r: int) -> None:
        """The carries that row ``r`` (and those it stands for) kept."""
        self.memory.free_matching("keep", (loop, chunk, r))

    def _backward_row(self, run: BackwardPass, chunk: int, r: int, handed: dict[int, float]) -> dict[int, float]:
        graph, memory = self.graph, self.memory
        loop, row = run.loop, run.loop.rows[r]
        samples = loop.chunks[chunk].length
        waiting = _waiting(graph, run.nodes)
        injected = {graph.nodes[p].inputs[0] for p in run.injections}
        holders: dict[int, int] = {}  # slab -> how many differentiated nodes saved it

        def hold(value: int) -> None:
            holders[value] = holders.get(value, 0) + 1

        saved_by: dict[int, list[int]] = {}
        for position in run.nodes:
            node, span = graph.nodes[position], row.spans[position]
            hollow = position in run.hollow
            self._make(position, span, samples, hollow)
            if position in run.differentiated and not span.computed.empty:
                saves_inputs, saves_result = retains(node)
                saved = [i for i in node.inputs if graph.is_map(i)] if saves_inputs else []
                saved += list(node.outputs) if saves_result and not hollow else []
                for value in saved:
                    hold(value)
                saved_by[position] = saved
                extra = extra_bytes(graph, position, span.computed.length, samples)
                if extra:
                    memory.allocate(("extra", position), extra)
                for value in node.outputs:
                    if value in injected and not row.owned[value].empty:
                        size = bytes_of(graph, value, row.owned[value].length, samples)
                        memory.allocate(("seed", value), size)
            for value in (*node.inputs, *node.outputs):
                if value in node.inputs:
                    waiting[value] -= 1
                if not waiting.get(value) and not holders.get(value):
                    memory.free(("slab", value))
                memory.free(("fresh", value))
        # The engine walks back: gradients of results come, those of inputs are made, what was saved is dropped.
        for position in reversed(run.nodes):
            if position not in run.differentiated:
                continue
            node, span = graph.nodes[position], row.spans[position]
            if span.computed.empty:
                continue
            rule = graph.rules[position]
            assert isinstance(rule, RowRule)
            needed = rule.needed(span.computed)
            for value in node.outputs:
                memory.free(("handed", value))
            for index in node.inputs:
                if not graph.is_map(index) and index in run.wholes and is_large(graph, index):
                    memory.touch(graph.values[index].bytes)  # added to the sum at once
            for index in node.inputs:
                if not graph.is_map(index) or index not in self.differentiable:
                    continue
                producer = graph.producer.get(index)
                if index not in run.maps and producer not in run.differentiated:
                    continue
                size = 0.0 if passes_gradient_on(node) else bytes_of(graph, index, needed.length, samples)
                key = ("slab gradient", index)
                if key in memory:
                    memory.touch(size)
                memory.allocate(key, size)
            for value in node.outputs:
                memory.free(("slab gradient", value))
                memory.free(("seed", value))
            for value in saved_by.get(position, []):
                holders[value] -= 1
                if not holders[value]:
                    memory.free(("slab", value))
            memory.free(("extra", position))
        result: dict[int, float] = {}
        for position in run.nodes:
            span = row.spans[position]
            if position in run.differentiated and span.lo < span.new:
                for value in graph.nodes[position].outputs:
                    size = bytes_of(graph, value, span.new - span.lo, samples)
                    memory.allocate(("handed", value), size)
                    result[value] = size
        for index in run.maps:
            memory.allocate(("gradient", index), graph.values[index].bytes)
        memory.free_all("slab gradient")
        memory.free_all("slab")
        memory.free_all("fresh")
        memory.free_all("seed")
        return result


def _sampled_rows(rows: int) -> list[tuple[int, int]]:
    """Rows to simulate, and how many each stands for: those of the middle are alike but for a line more or less."""
    if rows <= 6:
        return [(r, 1) for r in range(rows)]
    middle = rows // 2
    return [(0, 1), (1, 1), (middle, rows - 4), (rows - 2, 1), (rows - 1, 1)]


def _waiting(graph: RowGraph, nodes: Sequence[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for position in nodes:
        for value in graph.nodes[position].inputs:
            counts[value] = counts.get(value, 0) + 1
    return counts
