"""The Python state of a module: attributes, what is in its containers, and random numbers unknown to PyTorch.

A trace runs the module's code, and afterwards all of that has to be as it was.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from typing import Any

from torch import nn

__all__ = [
    "MISSING",
    "TABLES",
    "PythonState",
    "is_array",
    "is_machinery",
    "random_states",
    "same_items",
    "set_random_states",
]

MISSING = object()
"""Stands for an attribute that is not there."""
_MACHINERY = frozenset(vars(nn.Module())) - {"training"} | {"forward", "_compiled_call_impl", "call_super_init"}
_CONTAINERS = (list, dict, set, bytearray, deque)
TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps what is registered."""
_UNSAVED = "_non_persistent_buffers_set"


def is_machinery(name: str) -> bool:
    """Whether PyTorch itself works by an attribute of that name."""
    return name in _MACHINERY or name.startswith("_tensor_constant")


def is_array(value: object) -> bool:
    """Whether something is an array of NumPy's."""
    return "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray)


class PythonState:
    """A snapshot, and with ``with`` a promise to go back to it."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = {child: dict(vars(child)) for child in module.modules()}
        self.contents = {
            (child, name): copy.copy(value)
            for child, table in self.attributes.items()
            for name, value in table.items()
            if (isinstance(value, _CONTAINERS) or is_array(value)) and not is_machinery(name)
        }
        """What was in the containers among the attributes."""
        self.tables = {child: {name: dict(vars(child)[name]) for name in TABLES} for child in self.attributes}
        """The parameters, buffers and submodules of each module."""
        self._unsaved = {child: set(vars(child)[_UNSAVED]) for child in self.attributes}
        self._random = random_states()

    def drawn(self) -> list[str]:
        """The generators from which numbers have been drawn since."""
        return [name for name, state in random_states().items() if state != self._random.get(name)]

    def __enter__(self) -> PythonState:
        return self

    def __exit__(self, *error: object) -> None:
        for child, table in self.attributes.items():
            for name in [name for name in vars(child) if name not in table]:
                del vars(child)[name]
            vars(child).update(table)
        for (child, name), content in self.contents.items():
            _refill(self.attributes[child][name], content)
        for child, tables in self.tables.items():
            for name, content in tables.items():
                _refill(vars(child)[name], content)
            _refill(vars(child)[_UNSAVED], self._unsaved[child])
        set_random_states(self._random)


def same_items(present: Any, content: Any) -> bool:
    """Whether a container has the items that it had."""
    if is_array(present):
        return bool(present.dtype == content.dtype and present.tobytes() == content.tobytes())
    if len(present) != len(content):
        return False
    if isinstance(present, dict):
        return all(key in present and present[key] is value for key, value in content.items())
    if isinstance(present, (list, deque)):
        return all(a is b for a, b in zip(present, content, strict=True))
    return bool(present == content)


def _refill(container: Any, content: Any) -> None:
    if same_items(container, content):
        return
    if is_array(container):
        container[...] = content
        return
    container.clear()
    if isinstance(container, (list, deque, bytearray)):
        container.extend(content)
    else:
        container.update(content)


def random_states() -> dict[str, Any]:
    """The states of the generators that PyTorch does not know."""
    states: dict[str, Any] = {"Python's random": random.getstate()}
    if "numpy" in sys.modules:
        kind, key, *rest = sys.modules["numpy"].random.get_state()
        states["NumPy"] = kind, key.tobytes(), *rest
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Go back to `random_states` of before."""
    present = random_states()
    if present["Python's random"] != states["Python's random"]:
        random.setstate(states["Python's random"])
    if "NumPy" in states and present["NumPy"] != states["NumPy"]:
        numpy = sys.modules["numpy"]
        kind, key, *rest = states["NumPy"]
        numpy.random.set_state((kind, numpy.frombuffer(key, dtype="uint32"), *rest))
