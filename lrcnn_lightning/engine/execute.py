"""Executing a plan: the prologue, then the segments, on the live parameters and buffers of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.engine.rows import run_node
from lrcnn_lightning.engine.segment import SegmentCall, run_segment
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.graph import Graph, ValueKind, Write, map_refs
from lrcnn_lightning.plan.plan import Plan

__all__ = ["Execution", "live_tensor", "requires_grad_leaves"]


def live_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name, as it is now."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    tensor: Tensor = getattr(owner, leaf)
    return tensor


def _given(graph: Graph, module: nn.Module, inputs: Sequence[Any]) -> dict[int, Any]:
    """The tensors that no node computes."""
    store: dict[int, Any] = {}
    for value in graph.values:
        if value.kind is ValueKind.INPUT:
            assert isinstance(value.source, int)
            store[value.index] = inputs[value.source]
        elif value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
            store[value.index] = live_tensor(module, str(value.source))
        elif value.kind is ValueKind.CONSTANT:
            store[value.index] = graph.constants[str(value.source)]
    return store


class Execution:
    """A plan made ready to be run, step after step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._prepared = Prepared(plan.graph)
        self._drops = plan.drops

    def __call__(self, module: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run the plan on the flat inputs of a call; returns what the module would return."""
        plan, graph = self.plan, self.plan.graph
        store = _given(graph.graph, module, inputs)
        self._run_plainly(plan.prologue, store)
        for number, segment in enumerate(plan.segments):
            if segment.plain:
                self._run_plainly(segment.nodes, store)
            else:
                call = SegmentCall(graph, segment, self._prepared)
                outputs = run_segment(call, [store[index] for index in segment.inputs])
                store.update(zip(segment.outputs, outputs, strict=True))
            for index in segment.inputs:
                if plan.last_reader.get(index) == number:
                    store.pop(index, None)
        leaves = map_refs(list(graph.graph.outputs), lambda ref: store[ref.index])
        returned = graph.graph.structure.size
        _write(module, graph.graph.writes, leaves[returned:])
        return graph.graph.structure.put_together(leaves[:returned])

    def _run_plainly(self, nodes: Sequence[int], store: dict[int, Any]) -> None:
        """Run nodes under ordinary autograd, and drop what is not read any more."""
        for position in nodes:
            node = self.plan.graph.nodes[position]
            store.update(zip(node.outputs, run_node(node, store), strict=True))
            for index in self._drops.get(position, ()):
                del store[index]


def _write(module: nn.Module, writes: Sequence[Write], leaves: list[Any]) -> None:
    """Set the attributes that the module's own code would have set."""
    for write in writes:
        owner = module.get_submodule(write.path) if write.path else module
        setattr(owner, write.name, write.structure.put_together(leaves[: write.structure.size]))
        leaves = leaves[write.structure.size :]


def requires_grad_leaves(graph: Graph, module: nn.Module, inputs: Sequence[Any]) -> frozenset[int]:
    """Inputs and parameters that require a gradient now."""
    found = []
    for value in graph.values:
        if value.kind is ValueKind.INPUT:
            assert isinstance(value.source, int)
            tensor = inputs[value.source]
        elif value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
            tensor = live_tensor(module, str(value.source))
        else:
            continue
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            found.append(value.index)
    return frozenset(found)
