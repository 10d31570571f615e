"""Why a module cannot be captured, in the words of whoever wrote it.

Tracing ends with an error of PyTorch's about its own machinery. What the reader knows is the line of code that was
being run, which the traceback has, and what about it cannot be traced, which the type of the error says.
"""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from pathlib import Path

import torch

from lrcnn_lightning.errors import CaptureError, InternalError

__all__ = ["in_words", "reason_of"]

_NEEDS_VALUES = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "UnsupportedFakeTensorException",
    "TorchRuntimeError",
)
"""Types of errors that say that Python code asked for the values of a tensor."""

_OF_TRACING = ("torch._dynamo", "torch._subclasses", "torch._export", "torch.export", "torch.fx", "torch._higher_order")
"""Where the errors come from by which PyTorch says that it cannot trace something."""

_NOT_FORESEEN = (AssertionError, AttributeError, LookupError, NameError, RecursionError, SystemError)
"""Errors by which programs say that they are wrong themselves."""

_PACKAGE = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)
_STANDARD = sysconfig.get_paths()["stdlib"]
_INSTALLED = tuple(sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}))
_BOILERPLATE = re.compile(r"https?://|file an? (issue|bug)|github|TORCH_|draft_export|torch\.(export|compile)", re.I)
_MOST = 200


def reason_of(error: Exception) -> CaptureError:
    """The error that a capture ends with, for one that came out of tracing.

    An `InternalError` where neither the user's code nor a restriction of tracing is the cause.
    """
    frames, own = traceback.extract_tb(error.__traceback__), _own_frames(error)
    name, told = type(error).__name__, in_words(error)
    line = f"`{_line(own[-1])}` at {_place(own[-1])}" if own else ""
    if name in _NEEDS_VALUES or "data-dependent" in told:
        return CaptureError(f"{line or 'its code'} depends on the values of a tensor")
    if type(error).__module__.startswith(_OF_TRACING):
        return CaptureError(f"PyTorch cannot trace {line or 'it'} ({told})")
    if own and frames and own[-1] == frames[-1]:
        return CaptureError(f"without the values of tensors {line} ends with {told}")
    if own and not isinstance(error, _NOT_FORESEEN) and not frames[-1].filename.startswith(f"{_PACKAGE}/"):
        return CaptureError(f"PyTorch cannot run {line} without the values of tensors ({told})")
    inner = f" at {_place(frames[-1])}" if frames else ""
    return InternalError(f"{told}{inner}{', where it traces ' if line else ''}{line}")


def _own_frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    """Those of the user's code, of the error or of what it came from."""
    while error is not None:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
        if own:
            return own
        error = error.__cause__ or error.__context__
    return []


def _is_foreign(filename: str) -> bool:
    """Whether code is PyTorch's, Python's or this package's."""
    if filename.startswith("<"):
        return True
    path = str(Path(filename).resolve())
    if path.startswith((f"{_PACKAGE}/", f"{_TORCH}/")):
        return True
    return path.startswith(f"{_STANDARD}/") and not path.startswith(tuple(f"{folder}/" for folder in _INSTALLED))


def _place(frame: traceback.FrameSummary) -> str:
    """``net.py:12``; the whole path within an installed package."""
    for folder in _INSTALLED:
        if frame.filename.startswith(f"{folder}/"):
            return f"{frame.filename[len(folder) + 1 :]}:{frame.lineno}"
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _line(frame: traceback.FrameSummary) -> str:
    return linecache.getline(frame.filename, frame.lineno or 0).strip() or frame.name


def in_words(error: Exception) -> str:
    """The type of an error and its first line, without sentences about PyTorch's own settings and pages."""
    lines = str(error).strip().splitlines()
    sentences = re.split(r"(?<=[.!])\s+", lines[0]) if lines else []
    text = " ".join(sentence for sentence in sentences if not _BOILERPLATE.search(sentence)).strip()
    text = text if len(text) <= _MOST else f"{text[:_MOST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
