"""Gradients that are not those of the operations: functions with a backward of their own, and hooks on tensors.

A trace goes through a function's forward and forgets its backward, so a module with one cannot be captured. Activation
checkpointing is such a function, too, but one whose gradients are those of what it calls: it is passed through, since
rows save what it saves.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from lrcnn_lightning.errors import CaptureError

__all__ = ["refused_gradients"]

_HOOKS = {
    torch.Tensor.register_hook: "register_hook",
    torch.Tensor.retain_grad: "retain_grad",
    torch.Tensor.register_post_accumulate_grad_hook: "register_post_accumulate_grad_hook",
}


class _NoHooks(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _HOOKS:
            raise CaptureError(
                f"its forward calls {_HOOKS[function]}() on a tensor, which a captured graph would not do again"
            )
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def refused_gradients() -> Iterator[None]:
    """Raise `CaptureError` where the code inside calls for a gradient that is not that of its operations."""
    thread = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and cls is CheckpointFunction:
            function, _preserve_random_state, *rest = args
            return function(*rest)
        if threading.get_ident() == thread and not cls.__module__.startswith("torch."):
            raise CaptureError(
                f"its forward applies {cls.__name__}, a torch.autograd.Function, whose backward a captured graph would "
                "not run"
            )
        return super(_SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]

    # Every function's `apply` ends here, also one that was looked up before; only this thread's is another.
    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        with _NoHooks():
            yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]
