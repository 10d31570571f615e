"""Autocast: the dtypes that a graph's values have when autocast chooses those that each operation reads.

A graph is captured without autocast, and the engine follows the tensors it gets. To know what a step takes, the
operations are run once on tensors without data under the autocast of the call:

    captured        x float32 -> conv -> float32 -> batch_norm -> float32
    under autocast  x float32 -> conv -> bfloat16 -> batch_norm -> bfloat16      and a copy of each weight in bfloat16

The copies of weights stay until autocast is left, which is done between forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node, ValueKind
from lrcnn_lightning.monitor.meter import MemoryMeter
from lrcnn_lightning.planning.trial import results_of, without_data
from lrcnn_lightning.rules import RowGraph

__all__ = ["under_autocast_of"]


def under_autocast_of(graph: RowGraph, device: torch.device) -> RowGraph:
    """The graph as it runs under the autocast that is in force for a device."""
    dtype = torch.get_autocast_dtype(device.type)
    known: dict[tuple[str, torch.dtype], RowGraph] = graph.learned.setdefault("autocast", {})
    key = (device.type, dtype)
    if key not in known:
        dtypes, copies = _dtypes(graph, *key)
        values = tuple(replace(value, dtype=dtypes.get(value.index, value.dtype)) for value in graph.values)
        known[key] = replace(graph, graph=replace(graph.graph, values=values), autocast=key, cast_bytes=copies)
    return known[key]


def _dtypes(graph: RowGraph, kind: str, dtype: torch.dtype) -> tuple[dict[int, torch.dtype], int]:
    """The dtypes of values that are computed, and the bytes of the copies of weights."""
    found: dict[int, torch.dtype] = {}

    def made(index: int) -> Tensor:
        value = graph.values[index]
        tensor = torch.empty(value.shape, dtype=found.get(index, value.dtype), device=value.device)
        floats = tensor.is_floating_point() or tensor.is_complex()
        return tensor.requires_grad_(value.kind is ValueKind.PARAMETER and floats)

    def run(node: Node, weights: Mapping[int, Tensor]) -> None:
        tensors = {index: weights[index] if index in weights else made(index) for index in node.inputs}
        for index, result in results_of(node, tensors, graph.values).items():
            found[index] = result.dtype

    with without_data(), MemoryMeter() as meter, torch.no_grad():
        weights = {value.index: made(value.index) for value in graph.values if value.kind is ValueKind.PARAMETER}
        before = meter.live_bytes
        with torch.autocast(kind, dtype=dtype):
            for node in graph.nodes:
                run(node, weights)
            return found, meter.live_bytes - before
