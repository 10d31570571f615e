"""Variance and standard deviation over rows, merged by Chan's formula as in `reduction`.

The gradient of a variance needs the mean, so over rows ``var`` and ``std`` are made from the pair:

    variance, mean = spread(x)        deviation = root(variance)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.pointwise import pointwise
from lrcnn_lightning.rules.reduction import kept_batch, reduced_dimensions, restored, wide, within_rows
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Operator, Reduction, RowRule, Scope, register

__all__ = ["Spread", "root", "spread"]

aten = torch.ops.aten


def _spread(x: Tensor, dims: tuple[int, ...], correction: float, keepdim: bool) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dims, correction=correction, keepdim=keepdim)
    return variance, mean


def _root(variance: Tensor) -> Tensor:
    """The square root, whose gradient at zero is zero, as that of ``std`` is."""
    flat = variance == 0
    return torch.where(flat, 0 * variance, torch.where(flat, 1, variance).sqrt())


spread = Operator("spread", _spread)
root = Operator("root", _root)


@dataclass(frozen=True)
class Spread(Reduction):
    """``var_mean`` over dimensions that include the row axis; ``count`` elements each."""

    dims: tuple[int, ...]
    count: int
    correction: float
    keepdim: bool
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE, WHOLE)

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        variance, mean = torch.var_mean(wide(slab), self.dims, correction=0, keepdim=self.keepdim)
        count = 1
        for dim in self.dims:
            count *= slab.shape[dim]
        return count, mean, variance * count, slab.dtype

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        count = first[0] + second[0]
        difference = second[1] - first[1]
        deviations = first[2] + second[2] + difference * difference * (first[0] * second[0] / count)
        return count, first[1] + difference * (second[0] / count), deviations, first[3]

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        count, mean, deviations, dtype = state
        return (deviations / max(count - self.correction, 0)).to(dtype), mean.to(dtype)

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        outputs, (for_variance, for_mean) = coefficients
        x, result = wide(slab), torch.zeros((), dtype=slab.dtype, device=slab.device)
        if for_variance is not None:
            mean = restored(outputs[1], self.dims, self.keepdim)
            scale = 2 * for_variance / max(self.count - self.correction, 0)
            result = (x - mean) * restored(scale, self.dims, self.keepdim)
        if for_mean is not None:
            result = result + restored(for_mean, self.dims, self.keepdim) / self.count
        return result.to(slab.dtype).expand(slab.shape)


@register("reduction", spread)
def spread_rule(scope: Scope) -> Reduction | RowRule | None:
    """``spread(input, dims, correction, keepdim)``."""
    _, dims, correction, keepdim = scope.node.args
    if not scope.only_first_has_rows():
        return None
    if scope.of(scope.node.args[0]).row not in dims:
        return within_rows(scope, dims, keepdim)
    count = 1
    for dim in dims:
        count *= scope.shape(scope.node.args[0])[dim]
    return Spread(dims, count, correction, keepdim, kept_batch(scope, dims, keepdim))


@register("pointwise", root)
def root_rule(scope: Scope) -> RowRule | None:
    """``root(variance)``."""
    return pointwise(scope)


@expands(aten.var.dim)
@expands(aten.var.correction)
@expands(aten.std.dim)
@expands(aten.std.correction)
@expands(aten.var_mean.dim)
@expands(aten.var_mean.correction)
def expand_variance(builder: Builder, node: Node) -> bool:
    """``var(input, dim, unbiased, keepdim)`` or ``var(input, dim, correction=..., keepdim=...)``, and its kin."""
    name, overload = node.op._schema.name.split("::")[1], node.op._overloadname
    value = builder.values[node.args[0].index]
    rank = len(value.shape)
    if rank < 3 or not value.dtype.is_floating_point:
        return False
    dims = reduced_dimensions(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), rank)
    if overload == "dim":
        unbiased = node.args[2] if len(node.args) > 2 else node.kwargs.get("unbiased", True)
        correction: Any = int(unbiased)
        keepdim = node.args[3] if len(node.args) > 3 else node.kwargs.get("keepdim", False)
    else:
        correction, keepdim = node.kwargs.get("correction"), node.kwargs.get("keepdim", False)
        correction = 1 if correction is None else correction
    args = (node.args[0], dims, correction, bool(keepdim))
    if name == "var_mean":
        builder.emit(node, spread, args, node.outputs, "spread")
        return True
    out = builder.values[node.outputs[0]]
    extra = [builder.value(f"{node.name}_mean", out.shape, out.dtype, out.device)]
    if name == "var":
        builder.emit(node, spread, args, (node.outputs[0], extra[0].index), "spread")
        return True
    variance = builder.value(f"{node.name}_variance", out.shape, out.dtype, out.device)
    builder.emit(node, spread, args, (variance.index, extra[0].index), "spread")
    builder.emit(node, root, (variance,), node.outputs, "root")
    return True
