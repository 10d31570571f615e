"""What autograd retains for the backward pass of an operation."""

from __future__ import annotations

import torch

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules import RowGraph

__all__ = ["VIEWS", "bytes_of", "extra_bytes", "passes_gradient_on", "retains"]

aten = torch.ops.aten

# What autograd saves, by operation: inputs, the result, both, or neither. Anything else: the inputs.
_SAVES_RESULT = {
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.reciprocal.default,
}
_SAVES_NOTHING = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.chunk.default,
    aten.split_with_sizes.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.avg_pool2d.default,
    aten.neg.default,
    aten.add.Scalar,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
}
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


def retains(node: Node) -> tuple[bool, bool]:
    """Whether autograd retains the inputs, and the result, of a node."""
    if node.op in _SAVES_RESULT:
        return False, True
    return node.op not in _SAVES_NOTHING, False


def passes_gradient_on(node: Node) -> bool:
    """Whether the gradient of an input has the memory of the result's gradient."""
    return node.op in VIEWS or node.op is aten.add.Tensor


def bytes_of(graph: RowGraph, value: int, rows: int, samples: int) -> float:
    """Bytes of a slab: ``rows`` lines of ``samples`` samples."""
    info = graph.values[value]
    size = float(info.bytes)
    if graph.height(value):
        size *= rows / graph.height(value)
    if graph.samples(value):
        size *= samples / graph.samples(value)
    return size


def extra_bytes(graph: RowGraph, position: int, rows: int, samples: int) -> float:
    """Bytes retained beside inputs and result, of a slab of the result: the indices of maximum pooling."""
    node = graph.nodes[position]
    if "max_pool" in str(node.op):
        info = graph.values[node.outputs[0]]
        return bytes_of(graph, node.outputs[0], rows, samples) / info.dtype.itemsize * 8
    return 0.0
