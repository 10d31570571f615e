"""Formulas of operations on single elements, of layer normalisation and of permutations, which leave rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.rules.formula import Formula, Saved
from lrcnn_lightning.rules.precision import as_read_by

__all__ = ["formula_along_rows", "pointwise_formula"]

aten = torch.ops.aten

_Backward = Callable[..., Tensor]
"""Takes the gradient, what is saved, and the other arguments of the operation."""


def _argument(args: Sequence[Any], position: int, default: Any) -> Any:
    return args[position] if len(args) > position else default


_FROM_RESULT: dict[Any, _Backward] = {
    aten.relu.default: lambda gradient, result: aten.threshold_backward.default(gradient, result, 0),
    aten.sigmoid.default: aten.sigmoid_backward.default,
    aten.tanh.default: aten.tanh_backward.default,
}

_FROM_INPUT: dict[Any, _Backward] = {
    aten.silu.default: aten.silu_backward.default,
    aten.mish.default: aten.mish_backward.default,
    aten.hardswish.default: aten.hardswish_backward.default,
    aten.hardsigmoid.default: aten.hardsigmoid_backward.default,
    aten.gelu.default: aten.gelu_backward.default,
    aten.relu6.default: lambda gradient, x: aten.hardtanh_backward.default(gradient, x, 0, 6),
    aten.hardtanh.default: lambda gradient, x, low=-1, high=1: aten.hardtanh_backward.default(gradient, x, low, high),
    aten.leaky_relu.default: lambda gradient, x, slope=0.01: aten.leaky_relu_backward.default(
        gradient, x, slope, False
    ),
    aten.elu.default: lambda gradient, x, alpha=1, scale=1, input_scale=1: aten.elu_backward.default(
        gradient, alpha, scale, input_scale, False, x
    ),
    aten.softplus.default: lambda gradient, x, beta=1, threshold=20: aten.softplus_backward.default(
        gradient, x, beta, threshold
    ),
}


def pointwise_formula(operation: Any, wanted: Sequence[Any]) -> Formula | None:
    """That of an operation on maps of one shape, if there is one; ``wanted``: of which the gradient is."""
    if operation in _FROM_RESULT:
        return _Activation(operation, _FROM_RESULT[operation], True)
    if operation in _FROM_INPUT:
        return _Activation(operation, _FROM_INPUT[operation], False)
    if operation is aten.add.Tensor:
        return _Sum(tuple(map(bool, wanted)))
    if operation is aten.mul.Tensor:
        return _Product(tuple(map(bool, wanted)))
    return None


def formula_along_rows(operation: Any, wanted: Sequence[Any]) -> Formula | None:
    """That of an operation that treats every row alike, if there is one."""
    if operation is aten.permute.default:
        return _Permutation()
    if operation is aten.layer_norm.default:
        flags = [*map(bool, wanted), False, False, False]
        return _LayerNorm(flags[0], flags[2], flags[3])
    return None


@dataclass(frozen=True)
class _Activation(Formula):
    """From its result, or from its input."""

    operation: Any
    back: _Backward
    from_result: bool

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return bool(args[0].is_floating_point()) and as_read_by(self.operation, args[0]) is args[0]

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        result = self.operation(*args, **kwargs)
        return result, (result if self.from_result else args[0], tuple(args[1:]), dict(kwargs))

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        tensor, others, options = saved
        return (self.back(gradients.pop(), tensor, *others, **options),)


@dataclass(frozen=True)
class _OfTwo(Formula):
    """Of two maps of one shape and dtype."""

    wanted: tuple[bool, ...]

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        if kwargs or len(args) != 2 or not all(isinstance(operand, Tensor) for operand in args):
            return False
        first, second = args
        same = first.shape == second.shape and first.dtype == second.dtype
        return bool(same and not first.is_complex())


class _Sum(_OfTwo):
    """Its gradient as it is."""

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        return aten.add.Tensor(*args), ()

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        return [gradients[0] if wanted else None for wanted in self.wanted]


class _Product(_OfTwo):
    """Its gradient times the other one."""

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        kept = [other if wanted else None for wanted, other in zip(self.wanted, reversed(args), strict=True)]
        return aten.mul.Tensor(*args), tuple(kept)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        gradient = gradients.pop()
        assert gradient is not None
        return [None if other is None else gradient * other for other in saved]


class _Permutation(Formula):
    """The gradient with its dimensions where they were."""

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        rank = args[0].dim()
        order = [dimension % rank for dimension in args[1]]
        return args[0].permute(order), tuple(order)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        gradient = gradients.pop()
        assert gradient is not None
        return (gradient.permute(sorted(range(len(saved)), key=saved.__getitem__)),)


@dataclass(frozen=True)
class _LayerNorm(Formula):
    """By the kernel of ATen, from mean and deviation of each line."""

    wants_x: bool
    wants_weight: bool
    wants_bias: bool

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return not kwargs and as_read_by(aten.layer_norm.default, args[0]) is args[0]

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        x, shape = args[:2]
        weight, bias, eps = (_argument(args, 2, None), _argument(args, 3, None), _argument(args, 4, 1e-5))
        result, mean, deviation = aten.native_layer_norm.default(x, shape, weight, bias, eps)
        return result, (x, shape, mean, deviation, weight, bias)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        mask = [self.wants_x, self.wants_weight, self.wants_bias]
        for_x, *others = aten.native_layer_norm_backward.default(gradients.pop(), *saved, mask)
        return for_x, None, *others
