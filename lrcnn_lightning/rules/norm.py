"""Vector norms over rows: sums of powers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.precision import as_read_by
from lrcnn_lightning.rules.reduction import kept_batch, reduced_dimensions, restored, wide, within_rows
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Reduction, RowRule, Scope, register

__all__ = ["Norm"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm(Reduction):
    """``(sum |x|^p)^(1/p)`` over dimensions that include the row axis, p at least 1 and finite."""

    power: float
    dims: tuple[int, ...]
    keepdim: bool
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE,)

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        x = wide(slab)
        powers = x * x if self.power == 2 else x.abs().pow(self.power)
        return powers.sum(self.dims, keepdim=self.keepdim), as_read_by(aten.linalg_vector_norm.default, slab).dtype

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        return first[0] + second[0], first[1]

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        total, dtype = state
        return ((total.sqrt() if self.power == 2 else total.pow(1 / self.power)).to(dtype),)

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        outputs, gradients = coefficients
        # dx = g sign(x) |x|^(p-1) / norm^(p-1), and zero where the norm is.
        gradient = gradients[0]
        assert gradient is not None
        norm, x = wide(outputs[0]), wide(slab)
        scale = gradient / norm.pow(self.power - 1)
        if self.power > 1:
            scale = scale.masked_fill(norm == 0, 0)
        scale = restored(scale, self.dims, self.keepdim)
        direction = x if self.power == 2 else x.sgn() * x.abs().pow(self.power - 1)
        return (direction * scale).to(slab.dtype)


@register("reduction", aten.linalg_vector_norm.default)
def vector_norm(scope: Scope) -> Reduction | RowRule | None:
    """``linalg_vector_norm(input, ord, dim, keepdim, dtype)``."""
    if not scope.only_first_has_rows():
        return None
    rank = len(scope.shape(scope.node.args[0]))
    dims = reduced_dimensions(scope.argument(2, "dim"), rank)
    keepdim = bool(scope.argument(3, "keepdim", False))
    if scope.of(scope.node.args[0]).row not in dims:
        return within_rows(scope, dims, keepdim)
    power = float(scope.argument(1, "ord", 2))
    if not 1 <= power < float("inf") or scope.node.kwargs.get("dtype") is not None:
        return None
    return Norm(power, dims, keepdim, kept_batch(scope, dims, keepdim))
