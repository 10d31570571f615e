"""Window operations: convolution and pooling.

Kernel k, dilation d, stride s, padding p, input height H; output rows [a, b) read

    start = a*s - p                    stop = (b-1)*s - p + d*(k-1) + 1

    padding |  0 . . . . . . . . . . . . . . . . H-1  | padding
          start ========= [lo, hi) ============ stop           lo = max(0, start), hi = min(H, stop)

What lies outside the map is padded explicitly, and only there: zeros for a convolution, minus infinity for max
pooling, counted or not as ``count_include_pad`` says for average pooling.  The operation itself then runs without
padding along the row axis and with its own padding along the other axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.rules.rule import Interval

__all__ = ["WindowGeometry", "pad_rows", "spatial_tuple"]


@dataclass(frozen=True)
class WindowGeometry:
    """The row arithmetic of a window; all numbers are those of the row axis."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    height: int

    def reach(self, output: Interval) -> Interval:
        """``[start, stop)``: what the output rows read, padding included."""
        start = output.lo * self.stride - self.padding
        stop = (output.hi - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1
        return Interval(start, stop)

    def needed(self, output: Interval) -> Interval:
        """The rows of the map that are read; never empty, so that an output made of padding alone has an input."""
        reach = self.reach(output)
        lo = min(max(reach.lo, 0), self.height - 1)
        return Interval(lo, min(max(reach.hi, lo + 1), self.height))

    def missing(self, output: Interval) -> tuple[int, int]:
        """Rows of padding to add above and below the needed rows; negative ones are cut off."""
        reach, needed = self.reach(output), self.needed(output)
        return needed.lo - reach.lo, reach.hi - needed.hi

    def symmetric(self, output: Interval) -> tuple[int, int] | None:
        """``(padding, skipped)``: the same padding on both sides, and how many rows of the result then come first.

        The operation itself can run with that, and saves the slab and no padded copy of it. ``None`` where the result
        would not line up with the stride.
        """
        above, below = self.missing(output)
        padding = max(above, below, 0)
        if (padding - above) % self.stride:
            return None
        return padding, (padding - above) // self.stride


def pad_rows(slab: Tensor, axis: int, above: int, below: int, value: float = 0.0) -> Tensor:
    """``slab`` with rows of ``value`` added along ``axis``; negative counts cut rows off."""
    length = slab.shape[axis] + above + below
    if above > 0 or below > 0:
        widths = [0, 0] * (slab.dim() - axis - 1) + [max(above, 0), max(below, 0)]
        slab = functional.pad(slab, widths, value=value)
    return slab if slab.shape[axis] == length else lines(slab, axis, max(-above, 0), length)


def spatial_tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    """An ATen size argument (an int, one number, or one a dimension) as one number a dimension."""
    if isinstance(value, int):
        return (value,) * dimensions
    numbers = tuple(value)
    return numbers * dimensions if len(numbers) == 1 else numbers
