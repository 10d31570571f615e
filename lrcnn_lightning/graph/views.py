"""Views, and writes: what an operation writes, and what the memory behind a view holds after one on it.

v = slice(y, 1, 0, 2)                       v  = slice(y, 1, 0, 2)
v.mul_(2)                     becomes       v' = mul(v, 2)
... y is read ...                           y' = slice_scatter(y, v', 1, 0, 2)      ... y' is read ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrcnn_lightning.graph.graph import Graph, Node, Ref, Value, ValueKind, map_refs, references

__all__ = ["base_of", "views_of", "without_aliases", "write_back", "written_argument"]

aten = torch.ops.aten

WriteBack = Callable[[Node, int, Value, Ref, Ref], tuple[Any, tuple[Any, ...]] | None]


def base_of(view: Mapping[int, Node], index: int) -> int:
    """What a view, or a view of a view, looks into; ``view``: each view -> the node that made it."""
    while index in view:
        index = view[index].args[0].index
    return index


def without_aliases(graph: Graph) -> Graph:
    """The same graph in which whoever reads what an operation that writes returns, reads the memory that it wrote."""
    same: dict[int, int] = {}

    def resolved(ref: Ref) -> Ref:
        return Ref(same.get(ref.index, ref.index))

    nodes = []
    for node in graph.nodes:
        node = replace(node, args=map_refs(node.args, resolved), kwargs=map_refs(node.kwargs, resolved))
        written = written_argument(node)
        if written is not None and node.outputs and node.op._schema.returns[0].alias_info is not None:
            same[node.outputs[0]] = written.index
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), outputs=map_refs(graph.outputs, resolved))


def views_of(node: Node) -> dict[int, Node]:
    """The outputs of a node that are views, and how they were made."""
    return dict.fromkeys(node.outputs, node) if written_argument(node) is None and _is_view(node) else {}


def _is_view(node: Node) -> bool:
    """Whether the outputs of a node may share the memory of its first argument."""
    if not isinstance(node.op, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], Ref):
        return False
    return node.op._schema.arguments[0].alias_info is not None and not node.op._schema.is_mutable


def written_argument(node: Node) -> Ref | None:
    """The argument that a node writes in place, if it does."""
    if not isinstance(node.op, torch._ops.OpOverload) or not node.op._schema.is_mutable:
        return None
    by_position = zip(node.op._schema.arguments, node.args, strict=False)
    by_name = ((argument, node.kwargs.get(argument.name)) for argument in node.op._schema.arguments)
    for argument, given in (*by_position, *by_name):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Ref):
            return given
    return None


def write_back(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]] | None:
    """The operation and its arguments that put ``written`` (the new contents of output number ``output`` of the node
    ``view``) back into ``before``, the value that was viewed; ``source`` describes that one. None if there is none.
    """
    inverse = _INVERSES.get(view.op)
    if inverse is not None and not source.dtype.is_complex:  # those of ATen cannot be differentiated there
        return inverse(view, output, source, before, written)
    if view.op is aten.detach.default or any(references((view.args[1:], view.kwargs))):
        return None
    return WrittenBack(view.op, output, view.args[1:], tuple(view.kwargs.items())), (before, written)


@dataclass(frozen=True)
class WrittenBack:
    """A copy of a tensor in which a view of it holds something else: for any view. It runs whole."""

    view: Any
    output: int
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, before: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        result = before.clone()
        viewed = self.view(result, *self.args, **dict(self.kwargs))
        (viewed[self.output] if isinstance(viewed, (list, tuple)) else viewed).copy_(written)
        return result

    def __str__(self) -> str:
        return f"written back by {self.view}"

    __repr__ = __str__


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _slice(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    given = [_argument(view, i, name, default) for i, (name, default) in enumerate(_SLICE, 1)]
    return aten.slice_scatter.default, (before, written, *given)


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _narrow(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    dim, start, length = view.args[1:4]
    start = start + source.shape[dim] if start < 0 else start
    return aten.slice_scatter.default, (before, written, dim, start, start + length, 1)


def _select(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    return aten.select_scatter.default, (before, written, *view.args[1:3])


def _split(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    dim = _argument(view, 2, "dim", 0)
    sizes = view.args[1]
    if isinstance(sizes, int):
        step = sizes if view.op is aten.split.Tensor else -(-source.shape[dim] // sizes)
        start, end = output * step, min((output + 1) * step, source.shape[dim])
    else:
        start, end = sum(sizes[:output]), sum(sizes[: output + 1])
    return aten.slice_scatter.default, (before, written, dim, start, end, 1)


def _reshape(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    return aten.reshape.default, (written, list(source.shape))


def _transpose(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    return aten.transpose.int, (written, *view.args[1:3])


def _permute(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    order = [dim % len(source.shape) for dim in view.args[1]]
    return aten.permute.default, (written, [order.index(dim) for dim in range(len(order))])


def _same(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]]:
    return aten.alias.default, (written,)


def _detached(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]] | None:
    """A buffer has no gradient that could be lost on the way."""
    return (aten.alias.default, (written,)) if source.kind is ValueKind.BUFFER else None


_INVERSES: dict[Any, WriteBack] = {
    aten.detach.default: _detached,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.split.sizes: _split,
    aten.chunk.default: _split,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
        ),
        _reshape,
    ),
    **dict.fromkeys((aten.alias.default, aten.contiguous.default, aten.view_as.default, aten.dropout.default), _same),
}
