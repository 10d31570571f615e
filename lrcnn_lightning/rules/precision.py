"""What autocast does to an operation that is rewritten into others.

Autocast decides by the operation's name: on CUDA ``group_norm`` reads float32 and returns it, while ``batch_norm``
keeps the dtype of its input. So it is asked about the operation that the user wrote, not what runs in its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import under_autocast

__all__ = ["as_read_by"]


def as_read_by(operation: Any, x: Tensor) -> Tensor:
    """``x`` as ``operation`` reads it under the autocast in force: float32 where autocast widens for it.

    For normalisations and sums, all of which autocast widens where it has anything to do with them.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x
    if not under_autocast(x.device):
        return x
    return x.float() if _is_widened(operation, x.device.type) else x


@cache
def _is_widened(operation: Any, kind: str) -> bool:
    key = f"Autocast{kind.upper()}"
    name = operation._schema.name
    if operation._schema.overload_name:
        name = f"{name}.{operation._schema.overload_name}"
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    return found
