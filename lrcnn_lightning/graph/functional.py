"""Functional form: in-place operations on feature maps become functional ones.

``relu_(a)`` becomes ``r = relu(a)`` and every later reader of ``a`` reads ``r``.  A buffer that takes a value from the
data is treated alike, and written once, at the end:

    ema.mul_(0.9).add_(m)               before = clone(ema)             (if what depends on the data reads it)
    b(y - ema)                 becomes  now = add(mul(before, 0.9), m)
                                        b(y - now);  ema.copy_(now)

What does not depend on the input's data (parameters, buffers, random masks) is computed once a step, in order, before
all rows; random numbers that are drawn after others for which the data were read depend on the data, too (`draws`).
Writes among it stay as they were written, on the live tensors, so ``num_batches_tracked.add_(1)`` and the power
iteration of spectral norm do what they do in plain training. Whoever depends on the data and reads memory that is
written later gets a copy from before.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.graph.draws import DrawOrder
from lrcnn_lightning.graph.graph import Graph, Node, Ref, Value, ValueKind, dense_strides, map_refs, references
from lrcnn_lightning.graph.views import base_of, views_of, write_back, written_argument

__all__ = ["buffer_values", "dependent_values", "functionalise"]

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
# How each of the other factories fills what it makes.
_FILL_IN_PLACE: dict[Any, tuple[Any, ...]] = {
    aten.zeros.default: (aten.zero_.default,),
    aten.ones.default: (aten.fill_.Scalar, 1),
    aten.rand.default: (aten.uniform_.default,),
    aten.randn.default: (aten.normal_.default,),
}

# Operations that fill with random numbers, and what is called otherwise than its name says.
_FILLS: dict[Any, Any] = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.normal_.default: aten.normal_functional.default,
}


def dependent_values(graph: Graph) -> set[int]:
    """Indices of the values that depend on the data of a user input."""
    dependent, order = {value.index for value in graph.inputs}, DrawOrder()
    for node in graph.nodes:
        if order.waits(node, not dependent.isdisjoint(node.inputs)):
            dependent.update(node.outputs)
    return dependent


def buffer_values(graph: Graph) -> frozenset[int]:
    """Indices of the buffers, and of the views of them: what others may write while a backward pass is to come."""
    view: dict[int, Node] = {}
    for node in graph.nodes:
        view.update(views_of(node))
    indices = (value.index for value in graph.values)
    return frozenset(i for i in indices if graph.values[base_of(view, i)].kind is ValueKind.BUFFER)


def functionalise(graph: Graph) -> Graph:
    """The same graph without mutation of values that depend on the input.

    Where a view is written, so is the memory behind it (`views`). Raises `CaptureError` where that cannot be followed.
    """
    values = list(graph.values)
    nodes = [made for node in graph.nodes for made in _without_data(values, node)]
    functional = _Functionaliser(replace(graph, values=tuple(values), nodes=tuple(nodes))).run()
    return replace(functional, source=graph)


_LIVE = (ValueKind.BUFFER, ValueKind.PARAMETER)
"""What outlasts a call: a value that such memory takes from the data is written there."""


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
        self.dependent = {value.index for value in graph.inputs}
        """Values that depend on the data of an input."""
        self.copies: set[int] = set()
        """Values of which a copy is read, because they are written in place later."""
        self.taken: dict[int, Node] = {}
        """Buffer or parameter -> the last node by which it takes a value from the data."""
        self.last_writes = _last_writes(graph)

    def run(self) -> Graph:
        order = DrawOrder()
        for position, node in enumerate(self.graph.nodes):
            written = written_argument(node)
            depends = order.waits(node, any(self._depends(index) for index in node.inputs))
            if depends:
                self.dependent.update(node.outputs)
                for index in node.inputs:
                    self._copy_before(index, position)
            if written is None:
                self._emit(node)
            elif depends:
                self._emit(self._copied(node) if node.op is aten.copy_.default else _functional(node))
                self._written(written.index, node)
                base = self._base(written.index)
                if self.values[base].kind in _LIVE:
                    self.taken[base] = node
            else:
                self._drop_copy(written.index)
                self._emit(node)
            self.view.update(views_of(node))
        for base, node in self.taken.items():
            args = (Ref(base), self._now(Ref(base)))
            name = f"{node.name}.written"
            self._append(replace(node, name=name, op=aten.copy_.default, args=args, kwargs={}, outputs=()))
        outputs = map_refs(self.graph.outputs, self._now)
        return _without_unread(
            replace(self.graph, values=tuple(self.values), nodes=tuple(self.result), outputs=outputs)
        )

    def _emit(self, node: Node) -> None:
        args, kwargs = map_refs(node.args, self._now), map_refs(node.kwargs, self._now)
        self._append(replace(node, args=args, kwargs=kwargs))

    def _append(self, node: Node) -> None:
        self.result.append(node)
        if not self.dependent.isdisjoint(node.inputs):
            self.dependent.update(node.outputs)

    def _depends(self, index: int) -> bool:
        """Whether what a value holds now depends on the data."""
        held = self._base(index) if index in self.stale else index
        return self.current.get(held, held) in self.dependent

    def _copy_before(self, index: int, position: int) -> None:
        """Let the value be read from a copy if its memory is written at ``position`` or later."""
        base = self._base(index)
        if base in self.copies or self._depends(base) or self.last_writes.get(base, -1) < position:
            return
        copy = self._like(base)
        self._emit(Node(f"{self.values[base].name}.before", aten.clone.default, (Ref(base),), {}, (copy,)))
        self.copies.add(base)
        self.current[base] = copy
        self._look_again(base)

    def _drop_copy(self, index: int) -> None:
        """Let the value be read from its own memory again, which is about to be written."""
        base = self._base(index)
        if base in self.copies:
            self.copies.discard(base)
            del self.current[base]
            self._look_again(base)

    def _look_again(self, base: int, but: Collection[int] = ()) -> None:
        """The views of a value are views of what it holds now."""
        for other in self.view:
            if other not in but and self._base(other) == base:
                self.current.pop(other, None)
                self.stale.add(other)

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
        return base_of(self.view, index)

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
            self._append(
                replace(origin, name=name, op=inverse[0], args=inverse[1], kwargs={}, outputs=(self.current[source],))
            )
            index = source
        self._look_again(base, path)


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


def _last_writes(graph: Graph) -> dict[int, float]:
    """Value -> position of the last node that writes its memory in place. A buffer that takes a value from the data is
    written at the end; other memory that does becomes a value of its own.
    """
    view: dict[int, Node] = {}
    dependent, order = {value.index for value in graph.inputs}, DrawOrder()
    found: dict[int, float] = {}
    for position, node in enumerate(graph.nodes):
        written = written_argument(node)
        reads = any(index in dependent or base_of(view, index) in dependent for index in node.inputs)
        depends = order.waits(node, reads)
        if depends:
            dependent.update(node.outputs)
        if written is not None:
            base = base_of(view, written.index)
            if not depends:
                found[base] = position
            elif graph.values[base].kind in _LIVE:
                found[base] = math.inf
            if depends:
                dependent.add(base)
        view.update(views_of(node))
    return found


def _without_data(values: list[Value], node: Node) -> list[Node]:
    """``empty_like(x)`` and its kin as factories that no longer mention ``x``.

    Random numbers go to elements as these lie in memory, so what is not contiguous is made so, and then filled.
    """
    factory = _METADATA_ONLY.get(node.op)
    if factory is None:
        return [node]
    (output,) = node.outputs
    value = values[output]
    args: tuple[Any, ...] = (list(value.shape),)
    kwargs = {"dtype": value.dtype, "device": value.device}
    if value.strides is None or dense_strides(value.shape) == value.strides:
        args += (node.args[_FILLED[node.op]],) if node.op in _FILLED else ()
        return [replace(node, op=factory, args=args, kwargs=kwargs)]
    args += (list(value.strides),)
    if factory is aten.empty.memory_format:
        return [replace(node, op=aten.empty_strided.default, args=args, kwargs=kwargs)]
    empty = replace(value, index=len(values))
    values.append(empty)
    fill, *filling = _FILL_IN_PLACE.get(factory) or (aten.fill_.Scalar, node.args[_FILLED[node.op]])
    name = f"{node.name}.empty"
    return [
        replace(node, name=name, op=aten.empty_strided.default, args=args, kwargs=kwargs, outputs=(empty.index,)),
        replace(node, op=fill, args=(Ref(empty.index), *filling), kwargs={}),
    ]


def _functional(node: Node) -> Node:
    """The functional overload of an in-place operation, with the same arguments."""
    if node.op in _FILLS:
        return replace(node, op=_FILLS[node.op])
    name = node.op._schema.name.split("::")[1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = None if packet is None else getattr(packet, node.op._overloadname, None)
    if overload is None:
        raise CaptureError(f"{node.op} at {node.module or 'the top'} has no functional form")
    return replace(node, op=overload)
