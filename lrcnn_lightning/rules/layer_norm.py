"""Layer and RMS normalisation over space (``LayerNorm([C, H, W])``, ``LayerNorm([H, W])``), rewritten.

    layer_norm(x)  ->  moments(x), one group or one a channel     a reduction over rows
                       normalise(x, mean, variance)               pointwise
                       * weight + bias, as high as the map        pointwise

Over channels alone, the form of ConvNeXt and transformers, they are pointwise along rows as they stand (`pointwise`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node, Ref
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.moments import moments
from lrcnn_lightning.rules.normalisation import emit_normalise
from lrcnn_lightning.rules.pointwise import pointwise
from lrcnn_lightning.rules.rule import Operator, RowRule, Scope, register

__all__ = ["expand_layer_norm", "expand_rms_norm"]

aten = torch.ops.aten


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).to(x.dtype)


def _shifted(x: Tensor, offset: Tensor) -> Tensor:
    return (x + offset).to(x.dtype)


scaled, shifted = Operator("scaled", _scaled), Operator("shifted", _shifted)
"""Products and sums in the dtype of the map, as in ATen's normalisations: under autocast weights have a wider one."""


@register("pointwise", scaled, shifted)
def affine_rule(scope: Scope) -> RowRule | None:
    """``scaled(input, factor)`` and ``shifted(input, offset)``."""
    return pointwise(scope)


def _over_space(builder: Builder, node: Node) -> int | None:
    """How many of the last dimensions of a map are normalised, if the row axis is among them."""
    rank, last, row = len(builder.values[node.args[0].index].shape), len(node.args[1]), builder.row(node.args[0])
    return last if row is not None and row >= rank - last and last in (rank - 1, rank - 2) else None


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _affine(builder: Builder, node: Node, x: Ref, steps: list[tuple[Any, Any]]) -> None:
    """Emit a chain of pointwise operations that ends in the node's output; ``steps``: operation, second operand."""
    value = builder.values[node.outputs[0]]
    for number, (operation, operand) in enumerate(steps):
        last = number == len(steps) - 1
        result = Ref(node.outputs[0]) if last else builder.like(node, value, f"affine{number}")
        builder.emit(node, operation, (x, operand), (result.index,), f"affine{number}")
        x = result


@expands(aten.layer_norm.default)
def expand_layer_norm(builder: Builder, node: Node) -> bool:
    """``layer_norm(input, normalized_shape, weight, bias, eps)`` over all but the batch, or over each channel."""
    last = _over_space(builder, node)
    if last is None:
        return False
    x = node.args[0]
    value, out = builder.values[x.index], builder.values[node.outputs[0]]
    weight, bias = _argument(node, 2, "weight"), _argument(node, 3, "bias")
    groups = 1 if last == len(value.shape) - 1 else value.shape[1]
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    statistics = [
        builder.value(f"{node.name}_{part}", (value.shape[0], groups), dtype, value.device)
        for part in ("mean", "variance")
    ]
    builder.emit(node, moments, (x, groups), tuple(s.index for s in statistics), "moments")
    steps = [(op, operand) for op, operand in ((scaled, weight), (shifted, bias)) if operand is not None]
    normalised = builder.like(node, out, "normalised") if steps else Ref(node.outputs[0])
    eps = _argument(node, 4, "eps", 1e-5)
    emit_normalise(builder, node, x, statistics, (None, None), eps, normalised.index, node.op)
    _affine(builder, node, normalised, steps)
    return True


@expands(aten.rms_norm.default)
def expand_rms_norm(builder: Builder, node: Node) -> bool:
    """``rms_norm(input, normalized_shape, weight, eps)``; in half precision it runs whole."""
    last = _over_space(builder, node)
    value = builder.values[node.args[0].index]
    if last is None or value.dtype not in (torch.float32, torch.float64):
        return False
    weight, eps = _argument(node, 2, "weight"), _argument(node, 3, "eps")
    rank = len(value.shape)
    dims = list(range(rank - last, rank))
    shape = tuple(1 if d in dims else size for d, size in enumerate(value.shape))
    square = builder.like(node, value, "square")
    parts = [builder.like(node, value, part, shape) for part in ("mean", "stable", "scale")]
    mean, stable, scale = parts
    builder.emit(node, aten.mul.Tensor, (node.args[0], node.args[0]), (square.index,), "square")
    builder.emit(node, aten.mean.dim, (square, dims, True), (mean.index,), "mean")
    smallest = torch.finfo(value.dtype).eps if eps is None else eps
    builder.emit(node, aten.add.Scalar, (mean, smallest), (stable.index,), "stable")
    builder.emit(node, aten.rsqrt.default, (stable,), (scale.index,), "rsqrt")
    steps = [(scaled, scale)] + ([] if weight is None else [(scaled, weight)])
    _affine(builder, node, node.args[0], steps)
    return True
