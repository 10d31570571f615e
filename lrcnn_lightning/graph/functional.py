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
from lrcnn_lightning.graph.graph import Graph, Node, Ref, ValueKind, map_refs, references
from lrcnn_lightning.graph.views import write_back

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

    Where a view is written, so is the memory behind it (`views`). Raises `CaptureError` where that cannot be followed.
    """
    graph = replace(graph, nodes=tuple(_without_data(graph, node) for node in graph.nodes))
    return _Functionaliser(graph).run()


class _Functionaliser:
    """Walks the nodes and follows what each value, and each view of it, holds."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = list(graph.values)
        self.result: list[Node] = []
        self.current: dict[int, int] = {}
        """Value -> the value that holds its contents now."""
        self.view: dict[int, Node] = {}
        """View -> the node that made it; it looks into the node's first argument."""
        self.stale: set[int] = set()
        """Views of memory that was written since: looked up again when they are read."""
        self.lost: dict[int, str] = {}
        """Value -> why its contents are not known."""

    def run(self) -> Graph:
        dependent = dependent_values(self.graph)
        for node in self.graph.nodes:
            written = _written_argument(node)
            if written is None or not any(index in dependent for index in node.inputs):
                self._emit(node)
                if _is_view(node):
                    self.view.update(dict.fromkeys(node.outputs, node))
            elif self.values[self._base(written.index)].kind in (ValueKind.BUFFER, ValueKind.PARAMETER):
                self._emit(node)  # a buffer that takes a value from the data: an effect, run on the live buffer
            else:
                self._emit(self._copied(node) if node.op is aten.copy_.default else _functional(node))
                self._written(written.index, node)
                # The result is the memory that was written, once more.
                self.view[node.outputs[0]] = replace(node, op=aten.alias.default, args=(written,), kwargs={})
        outputs = map_refs(self.graph.outputs, self._now)
        return _without_unread(
            replace(self.graph, values=tuple(self.values), nodes=tuple(self.result), outputs=outputs)
        )

    def _emit(self, node: Node) -> None:
        args, kwargs = map_refs(node.args, self._now), map_refs(node.kwargs, self._now)
        self.result.append(replace(node, args=args, kwargs=kwargs))

    def _copied(self, node: Node) -> Node:
        """``copy_(destination, source)``: the source, in the destination's shape and dtype."""
        result, source = self.values[node.outputs[0]], node.args[1]
        given = self.values[source.index]
        if given.dtype is not result.dtype:
            self.values.append(replace(given, index=len(self.values), dtype=result.dtype, kind=ValueKind.COMPUTED))
            output = self.values[-1].index
            self._emit(replace(node, op=aten.to.dtype, args=(source, result.dtype), kwargs={}, outputs=(output,)))
            source = Ref(output)
        if given.shape != result.shape:
            return replace(node, op=aten.expand.default, args=(source, list(result.shape)), kwargs={})
        return replace(node, op=aten.alias.default, args=(source,), kwargs={})

    def _now(self, ref: Ref) -> Ref:
        """The value that holds what ``ref`` holds at this point."""
        index = ref.index
        if index in self.lost:
            raise CaptureError(self.lost[index])
        if index in self.stale:
            self.stale.discard(index)
            node = self.view[index]
            outputs = tuple(self._like(output) for output in node.outputs)
            self._emit(replace(node, name=f"{node.name}.again", outputs=outputs))
            self.current[index] = outputs[node.outputs.index(index)]
        return Ref(self.current.get(index, index))

    def _like(self, index: int) -> int:
        """A new value with the shape and dtype of another."""
        value = self.graph.values[index]
        self.values.append(replace(value, index=len(self.values), kind=ValueKind.COMPUTED, source=None))
        return len(self.values) - 1

    def _base(self, index: int) -> int:
        """What a view, or a view of a view, looks into."""
        while index in self.view:
            index = self.view[index].args[0].index
        return index

    def _written(self, index: int, origin: Node) -> None:
        """The value holds the result of ``origin`` now; so does the memory behind it, and other views of that."""
        base = self._base(index)
        self.current[index] = origin.outputs[0]
        path = {index}
        while index in self.view:
            node = self.view[index]
            source = node.args[0].index
            path.add(source)
            contents = Ref(self.current[index])
            inverse = write_back(
                node, node.outputs.index(index), self.graph.values[source], self._now(Ref(source)), contents
            )
            if inverse is None:
                self.lost[source] = (
                    f"{origin.op} at {origin.module or 'the top'} changes {self.graph.values[index].name!r} in place, "
                    f"and {self.graph.values[source].name!r}, which it is a view of by {node.op}, is read later; "
                    "write it without in-place change"
                )
                break
            self.current[source] = self._like(source)
            name = f"{origin.name}{_WRITTEN_BACK}"
            self.result.append(
                replace(origin, name=name, op=inverse[0], args=inverse[1], kwargs={}, outputs=(self.current[source],))
            )
            index = source
        for other in self.view:
            if other not in path and self._base(other) == base:
                self.current.pop(other, None)
                self.stale.add(other)


_WRITTEN_BACK = ".written_back"


def _without_unread(graph: Graph) -> Graph:
    """Without the values that were written back and are not read again."""
    read = {ref.index for ref in references(graph.outputs)}
    nodes = []
    for node in reversed(graph.nodes):
        if node.name.endswith(_WRITTEN_BACK) and not any(output in read for output in node.outputs):
            continue
        read.update(node.inputs)
        nodes.append(node)
    return replace(graph, nodes=tuple(reversed(nodes)))


def _is_view(node: Node) -> bool:
    """Whether the outputs of a node may share the memory of its first argument."""
    if not isinstance(node.op, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], Ref):
        return False
    return node.op._schema.arguments[0].alias_info is not None and not node.op._schema.is_mutable


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


def _functional(node: Node) -> Node:
    """The functional overload of an in-place operation, with the same arguments."""
    name = node.op._schema.name.split("::")[1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = None if packet is None else getattr(packet, node.op._overloadname, None)
    if overload is None:
        raise CaptureError(f"{node.op} at {node.module or 'the top'} has no functional form")
    return replace(node, op=overload, in_place=True)
