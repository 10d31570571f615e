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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.rule import Axes, Interval, Reduction, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import spatial_tuple

__all__ = ["AdaptivePool", "Resize"]

aten = torch.ops.aten

Numbers = npt.NDArray[Any]

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
    scale: float | None
    others: tuple[int, ...]
    scales: tuple[float, ...] | None
    same_width: bool
    axes: tuple[Axes, ...]
    family = "resize"

    def _sources(self, output: Interval, dtype: torch.dtype) -> tuple[list[Numbers], list[Numbers]]:
        """For each tap: the source row of each output row, and its weight (computed as the operation computes it)."""
        exact = np.float64 if dtype is torch.float64 and not self.mode.startswith("nearest") else np.float32
        rows, last = np.arange(output.lo, output.hi).astype(exact), self.height - 1
        step, half = exact(self.step), exact(0.5)
        if self.mode.startswith("nearest"):
            place = rows * step if self.mode == "nearest" else (rows + half) * step
            return [_floor(place).clip(0, last)], []
        place = rows * step if self.align_corners else (rows + half) * step - half
        if self.mode == "linear":
            place = place.clip(min=0)
            base = _floor(place).clip(max=last)
            fraction = (place - base.astype(exact)).clip(0, 1)
            return [base, (base + 1).clip(max=last)], [1 - fraction, fraction]
        base = _floor(place)
        t = place - base.astype(exact)
        lines = [(base + offset).clip(0, last) for offset in (-1, 0, 1, 2)]
        return lines, [_far(t + 1), _near(t), _near(1 - t), _far(2 - t)]

    def needed(self, output: Interval) -> Interval:
        rows: list[int] = []
        for row in (output.lo, output.hi - 1):
            for dtype in (torch.float32, torch.float64):
                rows.extend(int(line[0]) for line in self._sources(Interval(row, row + 1), dtype)[0])
                if self.mode.startswith("nearest"):
                    rows.append(self._nearest_forward(dtype)[row])
        return Interval(min(rows), max(rows) + 1)

    def _nearest_forward(self, dtype: torch.dtype) -> tuple[int, ...]:
        return _nearest_rows(self.mode, len(self.others), self.height, self.out_height, self.scale, dtype)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab: Tensor = args[0]
        if not self.same_width:
            slab = self._resize_others(slab)
        lines, weights = self._sources(tile.rows, slab.dtype)
        start = self.needed(tile.rows).lo
        places = [torch.tensor((line - start).tolist(), device=slab.device) for line in lines]
        if not weights:
            (backward,) = places
            if slab.is_cuda:
                return slab.index_select(self.axis, backward)
            chosen = [row - start for row in self._nearest_forward(slab.dtype)[tile.rows.lo : tile.rows.hi]]
            if chosen == (lines[0] - start).tolist():
                return slab.index_select(self.axis, backward)
            forward = torch.tensor(chosen, device=slab.device)
            nearest_rows: Tensor = _TwoNearest.apply(slab, self.axis, forward, backward)  # type: ignore[no-untyped-call]
            return nearest_rows
        shape = [-1] + [1] * (slab.dim() - 1 - self.axis)
        result: Tensor | None = None
        for place, weight in zip(places, weights, strict=True):
            factor = torch.tensor(weight.tolist(), device=slab.device, dtype=slab.dtype).view(shape)
            taken = slab.index_select(self.axis, place) * factor
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


class _TwoNearest(torch.autograd.Function):
    """Copies of some rows, whose gradient goes to others.

    On the CPU, nearest interpolation finds a row in its forward pass in one way and in its backward pass in another.
    Where (i + 1/2) H / H' is an integer, rounding can part them. Plain training does that, so we do.
    """

    @staticmethod
    def forward(ctx: Any, slab: Tensor, axis: int, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.axis, ctx.size = axis, slab.shape[axis]
        ctx.save_for_backward(backward)
        return slab.index_select(axis, forward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        shape = list(gradient.shape)
        shape[ctx.axis] = ctx.size
        return gradient.new_zeros(shape).index_add_(ctx.axis, places, gradient), None, None, None


@lru_cache(1024)
def _nearest_rows(
    mode: str, dimensions: int, height: int, out_height: int, scale: float | None, dtype: torch.dtype
) -> tuple[int, ...]:
    """The source row of each output row in the forward pass on the CPU, found out by resizing the row numbers."""
    with unset_fake_temporarily(), torch.no_grad():
        numbers = torch.arange(height, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        column = numbers.view([1, 1, height] + [1] * (dimensions - 1))
        size = None if scale else [out_height] + [1] * (dimensions - 1)
        scales = [scale] + [1.0] * (dimensions - 1) if scale else None
        resized = functional.interpolate(column, size, scales, mode)
        return tuple(int(row) for row in resized.flatten().tolist())


def _floor(place: Numbers) -> Numbers:
    result: Numbers = np.floor(place).astype(np.int64)
    return result


def _near(x: Numbers) -> Numbers:
    """Cubic convolution kernel (A = -0.75) for |x| <= 1."""
    return ((-0.75 + 2) * x - (-0.75 + 3)) * x * x + 1


def _far(x: Numbers) -> Numbers:
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
    scale = None
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
        scale,
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
