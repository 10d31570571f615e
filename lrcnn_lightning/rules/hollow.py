"""Operations whose forward result is never read: only their gradient is wanted.

Where the convolution that ends a stage is differentiated, the gradient of its output is known and its output is not
needed: the gradient of a convolution does not depend on its result.  A hollow convolution saves its operands, returns
a stand-in of the right shape that occupies one element, and differentiates by ``convolution_backward``.  So the stage's
last and often dearest operation is not recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["hollow_convolution", "hollow_linear"]


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix operation runs here, given the ambient autocast."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class _HollowConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slab: Tensor, weight: Tensor, bias: Tensor | None, shape: list[int], call: Any) -> Tensor:
        ctx.save_for_backward(slab, weight)
        ctx.call, ctx.bias_sizes = call, None if bias is None else list(bias.shape)
        return slab.new_empty((1,)).expand(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        slab, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        results = torch.ops.aten.convolution_backward.default(gradient, slab, weight, ctx.bias_sizes, *ctx.call, mask)
        return (*results, None, None)


def hollow_convolution(
    slab: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A stand-in for ``convolution(...)`` (``N C *`` input) with its gradient and without its values."""
    dtype = _autocast_dtype(slab)
    slab, weight = slab.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    kernel = weight.shape[2:]
    spatial = []
    for i, size in enumerate(slab.shape[2:]):
        span = dilation[i] * (kernel[i] - 1)
        if transposed:
            spatial.append((size - 1) * stride[i] - 2 * padding[i] + span + output_padding[i] + 1)
        else:
            spatial.append((size + 2 * padding[i] - span - 1) // stride[i] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    shape = [slab.shape[0], channels, *spatial]
    call = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    result: Tensor = _HollowConvolution.apply(slab, weight, bias, shape, call)  # type: ignore[no-untyped-call]
    return result


class _HollowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slab: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(slab, weight)
        ctx.has_bias = bias is not None
        return slab.new_empty((1,)).expand([*slab.shape[:-1], weight.shape[0]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        slab, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        slab_gradient = (gradient @ weight) if ctx.needs_input_grad[0] else None
        weight_gradient = (flat.t() @ slab.reshape(-1, slab.shape[-1])) if ctx.needs_input_grad[1] else None
        bias_gradient = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return slab_gradient, weight_gradient, bias_gradient


def hollow_linear(slab: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A stand-in for ``linear(slab, weight, bias)`` (``* C`` input) with its gradient and without its values."""
    dtype = _autocast_dtype(slab)
    bias = None if bias is None else bias.to(dtype)
    result: Tensor = _HollowLinear.apply(slab.to(dtype), weight.to(dtype), bias)  # type: ignore[no-untyped-call]
    return result
