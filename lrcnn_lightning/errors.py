"""The exception types of the package, under one root.

Inner functions raise short facts; the public boundary (``rowwise``, ``plan``, the strategies) adds once where it
happened.  An out-of-memory error of the backend is never caught, wrapped or reworded: tools that search for a batch
size recognise it by its type and text.
"""

from __future__ import annotations

__all__ = ["CaptureError", "ConfigError", "DoubleBackwardError", "InputError", "PlanError", "RowwiseError"]


class RowwiseError(Exception):
    """Root of every exception that this package raises."""


class ConfigError(RowwiseError, ValueError):
    """An option has a value that is not allowed; the message names the allowed ones."""


class InputError(RowwiseError, ValueError):
    """An input of a row-wise module cannot be split, for example because it has no spatial axis."""


class CaptureError(RowwiseError, RuntimeError):
    """A module cannot be captured as a graph, for example because its control flow depends on data."""


class PlanError(RowwiseError, RuntimeError):
    """No plan exists for the request, or a plan does not fit the module that it is given to."""


class DoubleBackwardError(RowwiseError, RuntimeError):
    """A gradient of a gradient was asked for; row-wise backward is once differentiable."""
