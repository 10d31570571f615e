"""Pointwise operations, of any number of operands, with broadcasting.

An output row needs the same row of every operand that has a row axis.  An operand without one is whole: it is
broadcast along the rows (a ``[N, C, 1, 1]`` gate, a ``[C, 1, 1]`` weight), or, when it is as high as the map (a
position embedding, a dropout mask), the rows of the tile are cut from it.  The same holds for the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import references
from lrcnn_lightning.rules.elementwise import formula_along_rows, pointwise_formula
from lrcnn_lightning.rules.formula import Formula, Saved, autocast_dtype
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register

__all__ = ["AlongRows", "Linear", "Pointwise", "cut_whole"]

aten = torch.ops.aten


def cut_whole(operand: Tensor, rank: int, dimension: int | None, size: int, part: Interval) -> Tensor:
    """The part of a whole operand that lines up with rows (or samples) ``part`` of a map of ``rank`` dimensions."""
    if dimension is None or part.length == size:
        return operand
    own = dimension - (rank - operand.dim())
    if own < 0 or operand.shape[own] != size:
        return operand
    return operand.narrow(own, part.lo, part.length)


@dataclass(frozen=True)
class Pointwise(RowRule):
    """Any operation tagged pointwise, and those that behave so along the row axis."""

    operation: Any
    rank: int
    height: int
    samples: int
    whole: tuple[int, ...]
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Any:
        if self.whole:
            operands = list(args)
            for position in self.whole:
                operand = cut_whole(operands[position], self.rank, self.axes[0].row, self.height, tile.rows)
                operands[position] = cut_whole(operand, self.rank, self.axes[0].batch, self.samples, tile.batch)
            args = operands
        return self.operation(*args, **kwargs)

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        if self.whole:
            return super().prepare(tile)
        operation = self.operation
        return lambda args, kwargs: operation(*args, **kwargs)

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return None if self.whole else pointwise_formula(self.operation, wanted)


@register("pointwise", "pointwise")
def pointwise(scope: Scope) -> RowRule | None:
    """Operands are aligned from the last dimension, as broadcasting does."""
    output = scope.output
    rank = len(output.shape)
    row: int | None = None
    batch: int | None = None
    lacking_batch = False
    whole = []
    for position, operand in enumerate(scope.node.args):
        nested = list(references(operand))
        if not nested:
            continue
        if operand not in nested:
            return None  # tensors inside a list: no broadcasting operation of ATen takes them
        axes, shape = scope.of(operand), scope.shape(operand)
        if axes.row is None:
            whole.append(position)
            continue
        aligned = axes.row + rank - len(shape)
        if row not in (None, aligned) or shape[axes.row] != output.shape[aligned]:
            return None
        row = aligned
        if axes.batch is None:
            lacking_batch = True
        else:
            aligned = axes.batch + rank - len(shape)
            if batch not in (None, aligned) or shape[axes.batch] != output.shape[aligned]:
                lacking_batch = True
            batch = aligned
    if row is None or any(references(scope.node.kwargs)):
        return None
    samples = 0 if batch is None or lacking_batch else output.shape[batch]
    if any(scope.values[other].shape != output.shape for other in scope.node.outputs):
        return None
    out = Axes(row, None if lacking_batch else batch)
    return Pointwise(scope.node.op, rank, output.shape[row], samples, tuple(whole), (out,) * len(scope.node.outputs))


@dataclass(frozen=True)
class AlongRows(RowRule):
    """An operation that treats every row alike and takes one map; whole operands have no row dimension."""

    operation: Any
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Any:
        return self.operation(*args, **kwargs)

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return formula_along_rows(self.operation, wanted)


def _alike(scope: Scope) -> RowRule | None:
    if not scope.only_first_has_rows():
        return None
    axes = scope.of(scope.node.args[0])
    return AlongRows(scope.node.op, (axes,) * len(scope.node.outputs))


@register("pointwise", aten.prelu.default)
def prelu(scope: Scope) -> RowRule | None:
    """One learned slope, or one a channel (dimension 1)."""
    axes = scope.of(scope.node.args[0])
    return None if axes.row == 1 else _alike(scope)


@register("pointwise", aten.hardswish.default, aten.log_sigmoid.default, aten.special_expm1.default)
@register("pointwise", aten.leaky_relu.default)  # tagged since PyTorch 2.7
@register("pointwise", aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Tensor)
@register(
    "pointwise",
    aten.copy.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.type_as.default,
    aten.to.other,
    aten.expand_as.default,
)
def untagged(scope: Scope) -> RowRule | None:
    """Pointwise operations, with broadcasting, that ATen does not tag so."""
    return pointwise(scope)


@register("pointwise", aten.rrelu.default)
def rrelu(scope: Scope) -> RowRule | None:
    """``rrelu(input, lower, upper, training)``: in training mode its slopes are drawn at random, on the whole map."""
    return None if scope.argument(3, "training", False) else pointwise(scope)


@register("pointwise", aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)
@register("pointwise", aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device)
def elementwise(scope: Scope) -> RowRule | None:
    """Operations of one map that ATen does not tag pointwise."""
    return _alike(scope)


@register("pointwise", aten.softmax.int, aten.log_softmax.int, aten.cumsum.default, aten.cumprod.default)
@register("pointwise", aten._softmax.default, aten._log_softmax.default, aten.glu.default)
def along_a_dimension(scope: Scope) -> RowRule | None:
    """Operations along one dimension, pointwise along the others."""
    axes = scope.of(scope.node.args[0])
    rank = len(scope.shape(scope.node.args[0]))
    dimension = scope.argument(1, "dim", -1) % rank
    if dimension == axes.row:
        return None
    rule = _alike(scope)
    if rule is not None and dimension == axes.batch:
        return AlongRows(scope.node.op, (Axes(axes.row, None),))
    return rule


@dataclass(frozen=True)
class Linear(AlongRows):
    """``linear``: a matrix product along the last dimension."""

    @property
    def hollow(self) -> bool:
        return True

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return _LinearFormula(tuple(map(bool, wanted)))


@dataclass(frozen=True)
class _LinearFormula(Formula):
    """Two matrix products, and a sum for the bias."""

    wanted: tuple[bool, ...]

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        given, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
        dtype = autocast_dtype(given)
        slab, weight = given.to(dtype), weight.to(dtype)
        result = None if hollow else torch.nn.functional.linear(slab, weight, None if bias is None else bias.to(dtype))
        return result, (slab, weight, given.dtype)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        slab, weight, dtype = saved
        gradient = gradients.pop()
        assert gradient is not None
        wanted = (*self.wanted, False, False)
        gradient = gradient.to(slab.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_slab = (gradient @ weight).to(dtype) if wanted[0] else None
        for_weight = rows.t() @ slab.reshape(-1, slab.shape[-1]) if wanted[1] else None
        return for_slab, for_weight, rows.sum(0) if wanted[2] else None


@register("contraction", aten.linear.default)
def linear(scope: Scope) -> RowRule | None:
    """``linear(input, weight, bias)`` on channels in the last dimension."""
    axes = scope.of(scope.node.args[0])
    if not scope.only_first_has_rows() or axes.row == len(scope.shape(scope.node.args[0])) - 1:
        return None
    return Linear(scope.node.op, (axes,))


@register("pointwise", aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(scope: Scope) -> RowRule | None:
    """``layer_norm(input, normalized_shape, ...)`` when the row axis is not among the last dimensions it goes over."""
    axes = scope.of(scope.node.args[0])
    rank = len(scope.shape(scope.node.args[0]))
    first = rank - len(scope.node.args[1])
    if axes.row is None or axes.row >= first or not scope.only_first_has_rows():
        return None
    return AlongRows(scope.node.op, (axes,))
