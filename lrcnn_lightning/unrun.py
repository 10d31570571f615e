"""What a module that does not run row by row takes instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrcnn_lightning.captures import without_hooks
from lrcnn_lightning.graph import fake_run
from lrcnn_lightning.monitor.measure import measure_fake

__all__ = ["plain_peak"]


def plain_peak(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The activation peak of a plain call with these arguments, and of its backward pass, in bytes.

    The module is called once more on tensors without data. None where its code needs their values.
    """
    grad = torch.is_grad_enabled()
    try:
        with without_hooks(module), fake_run(module, (args, kwargs)), torch.inference_mode(False), torch.enable_grad():
            return measure_fake(module, *args, grad=grad, **kwargs).peak_bytes
    except Exception:  # whatever it is, the number is only a help
        return None
