"""Resizing: nearest, linear, cubic; adaptive average and maximum pooling to several rows.

A resized row is a weighted sum of a few source rows, found from the *global* coordinates:

    linear   y = (i + 1/2)/scale - 1/2, or i*(H-1)/(H'-1) with aligned corners;  rows floor(y), floor(y)+1
    cubic    the same y;  rows floor(y)-1 ... floor(y)+2, clamped to the map
    nearest  row floor(i/scale)

So the row axis is interpolated here, from the slab; the other axes by the operation itself, for which the row axis
then keeps its size (resizing is separable, and resizing an axis to its own size changes nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.rules.rule import Axes, Interval, Reduction, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import spatial_tuple

__all__ = ["AdaptivePool", "Resize"]

aten = torch.ops.aten

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Resize(RowRule):
    """``upsample_*``: ``mode`` is nearest, nearest-exact, linear (of any dimension) or bicubic."""

    mode: str
    align_corners: bool
    axis: int
    position: int
    height: int
    out_height: int
    step: float
    others: tuple[int, ...]
    scales: tuple[float, ...] | None
    same_width: bool
    axes: tuple[Axes, ...]
    family = "resize"

    def _taps(self, row: int, dtype: torch.dtype) -> tuple[int, ...]:
        """The source rows of one output row."""
        lines, _ = self._sources(Interval(row, row + 1), dtype)
        return tuple(int(line[0]) for line in lines)

    def _sources(self, output: Interval, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """For each tap: the source row of each output row, and its weight (computed as the operation computes it)."""
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        rows = torch.arange(output.lo, output.hi, dtype=exact)
        step = torch.tensor(self.step, dtype=exact)
        last = self.height - 1
        if self.mode == "nearest":
            return [(rows * step).floor().long().clamp(max=last)], []
        if self.mode == "nearest-exact":
            return [((rows + 0.5) * step).floor().long().clamp(max=last)], []
        place = rows * step if self.align_corners else (rows + 0.5) * step - 0.5
        if self.mode == "linear":
            place = place.clamp(min=0)
            base = place.floor().long().clamp(max=last)
            fraction = (place - base).clamp(0, 1)
            return [base, (base + 1).clamp(max=last)], [1 - fraction, fraction]
        base = place.floor()
        t = place - base
        lines = [(base.long() + offset).clamp(0, last) for offset in (-1, 0, 1, 2)]
        return lines, [_far(t + 1), _near(t), _near(1 - t), _far(2 - t)]

    def needed(self, output: Interval) -> Interval:
        first = self._taps(output.lo, torch.float64) + self._taps(output.lo, torch.float32)
        last = self._taps(output.hi - 1, torch.float64) + self._taps(output.hi - 1, torch.float32)
        return Interval(min(first), max(last) + 1)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab: Tensor = args[0]
        if not self.same_width:
            slab = self._resize_others(slab)
        lines, weights = self._sources(tile.rows, slab.dtype)
        start = self.needed(tile.rows).lo
        shape = [-1] + [1] * (slab.dim() - 1 - self.axis)
        result: Tensor | None = None
        for tap, line in enumerate(lines):
            taken = slab.index_select(self.axis, (line - start).to(slab.device))
            if weights:
                taken = taken * weights[tap].to(slab).view(shape)
            result = taken if result is None else result + taken
        assert result is not None
        return result

    def _operation(self, slab: Tensor) -> Any:
        assert self.scales is not None
        scales, mode = list(self.scales), self.mode
        if mode.startswith("nearest"):
            return functional.interpolate(slab, scale_factor=scales, mode=mode)
        mode = "bicubic" if mode == "bicubic" else _MODES[len(scales)]
        return functional.interpolate(slab, scale_factor=scales, mode=mode, align_corners=False)

    def _resize_others(self, slab: Tensor) -> Tensor:
        sizes = list(self.others)
        sizes[self.position] = slab.shape[self.axis]
        if self.scales is not None:
            # Scales that do not give the sizes exactly move the coordinates; the row axis keeps its size.
            result: Tensor = self._operation(slab)
            return result
        if self.mode.startswith("nearest"):
            return functional.interpolate(slab, sizes, mode=self.mode)
        mode = "bicubic" if self.mode == "bicubic" else _MODES[len(sizes)]
        return functional.interpolate(slab, sizes, mode=mode, align_corners=self.align_corners)


def _near(x: Tensor) -> Tensor:
    """Cubic convolution kernel (A = -0.75) for |x| <= 1."""
    return ((-0.75 + 2) * x - (-0.75 + 3)) * x * x + 1


def _far(x: Tensor) -> Tensor:
    """Cubic convolution kernel (A = -0.75) for 1 < |x| < 2."""
    return ((-0.75 * x + 5 * 0.75) * x - 8 * 0.75) * x + 4 * 0.75


def _resize(scope: Scope, mode: str, align_corners: bool, scales: Any) -> RowRule | None:
    if not scope.only_first_has_rows():
        return None
    shape, out = scope.shape(scope.node.args[0]), scope.output.shape
    axes = scope.of(scope.node.args[0])
    position = (axes.row or 0) - 2
    if axes.row is None or position < 0:
        return None
    height, out_height = shape[axes.row], out[axes.row]
    if align_corners:
        step = (height - 1) / (out_height - 1) if out_height > 1 else 0.0
    else:
        scale = None if scales is None else scales[position]
        step = 1.0 / scale if scale else height / out_height
    # A scale that does not give the size exactly moves the coordinates of the other axes, too.
    kept = None
    if scales is not None and not align_corners:
        kept = tuple(1.0 if i == position else scale for i, scale in enumerate(scales))
    same_width = all(a == b for i, (a, b) in enumerate(zip(shape, out, strict=True)) if i != axes.row)
    return Resize(
        mode,
        align_corners,
        axes.row,
        position,
        height,
        out_height,
        step,
        out[2:],
        kept,
        same_width,
        (axes,),
    )


@register("resize", aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def nearest(scope: Scope) -> RowRule | None:
    """``upsample_nearestNd(input, output_size, scale_factors)``."""
    return _resize(scope, "nearest", False, scope.argument(2, "scale_factors"))


@register(
    "resize",
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
)
def nearest_exact(scope: Scope) -> RowRule | None:
    """``_upsample_nearest_exactNd(input, output_size, scale_factors)``."""
    return _resize(scope, "nearest-exact", False, scope.argument(2, "scale_factors"))


@register("resize", aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec)
def linear_resize(scope: Scope) -> RowRule | None:
    """``upsample_linear(input, output_size, align_corners, scale_factors)``."""
    return _resize(scope, "linear", bool(scope.node.args[2]), scope.argument(3, "scale_factors"))


@register("resize", aten.upsample_bicubic2d.vec)
def cubic_resize(scope: Scope) -> RowRule | None:
    """``upsample_bicubic2d(input, output_size, align_corners, scale_factors)``."""
    return _resize(scope, "bicubic", bool(scope.node.args[2]), scope.argument(3, "scale_factors"))


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
    family = "resize"

    def _source(self, row: int) -> Interval:
        lo = row * self.height // self.out_height
        return Interval(lo, math.ceil((row + 1) * self.height / self.out_height))

    def needed(self, output: Interval) -> Interval:
        return Interval(self._source(output.lo).lo, self._source(output.hi - 1).hi)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tile: Tile) -> Any:
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
    "resize", aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default
)
def adaptive_average(scope: Scope) -> Reduction | RowRule | None:
    """``adaptive_avg_poolNd(input, output_size)``; one row is a reduction, and has its own rule."""
    return _adaptive(scope, False)


@register(
    "resize", aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default
)
def adaptive_maximum(scope: Scope) -> Reduction | RowRule | None:
    """``adaptive_max_poolNd(input, output_size)`` to several rows: the values, and where they are."""
    return _adaptive(scope, True)


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
        from lrcnn_lightning.rules.reduction import global_average

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
