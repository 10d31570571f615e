"""BatchNorm synchronised between processes, as one operation that a capture can record.

``torch.nn.SyncBatchNorm`` communicates in its forward, which cannot be traced. While a module is captured, its layers
of that kind call ``lrcnn_lightning::sync_batch_norm`` instead; the rules rewrite that into moments, a merge over the
processes, and pointwise work. With one process it is plain ``batch_norm``, as in PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SYNC_BATCH_NORM", "processes", "recorded_sync_batch_norms"]

_LIBRARY = torch.library.Library("lrcnn_lightning", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "sync_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "float momentum, float eps, str group) -> Tensor"
)


@torch.library.register_fake("lrcnn_lightning::sync_batch_norm", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


SYNC_BATCH_NORM = torch.ops.lrcnn_lightning.sync_batch_norm.default


def processes(group: Any = None) -> int:
    """The number of processes in a group (by default of all processes); 1 where none were launched."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)


@contextlib.contextmanager
def recorded_sync_batch_norms(module: nn.Module) -> Iterator[None]:
    """For the time of a capture: layers that would communicate call the one operation."""
    changed = [
        child
        for child in module.modules()
        if isinstance(child, nn.SyncBatchNorm) and child.training and processes(child.process_group) > 1
    ]
    before = {child: child.__dict__.get("forward") for child in changed}
    for child in changed:
        child.__dict__["forward"] = partial(_forward, child)
    try:
        yield
    finally:
        for child, forward in before.items():
            del child.__dict__["forward"]
            if forward is not None:
                child.__dict__["forward"] = forward


def _forward(layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    tracks = layer.track_running_stats and layer.num_batches_tracked is not None
    if tracks:
        layer.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    group: Any = layer.process_group or torch.distributed.group.WORLD
    result: Tensor = SYNC_BATCH_NORM(
        x,
        layer.weight,
        layer.bias,
        layer.running_mean if tracks else None,
        layer.running_var if tracks else None,
        0.0 if layer.momentum is None else layer.momentum,
        layer.eps,
        group.group_name,
    )
    return result
