"""Pooling by rows: the largest of each window, or the average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.graph import Node
from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.formula import Formula, Saved
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import WindowGeometry, pad_rows, spatial_tuple

__all__ = ["AveragePool", "MaxPool"]

aten = torch.ops.aten


def _without(numbers: Sequence[int], position: int, value: int) -> list[int]:
    """``numbers`` with one entry replaced."""
    return [value if i == position else number for i, number in enumerate(numbers)]


@dataclass(frozen=True)
class MaxPool(RowRule):
    """``max_poolNd``, with or without indices: minus infinity outside the map."""

    geometry: WindowGeometry
    axis: int
    position: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    shape: tuple[int, ...]
    indices: bool
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        return self.geometry.needed(output)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Any:
        return self.prepare(tile)(args, kwargs)

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        dimensions = len(self.kernel)
        pool: Any = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[dimensions - 1]
        symmetric = self.geometry.symmetric(tile.rows)
        if not self.indices and symmetric is not None and symmetric[0] <= self.geometry.kernel // 2:
            padding = _without(self.padding, self.position, symmetric[0])
            first = (self.kernel, self.stride, padding, self.dilation, self.ceil_mode)
            return lambda args, kwargs: lines(pool(args[0], *first), self.axis, symmetric[1], tile.rows.length)
        above, below = self.geometry.missing(tile.rows)
        call = (self.kernel, self.stride, _without(self.padding, self.position, 0), self.dilation, self.ceil_mode)

        def padded(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            slab = args[0]
            lowest = float("-inf") if slab.is_floating_point() else torch.iinfo(slab.dtype).min
            slab = pad_rows(slab, self.axis, above, below, lowest)
            if not self.indices:
                return pool(slab, *call)
            with_indices: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dimensions - 1]
            values, local = with_indices(slab, *call, return_indices=True)
            return values, self._global_indices(local, slab, self.geometry.reach(tile.rows).lo)

        return padded

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        dimensions = len(self.kernel)
        if self.indices or dimensions == 1:
            return None
        symmetric = self.geometry.symmetric(tile.rows)
        missing = (0, 0)
        if symmetric is None or symmetric[0] > self.geometry.kernel // 2:
            missing, symmetric = self.geometry.missing(tile.rows), (0, 0)
        padding = _without(self.padding, self.position, symmetric[0])
        call = (list(self.kernel), list(self.stride), padding, list(self.dilation), self.ceil_mode)
        return _MaxPoolFormula(self.axis, tile.rows.length, missing, symmetric[1], dimensions, call)

    def _global_indices(self, local: Tensor, slab: Tensor, start: int) -> Tensor:
        """Flat positions within the padded slab -> flat positions within the map."""
        sizes = list(slab.shape[-len(self.kernel) :])
        full = list(self.shape[-len(self.kernel) :])
        result, place = torch.zeros_like(local), 1
        for i in reversed(range(len(sizes))):
            coordinate = local % sizes[i]
            local = local // sizes[i]
            result = result + (coordinate + start if i == self.position else coordinate) * place
            place *= full[i]
        return result


@dataclass(frozen=True)
class _MaxPoolFormula(Formula):
    """From the places of the maxima, in what was padded."""

    axis: int
    rows: int
    missing: tuple[int, int]
    skipped: int
    dimensions: int
    call: tuple[Any, ...]

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return bool(args[0].is_floating_point())

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        slab = pad_rows(args[0], self.axis, *self.missing, float("-inf"))
        pool = aten.max_pool2d_with_indices if self.dimensions == 2 else aten.max_pool3d_with_indices
        result, places = pool.default(slab, *self.call)
        length = result.shape[self.axis]
        return lines(result, self.axis, self.skipped, self.rows), (slab, places, length)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        slab, places, length = saved
        gradient = gradients.pop()
        assert gradient is not None
        gradient = pad_rows(gradient, self.axis, self.skipped, length - self.rows - self.skipped)
        two = self.dimensions == 2
        back = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
        for_slab = back.default(gradient, slab, *self.call, places)
        above, below = self.missing
        return (pad_rows(for_slab, self.axis, -above, -below),)


@register("pooling", aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
@register("pooling", aten.max_pool1d_with_indices.default)
@register("pooling", aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(scope: Scope) -> RowRule | None:
    """``max_poolNd(input, kernel, stride, padding, dilation, ceil_mode)``."""
    name = scope.node.op._schema.name.split("::")[1]
    pool = _pool(scope, int(name[8]), 5, scope.argument(4, "dilation", 1))
    if pool is None:
        return None
    geometry, axes, position, kernel, stride, padding, dilation, ceil_mode = pool
    assert axes.row is not None
    indices = name.endswith("_with_indices")
    shape = scope.shape(scope.node.args[0])
    return MaxPool(
        geometry,
        axes.row,
        position,
        kernel,
        stride,
        padding,
        dilation,
        ceil_mode,
        shape,
        indices,
        (axes,) * (2 if indices else 1),
    )


@expands(aten.max_pool1d.default)
@expands(aten.max_pool2d.default)
@expands(aten.max_pool3d.default)
def expand_max_pool(builder: Builder, node: Node) -> bool:
    """``max_pool(relu(x))`` as ``relu(max_pool(x))``, which is the same number with the same gradient.

    The relu is then one of a quarter of the map, and the convolution before it is the last that the large map sees.
    """
    relu = builder.only_read_by(node, node.args[0])
    if relu is None or relu.op is not aten.relu.default or node.kwargs or relu.context != node.context:
        return False
    output = builder.values[node.outputs[0]]
    pooled = builder.like(node, output, "pooled")
    builder.emit(node, node.op, (relu.args[0], *node.args[1:]), (pooled.index,), "pooled")
    builder.emit(relu, relu.op, (pooled,), node.outputs, "of_pooled")
    return True


def _pool(scope: Scope, dimensions: int, ceil_position: int, dilation_argument: Any) -> Any:
    """The common part of pooling: geometry, axes, the row axis's position, and the numbers of every axis."""
    if not scope.only_first_has_rows():
        return None
    shape = scope.shape(scope.node.args[0])
    axes = scope.of(scope.node.args[0])
    assert axes.row is not None
    position = axes.row - (len(shape) - dimensions)
    if position < 0:
        return None
    kernel = spatial_tuple(scope.argument(1, "kernel_size"), dimensions)
    given = scope.argument(2, "stride", None)
    stride = spatial_tuple(given, dimensions) if given not in (None, [], ()) else kernel
    padding = spatial_tuple(scope.argument(3, "padding", 0), dimensions)
    dilation = spatial_tuple(dilation_argument, dimensions)
    geometry = WindowGeometry(
        kernel[position], stride[position], padding[position], dilation[position], shape[axes.row]
    )
    ceil_mode = bool(scope.argument(ceil_position, "ceil_mode", False))
    return geometry, axes, position, kernel, stride, padding, dilation, ceil_mode


@dataclass(frozen=True)
class AveragePool(RowRule):
    """``avg_poolNd``: windows at the border are divided by what they count."""

    geometry: WindowGeometry
    axis: int
    position: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    include_padding: bool
    divisor: int | None
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        return self.geometry.needed(output)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        above, below = self.geometry.missing(tile.rows)
        padding = _without(self.padding, self.position, 0)
        if above == 0 and below == 0:
            return self._pool(args[0], padding, self.include_padding, self.divisor)
        # At the border: the plain sum of each window, over what each window counts.
        slab = pad_rows(args[0], self.axis, above, below)
        total = self._pool(slab, padding, True, 1)
        if self.divisor is not None:
            return total / self.divisor
        counts: Tensor | None = None
        dimensions = len(self.kernel)
        for i in range(dimensions):
            rows = tile.rows if i == self.position else Interval(0, self.out_shape[i - dimensions])
            line = self._counts(i, rows, total.device).to(total.dtype)
            line = line.view([-1] + [1] * (dimensions - 1 - i))
            counts = line if counts is None else counts * line
        assert counts is not None
        return total / counts

    def _counts(self, axis: int, rows: Interval, device: torch.device) -> Tensor:
        """How many positions along one axis the windows of these outputs count."""
        size, pad = self.shape[axis - len(self.kernel)], self.padding[axis]
        start = torch.arange(rows.lo, rows.hi, device=device) * self.stride[axis] - pad
        stop = (start + self.kernel[axis]).clamp(max=size + pad)
        if not self.include_padding:
            start, stop = start.clamp(min=0), stop.clamp(max=size)
        return stop - start

    def _pool(self, slab: Tensor, padding: Sequence[int], include: bool, divisor: int | None) -> Tensor:
        kernel, stride = list(self.kernel), list(self.stride)
        if len(kernel) == 1:
            # avg_pool1d takes no divisor: a map of width one is the same.
            image = slab.unsqueeze(-1)
            pooled = functional.avg_pool2d(
                image, (kernel[0], 1), (stride[0], 1), (padding[0], 0), self.ceil_mode, include, divisor
            )
            return pooled.squeeze(-1)
        pool = functional.avg_pool2d if len(kernel) == 2 else functional.avg_pool3d
        return pool(slab, kernel, stride, tuple(padding), self.ceil_mode, include, divisor)


@register("pooling", aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(scope: Scope) -> RowRule | None:
    """``avg_poolNd(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)``."""
    dimensions = int(scope.node.op._schema.name.split("::")[1][8])
    pool = _pool(scope, dimensions, 4, 1)
    if pool is None:
        return None
    geometry, axes, position, kernel, stride, padding, _, ceil_mode = pool
    assert axes.row is not None
    return AveragePool(
        geometry,
        axes.row,
        position,
        kernel,
        stride,
        padding,
        ceil_mode,
        bool(scope.argument(5, "count_include_pad", True)),
        scope.argument(6, "divisor_override", None),
        scope.shape(scope.node.args[0]),
        scope.output.shape,
        (axes,),
    )
