"""A tap: where a gradient leaves autograd for the place where it is summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["tapped"]


class _Tap(torch.autograd.Function):
    """The identity, where a gradient leaves autograd for the place where it is summed.

    Collected by ``autograd.grad`` instead, the weight gradients of all layers of a row would exist at once.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, origin: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        # A view by shape may give other strides to dimensions of size 1, by which memory formats are told apart.
        same: Tensor = torch.ops.aten.alias.default(tensor)
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.receive(gradient)
        return None, None, None


def tapped(tensor: Tensor, origin: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """The tensor, whose gradient ``receive`` is given; ``origin`` is what ``autograd.grad`` asks for, and needs one."""
    result: Tensor = _Tap.apply(tensor, origin, receive)  # type: ignore[no-untyped-call]
    return result
