"""When a row-wise module steps aside: others look at the module's own code, or run it on tensors of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lrcnn_lightning.graph import is_rehearsed, is_rehearsed_elsewhere

__all__ = ["steps_aside"]

_fx = torch.fx._symbolic_trace
_is_traced: Callable[[], bool] = getattr(_fx, "is_fx_symbolic_tracing", None) or _fx.is_fx_tracing


def steps_aside() -> bool:
    """Whether the module's own forward is to run now.

    A compiler, an exporter or a tracer is to see the network, not what rows make of it. Transforms of ``torch.func``
    and forward-mode differentiation have tensors of their own, for which segments have no rules.
    """
    if is_rehearsed():
        return True
    elsewhere = is_rehearsed_elsewhere()  # which sets flags that are read below, for all threads
    if not elsewhere and torch.compiler.is_compiling():  # asked first: the compiler of PyTorch 2.6 does not read on
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not elsewhere and (
        torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or get_proxy_mode() is not None
        or _is_traced()
    )
