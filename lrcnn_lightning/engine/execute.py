"""Executing a plan: the prologue, then the segments, on the live parameters and buffers of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.engine.record import CallRecord, SegmentCall
from lrcnn_lightning.engine.rows import run_node
from lrcnn_lightning.engine.segment import CHANGED_MAP, run_segment
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.engine.undo import Before, draws_numbers, written_buffers
from lrcnn_lightning.errors import InternalError, is_out_of_memory
from lrcnn_lightning.graph import Graph, ValueKind, Write, in_words, map_refs
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

    def __init__(self, plan: Plan, tell: Callable[[str], None] = lambda event: None) -> None:
        self.plan, self._tell = plan, tell
        """``tell`` is told of backward passes that take more than was planned (`engine.segment`)."""
        self._copies = False
        self._prepared = Prepared(plan.graph)
        self._draws = draws_numbers(plan.graph)
        self._copied = written_buffers(plan.graph)
        """Of what there are copies while the plan has not been executed to its end yet."""

    def __call__(self, module: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run the plan on the flat inputs of a call; returns what the module would return.

        Raises `InternalError`, from the error itself, where the call fails and could be taken back, so that it can be
        made in another way. (Not where other processes take part, which would have to do the same.)
        """
        store = _given(self.plan.graph.graph, module, inputs)
        before = Before(store, self._draws, self._copied)
        try:
            result = self._run(module, store)
        except Exception as error:
            if is_out_of_memory(error) or self.plan.graph.communicates or not before.undo():
                raise
            raise InternalError(in_words(error)) from error
        self._copied = []
        return result

    def _run(self, module: nn.Module, store: dict[int, Any]) -> Any:
        plan, graph = self.plan, self.plan.graph
        record = CallRecord()
        for position in plan.prologue:
            node = graph.nodes[position]
            store.update(zip(node.outputs, run_node(node, store), strict=True))
        for number, segment in enumerate(plan.segments):
            if segment.plain:
                for position in segment.nodes:
                    node = graph.nodes[position]
                    store.update(zip(node.outputs, run_node(node, store), strict=True))
            else:
                call = SegmentCall(graph, segment, self._prepared)
                outputs = run_segment(call, [store[index] for index in segment.inputs], record, self._told)
                store.update(zip(segment.outputs, outputs, strict=True))
            for index in segment.inputs:
                if plan.last_reader.get(index) == number:
                    store.pop(index, None)
        if self._copies:
            kept = {index for segment in plan.segments for index in segment.kept}
            store.update(
                {i: store[i].clone() for i in graph.graph.output_values() if i in kept and i in graph.producer}
            )
        leaves = map_refs(list(graph.graph.outputs), lambda ref: store[ref.index])
        returned = graph.graph.structure.size
        _write(module, graph.graph.writes, leaves[returned:])
        return graph.graph.structure.put_together(leaves[:returned])

    def _told(self, event: str) -> None:
        """Maps that are returned are copied once one was changed, so that what is kept of the next ones stays."""
        self._copies = self._copies or event == CHANGED_MAP
        self._tell(event)


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
