"""Live tensors: what a module's code reads beside its arguments, and the stand-ins for them in a trace.

A trace runs on stand-ins, which have shapes and no data.  Parameters, buffers, attributes and whatever else the code
reaches are real tensors.  The moment an operation is about to take one, its stand-in takes its place, so that nothing
is computed or changed, and the graph says which tensor it is:

    registered                                       by its qualified name
    an attribute of a module                         by the module's path and the attribute's name
    in a list, a dict, an object, a closure, ...     itself

Whatever it is, each step reads it as it is then, its gradient arrives, and what the code writes to it is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.fake import FakeTensorMode, is_fake
from lrcnn_lightning.graph.graph import ValueKind
from lrcnn_lightning.graph.recorder import unrecorded
from lrcnn_lightning.graph.state import is_machinery

__all__ = ["LiveTensor", "LiveTensors", "stand_in"]

_DEPTH = 4
"""How far containers inside of one another are searched for tensors."""


def stand_in(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with the metadata of ``tensor`` and without data; a leaf of autograd where ``tensor`` is one."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        with mode:
            return mode.from_tensor(tensor, static_shapes=True)
    with mode, torch.enable_grad():
        empty = partial(torch.empty_strided, tensor.shape, tensor.stride(), device=tensor.device)
        fake: Tensor = empty(dtype=dtype or tensor.dtype)
        if tensor.requires_grad and not tensor.is_leaf:
            return fake.copy_(empty(dtype=fake.dtype, requires_grad=True))
        return fake.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class LiveTensor:
    """A tensor that the code has reached.

    ``source`` is its name, or for one that is ``held`` (bound by identity) its key among these. ``owned`` says whether
    it belongs to the module: it is registered, an attribute, or in a container that is one.
    """

    tensor: Tensor
    fake: Tensor
    kind: ValueKind
    source: str
    held: bool
    owned: bool


class LiveTensors:
    """The live tensors of one trace of a module, by identity.

    Args:
        module: Whose code is traced.
        mode: In which stand-ins are made.
        introduce: Makes a new stand-in known to the trace.
    """

    def __init__(self, module: nn.Module, mode: FakeTensorMode, introduce: Callable[[LiveTensor], None]) -> None:
        self._mode, self._introduce = mode, introduce
        self._registered: dict[int, tuple[ValueKind, str]] = {}
        for name, parameter in module.named_parameters():
            self._registered[id(parameter)] = (ValueKind.PARAMETER, name)
        for name, buffer in module.named_buffers():
            self._registered.setdefault(id(buffer), (ValueKind.BUFFER, name))
        self._attributes = _attributes(module, self._registered)
        self._contained = frozenset(map(id, _contained(module)))
        self._owned = frozenset((*self._registered, *self._attributes, *self._contained))
        self._reached: dict[int, LiveTensor] = {}
        self._by_stand_in: dict[int, LiveTensor] = {}

    def __iter__(self) -> Iterator[LiveTensor]:
        return iter(self._reached.values())

    def place(self, tensor: Tensor) -> str | None:
        """The name of an attribute that is this tensor and nothing else is."""
        return self._attributes.get(id(tensor))

    def of_stand_in(self, fake: object) -> LiveTensor | None:
        """The live tensor that something stands in for, if it does."""
        return self._by_stand_in.get(id(fake))

    def original(self, value: Any) -> Any:
        """The live tensor in the place of its stand-in; anything else as it is."""
        live = self.of_stand_in(value)
        return value if live is None else live.tensor

    def replaced(self, tree: Any) -> Any:
        """Nested arguments of an operation with stand-ins in the place of live tensors."""
        if isinstance(tree, Tensor):
            return tree if is_fake(tree) and id(tree) not in self._owned else self._stand_in(tree)
        if type(tree) in (list, tuple):
            return type(tree)(self.replaced(item) for item in tree)
        if type(tree) is dict:
            return {key: self.replaced(item) for key, item in tree.items()}
        return tree

    def forget(self) -> None:
        """Let go of all stand-ins."""
        self._reached.clear()
        self._by_stand_in.clear()

    def _stand_in(self, tensor: Tensor) -> Tensor:
        live = self._reached.get(id(tensor))
        if live is None:
            live = self._reached[id(tensor)] = self._live(tensor)
            self._by_stand_in[id(live.fake)] = live
            self._introduce(live)
        return live.fake

    def _live(self, tensor: Tensor) -> LiveTensor:
        with unrecorded():
            fake = stand_in(tensor, self._mode)
        registered = self._registered.get(id(tensor))
        if registered is not None:
            return LiveTensor(tensor, fake, *registered, held=False, owned=True)
        place = self.place(tensor)
        if place is not None:
            return LiveTensor(tensor, fake, ValueKind.BUFFER, place, held=False, owned=True)
        kind = ValueKind.PARAMETER if tensor.requires_grad and tensor.is_leaf else ValueKind.BUFFER
        return LiveTensor(tensor, fake, kind, f"held {len(self._reached)}", True, id(tensor) in self._contained)


def _attributes(module: nn.Module, registered: Mapping[int, Any]) -> dict[int, str]:
    """The tensors that are one attribute of one submodule, and nothing else, with its name."""
    table = [
        (id(value), f"{path}.{name}" if path else name)
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, Tensor) and not is_machinery(name) and id(value) not in registered
    ]
    count = Counter(key for key, _ in table)
    return {key: name for key, name in table if count[key] == 1}


def _contained(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in the containers and objects among the attributes of submodules."""
    for child in module.modules():
        for name, value in vars(child).items():
            if not is_machinery(name):
                yield from _tensors_in(value, _DEPTH)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (nn.Module, type)):
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = value
        elif isinstance(value, partial):
            items = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            items = (value.__self__,)
        elif getattr(value, "__closure__", None):
            items = [cell.cell_contents for cell in value.__closure__ if _is_filled(cell)]
        elif hasattr(value, "__dict__") and not callable(value):
            items = vars(value).values()
        for item in items:
            yield from _tensors_in(item, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
