"""Hooks on what autograd saves, which a user may have set, as checkpointing does."""

from __future__ import annotations

from typing import Any

from torch import _C

__all__ = ["TOLD", "pop_saved_hooks", "saved_hooks"]

TOLD = hasattr(_C._autograd, "_top_saved_tensors_default_hooks")
"""Whether PyTorch tells which are set; 2.6 does not."""


def saved_hooks() -> tuple[Any, ...] | None:
    """The innermost pair, which packs and unpacks; ``None`` where there is none, or where it is not told."""
    if not TOLD:
        return None
    hooks: tuple[Any, ...] | None = _C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def pop_saved_hooks() -> None:
    """Take the innermost pair away."""
    _C._autograd._pop_saved_tensors_default_hooks()
