"""What plain, column-centric execution costs: what every plan is compared with.

Its memory is found by running the operations once as the module's code has them, in place where it says so, on tensors
without data, with autograd, as the monitor measures a module: no model of what autograd saves could be nearer. Its time
is that of the nominal machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.graph import Graph, Node, Ref, Value, ValueKind, map_refs
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.monitor.measure import measured_by
from lrcnn_lightning.monitor.meter import MemoryMeter
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.trial import Autocast, without_data
from lrcnn_lightning.planning.work import Work
from lrcnn_lightning.planning.workspace import Workspaces
from lrcnn_lightning.rules import Role

__all__ = ["plain_cost", "plain_seconds"]


def plain_cost(problem: Problem) -> Cost:
    """The cost of one step of plain, column-centric execution."""
    graph, machine = problem.graph, problem.machine
    key = problem.differentiable, machine.caching, machine.device
    known: dict[Any, tuple[int, tuple[int, ...]]] = graph.learned.setdefault("plain", {})
    if key not in known:
        workspaces = Workspaces(machine, graph.learned.setdefault("workspaces", {}))
        known[key] = _memory(graph.captured, problem.differentiable, graph.autocast, workspaces)
    peak, timeline = known[key]
    return Cost(peak, plain_seconds(problem), timeline)


def _memory(
    graph: Graph, differentiable: Collection[int], autocast: Autocast | None, workspaces: Workspaces
) -> tuple[int, tuple[int, ...]]:
    """The peak of activation memory of a step, and what is live after each operation, in bytes."""
    counted: dict[str, Any] = {}
    if workspaces.machine.caching:
        counted = {"rounded": workspaces.machine.rounded, "passing": workspaces.taken}
    for source in (graph.source, graph):
        with without_data(), contextlib.suppress(Exception):
            code = source or graph
            module = _Captured(code, graph.outputs, differentiable, autocast, workspaces.machine.caching)
            inputs = [module.made(value).requires_grad_(value.index in differentiable) for value in graph.inputs]
            meter = MemoryMeter(module, record=True, **counted)
            step = measured_by(meter, module, tuple(inputs), {}, bool(differentiable))
            return step.peak_bytes, step.timeline
    # Some operation has no backward pass without data: as if every result were kept.
    total = sum(graph.values[output].bytes for node in graph.nodes for output in node.outputs)
    return total, (total,)


class _Captured(nn.Module):
    """The captured operations as a module whose tensors have no data; it returns as many values as ``outputs``."""

    def __init__(
        self,
        graph: Graph,
        outputs: Sequence[Any],
        differentiable: Collection[int],
        autocast: Autocast | None,
        by_format: bool,
    ) -> None:
        super().__init__()
        self._by_format = by_format
        self._autocast = (
            contextlib.nullcontext() if autocast is None else torch.autocast(autocast[0], dtype=autocast[1])
        )
        graph = self._graph = replace(graph, outputs=graph.outputs[: len(outputs)])
        self._given: dict[int, Tensor] = {}
        for value in graph.values:
            if value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER, ValueKind.CONSTANT):
                wanted = value.index in differentiable
                self._given[value.index] = nn.Parameter(self.made(value)) if wanted else self.made(value)
        parameters = [tensor for tensor in self._given.values() if isinstance(tensor, nn.Parameter)]
        self._held = nn.ParameterList(parameters)
        self._dropped = _dropped(graph)

    def made(self, value: Value) -> Tensor:
        """A tensor for a value that is given; in the memory format of the capture where formats are told apart."""
        if self._by_format and value.strides is not None:
            return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=value.device)
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    def forward(self, *inputs: Tensor) -> Any:
        with self._autocast:
            return self._outputs(inputs)

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        graph = self._graph
        store = dict(self._given)
        store.update(zip((value.index for value in graph.inputs), inputs, strict=True))
        for position, node in enumerate(graph.nodes):
            store.update(zip(node.outputs, _run(node, store), strict=False))
            for index in self._dropped.get(position, ()):
                store.pop(index, None)
        return [store[index] for index in graph.output_values()]


def _dropped(graph: Graph) -> dict[int, list[int]]:
    """After which node no variable of the module's code holds a value any more: after its last reader, and not before
    the submodule that it was given to returns.
    """
    last: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        last.update(dict.fromkeys((*node.outputs, *node.inputs), position))
    producer = graph.producers()
    ends: dict[str, tuple[int, int]] = {}  # path of a submodule -> first and last node of the call that goes on
    calls: list[tuple[int, int]] = []
    paths = [node.module for node in graph.nodes]
    for position, module in enumerate((*paths, "")):
        names = module.split(".") if module else []
        inside = {".".join(names[: depth + 1]) for depth in range(len(names))}
        calls += [ends.pop(path) for path in [*ends] if path not in inside]
        for path in inside:
            ends[path] = ends.get(path, (position, position))[0], position
    for first, end in calls:
        for node in graph.nodes[first : end + 1]:
            for index in node.inputs:
                if producer.get(index, -1) < first:
                    last[index] = max(last[index], end)
    result: dict[int, list[int]] = {}
    for index in producer.keys() - set(graph.output_values()):
        result.setdefault(last[index], []).append(index)
    return result


def _run(node: Node, store: Mapping[int, Any]) -> tuple[Any, ...]:
    """The results of a node."""

    def tensor(ref: Ref) -> Any:
        return store[ref.index]

    args, kwargs = map_refs(node.args, tensor), map_refs(node.kwargs, tensor)
    with entered(node.context):
        result = node.op(*args, **kwargs)
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def plain_seconds(problem: Problem) -> float:
    """How long one step of plain execution takes."""
    work = Work(problem.graph, problem.machine, problem.machine.seconds_a_call)
    seconds = 0.0
    for position, role in enumerate(problem.graph.roles):
        if role is not Role.PROLOGUE:
            seconds += work.forward(position) + work.backward_whole(position, problem.differentiable)
    return seconds + _seconds_of_moved(problem, work)


def _seconds_of_moved(problem: Problem, work: Work) -> float:
    """What plain execution takes longer for what rows do later, where the map is smaller (`rules.pooling`)."""
    graph, seconds = problem.graph, 0.0
    readers, made = graph.captured.readers(), {output for node in graph.nodes for output in node.outputs}
    for node in graph.captured.nodes:
        if node.op is torch.ops.aten.relu.default and node.outputs[0] not in made:
            (reader,) = readers[node.outputs[0]] or (None,)
            after = graph.captured.nodes[reader].outputs[0] if reader is not None else node.outputs[0]
            difference = graph.values[node.outputs[0]].bytes - graph.values[after].bytes
            directions = 1 + (node.outputs[0] in problem.differentiable or after in problem.differentiable)
            seconds += directions * (work.traffic(difference, 2) + work.fresh(difference))
    return seconds
