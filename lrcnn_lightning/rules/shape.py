"""Operations that move, join, cut or pad dimensions.

``permute`` moves the row axis; ``view`` leaves it alone or the operation runs whole; a crop along the row axis shifts
it; padding adds rows at the map's own border; ``pixel_shuffle`` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.rules.pointwise import AlongRows, cut_whole
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import pad_rows

__all__ = ["Concatenate", "Crop", "PadRows", "PixelShuffle", "Sized"]

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


def _rank(scope: Scope) -> int:
    return len(scope.shape(scope.node.args[0]))


@register("shape", aten.permute.default)
def permute(scope: Scope) -> RowRule | None:
    """``permute(input, dims)``."""
    order = [d % _rank(scope) for d in scope.node.args[1]]
    return _moved(scope, order.index)


@register("shape", aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def movedim(scope: Scope) -> RowRule | None:
    """``movedim(input, source, destination)``."""
    # A tensor whose sizes number its dimensions shows where each one goes.
    numbered = torch.empty(tuple(range(_rank(scope))), device="meta").movedim(*scope.node.args[1:3])
    return _moved(scope, list(numbered.shape).index)


@register("shape", aten.mT.default, aten.mH.default)
def matrix_transpose(scope: Scope) -> RowRule | None:
    """``input.mT``: the last two dimensions change places."""
    first, second = _rank(scope) - 2, _rank(scope) - 1
    swap = {first: second, second: first}
    return _moved(scope, lambda d: swap.get(d, d))


@register("shape", aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(scope: Scope) -> RowRule | None:
    """``transpose(input, dim0, dim1)``."""
    first, second = (d % _rank(scope) for d in scope.node.args[1:3])
    swap = {first: second, second: first}
    return _moved(scope, lambda d: swap.get(d, d))


@register("shape", aten.unsqueeze.default)
def unsqueeze(scope: Scope) -> RowRule | None:
    """``unsqueeze(input, dim)``."""
    dim = scope.node.args[1] % (_rank(scope) + 1)
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
    keep_batch: bool
    axes: tuple[Axes, ...]
    family = "shape"

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
    return Sized(aten.reshape.default, after, batch is not None, (Axes(row, batch),))


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
    return Sized(aten.expand.default, after, batch is not None, (Axes(axes.row + shift, batch),))


@dataclass(frozen=True)
class Concatenate(RowRule):
    """``cat`` and ``stack`` along another dimension; whole members give the rows of the tile."""

    operation: Any
    dimension: int
    rank: int
    height: int
    samples: int
    axes: tuple[Axes, ...]
    member_axes: Axes
    family = "shape"

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        row, batch = self.member_axes
        members = []
        for member in args[0]:
            if row is not None and member.shape[row] != tile.rows.length:
                member = cut_whole(member, self.rank, row, self.height, tile.rows)
            if batch is not None and member.shape[batch] != tile.batch.length:
                member = cut_whole(member, self.rank, batch, self.samples, tile.batch)
            members.append(member)
        result: Tensor = self.operation(members, self.dimension)
        return result


@register("shape", aten.cat.default, aten.stack.default)
def concatenate(scope: Scope) -> RowRule | None:
    """``cat(tensors, dim)`` and ``stack(tensors, dim)``."""
    members = [ref for ref in scope.node.args[0] if scope.shape(ref) != (0,)]
    with_rows = [ref for ref in members if scope.of(ref).row is not None]
    if not with_rows:
        return None
    shape = scope.shape(with_rows[0])
    row, batch = scope.of(with_rows[0])
    assert row is not None
    stacking = scope.node.op is aten.stack.default
    dimension = scope.argument(1, "dim", 0) % (len(shape) + stacking)
    if not stacking and dimension == row:
        return None
    if any(scope.of(ref).row != row for ref in with_rows) or any(scope.shape(r)[row] != shape[row] for r in members):
        return None
    kept = all(scope.of(ref).batch == batch for ref in with_rows) and (stacking or dimension != batch)
    batch = batch if kept else None
    shift = [int(stacking and dimension <= d) for d in (row, batch or 0)]
    out = Axes(row + shift[0], None if batch is None else batch + shift[1])
    samples = 0 if batch is None else shape[batch]
    return Concatenate(scope.node.op, dimension, len(shape), shape[row], samples, (out,), Axes(row, batch))


@register("shape", aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
@register("shape", aten.tensor_split.sections, aten.split.sizes)
def split(scope: Scope) -> RowRule | None:
    """``split``, ``chunk`` along another dimension."""
    dimension = scope.argument(2, "dim", 0) % _rank(scope)
    axes = scope.of(scope.node.args[0])
    if not scope.only_first_has_rows() or dimension == axes.row:
        return None
    out = Axes(axes.row, None if dimension == axes.batch else axes.batch)
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@register("shape", aten.unbind.int, aten.select.int)
def unbind(scope: Scope) -> RowRule | None:
    """``unbind(input, dim)`` and ``select(input, dim, index)`` along another dimension."""
    axes = scope.of(scope.node.args[0])
    dimension = scope.argument(1, "dim", 0) % _rank(scope)
    if not scope.only_first_has_rows() or axes.row is None or dimension == axes.row:
        return None
    batch = None if axes.batch in (None, dimension) else axes.batch - (dimension < axes.batch)
    out = Axes(axes.row - (dimension < axes.row), batch)
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@dataclass(frozen=True)
class Crop(RowRule):
    """``slice`` and ``narrow`` along the row axis."""

    axis: int
    start: int
    step: int
    axes: tuple[Axes, ...]
    family = "shape"

    def needed(self, output: Interval) -> Interval:
        return Interval(output.lo * self.step + self.start, (output.hi - 1) * self.step + self.start + 1)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        if self.step == 1:
            slab: Tensor = args[0]
            return slab
        result: Tensor = aten.slice.Tensor(args[0], self.axis, 0, args[0].shape[self.axis], self.step)
        return result


@register("shape", aten.slice.Tensor)
def slice_(scope: Scope) -> RowRule | None:
    """``slice(input, dim, start, end, step)``: a crop along the row axis, pointwise along the others."""
    if not scope.only_first_has_rows():
        return None
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    dimension = scope.argument(1, "dim", 0) % len(shape)
    start, step = scope.argument(2, "start", None) or 0, scope.argument(4, "step", 1)
    return _cropped(scope, axes, shape, dimension, start, step)


@register("shape", aten.narrow.default)
def narrow(scope: Scope) -> RowRule | None:
    """``narrow(input, dim, start, length)``."""
    if not scope.only_first_has_rows():
        return None
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    return _cropped(scope, axes, shape, scope.node.args[1] % len(shape), scope.node.args[2], 1)


def _cropped(scope: Scope, axes: Axes, shape: tuple[int, ...], dimension: int, start: int, step: int) -> RowRule:
    if dimension == axes.row:
        start = max(0, start + shape[dimension] if start < 0 else start)
        return Crop(dimension, start, step, (axes,))
    cuts_batch = dimension == axes.batch and scope.output.shape[dimension] != shape[dimension]
    if dimension == axes.batch and not cuts_batch:
        return AlongRows(aten.alias.default, (axes,)) if len(scope.node.args) == 0 else _Identity((axes,))
    return AlongRows(scope.node.op, (Axes(axes.row, None if cuts_batch else axes.batch),))


@dataclass(frozen=True)
class _Identity(RowRule):
    """``x[:]`` along the batch: the slab itself."""

    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab: Tensor = args[0]
        return slab


@register("shape", aten.index.Tensor)
def index(scope: Scope) -> RowRule | None:
    """``input[:, order]``: one list of places along another dimension."""
    given = [(dim, ref) for dim, ref in enumerate(scope.node.args[1]) if ref is not None]
    axes = scope.of(scope.node.args[0])
    if not scope.only_first_has_rows() or len(given) != 1 or len(scope.shape(given[0][1])) != 1:
        return None
    if given[0][0] == axes.row or scope.values[given[0][1].index].dtype is torch.bool:
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if given[0][0] == axes.batch else axes.batch),))


@register("shape", aten.channel_shuffle.default)
def channel_shuffle(scope: Scope) -> RowRule | None:
    """``channel_shuffle(input, groups)``: dimension 1."""
    axes = scope.of(scope.node.args[0])
    return AlongRows(scope.node.op, (axes,)) if scope.only_first_has_rows() and axes.row != 1 else None


@register("shape", aten.topk.default, aten.sort.default, aten.argsort.default)
def ordered(scope: Scope) -> RowRule | None:
    """``topk(input, k, dim)``, ``sort(input, dim)`` along another dimension."""
    axes = scope.of(scope.node.args[0])
    dim = scope.argument(2 if scope.node.op is aten.topk.default else 1, "dim", -1) % _rank(scope)
    if not scope.only_first_has_rows() or dim == axes.row:
        return None
    out = Axes(axes.row, None if dim == axes.batch else axes.batch)
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@register("shape", aten.repeat_interleave.self_int)
def repeat_interleave(scope: Scope) -> RowRule | None:
    """``repeat_interleave(input, repeats, dim)`` along another dimension."""
    axes, dim = scope.of(scope.node.args[0]), scope.argument(2, "dim")
    if not scope.only_first_has_rows() or dim is None or dim % _rank(scope) == axes.row:
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if dim % _rank(scope) == axes.batch else axes.batch),))


@register("shape", aten.flip.default, aten.roll.default, aten.index_select.default)
def reordered(scope: Scope) -> RowRule | None:
    """``flip``, ``roll``, ``index_select`` along other dimensions."""
    axes = scope.of(scope.node.args[0])
    given = scope.argument(1, "dims") if scope.node.op is not aten.roll.default else scope.argument(2, "dims", [])
    dims = [d % _rank(scope) for d in ([given] if isinstance(given, int) else given or [])]
    if not dims or axes.row in dims or not scope.only_first_has_rows():
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if axes.batch in dims else axes.batch),))


@register("shape", aten.repeat.default)
def repeat(scope: Scope) -> RowRule | None:
    """``repeat(input, repeats)`` along other dimensions."""
    repeats = scope.node.args[1]
    axes, shift = scope.of(scope.node.args[0]), len(scope.node.args[1]) - _rank(scope)
    if not scope.only_first_has_rows() or axes.row is None or repeats[axes.row + shift] != 1:
        return None
    batch = None if axes.batch is None or repeats[axes.batch + shift] != 1 else axes.batch + shift
    return AlongRows(scope.node.op, (Axes(axes.row + shift, batch),))


@dataclass(frozen=True)
class PixelShuffle(RowRule):
    """``pixel_shuffle`` (``factor`` rows from one) and ``pixel_unshuffle`` (one row from ``factor``)."""

    operation: Any
    factor: int
    axis: int
    unshuffle: bool
    axes: tuple[Axes, ...]
    family = "shape"

    def needed(self, output: Interval) -> Interval:
        if self.unshuffle:
            return Interval(output.lo * self.factor, output.hi * self.factor)
        return Interval(output.lo // self.factor, -(-output.hi // self.factor))

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        result: Tensor = self.operation(args[0], self.factor)
        if self.unshuffle:
            return result
        return result.narrow(self.axis, tile.rows.lo - self.needed(tile.rows).lo * self.factor, tile.rows.length)


@register("shape", aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(scope: Scope) -> RowRule | None:
    """``pixel_shuffle(input, factor)``: channels into the last two dimensions."""
    axes, rank = scope.of(scope.node.args[0]), _rank(scope)
    if not scope.only_first_has_rows() or axes.row not in (rank - 2, rank - 1):
        return None
    unshuffle = scope.node.op is aten.pixel_unshuffle.default
    return PixelShuffle(scope.node.op, scope.node.args[1], axes.row, unshuffle, (axes,))


@dataclass(frozen=True)
class PadRows(RowRule):
    """``pad``: rows of a constant, or copies of the border rows (``reflect``, ``replicate``)."""

    mode: str
    value: float
    axis: int
    above: int
    height: int
    others: tuple[int, ...]
    axes: tuple[Axes, ...]
    family = "shape"

    def _source(self, row: int) -> int:
        place = row - self.above
        if self.mode == "reflect":
            place = abs(place)
            return place if place < self.height else 2 * (self.height - 1) - place
        return min(max(place, 0), self.height - 1)

    def needed(self, output: Interval) -> Interval:
        if self.mode == "constant":
            lo = min(max(output.lo - self.above, 0), self.height - 1)
            return Interval(lo, min(max(output.hi - self.above, lo + 1), self.height))
        rows = [self._source(row) for row in range(output.lo, output.hi)]
        return Interval(min(rows), max(rows) + 1)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        slab: Tensor = args[0]
        if any(self.others):
            if self.mode == "constant":
                slab = functional.pad(slab, list(self.others), value=self.value)
            else:
                # The modes that copy exist only for all spatial dimensions at once.
                slab = functional.pad(slab, list(self.others), mode=self.mode)
        given = self.needed(tile.rows)
        if self.mode == "constant":
            start, stop = tile.rows.lo - self.above, tile.rows.hi - self.above
            return pad_rows(slab, self.axis, given.lo - start, stop - given.hi, self.value)
        if tile.rows.lo - self.above == given.lo and tile.rows.hi - self.above == given.hi:
            return slab
        rows = torch.tensor([self._source(row) - given.lo for row in range(tile.rows.lo, tile.rows.hi)])
        return slab.index_select(self.axis, rows.to(slab.device))


@register("shape", aten.pad.default, aten.constant_pad_nd.default)
@register("shape", aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
@register("shape", aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def pad(scope: Scope) -> RowRule | None:
    """``pad(input, pad, mode, value)``; circular padding along the row axis runs whole."""
    if not scope.only_first_has_rows():
        return None
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    widths = list(scope.node.args[1])
    name = scope.node.op._schema.name.split("::")[1]
    mode, value = "constant", 0.0
    if name == "pad":
        mode, value = scope.argument(2, "mode", "constant"), scope.argument(3, "value", None) or 0.0
    elif name == "constant_pad_nd":
        value = scope.argument(2, "value", 0)
    else:
        mode = "reflect" if name.startswith("reflection") else "replicate"
    assert axes.row is not None
    place = 2 * (len(shape) - 1 - axes.row)
    above, below = (widths[place], widths[place + 1]) if place < len(widths) else (0, 0)
    others = list(widths)
    if place < len(widths):
        others[place : place + 2] = [0, 0]
    if mode == "circular":
        if above or below:
            return None
        return AlongRows(scope.node.op, (axes,))
    if mode != "constant" and (above < 0 or below < 0):
        return None
    batch = axes.batch
    if batch is not None:
        place = 2 * (len(shape) - 1 - batch)
        if place < len(widths) and (widths[place] or widths[place + 1]):
            batch = None
    return PadRows(mode, value, axes.row, above, shape[axes.row], tuple(others), (Axes(axes.row, batch),))
