"""Nodes on full maps, simulated: what they make, what autograd saves of it, and the gradients.

Keys of the memory: ``("map", value)`` for whatever is whole, ``("gradient", value)``, and for as long as autograd has
them ``("saved", node, value)`` and ``("extra", node)``. A view stands for the same bytes as what it looks into.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from lrcnn_lightning.planning.footprint import Footprint, Footprints
from lrcnn_lightning.planning.memory import Key, Memory
from lrcnn_lightning.planning.retained import is_parameter, sum_bytes
from lrcnn_lightning.rules import RowGraph

__all__ = ["Wholes"]


class Wholes:
    """Simulates nodes by their positions; allocates in ``memory``."""

    def __init__(self, graph: RowGraph, footprints: Footprints, differentiable: Collection[int]) -> None:
        self.graph, self.footprints, self.differentiable = graph, footprints, differentiable
        self.memory = Memory(footprints.machine)

    def plainly(self, nodes: Sequence[int], drops: Mapping[int, Sequence[int]]) -> None:
        """Run nodes under autograd; ``drops``: after which of them the engine drops which values."""
        for position in nodes:
            self.run(position, grad=True)
            for value in drops.get(position, ()):
                self.memory.free(("map", value))

    def run(self, position: int, grad: bool = False) -> None:
        """Run a node, with ``grad`` under autograd."""
        memory, outputs = self.memory, self.graph.nodes[position].outputs
        if not outputs:
            return
        footprint = self.footprints.whole(position)
        grad = grad and any(output in self.differentiable for output in outputs)
        passing = footprint.recompute + footprint.extra if grad else footprint.forward
        memory.touch(sum(footprint.results) + passing)
        self._make(outputs, footprint)
        if grad:
            for value in (*footprint.saved_inputs, *footprint.saved_results):
                memory.share(("saved", position, value), ("map", value))
            memory.allocate(("extra", position), footprint.extra)

    def saved(self, nodes: Sequence[int]) -> list[Key]:
        """What autograd has saved for nodes, and has not released."""
        keys: list[Key] = []
        for position in nodes:
            if ("extra", position) in self.memory:
                footprint = self.footprints.whole(position)
                values = (*footprint.saved_inputs, *footprint.saved_results)
                keys += [("extra", position), *(("saved", position, value) for value in values)]
        return keys

    def _make(self, outputs: Sequence[int], footprint: Footprint) -> None:
        first = outputs[0]
        for value, view, size in zip(outputs, footprint.views, footprint.results, strict=True):
            if size:
                self.memory.allocate(("map", value), size)
                first = value
            else:  # it looks into an input, or is a part of what another result is a part of
                self.memory.share(("map", value), ("map", first if view is None else view))

    def differentiate_plainly(self, nodes: Sequence[int]) -> None:
        """The backward pass of nodes that have run under autograd."""
        for position in reversed(nodes):
            self.differentiate(position, again=False)

    def differentiate(self, position: int, again: bool) -> None:
        """The gradients of the inputs of a node, which is run ``again`` for them unless autograd has saved what is
        needed. Gradients are added to what is there when what was saved is gone.
        """
        memory, node = self.memory, self.graph.nodes[position]
        saved = self.saved([position])
        if any(("gradient", output) in memory for output in node.outputs):
            footprint = self.footprints.whole(position)
            results = float(sum(footprint.results)) if again else 0.0
            passing = max(footprint.recompute, footprint.backward + footprint.whole) + footprint.extra
            whole = 0.0 if self._are_final(position) else footprint.whole
            memory.touch(results + passing if again else footprint.backward + whole)
            received = [value for value in node.inputs if value in self.differentiable]
            for value in received:
                self._make_gradient(value, footprint)
            for key in saved:
                memory.free(key)
            if not again:  # the engine drops them in a step of its own
                for output in node.outputs:
                    memory.free(("gradient", output))
            for value in received:
                self._receive(value, results, again)
        for key in saved:
            memory.free(key)
        if not again:
            for output in node.outputs:
                memory.free(("gradient", output))

    def _are_final(self, position: int) -> bool:
        """Whether the gradients of whole inputs of a node are those of parameters, with nothing added to them: these
        are no activation memory.
        """
        graph = self.graph
        wholes = [index for index in graph.nodes[position].inputs if not graph.is_map(index)]
        wholes = [
            index for index in wholes if index in self.differentiable and graph.values[index].kind.value != "computed"
        ]
        return all(is_parameter(graph, index) and len(graph.readers[index]) == 1 for index in wholes)

    def _make_gradient(self, value: int, footprint: Footprint) -> None:
        """The gradient of an input comes, under the key ``("made", value)``."""
        passed = footprint.passed_on.get(value)
        if is_parameter(self.graph, value):
            return  # it is added to the sum, or to ``.grad``, and is no activation memory
        if passed is None:
            made = footprint.gradients.get(value, float(self.graph.values[value].bytes))
            self.memory.allocate(("made", value), made)
        else:
            self.memory.share(("made", value), ("gradient", passed))

    def _receive(self, value: int, results: float, again: bool) -> None:
        """Add a gradient to what is there; ``results`` are bytes that are still there meanwhile."""
        memory, key, made, info = self.memory, ("gradient", value), ("made", value), self.graph.values[value]
        summed = again and not self.graph.is_map(value) and info.dtype in (torch.float16, torch.bfloat16)
        if is_parameter(self.graph, value) or summed:
            if again:  # the engine sums it in float32 or better
                memory.allocate(key, sum_bytes(self.graph, value))
        elif key in memory:
            memory.touch(results + info.bytes)  # the sum is a new tensor
            memory.free(key)
            memory.free(made)
            memory.allocate(key, info.bytes)
        else:
            memory.share(key, made)
        memory.free(made)
