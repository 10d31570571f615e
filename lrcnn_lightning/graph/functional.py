"""Functional form: in-place operations on feature maps become functional ones.

``relu_(a)`` becomes ``r = relu(a)`` and every later reader of ``a`` reads ``r``.  Operations on values that do not
depend on the input's data (parameters, buffers, random masks) stay as they were written: they run once a step, in
order, on the live tensors, so ``num_batches_tracked.add_(1)`` and the power iteration of spectral norm do what they do
in plain training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.graph.graph import Graph, Node, Ref, ValueKind, map_refs

__all__ = ["dependent_values", "functionalise"]

aten = torch.ops.aten

# Operations that read only the shape, dtype and device of their first argument, and the one that replaces each.
_METADATA_ONLY: dict[Any, Any] = {
    aten.empty_like.default: aten.empty.memory_format,
    aten.zeros_like.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.rand_like.default: aten.rand.default,
    aten.randn_like.default: aten.randn.default,
    aten.full_like.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}
_FILLED = {aten.full_like.default: 1, aten.new_full.default: 2}


def dependent_values(graph: Graph) -> set[int]:
    """Indices of the values that depend on the data of a user input."""
    dependent = {value.index for value in graph.inputs}
    for node in graph.nodes:
        if any(index in dependent for index in node.inputs):
            dependent.update(node.outputs)
    return dependent


def functionalise(graph: Graph) -> Graph:
    """The same graph without mutation of values that depend on the input.

    Raises `CaptureError` where a mutated map is also visible through a view that is read later; no such network is
    known among the common libraries.
    """
    nodes = tuple(_without_data(graph, node) for node in graph.nodes)
    graph = replace(graph, nodes=nodes)
    dependent = dependent_values(graph)
    current: dict[int, int] = {}  # value -> the value that holds its contents now
    alias: dict[int, int] = {}  # view -> the value it looks into
    result: list[Node] = []

    def now(ref: Ref) -> Ref:
        index = ref.index
        while index in current:
            index = current[index]
        return Ref(index)

    for position, node in enumerate(nodes):
        written = _written_argument(node)
        if written is None or not any(index in dependent for index in node.inputs):
            result.append(replace(node, args=map_refs(node.args, now), kwargs=map_refs(node.kwargs, now)))
            for index in _viewed(node):
                for output in node.outputs:
                    alias[output] = _base(alias, index)
            continue
        target = now(written).index
        if graph.values[_base(alias, target)].kind in (ValueKind.BUFFER, ValueKind.PARAMETER):
            result.append(replace(node, args=map_refs(node.args, now), kwargs=map_refs(node.kwargs, now)))
            continue  # a buffer that takes a value from the data: an effect, run on the live buffer
        _refuse_visible_views(graph, alias, current, target, position)
        functional = _functional(node)
        result.append(replace(functional, args=map_refs(functional.args, now), kwargs=map_refs(functional.kwargs, now)))
        current[target] = node.outputs[0]
    return replace(graph, nodes=tuple(result), outputs=map_refs(graph.outputs, now))


def _without_data(graph: Graph, node: Node) -> Node:
    """``empty_like(x)`` and its kin as factories that no longer mention ``x``."""
    factory = _METADATA_ONLY.get(node.op)
    if factory is None:
        return node
    (output,) = node.outputs
    value = graph.values[output]
    args: tuple[Any, ...] = (list(value.shape),)
    if node.op in _FILLED:
        args += (node.args[_FILLED[node.op]],)
    kwargs = {"dtype": value.dtype, "device": value.device}
    return replace(node, op=factory, args=args, kwargs=kwargs)


def _written_argument(node: Node) -> Ref | None:
    if not isinstance(node.op, torch._ops.OpOverload) or not node.op._schema.is_mutable:
        return None
    for argument, given in zip(node.op._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Ref):
            return given
    return None


def _viewed(node: Node) -> list[int]:
    """Indices of arguments that an output may be a view of."""
    if not isinstance(node.op, torch._ops.OpOverload):
        return []
    return [
        given.index
        for argument, given in zip(node.op._schema.arguments, node.args, strict=False)
        if argument.alias_info is not None and isinstance(given, Ref)
    ]


def _base(alias: dict[int, int], index: int) -> int:
    while index in alias:
        index = alias[index]
    return index


def _refuse_visible_views(
    graph: Graph, alias: dict[int, int], current: dict[int, int], target: int, position: int
) -> None:
    base = _base(alias, target)
    family = {index for index in (*alias, base) if _base(alias, index) == base and index != target}
    later = {index for node in graph.nodes[position + 1 :] for index in node.inputs}
    later.update(ref.index for ref in graph.outputs if isinstance(ref, Ref))
    seen = sorted(index for index in family & later if index not in current)
    if seen:
        names = ", ".join(graph.values[index].name for index in seen)
        node = graph.nodes[position]
        raise CaptureError(
            f"{node.op} at {node.module or 'the top'} changes {graph.values[target].name!r} in place "
            f"while a view of the same memory ({names}) is read later; write it without in-place change"
        )


def _functional(node: Node) -> Node:
    """The functional overload of an in-place operation, with the same arguments."""
    name = node.op._schema.name.split("::")[1]
    if name == "copy_":
        destination, source = node.args[:2]
        return replace(node, op=aten.copy.default, args=(destination, source), kwargs={})
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = None if packet is None else getattr(packet, node.op._overloadname, None)
    if overload is None:
        raise CaptureError(f"{node.op} at {node.module or 'the top'} has no functional form")
    return replace(node, op=overload)
