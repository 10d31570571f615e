"""Writing into a part of a map: ``slice_scatter`` and ``select_scatter`` (what ``y[:, 2:] = x`` becomes).

Along another dimension than the row axis it is pointwise in rows. Either operand may be whole (``y = zeros(...)``) and
then gives the rows of the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register

__all__ = ["Scatter"]

aten = torch.ops.aten


def _part(operand: Tensor, dimension: int | None, part: Interval) -> Tensor:
    if dimension is None or operand.shape[dimension] == part.length:
        return operand
    return operand.narrow(dimension, part.lo, part.length)


@dataclass(frozen=True)
class Scatter(RowRule):
    """The operation on slabs of both operands; ``operands`` are the axes of each."""

    operation: Any
    operands: tuple[Axes, Axes]
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slabs = [
            _part(_part(operand, row, tile.rows), batch, tile.batch)
            for operand, (row, batch) in zip(args[:2], self.operands, strict=True)
        ]
        result: Tensor = self.operation(*slabs, *args[2:])
        return result


@register("shape", aten.slice_scatter.default, aten.select_scatter.default)
def scatter(scope: Scope) -> RowRule | None:
    """``slice_scatter(input, src, dim, start, end, step)`` and ``select_scatter(input, src, dim, index)``."""
    shape = scope.shape(scope.node.args[0])
    dimension = scope.argument(2, "dim", 0) % len(shape)
    selects = scope.node.op is aten.select_scatter.default

    def widened(axis: int | None) -> int | None:
        return axis + 1 if axis is not None and selects and axis >= dimension else axis

    def narrowed(axis: int | None) -> int | None:
        return axis - 1 if axis is not None and selects and axis > dimension else axis

    base, source = (scope.of(ref) for ref in scope.node.args[:2])
    source = Axes(widened(source.row), widened(source.batch))
    with_rows = [axes for axes in (base, source) if axes.row is not None]
    row = with_rows[0].row
    if row == dimension or any(axes.row != row for axes in with_rows):
        return None
    batches = {axes.batch for axes in with_rows}
    batch = batches.pop() if len(batches) == 1 else None
    batch = None if batch == dimension else batch
    out = Axes(row, batch)
    return Scatter(scope.node.op, (out, Axes(narrowed(row), narrowed(batch))), (out,))
