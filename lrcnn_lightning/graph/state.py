"""The Python state of a module: attributes, what is inside of them, and random numbers unknown to PyTorch.

A trace runs the module's code, and afterwards all of that has to be as it was.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = [
    "MISSING",
    "MOST",
    "PLAIN",
    "TABLES",
    "Holder",
    "PythonState",
    "contents_of",
    "fields_of",
    "holders_in",
    "is_array",
    "is_iterator",
    "is_machinery",
    "is_of_others",
    "random_states",
    "same_items",
    "set_random_states",
]

MISSING = object()
"""Stands for an attribute that is not there."""
MOST = 1000
"""Things inside of one attribute that are looked at; more is a log, an archive, or the rest of the program."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Types whose values are compared by themselves."""
TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps what is registered."""
_MACHINERY = frozenset(vars(nn.Module())) - {"training"} | {"forward", "_compiled_call_impl", "call_super_init"}
_UNSAVED = "_non_persistent_buffers_set"
_CLOSED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, partial, tuple, frozenset, torch.Tensor)
_OTHERS = frozenset({"torch", "lightning", "pytorch_lightning", "lrcnn_lightning", "logging", "threading", "_thread"})
"""Packages whose objects go on living beside a module that refers to them: a trainer, a logger, a lock."""


def is_machinery(name: str) -> bool:
    """Whether PyTorch itself works by an attribute of that name."""
    return name in _MACHINERY or name.startswith("_tensor_constant")


def is_array(value: object) -> bool:
    """Whether something is an array of NumPy's."""
    return "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray)


def is_iterator(value: object) -> bool:
    """Whether something goes on with each use and cannot be put back: an iterator, a file."""
    return hasattr(type(value), "__next__")


# ------------------------------------------------------------------------------------------- what can be changed


def is_of_others(value: object) -> bool:
    """Whether something belongs to PyTorch, Lightning or this package, and is no module, nor derived by the user."""
    return not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] in _OTHERS


def fields_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an ordinary object, those in slots among them; None for what is no such object.

    What a `functools.cached_property` remembers is none of them.
    """
    kind = type(value)
    if isinstance(value, (*_CLOSED, *PLAIN)):
        return None
    slots = [name for each in kind.__mro__ for name in _slots(each)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    fields = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    for name, item in getattr(value, "__dict__", {}).items():
        if not isinstance(getattr(kind, name, None), cached_property):
            fields[name] = item
    return {name: item for name, item in fields.items() if not (isinstance(value, nn.Module) and is_machinery(name))}


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _set_fields(value: Any, fields: dict[str, Any]) -> None:
    present = fields_of(value) or {}
    for name in present.keys() - fields.keys():
        object.__delattr__(value, name)
    for name, item in fields.items():
        if present.get(name, MISSING) is not item:
            object.__setattr__(value, name, item)


def _refill(container: Any, content: Iterable[Any]) -> None:
    container.clear()
    getattr(container, "extend" if isinstance(container, (list, deque, bytearray)) else "update")(content)


def _set_array(array: Any, content: Any) -> None:
    array[...] = content


def _of_numpy(name: str) -> Callable[[object], bool]:
    return lambda value: "numpy" in sys.modules and isinstance(value, getattr(sys.modules["numpy"].random, name))


def contents_of(cell: CellType) -> list[Any]:
    """What is in a variable of a function's surroundings: one thing, or nothing yet."""
    try:
        return [cell.cell_contents]
    except ValueError:  # nothing is in it yet
        return []


class _Kind(NamedTuple):
    """A kind of thing that can be changed: how to tell it, to read what is in it, and to put that back."""

    holds: Callable[[Any], bool]
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


def _type(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_KINDS = (
    _Kind(_type(list, deque), list, _refill),
    _Kind(_type(dict), dict, _refill),
    _Kind(_type(set), set, _refill),
    _Kind(_type(bytearray), bytes, _refill),
    _Kind(is_array, lambda array: array.copy(), _set_array),
    _Kind(_type(CellType), contents_of, lambda cell, content: setattr(cell, "cell_contents", *content)),
    _Kind(_type(random.Random), random.Random.getstate, random.Random.setstate),
    _Kind(
        _of_numpy("Generator"),
        lambda rng: pickle.dumps(rng.bit_generator.state),
        lambda rng, content: setattr(rng.bit_generator, "state", pickle.loads(content)),
    ),
    _Kind(
        _of_numpy("RandomState"),
        lambda rng: pickle.dumps(rng.get_state(legacy=False)),
        lambda rng, content: rng.set_state(pickle.loads(content)),
    ),
    _Kind(lambda value: not is_of_others(value) and fields_of(value) is not None, fields_of, _set_fields),
)
"""The first that fits is it; containers come first."""
_ITERATOR = _Kind(is_iterator, lambda _: None, lambda _, __: None)


class Holder:
    """Something that can be changed, and what was in it: a container, an array, an object, the variables of a file.

    ``where`` says what it belongs to, for messages.
    """

    def __init__(self, value: Any, kind: _Kind, where: str = "") -> None:
        self.value, self._kind, self.where = value, kind, where
        self.content = kind.read(value)

    @property
    def name(self) -> str:
        """What it is, and where."""
        if self._kind is _VARIABLES:
            return f"a number {self.where}"
        return f"the {type(self.value).__name__} {self.where}"

    @property
    def is_for_good(self) -> bool:
        """Whether what is done to it cannot be undone."""
        return self._kind is _ITERATOR

    @property
    def present(self) -> Any:
        """What is in it now, in the form of ``content``."""
        return self._kind.read(self.value)

    def put_back(self) -> None:
        """Put what was in it there again."""
        if not same_items(self.present, self.content):
            self._kind.write(self.value, self.content)


def holders_in(value: Any, known: set[int], where: str = "") -> Iterator[Holder]:
    """What can be changed inside of a value, the nearest first; not what is ``known`` by its id, and at most `MOST`."""
    queue, count, outermost = deque([value]), 0, value
    while queue and count < MOST:
        value = queue.popleft()
        count += 1
        if isinstance(value, PLAIN) or id(value) in known:
            continue
        kind = next((kind for kind in _KINDS if kind.holds(value)), None)
        inside: Iterable[Any] = ()
        if kind is not None:
            known.add(id(value))
            holder = Holder(value, kind, where if value is outermost else f"inside of {where}")
            yield holder
            content = holder.content
            inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(value, partial):
            inside = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            inside = (value.__self__, value.__func__)
        elif isinstance(value, FunctionType):
            inside = value.__closure__ or ()
        elif is_iterator(value):
            yield Holder(value, _ITERATOR, where)
        queue.extend(inside)


def _numbers(namespace: Any) -> dict[str, Any]:
    """The variables of a class or a file that are numbers; flags, as of warnings that were given, are left out."""
    return {name: value for name, value in list(vars(namespace).items()) if type(value) in (int, float)}


def _set_numbers(namespace: Any, numbers: dict[str, Any]) -> None:
    for name in _numbers(namespace).keys() - numbers.keys():
        delattr(namespace, name)
    for name, value in numbers.items():
        if vars(namespace).get(name, MISSING) is not value:
            setattr(namespace, name, value)


_VARIABLES = _Kind(_type(type, ModuleType), _numbers, _set_numbers)


def variables_of(module: nn.Module) -> Iterator[Holder]:
    """Numbers and containers among the variables of the classes of a module and its parts, and of their files."""
    classes = {kind: None for child in module.modules() for kind in type(child).__mro__ if _is_own(kind)}
    files = {kind.__module__: sys.modules[kind.__module__] for kind in classes if kind.__module__ in sys.modules}
    places: list[tuple[Any, str]] = [(kind, f"of the class {kind.__name__}") for kind in classes]
    places += [(file, f"of the file {name}") for name, file in files.items()]
    for namespace, where in places:
        yield Holder(namespace, _VARIABLES, where)
        for name, value in list(vars(namespace).items()):
            kind = next((kind for kind in _KINDS[:3] if kind.holds(value)), None)
            if kind is not None and not name.startswith("__"):
                yield Holder(value, kind, f"{name!r} {where}")


def _is_own(kind: type) -> bool:
    return kind is not object and kind.__module__.partition(".")[0] not in _OTHERS


def same_items(present: Any, content: Any) -> bool:
    """Whether there is inside of something what was there."""
    if is_array(present):
        return bool(present.dtype == content.dtype and present.tobytes() == content.tobytes())
    if isinstance(present, dict):
        return present.keys() == content.keys() and all(_same(present[key], item) for key, item in content.items())
    if isinstance(present, list):
        return len(present) == len(content) and all(map(_same, present, content))
    return bool(present == content)


def _same(value: Any, other: Any) -> bool:
    return value is other or (type(value) in PLAIN and type(value) is type(other) and value == other)


# ------------------------------------------------------------------------------------------------------ snapshot


class PythonState:
    """A snapshot, and with ``with`` a promise to go back to it."""

    def __init__(self, module: nn.Module, arguments: Any = ()) -> None:
        self.attributes = {child: dict(vars(child)) for child in module.modules()}
        known = set(map(id, self.attributes))
        self.contents = [
            holder
            for path, child in module.named_modules()
            for name, value in self.attributes[child].items()
            if not is_machinery(name)
            for holder in holders_in(value, known, repr(f"{path}.{name}" if path else name))
        ]
        """What can be changed inside of the attributes."""
        self.arguments = list(holders_in(arguments, known, "its arguments"))
        """What can be changed inside of the arguments."""
        self.variables = list(variables_of(module))
        """What can be changed of the classes of the module and its parts, and of their files."""
        self.tables = {child: {name: dict(vars(child)[name]) for name in TABLES} for child in self.attributes}
        """The parameters, buffers and submodules of each module."""
        self._unsaved = {child: set(vars(child)[_UNSAVED]) for child in self.attributes}
        self._random = random_states()

    @property
    def holders(self) -> list[Holder]:
        """All that can be changed."""
        return [*self.contents, *self.arguments, *self.variables]

    @property
    def for_good(self) -> Holder | None:
        """The first that cannot be put back, if there is one."""
        return next((holder for holder in self.holders if holder.is_for_good), None)

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
        for holder in self.holders:
            holder.put_back()
        for child, tables in self.tables.items():
            for name, content in (*tables.items(), (_UNSAVED, self._unsaved[child])):
                if not same_items(vars(child)[name], content):
                    _refill(vars(child)[name], content)
        set_random_states(self._random)


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
