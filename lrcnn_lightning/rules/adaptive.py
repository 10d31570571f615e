"""Adaptive average and maximum pooling to several rows: row i of H' pools the rows [iH/H', (i+1)H/H')."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.reduction import global_average
from lrcnn_lightning.rules.rule import Axes, Interval, Reduction, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import spatial_tuple

__all__ = ["AdaptivePool"]

aten = torch.ops.aten


@dataclass(frozen=True)
class AdaptivePool(RowRule):
    """``adaptive_avg_poolNd`` and ``adaptive_max_poolNd`` to more than one row: row i pools [iH/H', (i+1)H/H')."""

    maximum: bool
    axis: int
    position: int
    height: int
    out_height: int
    sizes: tuple[int, ...]
    source_sizes: tuple[int, ...]
    axes: tuple[Axes, ...]

    def _source(self, row: int) -> Interval:
        lo = row * self.height // self.out_height
        return Interval(lo, math.ceil((row + 1) * self.height / self.out_height))

    def needed(self, output: Interval) -> Interval:
        return Interval(self._source(output.lo).lo, self._source(output.hi - 1).hi)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Any:
        slab, start = args[0], self.needed(tile.rows).lo
        sizes = list(self.sizes)
        sizes[self.position] = 1
        dimensions = len(sizes)
        kind = "max" if self.maximum else "avg"
        pool = getattr(aten, f"adaptive_{kind}_pool{dimensions}d").default
        rows = []
        for row in range(tile.rows.lo, tile.rows.hi):
            source = self._source(row)
            pooled = pool(slab.narrow(self.axis, source.lo - start, source.length), sizes)
            rows.append((pooled[0], self._place(pooled[1], source)) if self.maximum else (pooled,))
        results = tuple(torch.cat(column, self.axis) for column in zip(*rows, strict=True))
        return results if self.maximum else results[0]

    def _place(self, local: Tensor, source: Interval) -> Tensor:
        """Flat positions within some rows -> flat positions within the map."""
        result, place = torch.zeros_like(local), 1
        for i in reversed(range(len(self.sizes))):
            size = source.length if i == self.position else self.source_sizes[i]
            coordinate, local = local % size, local // size
            result = result + (coordinate + source.lo if i == self.position else coordinate) * place
            place *= self.source_sizes[i]
        return result


@register(
    "pooling", aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default
)
def adaptive_average(scope: Scope) -> Reduction | RowRule | None:
    """``adaptive_avg_poolNd(input, output_size)``; one row is a reduction, and has its own rule."""
    return _adaptive(scope, False)


@register(
    "pooling", aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default
)
def adaptive_maximum(scope: Scope) -> Reduction | RowRule | None:
    """``adaptive_max_poolNd(input, output_size)`` to several rows: the values, and where they are."""
    return _adaptive(scope, True)


@expands(aten.adaptive_avg_pool2d.default)
@expands(aten.adaptive_avg_pool3d.default)
def expand_lines(builder: Builder, node: Node) -> bool:
    """To one row of several columns: each row is pooled to its columns, then the rows are averaged."""
    value, out = builder.values[node.args[0].index], builder.values[node.outputs[0]]
    dimensions, row = int(node.op._schema.name[-2]), builder.row(node.args[0])
    rank = len(value.shape)
    if row is None or row < rank - dimensions or out.shape[row] != 1:
        return False
    if all(size == 1 for size in out.shape[-dimensions:]) or value.shape[row] == 1:
        return False
    shape = tuple(value.shape[row] if d == row else size for d, size in enumerate(out.shape))
    lines = builder.like(node, value, "lines", shape)
    builder.emit(node, node.op, (node.args[0], list(shape[-dimensions:])), (lines.index,), "lines")
    builder.emit(node, aten.mean.dim, (lines, [row], True), node.outputs, "mean")
    return True


def _adaptive(scope: Scope, maximum: bool) -> Reduction | RowRule | None:
    if not scope.only_first_has_rows():
        return None
    shape, out = scope.shape(scope.node.args[0]), scope.output.shape
    axes = scope.of(scope.node.args[0])
    dimensions = int(scope.node.op._schema.name[-2])
    assert axes.row is not None
    position = axes.row - (len(shape) - dimensions)
    if position < 0:
        return None
    if out[axes.row] == 1 and not maximum:
        return global_average(scope, position)
    if out[axes.row] == 1:
        return None
    sizes = spatial_tuple(out[-dimensions:], dimensions)
    return AdaptivePool(
        maximum,
        axes.row,
        position,
        shape[axes.row],
        out[axes.row],
        sizes,
        shape[-dimensions:],
        (axes,) * len(scope.node.outputs),
    )
