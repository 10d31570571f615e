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
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import spatial_tuple

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

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab, weight = args[0], args[1]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        given = self.needed(tile.rows)
        first = given.lo * self.stride[self.position] - self.padding[self.position]
        rows = (given.length - 1) * self.stride[self.position] + self._span + 1
        beyond = max(0, tile.rows.hi - (first + rows))
        padding, extra = list(self.padding), list(self.output_padding)
        padding[self.position], extra[self.position] = 0, beyond
        operation = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[
            len(self.stride) - 1
        ]
        result: Tensor = operation(
            slab, weight, bias, list(self.stride), padding, extra, self.groups, list(self.dilation)
        )
        return lines(result, self.axis, tile.rows.lo - first, tile.rows.length)


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
