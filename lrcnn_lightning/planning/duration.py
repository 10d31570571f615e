"""How long a loop takes on the nominal machine: the work of every operation on every row, and what rows add to it.

forward       operations  +  joining and handing on carries  +  writing stored maps
backward      operations once more  +  their gradients  +  gradients added to maps, made by reductions, handed up
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass, Loop, LoopRun
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.retained import bytes_of, passes_gradient_on
from lrcnn_lightning.planning.work import Work, is_weight
from lrcnn_lightning.rules import Interval, RowGraph, RowRule

__all__ = ["Durations", "alike_chunks"]


def alike_chunks(chunks: int) -> list[tuple[int, int]]:
    """Chunks to look at, and how many each stands for: they are alike but for a sample more or less."""
    return [(chunk, 1) for chunk in range(chunks)] if chunks <= 2 else [(0, chunks - 1), (chunks - 1, 1)]


class Durations:
    """Seconds of loops and backward passes."""

    def __init__(self, graph: RowGraph, machine: Machine, differentiable: Collection[int]) -> None:
        self.graph, self.differentiable = graph, differentiable
        self.work = Work(graph, machine, machine.seconds_a_slab)
        self._known: dict[tuple[Any, ...], tuple[float, tuple[Row, ...]]] = {}
        """With the rows, so that no others get their ``id``."""

    def of(self, run: LoopRun) -> float:
        """Of a run of a loop."""
        key = run.key
        if key not in self._known:
            backward = run.backward
            seconds = self.forward(run.loop, run.stored) if backward is None else self.backward(backward, run.made)
            self._known[key] = seconds, run.loop.rows
        return self._known[key][0]

    def _share(self, value: int, rows: int, samples: int) -> float:
        height, batch = self.graph.height(value), self.graph.samples(value)
        return (rows / height if height else 1.0) * (samples / batch if batch else 1.0)

    def forward(self, loop: Loop, stored: bool) -> float:
        """Of a loop; with ``stored`` it writes its maps and finishes its reductions."""
        graph, work = self.graph, self.work
        seconds = 0.0
        for chunk, times in alike_chunks(len(loop.chunks)):
            samples = loop.chunks[chunk].length
            for row in loop.rows:
                seconds += times * self._computed(loop.nodes, (), row, samples)
                for value in loop.stored if stored else ():
                    span = row.spans[graph.producer[value]]
                    seconds += times * work.traffic(bytes_of(graph, value, span.hi - span.new, samples), 2)
        if stored:
            seconds += sum(work.fresh(graph.values[value].bytes) for value in loop.stored)
            calls = len(loop.rows) * len(loop.chunks)
            for position in loop.reductions:
                seconds += work.forward(position) + (calls - 1) * work.seconds_a_call
        return seconds

    def _computed(self, nodes: Sequence[int], hollow: Collection[int], row: Row, samples: int) -> float:
        """Of computing a row."""
        graph, work = self.graph, self.work
        seconds = 0.0
        for position in nodes:
            lo, new, hi = row.spans[position]
            outputs = graph.nodes[position].outputs
            if new < hi and position not in hollow:
                seconds += work.forward(position, self._share(outputs[0], hi - new, samples))
            if lo < new:  # what is carried is cut out, handed on, and joined with what is new
                carried = sum(bytes_of(graph, v, new - lo, samples) for v in outputs)
                seconds += work.traffic(sum(bytes_of(graph, v, hi - lo, samples) for v in outputs) + carried, 2)
        return seconds

    def backward(self, run: BackwardPass, made: Collection[int]) -> float:
        """Of a backward pass; ``made`` are the maps whose gradient map is there before."""
        graph, work = self.graph, self.work
        nodes = [_Differentiated(graph, run, position, self.differentiable) for position in run.nodes]
        nodes = [node for node in nodes if node.position in run.differentiated]
        injected = [graph.nodes[position].inputs[0] for position in run.injections]
        seconds = sum(work.fresh(graph.values[value].bytes) for value in run.maps if value not in made)
        for chunk, times in alike_chunks(len(run.loop.chunks)):
            samples = run.loop.chunks[chunk].length
            for row in run.loop.rows:
                seconds += times * self._computed(run.nodes, run.hollow, row, samples)
                for value in injected:  # made, and added to what comes from elsewhere
                    size = bytes_of(graph, value, row.owned[value].length, samples)
                    seconds += times * work.traffic(size, 5)
                for node in nodes:
                    lo, new, hi = row.spans[node.position]
                    if new < hi:
                        share = self._share(node.output, hi - new, samples)
                        part = work.backward(node.position, share, node.wanted, node.weights)
                        if node.summed:
                            needed = node.rule.needed(Interval(new, hi)).length
                            for value in node.summed:  # written, or added to what is there
                                size = bytes_of(graph, value, needed, samples)
                                part += work.traffic(size, 3 if value in made else 2)
                        if lo < new:  # the gradient of the carry is handed up
                            part += work.traffic(bytes_of(graph, node.output, new - lo, samples), 4)
                        seconds += times * part
        return seconds


class _Differentiated:
    """What the backward pass of a node makes: gradients of weights, of slabs, and of maps that are added to."""

    def __init__(self, graph: RowGraph, run: BackwardPass, position: int, differentiable: Collection[int]) -> None:
        node, rule = graph.nodes[position], graph.rules[position]
        assert isinstance(rule, RowRule)
        self.position, self.rule, self.output = position, rule, node.outputs[0]
        maps = [
            value
            for value in node.inputs
            if graph.is_map(value)
            and value in differentiable
            and (value in run.maps or graph.producer.get(value) in run.differentiated)
        ]
        self.weights = sum(not graph.is_map(v) and v in run.wholes and is_weight(graph, v) for v in node.inputs)
        self.wanted = self.weights + len(maps)
        self.summed = [] if passes_gradient_on(node) else [value for value in maps if value in run.maps]
