"""What stands in for a module's ``forward``, seen from outside: as a function, in copies and in pickles."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from lrcnn_lightning.errors import CaptureError

__all__ = ["StandIn"]

_OF_FUNCTIONS = ("__closure__", "__code__", "__defaults__", "__kwdefaults__", "__name__", "__qualname__")


class _NoSourceError(CaptureError, AttributeError):
    """Something asks for the namespace of the source."""


class StandIn:
    """Stands in for the ``forward`` of a module, and has what that has of a function.

    Args:
        module: The module, on which it will be set.
        name: The module's name in a model, if it has one.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        """A forward that the user has set on the instance."""
        self.passing = False
        """Whether it is there for the time of a step only, and not for good as by `rowwise`."""

    @property
    def where(self) -> str:
        """The module, for messages."""
        kind = type(self.module).__name__
        return f"row-wise module {self.name!r} ({kind})" if self.name else f"row-wise module {kind}"

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own forward, for those who look at its signature or its source."""
        return _own_forward(self.module, self.previous)

    def __getattr__(self, name: str) -> Any:
        """What exporters and compilers ask of a function is that of the module's own forward."""
        if name == "__globals__":  # without which torch.jit.script cannot do, and others can
            raise _NoSourceError(
                f"{self.where}: torch.jit.script compiles the source of a module's forward, and this one is not in its "
                "class; call lrcnn_lightning.restore(module) before, or use torch.jit.trace or torch.export, which see "
                "the module's own operations"
            )
        if name not in _OF_FUNCTIONS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__wrapped__, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle made during a step, of a teacher or for a file, has the module's own forward.

        No step would ever take a row-wise one away from it.
        """
        if not self.passing:
            return super().__reduce_ex__(protocol)
        return _own_forward, (self.module, self.previous)


def _own_forward(module: nn.Module, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """A module's forward without rows; ``previous`` is one that the user has set on the instance."""
    return MethodType(type(module).forward, module) if previous is None else previous
