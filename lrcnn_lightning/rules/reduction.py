"""Reductions over rows: sums, means, maxima, norms, global pools, moments.

Each is a partial result per row, a merge of two, and a finish.  Its backward needs no row of any other slab: given the
finished outputs and their gradients, the gradient of a slab is a pointwise formula (`inject`).

The moments of several slabs are merged by Chan's formula (Chan, Golub, LeVeque 1979), with count n, mean m and sum of
squared deviations M2:

    d = m_b - m_a      m = m_a + d * n_b / n      M2 = M2_a + M2_b + d^2 * n_a * n_b / n

which is stable where sums of squares are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.precision import as_read_by
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Operator, Reduction, RowRule, Scope, register

__all__ = ["Moments", "Sum", "global_average", "kept_batch", "moments", "reduced_dimensions", "restored", "wide"]

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


@dataclass(frozen=True)
class Moments(Reduction):
    """Mean and biased variance over space, and over the batch where ``groups`` is None.

    Of a map ``N C *``: ``[C]`` each, or, with groups G, ``[N, G]`` each (instance normalisation has G = C).
    """

    groups: int | None
    count: int
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE, WHOLE)

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        slab = wide(slab)
        count = slab.numel() // (slab.shape[1] if self.groups is None else slab.shape[0] * self.groups)
        variance, mean = _variance_and_mean(slab, self.groups)
        return [count], [mean], [variance]

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        merged = tuple(mine + others for mine, others in zip(first, second, strict=True))
        return merged if len(merged[0]) < _AT_ONCE else _merged(*merged)

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        _, (mean,), (variance,) = _merged(*state)
        return mean, variance

    def coefficients(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
        # dx = dmean/n + 2/n * dvar * (x - mean), as one scale and one shift a channel.
        for_mean, for_variance = gradients
        average = outputs[0]
        scale = 0 * average if for_variance is None else for_variance * (2 / self.count)
        if for_mean is None:
            return scale, -scale * average
        return scale, torch.addcmul(for_mean / self.count, scale, average, value=-1)

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        scale, shift = coefficients
        shape = [1, -1] + [1] * (slab.dim() - 2)
        if self.groups is not None:
            repeat = slab.shape[1] // self.groups
            scale, shift = (t.repeat_interleave(repeat, 1) for t in (scale, shift))
            shape[0] = slab.shape[0]
        return torch.addcmul(shift.view(shape), wide(slab), scale.view(shape)).to(slab.dtype)


_AT_ONCE = 64
"""Slabs whose moments are merged together."""


def _merged(counts: list[int], means: list[Tensor], variances: list[Tensor]) -> tuple[Any, ...]:
    """The moments of several slabs as those of one (Chan, Golub and LeVeque): counts, means and biased variances.

    The variance is the average of the slabs' own ones, and of their means' squared distances from the mean of all. A
    few calls for any number of slabs.
    """
    if len(counts) == 1:
        return counts, means, variances
    total = sum(counts)
    shares = [count / total for count in counts]
    mean = torch.stack(torch._foreach_mul(means, shares)).sum(0)
    apart, parts = torch._foreach_sub(means, [mean] * len(means)), torch._foreach_mul(variances, shares)
    torch._foreach_addcmul_(parts, apart, apart, shares)
    return [total], [mean], [torch.stack(parts).sum(0)]


_PIECE = 2**20
"""Bytes of deviations that exist at once, unless one channel takes more."""


def _variance_and_mean(x: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    """Biased variance and mean, in two passes over ``x``.

    ``torch.var_mean`` takes one pass, which on the CPU adds one number at a time: two passes with vectorised sums are
    several times faster. The deviations are made channels by channels, so that no second slab exists.
    """
    if groups is not None:
        x = x.reshape(x.shape[0], groups, -1)
    dims = [0, *range(2, x.dim())] if groups is None else [2]
    if x.device.type != "cpu":
        return torch.var_mean(x, dims, correction=0)
    mean = x.mean(dims, keepdim=True)
    channels = x.shape[1]
    pieces = max(1, min(channels, x.numel() * x.element_size() // _PIECE))
    variances = []
    for i in range(pieces):
        start, end = channels * i // pieces, channels * (i + 1) // pieces
        deviations = x.narrow(1, start, end - start) - mean.narrow(1, start, end - start)
        variances.append(deviations.square_().mean(dims))
    variance = variances[0] if pieces == 1 else torch.cat(variances, -1)
    return variance, mean.reshape(variance.shape)


def _moments(x: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    variance, mean = _variance_and_mean(wide(x), groups)
    return mean, variance


moments = Operator("moments", _moments)


@register("reduction", moments)
def moments_rule(scope: Scope) -> Reduction | None:
    """``moments(input, groups)``: the reduction half of a normalisation over space."""
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    groups = scope.node.args[1]
    if axes.row is None or axes.row < 2:
        return None
    elements = 1
    for size in shape:
        elements *= size
    count = elements // (shape[1] if groups is None else shape[0] * groups)
    return Moments(groups, count, None if groups is None else axes.batch)


@register("reduction", aten.max.dim, aten.min.dim, aten.median.dim, aten.argmax.default, aten.argmin.default)
@register("reduction", aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim)
def other_reduction(scope: Scope) -> RowRule | None:
    """Reductions that stream only where they leave the row axis alone: ``op(input, dim, keepdim)``."""
    given = scope.argument(1, "dim")
    if given is None:
        return None
    dims = reduced_dimensions(given, len(scope.shape(scope.node.args[0])))
    return within_rows(scope, dims, bool(scope.argument(2, "keepdim", False)))
