"""Maxima and minima over rows, with ATen's treatment of ties.

A map of one element a row is computed by rows, and what is left of it is reduced whole:

    x -> line_extreme -> N C H 1, how many attain it -> join_extremes -> N C          amax, amin, max(), min()
    x -> line_maximum -> N C H 1, where in the map   -> pick_maximum  -> N C 1 1      adaptive_max_pool to one element

The first four share the gradient evenly among the elements that attain the extreme; pooling gives it to the first one.

This is no `Reduction`. That would have to find the extreme again in a slab that has been computed again, and where
another slab height has rounded it differently no element would equal it: the gradient would be lost. Here each row
finds its own extreme, in the slab at hand, and the rows share the gradient by numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.reduction import reduced_dimensions, within_rows
from lrcnn_lightning.rules.rule import Axes, Operator, RowRule, Scope, Tile, register

__all__ = ["LineMaximum", "join_extremes", "line_extreme", "line_maximum", "pick_maximum"]

aten = torch.ops.aten


def _line_extreme(x: Tensor, dims: tuple[int, ...], largest: bool) -> tuple[Tensor, Tensor]:
    """The extreme over ``dims`` (which keep size one), and how many attain it."""
    if not dims:
        return x.clone(), torch.ones_like(x, dtype=torch.int64)
    extreme = x.amax(dims, keepdim=True) if largest else x.amin(dims, keepdim=True)
    return extreme, (x.detach() == extreme.detach()).sum(dims, keepdim=True)


class _Join(torch.autograd.Function):
    """The extreme along one dimension; its gradient is shared by the number of elements behind each entry."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ties: Tensor, row: int, largest: bool) -> Tensor:
        result = values.amax(row, keepdim=True) if largest else values.amin(row, keepdim=True)
        shares = ties * (values == result)
        # In the type of the map or float32: a quotient of integers would be in the default type of the process.
        wide = torch.promote_types(values.dtype, torch.float32)
        ctx.save_for_backward((shares.to(wide) / shares.sum(row, keepdim=True)).to(values.dtype))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (shares,) = ctx.saved_tensors
        return gradient * shares, None, None, None


def _join_extremes(values: Tensor, ties: Tensor, row: int, largest: bool, shape: list[int]) -> Tensor:
    """The extreme of the rows' extremes."""
    result: Tensor = _Join.apply(values, ties, row, largest)  # type: ignore[no-untyped-call]
    return result.reshape(shape)


line_extreme = Operator("line_extreme", _line_extreme)
join_extremes = Operator("join_extremes", _join_extremes)


@register("reduction", line_extreme)
def line_extreme_rule(scope: Scope) -> RowRule | None:
    """``line_extreme(input, dims, largest)``: ``dims`` are others than the row axis."""
    axes, dims = scope.of(scope.node.args[0]), scope.node.args[1]
    if not scope.only_first_has_rows() or axes.row in dims:
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if axes.batch in dims else axes.batch),) * 2)


@register("reduction", aten.amax.default, aten.amin.default)
def within(scope: Scope) -> RowRule | None:
    """``amax(input, dim, keepdim)`` over other dimensions than the row axis (over rows it has been expanded)."""
    dims = reduced_dimensions(scope.argument(1, "dim"), len(scope.shape(scope.node.args[0])))
    return within_rows(scope, dims, bool(scope.argument(2, "keepdim", False)))


@expands(aten.amax.default)
@expands(aten.amin.default)
@expands(aten.max.default)
@expands(aten.min.default)
def expand_extreme(builder: Builder, node: Node) -> bool:
    """``amax(input, dim, keepdim)``, ``max(input)``."""
    value, out = builder.values[node.args[0].index], builder.values[node.outputs[0]]
    row, rank = builder.row(node.args[0]), len(value.shape)
    dims = reduced_dimensions(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), rank)
    if row is None or rank < 3 or row not in dims:
        return False
    others = tuple(dim for dim in dims if dim != row)
    shape = tuple(1 if dim in others else size for dim, size in enumerate(value.shape))
    lines = builder.value(f"{node.name}_lines", shape, value.dtype, value.device)
    ties = builder.value(f"{node.name}_ties", shape, torch.int64, value.device)
    largest = "max" in node.op._schema.name
    builder.emit(node, line_extreme, (node.args[0], others, largest), (lines.index, ties.index), "lines")
    builder.emit(node, join_extremes, (lines, ties, row, largest, list(out.shape)), node.outputs, "join")
    return True


def _line_maximum(x: Tensor, row: int, first: int = 0, height: int | None = None) -> tuple[Tensor, Tensor]:
    """Per row: the largest element of ``N C *`` and its flat place in the map; of several the first.

    ``x`` is the part of a map of ``height`` rows that begins with row ``first``.
    """
    sizes = list(x.shape[2:])
    others = [size for dim, size in enumerate(sizes, 2) if dim != row]
    values, local = x.movedim(row, 2).unsqueeze(-1).flatten(3).max(-1)
    rows = torch.arange(first, first + x.shape[row], device=x.device)
    if height is not None:
        sizes[row - 2] = height
    place, step = torch.zeros_like(local), 1
    for dim in reversed(range(2, x.dim())):
        if dim == row:
            coordinate = rows
        else:
            size = others.pop()
            coordinate, local = local % size, local // size
        place = place + coordinate * step
        step *= sizes[dim - 2]
    shape = [*x.shape[:2], *(x.shape[row] if dim == row else 1 for dim in range(2, x.dim()))]
    return values.reshape(shape), place.reshape(shape)


def _pick_maximum(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows' maxima the largest, and its place; of several the first place in the map."""
    flat, where = values.flatten(2), places.flatten(2)
    candidates = where.masked_fill(flat < flat.amax(-1, keepdim=True), torch.iinfo(where.dtype).max)
    chosen = candidates.argmin(-1, keepdim=True)
    shape = [*values.shape[:2], *([1] * (values.dim() - 2))]
    return flat.gather(-1, chosen).reshape(shape), where.gather(-1, chosen).reshape(shape)


line_maximum = Operator("line_maximum", _line_maximum)
pick_maximum = Operator("pick_maximum", _pick_maximum)


@dataclass(frozen=True)
class LineMaximum(RowRule):
    """``line_maximum`` on a slab of a map of ``height`` rows."""

    row: int
    height: int
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> tuple[Tensor, Tensor]:
        return _line_maximum(args[0], self.row, tile.rows.lo, self.height)


@register("reduction", line_maximum)
def line_maximum_rule(scope: Scope) -> RowRule | None:
    """``line_maximum(input, row)``: only along the row axis itself."""
    axes, row = scope.of(scope.node.args[0]), scope.node.args[1]
    if not scope.only_first_has_rows() or axes.row != row:
        return None
    return LineMaximum(row, scope.shape(scope.node.args[0])[row], (axes, axes))


@expands(aten.adaptive_max_pool1d.default)
@expands(aten.adaptive_max_pool2d.default)
@expands(aten.adaptive_max_pool3d.default)
def expand_global_maximum(builder: Builder, node: Node) -> bool:
    """``adaptive_max_poolNd(input, output_size)`` to one element."""
    value, out = builder.values[node.args[0].index], builder.values[node.outputs[0]]
    rank, dimensions = len(value.shape), int(node.op._schema.name[-2])
    row = builder.row(node.args[0])
    if rank != dimensions + 2 or any(size != 1 for size in out.shape[2:]) or row is None or row < 2:
        return False
    shape = tuple(size if dim < 2 or dim == row else 1 for dim, size in enumerate(value.shape))
    parts = [
        builder.value(f"{node.name}_{part}", shape, dtype, value.device)
        for part, dtype in (("lines", value.dtype), ("places", torch.int64))
    ]
    builder.emit(node, line_maximum, (node.args[0], row), tuple(part.index for part in parts), "lines")
    builder.emit(node, pick_maximum, tuple(parts), node.outputs, "pick")
    return True
