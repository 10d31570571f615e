"""Functions with a backward of their own (``torch.autograd.Function``): each call is one operation of the graph.

A trace would go through such a function's forward and forget its backward.  So, for the time of a trace, its forward is
run aside, for the shapes of its results, and the call is recorded as an operation that applies the function:

    y = Spike.apply(h, 0.5)        ->        y = Spike(h)        which runs Spike.apply(h, 0.5), forward and backward

It runs whole, unless it is declared to act element by element (`elementwise`).  Activation checkpointing is such a
function, too, but one whose gradients are those of what it calls: it is passed through, since rows save what it saves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.graph.recorder import record_call, unrecorded
from lrcnn_lightning.graph.structure import Structure, take_apart

__all__ = ["CustomFunction", "elementwise", "is_elementwise", "recorded_functions"]

FunctionType = TypeVar("FunctionType", bound="type[Function]")

_ELEMENTWISE: WeakSet[type] = WeakSet()
"""The functions that are declared to act element by element."""


def elementwise(function: FunctionType) -> FunctionType:
    """Declare that a ``torch.autograd.Function`` acts element by element, so that it can run on rows; return it.

    Each element of its outputs, and of the gradients that its backward returns, depends on the elements in the same
    place of its tensor arguments only (with broadcasting). May be called on a class of another library, too.

    >>> import torch
    >>> @elementwise
    ... class Spike(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return (x > 0).to(x.dtype)
    ...     @staticmethod
    ...     def backward(ctx, gradient):
    ...         (x,) = ctx.saved_tensors
    ...         return gradient / (1 + x.abs()) ** 2

    Raises `ConfigError` for anything else than a class derived from ``torch.autograd.Function``.
    """
    if not (isinstance(function, type) and issubclass(function, _SingleLevelFunction)):
        raise ConfigError(f"elementwise() takes a class derived from torch.autograd.Function, given was {function!r}")
    _ELEMENTWISE.add(function)
    return function


def is_elementwise(function: type) -> bool:
    """Whether a function, or one that it is derived from, is declared to act element by element."""
    return any(base in _ELEMENTWISE for base in function.__mro__)


@dataclass(frozen=True, eq=False)
class CustomFunction:
    """A call of a function with all its arguments but the tensors.

    ``leaves`` are its arguments, taken apart by ``structure``, with None where a tensor goes (``tensors``: which).
    Called with these tensors it applies the function, and returns the tensors among its results.
    """

    function: type[Function]
    leaves: tuple[Any, ...]
    structure: Structure
    tensors: tuple[int, ...]
    written: tuple[int, ...]
    """Of the tensors: those that the function changes in place. It is given copies."""
    draws: bool
    """Whether it draws random numbers."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.tensors, tensors, strict=True):
            leaves[place] = tensor
        for number in self.written:
            leaves[self.tensors[number]] = tensors[number].clone()
        result = self.function.apply(*self.structure.put_together(leaves))  # type: ignore[no-untyped-call]
        results = result if isinstance(result, tuple) else (result,)
        return tuple(item for item in results if isinstance(item, Tensor))

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    __repr__ = __str__


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.any = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any = self.any or torch.Tag.nondeterministic_seeded in function.tags
        return function(*args, **(kwargs or {}))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Recorder:
    """Records calls of functions in the trace that is running."""

    def __init__(self, replaced: Callable[[Any], Any]) -> None:
        self._replaced = replaced
        self._aside = False

    def forward(self, function: type[Function], own: Callable[..., Any], *args: Any) -> Any:
        """Stands in for the function's ``forward``."""
        if self._aside:
            return own(*args)
        context: tuple[Any, ...] = ()
        if function.setup_context == _SingleLevelFunction.setup_context:
            context, args = args[:1], args[1:]
        leaves, structure = take_apart(args)
        leaves = [self._replaced(leaf) for leaf in leaves]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        operands = [leaves[place] for place in places]
        versions = [tensor._version for tensor in operands]
        result, drawn = self._run_aside(own, context, structure.put_together(leaves))
        written = [
            n for n, (tensor, version) in enumerate(zip(operands, versions, strict=True)) if tensor._version != version
        ]
        results = result if isinstance(result, tuple) else (result,)
        call = CustomFunction(
            function,
            tuple(None if place in places else leaf for place, leaf in enumerate(leaves)),
            structure,
            tuple(places),
            tuple(written),
            drawn,
        )
        with unrecorded():
            fresh = tuple(_like(item) for item in results if isinstance(item, Tensor))
        record_call(call, operands, fresh)
        recorded = iter(fresh)
        outputs = [next(recorded) if isinstance(item, Tensor) else item for item in results]
        for number in written:
            for place, item in enumerate(results):
                if item is operands[number]:
                    operands[number].copy_(outputs[place])
                    outputs[place] = operands[number]
        return tuple(outputs) if isinstance(result, tuple) else outputs[0]

    def _run_aside(self, own: Callable[..., Any], context: tuple[Any, ...], args: Any) -> tuple[Any, bool]:
        """What ``forward`` returns, of which nothing is recorded; and whether it drew random numbers."""
        self._aside = True
        try:
            with unrecorded(), _Draws() as draws:
                return own(*context, *args), draws.any
        finally:
            self._aside = False


@contextlib.contextmanager
def recorded_functions(replaced: Callable[[Any], Any]) -> Iterator[None]:
    """Record what is applied inside, in this thread, as operations of the trace that is running.

    ``replaced`` gives the stand-in for a live tensor.
    """
    thread = threading.get_ident()
    recorder = _Recorder(replaced)

    def attribute(cls: type[Function], name: str) -> Any:
        value = type.__getattribute__(cls, name)
        if name != "forward" or threading.get_ident() != thread or cls.__module__.startswith("torch."):
            return value
        return partial(recorder.forward, cls, value)

    def apply(cls: type[Function], function: Any, preserve: Any, *args: Any) -> Any:
        if threading.get_ident() == thread:
            return function(*args)
        return super(CheckpointFunction, cls).apply(function, preserve, *args)  # type: ignore[misc]

    # `forward` is looked up on the class at every call, also of an `apply` that was looked up before.
    FunctionMeta.__getattribute__ = attribute  # type: ignore[method-assign, assignment]
    CheckpointFunction.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del FunctionMeta.__getattribute__
        del CheckpointFunction.apply
