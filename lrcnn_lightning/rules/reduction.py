"""Reductions over rows: sums, means, maxima, global pools.

Each is a partial result per row, a merge of two, and a finish.  Its backward needs no row of any other slab: given the
finished outputs and their gradients, the gradient of a slab is a pointwise formula (`inject`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.precision import as_read_by
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Reduction, RowRule, Scope, register

__all__ = ["Sum", "global_average", "kept_batch", "reduced_dimensions", "restored", "wide", "within_rows"]

aten = torch.ops.aten


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better, in which sums over rows are taken."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class Sum(Reduction):
    """``sum`` and ``mean`` over dimensions that include the row axis."""

    dims: tuple[int, ...]
    keepdim: bool
    divisor: int
    dtype: torch.dtype | None
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE,)
    operation: Any = None

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        return wide(slab).sum(self.dims, keepdim=self.keepdim), as_read_by(self.operation, slab).dtype

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        return first[0] + second[0], first[1]

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        total, dtype = state
        return ((total / self.divisor).to(self.dtype or dtype),)

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        _, gradients = coefficients
        gradient = gradients[0]
        assert gradient is not None
        return (restored(gradient, self.dims, self.keepdim) / self.divisor).to(slab.dtype).expand(slab.shape)


def restored(tensor: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """The result of a reduction over ``dims`` with these dimensions, of size one, in their place."""
    for dim in () if keepdim else sorted(dims):
        tensor = tensor.unsqueeze(dim)
    return tensor


def reduced_dimensions(given: Any, rank: int) -> tuple[int, ...]:
    """The ``dim`` argument of a reduction as dimensions; none given are all."""
    if isinstance(given, int):
        return (given % rank,)
    return tuple(dim % rank for dim in given) if given else tuple(range(rank))


def kept_batch(scope: Scope, dims: Sequence[int], keepdim: bool) -> int | None:
    """Where the batch axis of the input is in the output of a reduction over ``dims``."""
    batch = scope.of(scope.node.args[0]).batch
    if batch is None or batch in dims:
        return None
    return batch if keepdim else batch - sum(dim < batch for dim in dims)


def _reduced(scope: Scope, given: Any, keepdim: bool, mean: bool) -> Reduction | RowRule | None:
    if not scope.only_first_has_rows():
        return None
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    dims = reduced_dimensions(given, len(shape))
    assert axes.row is not None
    if axes.row not in dims:
        return within_rows(scope, dims, keepdim)
    divisor = 1
    for dim in dims if mean else ():
        divisor *= shape[dim]
    dtype = scope.node.kwargs.get("dtype")
    batch = kept_batch(scope, dims, keepdim)
    return Sum(dims, keepdim, divisor, dtype, batch, operation=scope.node.op)


def within_rows(scope: Scope, dims: Sequence[int], keepdim: bool) -> RowRule | None:
    """A reduction that leaves the row axis alone; ``None`` where it does not."""
    row = scope.of(scope.node.args[0]).row
    if not scope.only_first_has_rows() or row is None or row in dims:
        return None
    row = row if keepdim else row - sum(dim < row for dim in dims)
    out = Axes(row, kept_batch(scope, dims, keepdim))
    return AlongRows(scope.node.op, (out,) * len(scope.node.outputs))


@register("reduction", aten.mean.dim)
def mean(scope: Scope) -> Reduction | RowRule | None:
    """``mean(input, dim, keepdim)``."""
    return _reduced(scope, scope.argument(1, "dim"), bool(scope.argument(2, "keepdim", False)), True)


@register("reduction", aten.sum.dim_IntList)
def total(scope: Scope) -> Reduction | RowRule | None:
    """``sum(input, dim, keepdim)``."""
    return _reduced(scope, scope.argument(1, "dim"), bool(scope.argument(2, "keepdim", False)), False)


@register("reduction", aten.mean.default)
def mean_of_all(scope: Scope) -> Reduction | RowRule | None:
    """``mean(input)``."""
    return _reduced(scope, None, False, True)


@register("reduction", aten.sum.default)
def total_of_all(scope: Scope) -> Reduction | RowRule | None:
    """``sum(input)``."""
    return _reduced(scope, None, False, False)


def global_average(scope: Scope, position: int) -> Reduction | None:
    """``adaptive_avg_poolNd`` to one row; the other axes must go to one as well."""
    shape, out = scope.shape(scope.node.args[0]), scope.output.shape
    dimensions = int(scope.node.op._schema.name[-2])
    dims = tuple(range(len(shape) - dimensions, len(shape)))
    if any(out[dim] != 1 for dim in dims):
        return None
    divisor = 1
    for dim in dims:
        divisor *= shape[dim]
    return Sum(dims, True, divisor, None, kept_batch(scope, dims, True), operation=scope.node.op)


@register("reduction", aten.max.dim, aten.min.dim, aten.median.dim, aten.argmax.default, aten.argmin.default)
@register("reduction", aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim)
def other_reduction(scope: Scope) -> RowRule | None:
    """Reductions that stream only where they leave the row axis alone: ``op(input, dim, keepdim)``."""
    given = scope.argument(1, "dim")
    if given is None:
        return None
    dims = reduced_dimensions(given, len(scope.shape(scope.node.args[0])))
    return within_rows(scope, dims, bool(scope.argument(2, "keepdim", False)))
