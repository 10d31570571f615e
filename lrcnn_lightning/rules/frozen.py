"""Batch normalisation with frozen statistics, which is pointwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.formula import Formula, Saved
from lrcnn_lightning.rules.normalisation import aligned, gradients_on_gpu, native_backward, strides_mislead
from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.rule import RowRule, Scope, Tile, register

__all__ = ["FrozenNorm"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FrozenNorm(AlongRows):
    """``batch_norm`` with frozen statistics."""

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        x: Tensor = args[0]
        if strides_mislead(x):
            x = x.contiguous()
        result: Tensor = self.operation(x, *args[1:], **kwargs)
        return result

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return _FrozenFormula(bool(wanted[0]), bool(wanted[1]), bool(wanted[2]))


@dataclass(frozen=True)
class _FrozenFormula(Formula):
    """The kernel of ATen on the CPU; on a GPU, where no gradient of an affine parameter is wanted, a product."""

    wants_x: bool
    wants_weight: bool
    wants_bias: bool

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        x, _, _, mean, variance = args[:5]
        if kwargs or mean is None or variance is None:
            return False
        if x.device.type == "cpu":
            return not torch.is_autocast_enabled("cpu")
        return x.device.type == "cuda" and not (self.wants_weight or self.wants_bias)

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        x, weight, _, mean, variance, *_ = args
        x = x.contiguous() if strides_mislead(x) else x
        return aten.batch_norm.default(x, *args[1:]), (x, weight, mean, variance, args[7])

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        x, weight, mean, variance, eps = saved
        gradient = gradients.pop()
        assert gradient is not None
        if x.device.type == "cpu":
            wanted = (self.wants_x, self.wants_weight, self.wants_bias)
            gradient = aligned(gradient, x)
            found = native_backward(gradient, x, weight, mean, variance, None, None, False, eps, wanted)
            return [made if asked else None for made, asked in zip(found, wanted, strict=True)]
        scale = torch.rsqrt(variance + eps)
        scale = scale if weight is None else scale * weight
        return gradients_on_gpu(gradient, x, mean, scale, scale, (True, False, False))


@register("normalisation", aten.batch_norm.default)
def frozen_batch_norm(scope: Scope) -> RowRule | None:
    """``batch_norm`` with frozen statistics (training mode has been expanded)."""
    axes = scope.of(scope.node.args[0])
    if axes.row is None or axes.row < 2 or scope.node.args[5] or not scope.only_first_has_rows():
        return None
    return FrozenNorm(scope.node.op, (axes,))
