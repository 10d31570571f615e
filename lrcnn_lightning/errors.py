"""The exception types of the package, under one root, and which errors mean what.

    RowwiseError
        ConfigError            a wrong option                                      raised, whatever is configured
        PlanError              a plan that was given, or a limit, does not fit     raised
            BudgetError        no plan fits the memory                             raised, if a limit was given
        DoubleBackwardError    a second derivative that cannot be had              raised
        InputError             an input cannot be split into rows                  ``on_unsupported`` decides
        CaptureError           a module cannot be captured as a graph              ``on_unsupported`` decides
            InternalError      this package, or PyTorch's tracing, has failed      ``on_unsupported`` decides
            UninitialisedError lazy layers before their first call                 that call runs plainly

Inner functions raise short facts; the public boundary (``rowwise``, ``plan``, the strategies) adds once where it
happened.  An out-of-memory error of the backend is never caught, wrapped or reworded: tools that search for a batch
size recognise it by its type and text.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BudgetError",
    "CaptureError",
    "ConfigError",
    "DoubleBackwardError",
    "InputError",
    "InternalError",
    "PlanError",
    "RowwiseError",
    "UninitialisedError",
    "is_out_of_memory",
]


class RowwiseError(Exception):
    """Root of every exception that this package raises."""


class ConfigError(RowwiseError, ValueError):
    """An option has a value that is not allowed; the message names the allowed ones."""


class InputError(RowwiseError, ValueError):
    """An input of a row-wise module cannot be split, for example because it has no spatial axis."""


class CaptureError(RowwiseError, RuntimeError):
    """A module cannot be captured as a graph, for example because its control flow depends on data."""


class InternalError(CaptureError):
    """Something unforeseen has failed that is not the user's: a fault of the package, or of PyTorch's tracing."""


class UninitialisedError(CaptureError):
    """A module has lazy layers, whose parameters get their shapes in the first call."""


class PlanError(RowwiseError, RuntimeError):
    """No plan exists for the request, or a plan does not fit the module that it is given to."""


class BudgetError(PlanError):
    """No plan fits the ``budget`` (bytes); ``least`` is the `Plan` that takes the least of those that were tried."""

    def __init__(self, message: str, least: Any = None, budget: int = 0) -> None:
        super().__init__(message)
        self.least, self.budget = least, budget


class DoubleBackwardError(RowwiseError, RuntimeError):
    """A gradient of a gradient was asked for where it cannot be had."""


_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "_ALLOC_FAILED", "CUDNN_STATUS_NOT_SUPPORTED", "CUDA error")
"""What PyTorch writes where memory is short, or a device is broken: nothing that runs afterwards can help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch says that memory is short, or that the device has failed."""
    if isinstance(error, RowwiseError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
