"""Guards: the Python values that a module's code read while it was captured, to be compared before the graph is used.

A graph holds tensor operations only. What the code asked of Python on the way (``self.training``, a stride, the current
epoch, a function kept as an attribute) decided which these are, so a graph serves a call only while all of it is as it
was.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.graph.state import MOST, PLAIN, contents_of, fields_of, is_array, is_iterator, is_of_others

__all__ = ["Alike", "Guard", "Guards", "compared"]

_VALUES = (torch.dtype, torch.device, torch.Size, torch.memory_format, enum.Enum, slice, range)
_MISSING = object()


class Alike(NamedTuple):
    """What is compared of a tensor that each call reads as it is then."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Alike:
        """The metadata of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Guard(NamedTuple):
    """An attribute of a module, and what it was (as `compared`, or `Alike` for a tensor that is read by its name)."""

    module: nn.Module
    name: str
    value: Any

    @property
    def holds(self) -> bool:
        """Whether the attribute is what it was."""
        value = getattr(self.module, self.name, _MISSING)
        if isinstance(self.value, Alike):
            return isinstance(value, torch.Tensor) and Alike.of(value) == self.value
        if type(value) in PLAIN:
            return type(value) is self.value[0] and (value == self.value[1] or value != value)
        try:
            return value is not _MISSING and compared(value) == self.value
        except CaptureError:
            return False


@dataclasses.dataclass(frozen=True)
class Guards:
    """All guards of a graph. ``held`` keeps alive what is compared by identity, so that no other takes its place."""

    attributes: tuple[Guard, ...] = ()
    held: tuple[Any, ...] = ()

    def broken(self) -> Guard | None:
        """The first guard that does not hold, if there is one."""
        return next((guard for guard in self.attributes if not guard.holds), None)


def compared(value: Any, held: list[Any] | None = None) -> Any:
    """What is compared of a Python value: equal for two values that lead to the same graph.

    Numbers and strings by value, containers and objects by what they contain, and functions, modules and tensors by
    identity; these are appended to ``held``. Raises `CaptureError` for an object with too much inside of it.
    """
    return _Comparison([] if held is None else held).of(value)


class _Comparison:
    """Walks a value."""

    def __init__(self, held: list[Any]) -> None:
        self.held, self.count = held, 0
        self.path: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return kind, (value if value == value else repr(value))
        self.count += 1
        if self.count > MOST:
            raise CaptureError("too much is inside of it to be compared at every call")
        if isinstance(value, _VALUES):
            return kind, value
        if id(value) in self.path:
            return "again", self.path[id(value)]
        if isinstance(value, (nn.Module, torch.Tensor, type, ModuleType, logging.Logger)):
            return self._itself(value)
        if is_array(value) and value.size <= MOST:
            return kind, value.dtype.str, value.shape, value.tobytes()
        self.path[id(value)] = len(self.path)
        try:
            return kind, self._inside(value)
        finally:
            del self.path[id(value)]

    def _inside(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return self._all(value)
        if isinstance(value, (set, frozenset)):
            return frozenset(self._all(value))
        if isinstance(value, partial):
            return self._all((value.func, value.args, value.keywords))
        if isinstance(value, MethodType):
            return self._all((value.__func__, value.__self__))
        if isinstance(value, FunctionType):
            return self._itself(value), self._all(value.__closure__ or ())
        if isinstance(value, CellType):
            return self._all(contents_of(value))
        if dataclasses.is_dataclass(value):
            return self._all(getattr(value, field.name) for field in dataclasses.fields(value))
        if is_iterator(value):
            raise CaptureError("an iterator, which goes on with each call")
        fields = None if callable(value) and is_of_others(value) else fields_of(value)
        return self._itself(value) if fields is None else self.of(fields)

    def _all(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self.of(value) for value in values)

    def _itself(self, value: Any) -> tuple[str, int]:
        self.held.append(value)
        return "the same", id(value)
