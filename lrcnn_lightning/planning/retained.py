"""Operations that move no bytes, for the time they take, and the bytes of slabs. What they hold is in `footprint`."""

from __future__ import annotations

import torch

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules import RowGraph

__all__ = ["VIEWS", "bytes_of", "is_half", "is_parameter", "passes_gradient_on", "sum_bytes"]

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.chunk.default,
    aten.split_with_sizes.default,
    aten.expand.default,
    aten.select.int,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.dropout.default,
}
"""Operations whose result has the memory of their input."""


def passes_gradient_on(node: Node) -> bool:
    """Whether the gradient of an input has the memory of the result's gradient."""
    return node.op in VIEWS or node.op is aten.add.Tensor


def is_parameter(graph: RowGraph, value: int) -> bool:
    """Whether a value is a parameter or buffer, whose gradient is no activation memory."""
    return graph.values[value].kind.value in ("parameter", "buffer")


def is_half(graph: RowGraph, value: int) -> bool:
    """Whether a value is in half precision, whose gradients are summed in another tensor."""
    return graph.values[value].dtype in (torch.float16, torch.bfloat16)


def sum_bytes(graph: RowGraph, value: int) -> float:
    """Bytes of activation memory where the gradient of a whole value is summed, which is done in float32 or better.

    What becomes the gradient of a parameter is none; but that of a parameter in half precision is made of the sum.
    """
    info = graph.values[value]
    if is_half(graph, value):
        return 2.0 * info.bytes
    return 0.0 if is_parameter(graph, value) else float(info.bytes)


def bytes_of(graph: RowGraph, value: int, rows: int, samples: int) -> float:
    """Bytes of a slab: ``rows`` lines of ``samples`` samples."""
    info = graph.values[value]
    size = float(info.bytes)
    if graph.height(value):
        size *= rows / graph.height(value)
    if graph.samples(value):
        size *= samples / graph.samples(value)
    return size
