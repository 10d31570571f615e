"""Operations that join maps, or take and order parts of them. A crop along the row axis shifts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.formula import Formula, Saved
from lrcnn_lightning.rules.pointwise import AlongRows, cut_whole
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register

__all__ = ["Concatenate", "Crop"]

aten = torch.ops.aten


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

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return (
            _PartsFormula(self.dimension, tuple(map(bool, wanted[0]))) if self.operation is aten.cat.default else None
        )


@dataclass(frozen=True)
class _PartsFormula(Formula):
    """The gradients of what is joined are parts of that of the result."""

    dimension: int
    wanted: tuple[bool, ...]

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        first, *others = args[0]
        apart = [list(member.shape) for member in args[0]]
        for sizes in apart:
            if len(sizes) != first.dim():
                return False
            sizes[self.dimension] = 0
        return all(sizes == apart[0] for sizes in apart) and all(other.dtype == first.dtype for other in others)

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        sizes = [member.shape[self.dimension] for member in args[0]]
        return torch.cat(args[0], self.dimension), tuple(sizes)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        gradient = gradients.pop()
        assert gradient is not None
        parts: list[Tensor | None] = []
        start = 0
        for size, wanted in zip(saved, self.wanted, strict=True):
            parts.append(gradient.narrow(self.dimension, start, size) if wanted else None)
            start += size
        return (parts,)


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
    dimension = scope.argument(2, "dim", 0) % scope.rank
    axes = scope.of(scope.node.args[0])
    if not scope.only_first_has_rows() or dimension == axes.row:
        return None
    out = Axes(axes.row, None if dimension == axes.batch else axes.batch)
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@register("shape", aten.unbind.int, aten.select.int)
def unbind(scope: Scope) -> RowRule | None:
    """``unbind(input, dim)`` and ``select(input, dim, index)`` along another dimension."""
    axes = scope.of(scope.node.args[0])
    dimension = scope.argument(1, "dim", 0) % scope.rank
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
        return _Identity((axes,))
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
    dim = scope.argument(2 if scope.node.op is aten.topk.default else 1, "dim", -1) % scope.rank
    if not scope.only_first_has_rows() or dim == axes.row:
        return None
    out = Axes(axes.row, None if dim == axes.batch else axes.batch)
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@register("shape", aten.repeat_interleave.self_int)
def repeat_interleave(scope: Scope) -> RowRule | None:
    """``repeat_interleave(input, repeats, dim)`` along another dimension."""
    axes, dim = scope.of(scope.node.args[0]), scope.argument(2, "dim")
    if not scope.only_first_has_rows() or dim is None or dim % scope.rank == axes.row:
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if dim % scope.rank == axes.batch else axes.batch),))


@register("shape", aten.flip.default, aten.roll.default, aten.index_select.default)
def reordered(scope: Scope) -> RowRule | None:
    """``flip``, ``roll``, ``index_select`` along other dimensions."""
    axes = scope.of(scope.node.args[0])
    given = scope.argument(1, "dims") if scope.node.op is not aten.roll.default else scope.argument(2, "dims", [])
    dims = [d % scope.rank for d in ([given] if isinstance(given, int) else given or [])]
    if not dims or axes.row in dims or not scope.only_first_has_rows():
        return None
    return AlongRows(scope.node.op, (Axes(axes.row, None if axes.batch in dims else axes.batch),))


@register("shape", aten.repeat.default)
def repeat(scope: Scope) -> RowRule | None:
    """``repeat(input, repeats)`` along other dimensions."""
    repeats = scope.node.args[1]
    axes, shift = scope.of(scope.node.args[0]), len(scope.node.args[1]) - scope.rank
    if not scope.only_first_has_rows() or axes.row is None or repeats[axes.row + shift] != 1:
        return None
    batch = None if axes.batch is None or repeats[axes.batch + shift] != 1 else axes.batch + shift
    return AlongRows(scope.node.op, (Axes(axes.row + shift, batch),))
