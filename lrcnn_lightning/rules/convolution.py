"""Convolution by rows, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.rules.formula import Formula, Saved, autocast_dtype
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import WindowGeometry, pad_rows, spatial_tuple

__all__ = ["Convolution"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution(RowRule):
    """``conv1d/2d/3d``: zeros outside the map."""

    geometry: WindowGeometry
    axis: int
    position: int
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        return self.geometry.needed(output)

    def _placed(self, tile: Tile) -> tuple[list[tuple[int, int, int]], int, tuple[Any, ...]]:
        """For a tile: explicit padding (axis, before, after), rows of the result to skip, arguments after the bias."""
        explicit = []
        padding = [before for before, _ in self.padding]
        for i, (before, after) in enumerate(self.padding):
            if i != self.position and before != after:
                explicit.append((self.axis - self.position + i, before, after))
                padding[i] = 0
        symmetric = self.geometry.symmetric(tile.rows)
        if symmetric is None:
            explicit.append((self.axis, *self.geometry.missing(tile.rows)))
            symmetric = (0, 0)
        padding[self.position], skipped = symmetric
        return explicit, skipped, (list(self.stride), padding, list(self.dilation), self.groups)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        result: Tensor = self.prepare(tile)(args, kwargs)
        return result

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        operation = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.stride) - 1]
        explicit, skipped, rest = self._placed(tile)

        def call(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
            slab, weight, bias = _operands(args, kwargs)
            for padded in explicit:
                slab = pad_rows(slab, *padded)
            return lines(operation(slab, weight, bias, *rest), self.axis, skipped, tile.rows.length)

        return call

    @property
    def hollow(self) -> bool:
        return self.axis - self.position == 2  # N C *

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        if not self.hollow:
            return None
        explicit, skipped, rest = self._placed(tile)
        return _ConvolutionFormula(self.axis, tile.rows.length, explicit, skipped, rest, tuple(map(bool, wanted[:3])))


@dataclass(frozen=True)
class _ConvolutionFormula(Formula):
    """``convolution_backward``, on what was padded."""

    axis: int
    rows: int
    explicit: list[tuple[int, int, int]]
    skipped: int
    rest: tuple[Any, ...]
    wanted: tuple[bool, ...]

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        given, weight, bias = _operands(args, kwargs)
        dtype, operation = autocast_dtype(given), (torch.conv1d, torch.conv2d, torch.conv3d)[given.dim() - 3]
        slab, weight = given.to(dtype), weight.to(dtype)
        for padded in self.explicit:
            slab = pad_rows(slab, *padded)
        result = None
        if not hollow:
            result = operation(slab, weight, None if bias is None else bias.to(dtype), *self.rest)
            result = lines(result, self.axis, self.skipped, self.rows)
        return result, (slab, weight, given.dtype, None if bias is None else list(bias.shape))

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        slab, weight, dtype, bias = saved
        gradient = gradients.pop()
        assert gradient is not None
        stride, padding, dilation, groups = self.rest
        place = self.axis - 2
        span = dilation[place] * (weight.shape[self.axis] - 1)
        length = (slab.shape[self.axis] + 2 * padding[place] - span - 1) // stride[place] + 1
        gradient = pad_rows(gradient, self.axis, self.skipped, length - self.rows - self.skipped)
        mask = [*self.wanted, *[False] * (3 - len(self.wanted))]
        call = (bias, stride, padding, dilation, False, [0] * len(stride), groups, mask)
        for_slab, *others = aten.convolution_backward.default(gradient.to(slab.dtype), slab, weight, *call)
        if for_slab is not None:
            for axis, before, after in reversed(self.explicit):
                for_slab = pad_rows(for_slab, axis, -before, -after)
            for_slab = for_slab.to(dtype)
        return for_slab, *others


def _operands(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of a convolution."""
    return args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")


@register("convolution", aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@register("convolution", aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution(scope: Scope) -> RowRule | None:
    """``convNd(input, weight, bias, stride, padding, dilation, groups)``, padding in numbers or in words."""
    if not scope.only_first_has_rows():
        return None
    kernel = scope.shape(scope.node.args[1])[2:]
    dimensions = len(kernel)
    shape = scope.shape(scope.node.args[0])
    axes = scope.of(scope.node.args[0])
    assert axes.row is not None
    position = axes.row - (len(shape) - dimensions)
    if position < 0:
        return None
    stride = spatial_tuple(scope.argument(3, "stride", 1), dimensions)
    dilation = spatial_tuple(scope.argument(5, "dilation", 1), dimensions)
    given = scope.argument(4, "padding", 0)
    padding: tuple[tuple[int, int], ...]
    if given == "valid":
        padding = ((0, 0),) * dimensions
    elif given == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((p, p) for p in spatial_tuple(given, dimensions))
    geometry = WindowGeometry(
        kernel[position], stride[position], padding[position][0], dilation[position], shape[axes.row]
    )
    out = Axes(axes.row, axes.batch if len(shape) == dimensions + 2 else None)
    return Convolution(geometry, axes.row, position, stride, padding, dilation, scope.argument(6, "groups", 1), (out,))
