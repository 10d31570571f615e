"""Resizing: nearest, linear, cubic.

A resized row is a weighted sum of a few source rows, found from the *global* coordinates:

    linear   y = (i + 1/2)/scale - 1/2, or i*(H-1)/(H'-1) with aligned corners;  rows floor(y), floor(y)+1
    cubic    the same y;  rows floor(y)-1 ... floor(y)+2, clamped to the map
    nearest  row floor(i/scale)

So the row axis is interpolated here, from the slab; the other axes by the operation itself, for which the row axis
then keeps its size (resizing is separable, and resizing an axis to its own size changes nothing). Where the operation
would do something else to another axis than it does on the whole map, that axis is interpolated here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.rules.constant import Constant
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.sampling import Sampling, quick_nearest

__all__ = ["Resize"]

aten = torch.ops.aten

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Resize(RowRule):
    """``upsample_*``: ``lines`` are the resized axes, from dimension 2 on; that at ``position`` is the row axis.

    ``natively`` are the positions of other axes that the operation itself resizes, ``by_hand`` of those that are
    resized here. ``copied_gradient``: the gradient of the result is that of the map as it stands.
    """

    lines: tuple[Sampling, ...]
    position: int
    natively: tuple[int, ...]
    by_hand: tuple[int, ...]
    copied_gradient: bool
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        return self.lines[self.position].needed(output)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        result: Tensor = self.prepare(tile)(args, kwargs)
        return result

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        row, axis, start = self.lines[self.position], 2 + self.position, self.needed(tile.rows).lo
        sizes = tuple(line.out_size for line in self.lines)
        others = ((self.lines[position], position) for position in self.by_hand)
        resized = [_Resized(line, 2 + position, Interval(0, line.out_size), 0) for line, position in others]
        if not row.unchanged:
            resized.append(_Resized(row, axis, tile.rows, start))

        def call(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
            given: Tensor = args[0]
            slab = given.detach() if self.copied_gradient else given
            quick = quick_nearest(slab, sizes)
            if self.natively:
                slab = self._natively(slab)
            for along_an_axis in resized:
                slab = along_an_axis(slab, quick)
            if self.copied_gradient:
                copied = given.narrow(axis, tile.rows.lo - start, tile.rows.length)
                slab = _WithGradientOf.apply(slab, copied)  # type: ignore[no-untyped-call]
            return slab

        return call

    def _natively(self, slab: Tensor) -> Tensor:
        first, native = self.lines[0], [i in self.natively for i in range(len(self.lines))]
        aligned = None if first.nearest else first.align_corners
        mode = _MODES[len(self.lines)] if first.mode == "linear" else first.mode
        # A scale that does not give the size exactly moves the coordinates.
        if any(line.scale is not None for line in self.lines):
            scales = [line.scale if own else 1.0 for line, own in zip(self.lines, native, strict=True)]
            scaled: Tensor = functional.interpolate(slab, scale_factor=scales, mode=mode, align_corners=aligned)  # type: ignore[arg-type]
            return scaled
        given = zip(self.lines, native, slab.shape[2:], strict=True)
        sizes = [line.out_size if own else size for line, own, size in given]
        return functional.interpolate(slab, sizes, mode=mode, align_corners=aligned)


class _Resized:
    """The places ``output`` of an axis, from a slab whose first place is ``start``."""

    def __init__(self, line: Sampling, axis: int, output: Interval, start: int) -> None:
        self.line, self.axis, self.output, self.start = line, axis, output, start
        self._copies: dict[Any, tuple[Constant, tuple[Constant, Constant | None] | None]] = {}
        self._taps: dict[torch.dtype, list[tuple[Constant, Constant | None]]] = {}

    def __call__(self, slab: Tensor, quick: bool) -> Tensor:
        """The slab resized along the axis; ``quick``: which kernel the CPU would take (`quick_nearest`)."""
        return self._copied(slab, quick) if self.line.nearest else self._weighted(slab)

    def _copied(self, slab: Tensor, quick: bool) -> Tensor:
        kind = (slab.device.type == "cuda", slab.dtype, quick)
        if kind not in self._copies:
            self._copies[kind] = self._found(*kind)
        forward, backward = self._copies[kind]
        if backward is None:
            return slab.index_select(self.axis, forward.on(slab))
        into, kept = (None if part is None else part.on(slab) for part in backward)
        parted: Tensor = _TwoNearest.apply(slab, self.axis, forward.on(slab), into, kept)  # type: ignore[no-untyped-call]
        return parted

    def _found(
        self, gpu: bool, dtype: torch.dtype, quick: bool
    ) -> tuple[Constant, tuple[Constant, Constant | None] | None]:
        """Of which place each is a copy; where its gradient goes if not there, and which have one if not all."""
        line, (lo, hi) = self.line, self.output
        forward = (line.copies_on_gpu if gpu else line.copies(dtype, quick))[lo:hi]
        backward: tuple[int | None, ...] = (line.copies_backward_on_gpu if gpu else line.copies_backward())[lo:hi]
        copies = Constant([place - self.start for place in forward])
        if forward == backward:
            return copies, None
        reached = [(number, place) for number, place in enumerate(backward) if place is not None]
        into = Constant([place - self.start for _, place in reached])
        return copies, (into, None if len(reached) == hi - lo else Constant([number for number, _ in reached]))

    def _weighted(self, slab: Tensor) -> Tensor:
        if slab.dtype not in self._taps:
            places, weights = self.line.sources(self.output, slab.dtype)
            constants = [Constant([place - self.start for place in tap.tolist()]) for tap in places]
            factors: list[Constant | None] = [Constant(weight.tolist(), slab.dtype) for weight in weights]
            self._taps[slab.dtype] = list(zip(constants, factors or [None], strict=True))
        taps = self._taps[slab.dtype]
        taken = [slab.index_select(self.axis, places.on(slab)) for places, _ in taps]
        shape = [-1] + [1] * (slab.dim() - 1 - self.axis)
        result: Tensor | None = None
        for part, (_, factor) in zip(taken, taps, strict=True):
            term = part if factor is None else part * factor.on(slab).view(shape)
            result = term if result is None else result + term
        assert result is not None
        return result


class _TwoNearest(torch.autograd.Function):
    """Copies of some rows, whose gradient goes to others; ``kept``: the places that have one, where not all do.

    Nearest interpolation finds a row in its forward pass in one way and in its backward pass in another (`sampling`).
    Plain training does that, so we do.
    """

    @staticmethod
    def forward(ctx: Any, slab: Tensor, axis: int, forward: Tensor, into: Tensor, kept: Tensor | None) -> Tensor:
        ctx.axis, ctx.size = axis, slab.shape[axis]
        ctx.save_for_backward(into, kept)
        return slab.index_select(axis, forward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        into, kept = ctx.saved_tensors
        shape = list(gradient.shape)
        shape[ctx.axis] = ctx.size
        added = gradient if kept is None else gradient.index_select(ctx.axis, kept)
        return gradient.new_zeros(shape).index_add_(ctx.axis, into, added), None, None, None, None


class _WithGradientOf(torch.autograd.Function):
    """A tensor whose gradient goes to another one of its shape (cubic in `sampling`)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, other: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _resize(scope: Scope, mode: str, align_corners: bool, scales: Any) -> RowRule | None:
    if not scope.only_first_has_rows():
        return None
    source = scope.values[scope.node.args[0].index]
    axes = scope.of(scope.node.args[0])
    sizes, out_sizes = source.shape[2:], scope.output.shape[2:]
    position = (axes.row or 0) - 2
    if axes.row is None or position < 0:
        return None
    gpu, dimensions = source.device.type == "cuda", len(sizes)
    given = [None] * dimensions if scales is None or align_corners else scales
    lines = []
    for size, out_size, scale in zip(sizes, out_sizes, given, strict=True):
        copied = sizes == out_sizes if gpu else size == out_size and mode == "linear"
        copied = copied and not align_corners and not mode.startswith("nearest")
        lines.append(Sampling(mode, align_corners, dimensions, size, out_size, scale, copied))
    others = [i for i, line in enumerate(lines) if i != position and not line.unchanged]
    by_hand = [i for i in others if lines[i].size == lines[i].out_size or (not gpu and lines[i].ambiguous)]
    natively = [i for i in others if i not in by_hand]
    moved = not all(line.unchanged for line in lines)
    copied_gradient = mode == "bicubic" and sizes == out_sizes and moved
    return Resize(tuple(lines), position, tuple(natively), tuple(by_hand), copied_gradient, (axes,))


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
