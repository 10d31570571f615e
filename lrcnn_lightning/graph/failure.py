"""Why a module's code could not be traced, in words for who wrote it."""

from __future__ import annotations

import os
import sysconfig
import traceback

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

__all__ = ["reason"]

_NOT_THEIRS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_PYTHON = sysconfig.get_path("stdlib") + os.sep


def reason(error: Exception) -> str:
    """What stopped a trace, with the line of the code that it was on."""
    lines = str(error).strip().splitlines()
    if isinstance(error, DataDependentOutputException):
        text = f"it needs the values of a tensor ({error.func}), and what it does depends on them"
    elif isinstance(error, DynamicOutputShapeException):
        text = f"the shape of a tensor depends on data ({error.func})"
    else:
        text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text + _where(error)


def _where(error: Exception) -> str:
    """The innermost line of code that is neither PyTorch's nor Python's nor this package's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        of_python = frame.filename.startswith(_PYTHON) and "site-packages" not in frame.filename
        if not of_python and not frame.filename.startswith((*_NOT_THEIRS, "<")):
            line = f", `{frame.line}`" if frame.line else ""
            return f" (at {os.path.basename(frame.filename)}:{frame.lineno}{line})"
    return ""
