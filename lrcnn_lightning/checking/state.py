"""What a module holds, by name: parameters, buffers, and whatever is in its attributes.

What is registered has its registered name alone: a parameter that also stands in a list is found under its own name.
Containers and objects are looked into, to tensors, arrays and plain Python values; functions are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path

from lrcnn_lightning.checking.comparison import Key
from lrcnn_lightning.graph.state import MOST, PLAIN, is_machinery

__all__ = ["held", "held_tensors", "named_leaves"]

_ARRAYS = tuple(map(numpy.dtype, ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64")))
_CLOSED = (type, ModuleType, FunctionType, torch.Generator, torch.dtype, torch.device)


def held(module: nn.Module) -> Iterator[tuple[Key, Any]]:
    """Every parameter, buffer and attribute of a module and of its parts.

    Parameters of lazy layers are there once they have a shape.
    """
    return _Walk().through(module)


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that is held, each once."""
    return iter({id(value): value for _, value in held(module) if isinstance(value, Tensor)}.values())


class _Walk:
    """A walk through modules and their attributes. What is known by id has a name, or is being walked through."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.count = 0

    def through(self, module: nn.Module, prefix: str = "") -> Iterator[tuple[Key, Any]]:
        registered: list[tuple[Key, Tensor]] = [(("parameter", name), p) for name, p in module.named_parameters()]
        registered += [(("buffer", name), buffer) for name, buffer in module.named_buffers()]
        for (kind, name), tensor in registered:
            if id(tensor) not in self.known and not is_lazy(tensor):
                yield (kind, prefix + name), tensor
        children = {name: child for name, child in module.named_modules() if id(child) not in self.known}
        self.known.update(map(id, (*children.values(), *(tensor for _, tensor in registered))))
        for path, child in children.items():
            for name, value in list(vars(child).items()):
                if not is_machinery(name):
                    if not prefix:
                        self.count = 0
                    yield from self._inside(value, f"{prefix}{path}.{name}" if path else prefix + name)

    def _inside(self, value: Any, name: str) -> Iterator[tuple[Key, Any]]:
        self.count += 1
        if isinstance(value, numpy.generic):
            value = value.item()
        if isinstance(value, PLAIN):
            if self.count <= MOST:
                yield ("attribute", name), value
            return
        if id(value) in self.known or self.count > MOST or isinstance(value, _CLOSED):
            return
        if isinstance(value, Tensor):
            if not is_lazy(value):
                yield ("parameter" if isinstance(value, nn.Parameter) else "attribute", name), value
        elif isinstance(value, numpy.ndarray):
            if value.dtype in _ARRAYS:
                shared = value.flags.writeable and min(value.strides, default=0) >= 0
                yield ("attribute", name), torch.from_numpy(value if shared else value.copy())
        elif isinstance(value, nn.Module):  # one that is hidden from its owner, in a list
            yield from self.through(value, f"{name}.")
        else:
            self.known.add(id(value))
            for part, item in _parts(value):
                yield from self._inside(item, f"{name}{part}")
            self.known.discard(id(value))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What is inside of a container or an object, each with how it is reached."""
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"[{key!r}]", item
    elif isinstance(value, (set, frozenset)):
        if all(isinstance(item, PLAIN) for item in value):
            yield "", repr(sorted(value, key=repr))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{field}", getattr(value, field)) for field in value._fields)
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{place}]", item) for place, item in enumerate(value))
    elif isinstance(value, partial):
        yield from ((f".args[{place}]", item) for place, item in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", item) for key, item in value.keywords.items())
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif hasattr(value, "__dict__"):
        yield from ((f".{name}", item) for name, item in list(vars(value).items()))


def named_leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves of nested arguments or results, in the order of `graph.take_apart`: ``output["logits"]``."""
    leaves: list[tuple[str, Any]] = []
    for path, leaf in tree_flatten_with_path(tree)[0]:
        full = name + "".join(map(_step, path))
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                leaves.extend(named_leaves(getattr(leaf, field.name), f"{full}.{field.name}"))
        else:
            leaves.append((full, leaf))
    return leaves


def _step(key: Any) -> str:
    if isinstance(key, SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, MappingKey):
        return f"[{key.key!r}]"
    return f".{key.name}" if isinstance(key, GetAttrKey) else str(key)
