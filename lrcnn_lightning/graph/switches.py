"""The switches that a module's own code had set around a node, set again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lrcnn_lightning.graph.graph import Context

__all__ = ["entered"]


@contextlib.contextmanager
def entered(context: Context) -> Iterator[None]:
    """``torch.no_grad()`` and ``torch.autocast(...)`` as they were."""
    with contextlib.ExitStack() as stack:
        if not context.grad:
            stack.enter_context(torch.no_grad())
        if context.autocast is not None:
            device, dtype, enabled = context.autocast
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield
