"""Views that are written to: what the memory behind a view holds after an in-place operation on it.

v = slice(y, 1, 0, 2)                       v  = slice(y, 1, 0, 2)
v.mul_(2)                     becomes       v' = mul(v, 2)
... y is read ...                           y' = slice_scatter(y, v', 1, 0, 2)      ... y' is read ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lrcnn_lightning.graph.graph import Node, Ref, Value, ValueKind

__all__ = ["write_back"]

aten = torch.ops.aten

WriteBack = Callable[[Node, int, Value, Ref, Ref], tuple[Any, tuple[Any, ...]] | None]


def write_back(view: Node, output: int, source: Value, before: Ref, written: Ref) -> tuple[Any, tuple[Any, ...]] | None:
    """The operation and its arguments that put ``written`` (the new contents of output number ``output`` of the node
    ``view``) back into ``before``, the value that was viewed; ``source`` describes that one. None if there is none.
    """
    inverse = _INVERSES.get(view.op)
    return None if inverse is None else inverse(view, output, source, before, written)


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
