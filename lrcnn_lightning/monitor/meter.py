"""The memory meter: which storages are live after each operation, and how many bytes they have."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils.hooks import RemovableHandle

from lrcnn_lightning.config import format_size
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.fake import innermost_mode, is_fake, mode_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["MemoryMeter", "StepMemory"]


@dataclass(frozen=True)
class StepMemory:
    """The activation memory of one step.

    Attributes:
        peak_bytes: Highest number of live bytes at any time of the step.
        end_bytes: Bytes still live when the step was over; anything but 0 was left behind or is held by the caller.
        timeline: Live bytes after each operation, in the order of their execution, if recorded, else empty.
        operations: Name of each operation of ``timeline``, such as ``"aten.convolution.default"``.
        backward_start: Operations of ``timeline`` that ran before the backward pass began; 0 where that is not known.
    """

    peak_bytes: int
    end_bytes: int
    timeline: tuple[int, ...] = ()
    operations: tuple[str, ...] = ()
    backward_start: int = 0

    def __str__(self) -> str:
        return f"activation memory: peak {format_size(self.peak_bytes)}, at the end {format_size(self.end_bytes)}"


@dataclass
class _Live:
    """A storage that is being counted; ``reference`` calls back when it is released."""

    serial: int
    nbytes: int
    reference: weakref.ref[torch.UntypedStorage] | None


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts the bytes of every storage born in an operation while it is active.

    Storages that existed before (parameters, buffers, inputs) are never counted, nor are views of them.  A storage
    counts from the operation that returns it until its last tensor, saved-tensor or Python reference is gone.  Nothing
    an operation allocates and frees inside is seen.

    Under ``FakeTensorMode`` (entered before the meter) fake tensors are counted, by the bytes that they stand for.
    Otherwise fake and meta tensors, which hold no memory, are not; and nothing is counted while ``torch.export`` or
    ``torch.compile`` traces.

    While it is active, backward passes run in the calling thread, so that the order of events is the same in each run.

    Args:
        module: Module (or its parameters) whose gradients are not counted: a storage that is ever found as the
            ``.grad`` of a parameter is left out over its whole life.  Parameters and buffers that are replaced inside
            the meter are left out, too.
        exclude: Further tensors that existed before, and that an operation may return without having been given.
        record: Also keep ``timeline`` and ``operations``; costs an int and a name for each operation.
        rounded: The bytes that count for a storage of so many.
        passing: The bytes that an operation, called with these arguments, takes for itself beside its results, which a
            meter does not see.

    After the meter has been left, its figures stay as they were at that moment.  It may be entered again, which starts
    from nothing.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        module: nn.Module | Iterable[Tensor] | None = None,
        *,
        exclude: Iterable[Tensor] = (),
        record: bool = False,
        rounded: Callable[[int], int] | None = None,
        passing: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module if isinstance(module, nn.Module) else None
        self._tensors = () if module is None or isinstance(module, nn.Module) else tuple(module)
        self._foreign = tuple(exclude)
        self._record = record
        self._rounded, self._passing = rounded, passing
        self._active = False
        self._forget()

    def _forget(self) -> None:
        self._live: dict[int, _Live] = {}  # by address, which is free again once the storage is released
        self._events: list[tuple[int, int]] = []  # (serial of the storage, bytes gained or lost), in order
        self._excluded: set[int] = set()  # serials
        self._marks: list[int] = []  # number of events after each operation
        self._operations: list[str] = []
        self._serial = 0
        self.sizes_born: set[int] = set()
        """Of the storages that were born, in elements of the tensors that they were born with."""

    # Entering and leaving

    def __enter__(self) -> Self:
        if self._active:
            raise ConfigError("this memory meter is active already; make another one to nest them")
        self._forget()
        self._fake_mode = innermost_mode()
        self._foreign_keys = {storage._cdata for storage in _storages(self._foreign)}
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._exclude_gradient)  # type: ignore[no-untyped-call]
            for parameter in self._parameters()
            if parameter.requires_grad and parameter.is_leaf
        ]
        self._threading = torch.autograd.set_multithreading_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        # The first operation under any mode makes torch import a good deal of itself, and errors that are caught
        # meanwhile keep the frames of their callers, with all tensors in them, until the next garbage collection.
        torch.empty(0)
        self._forget()
        self._active = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        self._settle()
        self._active = False
        self._threading.__exit__(exc_type, exc_value, traceback)
        for hook in self._hooks:
            hook.remove()
        for live in self._live.values():
            live.reference = None

    # Figures

    @property
    def live_bytes(self) -> int:
        """Bytes live now, without the gradients known so far."""
        self._settle()
        return sum(live.nbytes for live in self._live.values() if live.serial not in self._excluded)

    @property
    def peak_bytes(self) -> int:
        """Most bytes live at any time since the meter was entered, or since :meth:`reset_peak`."""
        self._settle()
        return max(self._history(), default=0)

    @property
    def timeline(self) -> list[int]:
        """Live bytes after each operation; empty unless the meter was made with ``record=True``."""
        self._settle()
        history = [0, *self._history()]
        return [history[mark] for mark in self._marks]

    @property
    def operations(self) -> list[str]:
        """Name of each operation of :attr:`timeline`."""
        return list(self._operations)

    def reset_peak(self) -> None:
        """Forget the past: the peak starts again from the bytes that are live now, and the timeline from its start."""
        self._settle()
        self._events = [(live.serial, live.nbytes) for live in self._live.values()]
        self._excluded &= {live.serial for live in self._live.values()}
        self._marks.clear()
        self._operations.clear()

    def exclude(self, *tensors: Tensor) -> None:
        """Leave the storages of these tensors out over their whole life, for example an optimizer's state."""
        for storage in _storages(tensors):
            live = self._live.get(storage._cdata)
            if live is not None:
                self._excluded.add(live.serial)

    # Counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim" or torch.compiler.is_compiling():  # ``prim`` asks a fake tensor where it is
            return result
        given: set[int] | None = None
        for tensor in _tensors(result):
            if not self._counts(tensor):
                continue
            for storage in _storages_of(tensor):
                key = storage._cdata
                live = self._live.get(key)
                if live is not None:
                    self._resize(live, self._counted(storage))
                    continue
                if given is None:
                    # ``torch.tensor`` fills a tensor outside of every operation and hands it over with this one.
                    fresh = func is torch.ops.aten.lift_fresh.default
                    given = set() if fresh else {storage._cdata for storage in _storages((args, kwargs))}
                if key not in given and key not in self._foreign_keys:
                    self._track(key, storage)
                    self.sizes_born.add(storage.nbytes() // max(tensor.element_size(), 1))
        if self._passing is not None and (size := self._passing(func, args, kwargs)):
            self._serial += 1
            self._events += [(self._serial, size), (self._serial, -size)]
        if self._record:
            self._marks.append(len(self._events))
            self._operations.append(str(func))
        return result

    def _counts(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for memory in this run: the tensors of its fake mode, or those that are real."""
        if is_fake(tensor):
            return mode_of(tensor) is self._fake_mode
        return self._fake_mode is None and not tensor.is_meta

    def _track(self, key: int, storage: torch.UntypedStorage) -> None:
        self._serial += 1
        nbytes = self._counted(storage)
        self._live[key] = _Live(self._serial, nbytes, weakref.ref(storage, partial(self._released, key)))
        self._events.append((self._serial, nbytes))

    def _counted(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes() if self._rounded is None else self._rounded(storage.nbytes())

    def _released(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        live = self._live.get(key)
        if self._active and live is not None and live.reference is reference:
            del self._live[key]
            self._events.append((live.serial, -live.nbytes))

    def _resize(self, live: _Live, nbytes: int) -> None:
        if nbytes != live.nbytes:
            self._events.append((live.serial, nbytes - live.nbytes))
            live.nbytes = nbytes

    def _history(self) -> Iterator[int]:
        """Live bytes after each event, as if the excluded storages had never been."""
        total = 0
        for serial, change in self._events:
            if serial not in self._excluded:
                total += change
            yield total

    def _parameters(self) -> Iterable[Tensor]:
        return self._module.parameters() if self._module is not None else self._tensors

    def _exclude_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.exclude(parameter.grad)

    def _settle(self) -> None:
        """Bring up to date what no operation has told: resized storages, and tensors that now belong to the module."""
        if not self._active:
            return
        for live in self._live.values():
            storage = live.reference() if live.reference is not None else None
            if storage is not None:
                self._resize(live, self._counted(storage))
        buffers = self._module.buffers() if self._module is not None else ()
        for tensor in chain(self._parameters(), buffers):
            self.exclude(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                self.exclude(tensor.grad)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation; far cheaper than a general tree traversal."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)


def _storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that hold a tensor: one, or those of the tensors it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages_of(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield from _storages_of(tensor._indices())
        yield from _storages_of(tensor._values())


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in _tensors(tree):
        yield from _storages_of(tensor)
