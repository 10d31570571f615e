"""Operations that move, merge and split dimensions.

``permute`` moves the row axis; ``view`` leaves it alone or the operation runs whole; ``pixel_shuffle`` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register

__all__ = ["PixelShuffle", "Sized"]

aten = torch.ops.aten


def _moved(scope: Scope, where: Callable[[int], int | None]) -> RowRule | None:
    """A rule for an operation that only renames dimensions; ``where`` maps an old dimension to the new one."""
    if not scope.only_first_has_rows():
        return None
    axes = scope.of(scope.node.args[0])
    assert axes.row is not None
    row = where(axes.row)
    if row is None:
        return None
    return AlongRows(scope.node.op, (Axes(row, None if axes.batch is None else where(axes.batch)),))


@register("shape", aten.permute.default)
def permute(scope: Scope) -> RowRule | None:
    """``permute(input, dims)``."""
    order = [d % scope.rank for d in scope.node.args[1]]
    return _moved(scope, order.index)


@register("shape", aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def movedim(scope: Scope) -> RowRule | None:
    """``movedim(input, source, destination)``."""
    # A tensor whose sizes number its dimensions shows where each one goes.
    numbered = torch.empty(tuple(range(scope.rank)), device="meta").movedim(*scope.node.args[1:3])
    return _moved(scope, list(numbered.shape).index)


@register("shape", aten.mT.default, aten.mH.default)
def matrix_transpose(scope: Scope) -> RowRule | None:
    """``input.mT``: the last two dimensions change places."""
    first, second = scope.rank - 2, scope.rank - 1
    swap = {first: second, second: first}
    return _moved(scope, lambda d: swap.get(d, d))


@register("shape", aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(scope: Scope) -> RowRule | None:
    """``transpose(input, dim0, dim1)``."""
    first, second = (d % scope.rank for d in scope.node.args[1:3])
    swap = {first: second, second: first}
    return _moved(scope, lambda d: swap.get(d, d))


@register("shape", aten.unsqueeze.default)
def unsqueeze(scope: Scope) -> RowRule | None:
    """``unsqueeze(input, dim)``."""
    dim = scope.node.args[1] % (scope.rank + 1)
    return _moved(scope, lambda d: d + (d >= dim))


@register("shape", aten.squeeze.dim, aten.squeeze.dims)
def squeeze(scope: Scope) -> RowRule | None:
    """``squeeze(input, dim)``; a row axis of one row that is squeezed away runs whole."""
    shape = scope.shape(scope.node.args[0])
    given = scope.node.args[1]
    dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)]
    gone = [d for d in dims if shape[d] == 1]
    return _moved(scope, lambda d: None if d in gone else d - sum(g < d for g in gone))


@dataclass(frozen=True)
class Sized(RowRule):
    """``view``, ``reshape``, ``flatten``, ``unflatten``, ``expand``: the sizes are those of the slab."""

    operation: Any
    sizes: tuple[int, ...]
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        sizes = list(self.sizes)
        row, batch = self.axes[0]
        if row is not None:
            sizes[row] = tile.rows.length
        if batch is not None:
            sizes[batch] = tile.batch.length
        result: Tensor = self.operation(args[0], sizes)
        return result


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of a view, grouped into the smallest runs of equal product. Ones join the run before them."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        p, q = (before[i] if left else 1), (after[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while p != q:
            if p < q and i < len(before):
                p, i = p * before[i], i + 1
                left.append(i - 1)
            elif j < len(after):
                q, j = q * after[j], j + 1
                right.append(j - 1)
            else:
                break
        blocks.append((left, right))
    return blocks


def _followed(before: Sequence[int], after: Sequence[int], dimension: int | None) -> int | None:
    """Where a dimension is after a view; ``None`` if the view merges or splits it."""
    if dimension is None:
        return None
    for left, right in _blocks(before, after):
        if dimension in left:
            wide_left = [d for d in left if before[d] != 1 or d == dimension]
            wide_right = [d for d in right if after[d] != 1]
            if wide_left == [dimension] and len(wide_right) == 1:
                return wide_right[0]
            if before[dimension] == 1 and len(left) == 1 and len(right) == 1:
                return right[0]
    return None


@register("shape", aten.view.default, aten.reshape.default, aten._unsafe_view.default)
@register("shape", aten.flatten.using_ints, aten.unflatten.int)
def view(scope: Scope) -> RowRule | None:
    """The row axis must be a dimension of its own before and after."""
    if not scope.only_first_has_rows():
        return None
    before, after = scope.shape(scope.node.args[0]), scope.output.shape
    axes = scope.of(scope.node.args[0])
    row = _followed(before, after, axes.row)
    if row is None:
        return None
    batch = _followed(before, after, axes.batch)
    return Sized(aten.reshape.default, after, (Axes(row, batch),))


@register("shape", aten.expand.default)
def expand(scope: Scope) -> RowRule | None:
    """``expand(input, size)``: the row axis keeps its size."""
    if not scope.only_first_has_rows():
        return None
    before, after = scope.shape(scope.node.args[0]), scope.output.shape
    axes = scope.of(scope.node.args[0])
    shift = len(after) - len(before)
    assert axes.row is not None
    if before[axes.row] != after[axes.row + shift]:
        return None
    batch = None if axes.batch is None or before[axes.batch] != after[axes.batch + shift] else axes.batch + shift
    return Sized(aten.expand.default, after, (Axes(axes.row + shift, batch),))


@dataclass(frozen=True)
class PixelShuffle(RowRule):
    """``pixel_shuffle`` (``factor`` rows from one) and ``pixel_unshuffle`` (one row from ``factor``)."""

    operation: Any
    factor: int
    axis: int
    unshuffle: bool
    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        if self.unshuffle:
            return Interval(output.lo * self.factor, output.hi * self.factor)
        return Interval(output.lo // self.factor, -(-output.hi // self.factor))

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        result: Tensor = self.operation(args[0], self.factor)
        if self.unshuffle:
            return result
        return lines(result, self.axis, tile.rows.lo - self.needed(tile.rows).lo * self.factor, tile.rows.length)


@register("shape", aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(scope: Scope) -> RowRule | None:
    """``pixel_shuffle(input, factor)``: channels into the last two dimensions."""
    axes, rank = scope.of(scope.node.args[0]), scope.rank
    if not scope.only_first_has_rows() or axes.row not in (rank - 2, rank - 1):
        return None
    unshuffle = scope.node.op is aten.pixel_unshuffle.default
    return PixelShuffle(scope.node.op, scope.node.args[1], axes.row, unshuffle, (axes,))
