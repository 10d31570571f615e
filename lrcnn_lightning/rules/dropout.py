"""Dropout: one mask a step, drawn in graph order, and pointwise work that uses it.

The mask has one byte an element, and every slab, recomputed or overlapping, sees the same.  It is drawn in the order of
the graph (`graph.draws`), before the rows start where it can be, so on the CPU the same seed gives the masks of plain
training.  Numbers go to elements as these lie in memory, so the mask is laid out as plain training lays out its input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node, dense_strides
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.pointwise import pointwise
from lrcnn_lightning.rules.rule import Operator, RowRule, Scope, register

__all__ = ["draw_mask", "masked"]

aten = torch.ops.aten

# The limit of SELU for large negative inputs, to which alpha dropout sets what it drops.
_ALPHA = 1.7580993408473766


def _draw_mask(shape: list[int], strides: list[int], keep: float, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=torch.bool, device=device).bernoulli_(keep)


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    result: Tensor = aten.native_dropout_backward.default(x, mask, scale)
    return result


def _masked_alpha(x: Tensor, mask: Tensor, scale: float, probability: float) -> Tensor:
    shift = (mask.to(x.dtype) - 1) * (_ALPHA * scale) + _ALPHA * scale * probability
    result: Tensor = aten.native_dropout_backward.default(x, mask, scale)
    return result + shift


draw_mask = Operator("draw_mask", _draw_mask, effect=True, draws=True)
masked = Operator("masked", _masked)
masked_alpha = Operator("masked_alpha", _masked_alpha)


@register("pointwise", masked, masked_alpha)
def masked_rule(scope: Scope) -> RowRule | None:
    """``masked(input, mask, scale)``: pointwise; the mask is cut to the tile."""
    return pointwise(scope)


def _expand(builder: Builder, node: Node, feature: bool, alpha: bool) -> bool:
    x, probability, training = node.args[:3]
    if not training or probability in (0, 1):
        return False
    value = builder.values[x.index]
    shape = (*value.shape[:2], *([1] * (len(value.shape) - 2))) if feature else value.shape
    strides = dense_strides(shape, None if feature else value.strides)
    mask = builder.value(f"{node.name}_mask", tuple(shape), torch.bool, value.device)
    args: tuple[Any, ...] = (list(shape), list(strides), 1 - probability, value.device)
    builder.emit(node, draw_mask, args, (mask.index,), "mask")
    args = (x, mask, 1 / (1 - probability))
    if alpha:
        scale = 1 / math.sqrt((_ALPHA * _ALPHA * probability + 1) * (1 - probability))
        args = (x, mask, scale, probability)
    builder.emit(node, masked_alpha if alpha else masked, args, node.outputs, "apply")
    return True


@expands(aten.dropout.default)
def expand_dropout(builder: Builder, node: Node) -> bool:
    """``dropout(input, p, train)``."""
    return _expand(builder, node, False, False)


@expands(aten.feature_dropout.default)
def expand_feature_dropout(builder: Builder, node: Node) -> bool:
    """``feature_dropout(input, p, train)``: whole channels (``Dropout2d``)."""
    return _expand(builder, node, True, False)


@expands(aten.alpha_dropout.default)
def expand_alpha_dropout(builder: Builder, node: Node) -> bool:
    """``alpha_dropout(input, p, train)``."""
    return _expand(builder, node, False, True)


@expands(aten.feature_alpha_dropout.default)
def expand_feature_alpha_dropout(builder: Builder, node: Node) -> bool:
    """``feature_alpha_dropout(input, p, train)``."""
    return _expand(builder, node, True, True)


@register("pointwise", aten.dropout.default, aten.feature_dropout.default)
@register("pointwise", aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def inactive(scope: Scope) -> RowRule | None:
    """Dropout in eval mode, or with probability 0 or 1 (active dropout has been expanded)."""
    if scope.node.args[2] and scope.node.args[1] not in (0, 1):
        return None
    return pointwise(scope)
