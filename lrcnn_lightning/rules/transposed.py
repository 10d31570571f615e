"""Transposed convolution: each input row i adds to output rows i*s - p ... i*s - p + d*(k-1).

    output rows [a, b) are reached by the inputs i with  i*s - p <= b-1  and  i*s - p + d*(k-1) >= a

    lo = ceil((a + p - d*(k-1)) / s)        hi = floor((b - 1 + p) / s) + 1

Run without padding, the slab [lo, hi) yields the output rows from lo*s - p on; those outside [a, b) are cut off.  The
neighbours' shares of the rows at its ends are there, because every input that reaches [a, b) is in the slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.rules.formula import Formula, Saved, autocast_dtype
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import pad_rows, spatial_tuple

__all__ = ["TransposedConvolution"]

aten = torch.ops.aten


@dataclass(frozen=True)
class TransposedConvolution(RowRule):
    """``conv_transpose1d/2d/3d``."""

    axis: int
    position: int
    kernel: int
    height: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    axes: tuple[Axes, ...]

    @property
    def _span(self) -> int:
        return self.dilation[self.position] * (self.kernel - 1)

    def needed(self, output: Interval) -> Interval:
        stride, padding = self.stride[self.position], self.padding[self.position]
        lo = -((self._span - output.lo - padding) // stride)
        hi = (output.hi - 1 + padding) // stride + 1
        # Rows that no input reaches (stride above kernel, output padding) are made from the input row above them.
        lo = min(max(min(lo, (output.lo + padding) // stride), 0), self.height - 1)
        return Interval(lo, min(max(hi, lo + 1), self.height))

    def _placed(self, tile: Tile) -> tuple[int, list[int], list[int]]:
        """The first of the rows of the tile in what is computed; padding, and padding of the output."""
        given = self.needed(tile.rows)
        first = given.lo * self.stride[self.position] - self.padding[self.position]
        rows = (given.length - 1) * self.stride[self.position] + self._span + 1
        padding, extra = list(self.padding), list(self.output_padding)
        padding[self.position], extra[self.position] = 0, max(0, tile.rows.hi - (first + rows))
        return tile.rows.lo - first, padding, extra

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab, weight = args[0], args[1]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        start, padding, extra = self._placed(tile)
        result: Tensor = _OPERATIONS[len(self.stride) - 1](
            slab, weight, bias, list(self.stride), padding, extra, self.groups, list(self.dilation)
        )
        return lines(result, self.axis, start, tile.rows.length)

    @property
    def hollow(self) -> bool:
        return self.axis - self.position == 2  # N C *

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        if not self.hollow:
            return None
        start, padding, extra = self._placed(tile)
        call = (list(self.stride), padding, list(self.dilation), True, extra, self.groups)
        return _TransposedFormula(self.axis, self.kernel, start, tile.rows.length, call, tuple(map(bool, wanted[:3])))


_OPERATIONS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class _TransposedFormula(Formula):
    """``convolution_backward``, on all that is computed."""

    axis: int
    kernel: int
    start: int
    rows: int
    call: tuple[Any, ...]
    wanted: tuple[bool, ...]

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        given, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
        dtype = autocast_dtype(given)
        slab, weight = given.to(dtype), weight.to(dtype)
        result = None
        if not hollow:
            stride, padding, dilation, _, extra, groups = self.call
            operation = _OPERATIONS[len(stride) - 1]
            result = operation(
                slab, weight, bias if bias is None else bias.to(dtype), stride, padding, extra, groups, dilation
            )
            result = lines(result, self.axis, self.start, self.rows)
        sizes = None if bias is None else list(bias.shape)
        return result, (slab, weight, given.dtype, sizes)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        slab, weight, dtype, sizes = saved
        gradient = gradients.pop()
        assert gradient is not None
        stride, _, dilation, _, extra, _ = self.call
        place = self.axis - 2
        length = (slab.shape[self.axis] - 1) * stride[place] + dilation[place] * (self.kernel - 1) + 1 + extra[place]
        gradient = pad_rows(gradient, self.axis, self.start, length - self.rows - self.start)
        mask = [*self.wanted, *[False] * (3 - len(self.wanted))]
        arguments = (gradient.to(slab.dtype), slab, weight, sizes, *self.call, mask)
        del gradient
        for_slab, *others = aten.convolution_backward.default(*arguments)
        return for_slab if for_slab is None else for_slab.to(dtype), *others


@register(
    "convolution",
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def transposed_convolution(scope: Scope) -> RowRule | None:
    """``conv_transposeNd(input, weight, bias, stride, padding, output_padding, groups, dilation)``."""
    if not scope.only_first_has_rows():
        return None
    shape = scope.shape(scope.node.args[0])
    kernel = scope.shape(scope.node.args[1])[2:]
    dimensions = len(kernel)
    axes = scope.of(scope.node.args[0])
    assert axes.row is not None
    position = axes.row - (len(shape) - dimensions)
    if position < 0:
        return None
    return TransposedConvolution(
        axes.row,
        position,
        kernel[position],
        shape[axes.row],
        spatial_tuple(scope.argument(3, "stride", 1), dimensions),
        spatial_tuple(scope.argument(4, "padding", 0), dimensions),
        spatial_tuple(scope.argument(5, "output_padding", 0), dimensions),
        spatial_tuple(scope.argument(7, "dilation", 1), dimensions),
        scope.argument(6, "groups", 1),
        (Axes(axes.row, axes.batch if len(shape) == dimensions + 2 else None),),
    )
