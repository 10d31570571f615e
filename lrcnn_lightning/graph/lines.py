"""Some lines of a tensor, whose gradient keeps the tensor's memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["in_zeros", "lines"]


def lines(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    """``tensor.narrow(axis, start, length)``.

    Its gradient comes in zeros of the tensor's size, and those that ATen makes are contiguous. Where the tensor is in
    another format (channels last), all gradients behind it would be converted, by cuDNN in every call.
    """
    if length == tensor.shape[axis]:
        return tensor
    if not tensor.requires_grad or not torch.is_grad_enabled() or tensor.is_contiguous():
        return tensor.narrow(axis, start, length)
    result: Tensor = _Lines.apply(tensor, axis, start, length)  # type: ignore[no-untyped-call]
    return result


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
        ctx.place = axis, start, tensor.shape[axis]
        return tensor.narrow(axis, start, length)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return in_zeros(gradient, *ctx.place), None, None, None


def in_zeros(gradient: Tensor, axis: int, start: int, total: int) -> Tensor:
    """The gradient of a tensor of ``total`` lines, of which those from ``start`` on have one."""
    behind = total - start - gradient.shape[axis]
    margins = [*([0, 0] * (gradient.dim() - 1 - axis)), start, behind]  # those of the last dimension come first
    return torch.constant_pad_nd(gradient, margins)
