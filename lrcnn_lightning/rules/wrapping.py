"""Circular padding along the row axis: the first rows need the last ones, and the last rows the first.

The rows that are wrapped around are collected first, as a whole value (a barrier); then the padding streams:

    x      0 ======================= H         border_rows(x)  ->  [H - above, H) and [0, below)
           |                         |                                  |
    out  [ wrapped | 0 ============= H | wrapped ]   <------------------+
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.pointwise import cut_whole
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Operator, Reduction, RowRule, Scope, Tile, register

__all__ = ["BorderRows", "WrapRows", "border_rows", "wrap_rows"]

aten = torch.ops.aten


def _border_rows(x: Tensor, axis: int, above: int, below: int) -> Tensor:
    """The last ``above`` rows and then the first ``below`` rows of a map."""
    height = x.shape[axis]
    return torch.cat([x.narrow(axis, height - above, above), x.narrow(axis, 0, below)], axis)


def _wrap_rows(x: Tensor, border: Tensor, axis: int, above: int, below: int) -> Tensor:
    """The map between the rows that are wrapped around it."""
    return torch.cat([border.narrow(axis, 0, above), x, border.narrow(axis, above, below)], axis)


border_rows = Operator("border_rows", _border_rows)
wrap_rows = Operator("wrap_rows", _wrap_rows)


@expands(aten.pad.default)
def expand_circular(builder: Builder, node: Node) -> bool:
    """``pad(input, pad, "circular")`` along the row axis, by at least no rows."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value, out = builder.values[node.args[0].index], builder.values[node.outputs[0]]
    axis, rank = builder.row(node.args[0]), len(value.shape)
    if mode != "circular" or axis is None:
        return False
    widths = list(node.args[1])
    place = 2 * (rank - 1 - axis)
    above, below = widths[place : place + 2] if place < len(widths) else (0, 0)
    if min(above, below) < 0 or above + below == 0:
        return False
    x = node.args[0]
    widths[place : place + 2] = [0, 0]
    if any(widths):
        shape = tuple(value.shape[axis] if d == axis else size for d, size in enumerate(out.shape))
        x = builder.like(node, value, "sides", shape)
        builder.emit(node, aten.pad.default, (node.args[0], widths, "circular"), (x.index,), "sides")
    shape = tuple(above + below if d == axis else size for d, size in enumerate(out.shape))
    border = builder.like(node, value, "border", shape)
    builder.emit(node, border_rows, (x, axis, above, below), (border.index,), "border")
    builder.emit(node, wrap_rows, (x, border, axis, above, below), node.outputs, "wrap")
    return True


@dataclass(frozen=True)
class BorderRows(Reduction):
    """``border_rows``: what a slab has of the rows that are wrapped around."""

    axis: int
    height: int
    above: int
    below: int
    keeps_batch: int
    axes: tuple[Axes, ...] = (WHOLE,)

    def _pieces(self, rows: Interval) -> list[tuple[int, Interval]]:
        """Where in the result the slab's rows go, and which they are."""
        wanted = [(0, Interval(self.height - self.above, self.height)), (self.above, Interval(0, self.below))]
        found = []
        for place, part in wanted:
            lo, hi = max(part.lo, rows.lo), min(part.hi, rows.hi)
            if lo < hi:
                found.append((place + lo - part.lo, Interval(lo, hi)))
        return found

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        return tuple(
            (place, slab.narrow(self.axis, part.lo - rows.lo, part.length).clone())
            for place, part in self._pieces(rows)
        )

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        return first + second

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([piece for _, piece in sorted(state, key=lambda item: item[0])], self.axis),)

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        _, gradients = coefficients
        gradient = gradients[0]
        assert gradient is not None
        result = torch.zeros_like(slab)
        for place, part in self._pieces(rows):
            result.narrow(self.axis, part.lo - rows.lo, part.length).add_(
                gradient.narrow(self.axis, place, part.length)
            )
        return result


@register("shape", border_rows)
def border_rows_rule(scope: Scope) -> Reduction | None:
    """``border_rows(input, axis, above, below)``."""
    axes = scope.of(scope.node.args[0])
    axis, above, below = scope.node.args[1:]
    if axes.row != axis or axes.batch is None:
        return None
    return BorderRows(axis, scope.shape(scope.node.args[0])[axis], above, below, axes.batch)


@dataclass(frozen=True)
class WrapRows(RowRule):
    """``wrap_rows`` on a slab."""

    axis: int
    height: int
    above: int
    samples: int
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        lo = min(max(output.lo - self.above, 0), self.height - 1)
        return Interval(lo, min(max(output.hi - self.above, lo + 1), self.height))

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab, border = args[:2]
        border = cut_whole(border, border.dim(), self.axes[0].batch, self.samples, tile.batch)
        given = self.needed(tile.rows)
        lo, hi = tile.rows.lo - self.above, tile.rows.hi - self.above
        parts = []
        if lo < 0:
            parts.append(border.narrow(self.axis, tile.rows.lo, min(hi, 0) - lo))
        if max(lo, 0) < min(hi, self.height):
            parts.append(slab.narrow(self.axis, max(lo, 0) - given.lo, min(hi, self.height) - max(lo, 0)))
        if hi > self.height:
            first = max(lo, self.height)
            parts.append(border.narrow(self.axis, self.above + first - self.height, hi - first))
        return torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]


@register("shape", wrap_rows)
def wrap_rows_rule(scope: Scope) -> RowRule | None:
    """``wrap_rows(input, border, axis, above, below)``."""
    axes = scope.of(scope.node.args[0])
    axis, above = scope.node.args[2:4]
    shape = scope.shape(scope.node.args[0])
    if axes.row != axis or not scope.only_first_has_rows():
        return None
    return WrapRows(axis, shape[axis], above, 0 if axes.batch is None else shape[axes.batch], (axes,))
