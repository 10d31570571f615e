"""Gradients switched off by the code that is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["GradMode"]


class GradMode(TorchFunctionMode):
    """Lets ``torch.no_grad()`` take effect in a trace.

    PyTorch 2.6 notes it in the graph and goes on with gradients, and operations with ``out=``, as in spectral
    normalisation, refuse tensors that require one.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                torch._C._set_grad_enabled(*args)
        return result
