"""Tensors without data ("fake tensors"): they have shapes, dtypes and devices, and operations on them compute nothing.

PyTorch has no public name for them, and what they are differs between its versions: a class of their own, or plain
tensors with a mark. This file is the only one that knows; the others ask it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, maybe_get_fake_mode, unset_fake_temporarily
from torch._subclasses.fake_tensor import is_fake as _is_fake
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "FakeTensorMode",
    "current_mode",
    "innermost_mode",
    "is_fake",
    "mode_of",
    "names_of_fakes",
    "new_mode",
    "with_data",
]

with_data = unset_fake_temporarily
"""A context in which tensors have data, whatever modes for tensors without data are in force outside."""


def is_fake(tensor: object) -> bool:
    """Whether something is a tensor without data, or a tensor made of such tensors."""
    return _is_fake(tensor)


def mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The mode under which a tensor without data was made; ``None`` for one that has data."""
    return maybe_get_fake_mode(tensor)


@cache
def names_of_fakes() -> frozenset[str]:
    """The attributes that tensors without data have for PyTorch's own use."""
    with with_data():
        fake = new_mode().from_tensor(torch.empty(1))
    annotated = (name for kind in type(fake).__mro__ for name in getattr(kind, "__annotations__", ()))
    return frozenset((*vars(fake), *annotated))


def new_mode() -> FakeTensorMode:
    """A context under which operations make tensors without data, also of tensors that have some."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def current_mode() -> FakeTensorMode | None:
    """The mode that is in force, or that of the trace which is going on; ``None`` where tensors have data.

    Tensors of several modes do not go together, so what is computed for a run must use its mode.
    """
    return detect_fake_mode()


def innermost_mode() -> FakeTensorMode | None:
    """The mode that was entered last and not left, where several may be nested."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]
    return modes[-1] if modes else None
