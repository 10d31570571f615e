"""Tensors without data ("fake tensors"): they have shapes, dtypes and devices, and operations on them compute nothing.

PyTorch has no public name for them, and what they are differs between its versions: a class of their own, or plain
tensors with a mark. This file is the only one that knows; the others ask it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, maybe_get_fake_mode
from torch._subclasses.fake_tensor import is_fake as _is_fake
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

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


@contextlib.contextmanager
def with_data() -> Iterator[None]:
    """A context in which tensors have data and are not traced, whatever modes are in force outside."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


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


class OnlyFakes(TorchFunctionMode):
    """Whatever takes a tensor with data is given one without data in its place, for the same one always the same.

    A module's registered tensors can be exchanged before it runs; those that it has in lists, objects or closures are
    seen only here. Where one without data is among the operands nothing would be computed anyway, but ``mul_(0.9)`` of
    such a tensor alone would be done, and a parameter would be given a gradient without data.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            if is_fake(tensor):
                return tensor
            if id(tensor) not in self._fakes:
                with _disable_current_modes(), torch.inference_mode(False):
                    fake: Tensor = self._mode.from_tensor(tensor.detach(), static_shapes=True)
                    self._fakes[id(tensor)] = tensor, fake.requires_grad_(tensor.requires_grad)
            return self._fakes[id(tensor)][1]
