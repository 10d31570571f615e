"""Tensors without data: which are, in every version of PyTorch."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["is_fake"]


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor that has a shape and no data."""
    return isinstance(value, FakeTensor)
