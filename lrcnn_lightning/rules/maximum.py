"""Maxima and minima over rows, with ATen's treatment of ties.

``amax``, ``amin``, ``max()`` and ``min()`` share the gradient evenly among the elements that attain the extreme, so
their number is part of the reduction:

    extreme, ties = extremes(x)           two rows: the larger of both; the ties of the larger, or of both

``adaptive_max_pool`` to one element gives the gradient to the first place that attains it, in the order of the map.
A map of one element a row is left of it, and that is reduced whole:

    x -> line_maximum -> N C H 1, where in the map -> pick_maximum -> N C 1 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.reduction import kept_batch, reduced_dimensions, restored, within_rows
from lrcnn_lightning.rules.rule import WHOLE, Axes, Operator, Reduction, RowRule, Scope, Tile, register

__all__ = ["Extreme", "LineMaximum", "extremes", "line_maximum", "pick_maximum"]

aten = torch.ops.aten


def _extremes(x: Tensor, dims: tuple[int, ...], keepdim: bool, largest: bool) -> tuple[Tensor, Tensor]:
    kept = x.amax(dims, keepdim=True) if largest else x.amin(dims, keepdim=True)
    ties = (x.detach() == kept.detach()).sum(dims, keepdim=keepdim)
    return kept.reshape(ties.shape), ties


extremes = Operator("extremes", _extremes)


@dataclass(frozen=True)
class Extreme(Reduction):
    """The largest or smallest element over dimensions that include the row axis, and how many attain it."""

    dims: tuple[int, ...]
    keepdim: bool
    largest: bool
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE, WHOLE)

    def partial(self, slab: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return _extremes(slab, self.dims, self.keepdim, self.largest)

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        value = (torch.maximum if self.largest else torch.minimum)(first[0], second[0])
        return value, first[1] * (first[0] == value) + second[1] * (second[0] == value)

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return state

    def inject(
        self, slab: Tensor, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], args: tuple[Any, ...]
    ) -> Tensor:
        gradient = gradients[0]
        assert gradient is not None
        value, share = (restored(t, self.dims, self.keepdim) for t in (outputs[0], gradient / outputs[1]))
        return ((slab == value) * share).to(slab.dtype)


@register("reduction", extremes)
def extremes_rule(scope: Scope) -> Reduction | None:
    """``extremes(input, dims, keepdim, largest)``."""
    _, dims, keepdim, largest = scope.node.args
    if not scope.only_first_has_rows() or scope.of(scope.node.args[0]).row not in dims:
        return None
    return Extreme(dims, keepdim, largest, kept_batch(scope, dims, keepdim))


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
    rank = len(value.shape)
    dims = reduced_dimensions(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), rank)
    keepdim = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    if rank < 3 or builder.dimension not in dims:
        return False
    ties = builder.value(f"{node.name}_ties", out.shape, torch.int64, out.device)
    largest = "max" in node.op._schema.name
    builder.emit(node, extremes, (node.args[0], dims, keepdim, largest), (node.outputs[0], ties.index), "extremes")
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
    family = "reduction"

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tile: Tile) -> tuple[Tensor, Tensor]:
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
    row = builder.dimension
    if rank != dimensions + 2 or any(size != 1 for size in out.shape[2:]) or not 2 <= row < rank:
        return False
    shape = tuple(size if dim < 2 or dim == row else 1 for dim, size in enumerate(value.shape))
    parts = [
        builder.value(f"{node.name}_{part}", shape, dtype, value.device)
        for part, dtype in (("lines", value.dtype), ("places", torch.int64))
    ]
    builder.emit(node, line_maximum, (node.args[0], row), tuple(part.index for part in parts), "lines")
    builder.emit(node, pick_maximum, tuple(parts), node.outputs, "pick")
    return True
