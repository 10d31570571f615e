"""What plain, column-centric execution costs: what every plan is compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lrcnn_lightning.plan.cost import Cost
from lrcnn_lightning.plan.machine import CPU, Machine
from lrcnn_lightning.plan.memory import Memory
from lrcnn_lightning.plan.retained import VIEWS, extra_bytes, passes_gradient_on, retains
from lrcnn_lightning.plan.work import Work, is_parameter, is_weight
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["plain_cost"]


def _shared_memory(graph: RowGraph, positions: Sequence[int]) -> list[int]:
    """For each value the one whose memory it is, in plain execution: views and results of in-place operations share."""
    memory_of = list(range(len(graph.values)))
    for position in positions:
        node = graph.nodes[position]
        if (node.in_place or node.op in VIEWS) and node.inputs and node.inputs[0] in graph.producer:
            for output in node.outputs:
                memory_of[output] = memory_of[node.inputs[0]]
    return memory_of


def plain_cost(graph: RowGraph, differentiable: Collection[int], machine: Machine = CPU) -> Cost:
    """The cost of one step of plain, column-centric execution: what autograd saves stays until it is used."""
    work = Work(graph, machine, machine.seconds_a_call)
    memory = Memory()
    seconds = 0.0
    holders: dict[int, int] = {}
    saved_by: dict[int, list[int]] = {}
    rest = [p for p in range(len(graph.nodes)) if graph.roles[p] is not Role.PROLOGUE]
    memory_of = _shared_memory(graph, rest)
    returned = {memory_of[value] for value in graph.graph.output_values()}
    waiting: dict[int, int] = {}
    for value, readers in graph.readers.items():
        waiting[memory_of[value]] = waiting.get(memory_of[value], 0) + len(readers)
    for position in rest:
        node = graph.nodes[position]
        for value in node.outputs:
            if memory_of[value] == value:
                memory.allocate(("map", value), graph.values[value].bytes)
        seconds += work.forward(position)
        if any(o in differentiable for o in node.outputs):
            inputs, result = retains(node)
            saved = [i for i in node.inputs if i in graph.producer] if inputs else []
            saved += list(node.outputs) if result else []
            saved = [memory_of[value] for value in saved]
            saved_by[position] = saved
            for value in saved:
                holders[value] = holders.get(value, 0) + 1
            samples = graph.samples(node.outputs[0]) or 1
            extra = extra_bytes(graph, position, graph.height(node.outputs[0]) or 1, samples)
            if extra:
                memory.allocate(("extra", position), extra)
        for value in node.inputs:
            waiting[memory_of[value]] -= 1
        for value in {memory_of[value] for value in (*node.inputs, *node.outputs)}:
            if not waiting[value] and not holders.get(value) and value not in returned:
                memory.free(("map", value))
    for value in returned:
        if not holders.get(value):
            memory.free(("map", value))
    for position in reversed(rest):
        node = graph.nodes[position]
        if not any(o in differentiable for o in node.outputs):
            continue
        wanted = weights = 0
        for index in node.inputs:
            if index not in differentiable:
                continue
            if is_parameter(graph, index):
                weights += is_weight(graph, index)
                continue
            wanted += 1
            memory.allocate(("gradient", index), 0 if passes_gradient_on(node) else graph.values[index].bytes)
        for value in node.outputs:
            memory.free(("gradient", value))
        for value in saved_by.get(position, []):
            holders[value] -= 1
            if not holders[value]:
                memory.free(("map", value))
        memory.free(("extra", position))
        seconds += work.backward(position, 1.0, wanted + weights, weights)
    return Cost(memory.peak, seconds, tuple(memory.timeline))
