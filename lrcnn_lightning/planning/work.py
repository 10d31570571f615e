"""Work: the time that operations take on a nominal machine.

    time of a call = operations / speed  +  bytes of its maps / speed  +  bytes of its weights / speed  +  a fixed price

On a slab the first two shrink with its share of the map; the weights and the fixed price do not. That is what many
rows cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from lrcnn_lightning.graph import Node, Value
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.retained import VIEWS, is_parameter
from lrcnn_lightning.rules import Role, RowGraph, family_of

__all__ = ["PRODUCTS", "Work", "is_weight"]

aten = torch.ops.aten

Values = Sequence[Value]


class _Price(NamedTuple):
    """Of an operation on full maps: seconds of its arithmetic and of moving its maps, of moving its weights; bytes of
    the result.
    """

    maps: float
    weights: float
    made: float


class Work:
    """Seconds of the nodes of a graph, each call at a fixed price of ``seconds_a_call``."""

    def __init__(self, graph: RowGraph, machine: Machine, seconds_a_call: float) -> None:
        self.graph, self.machine, self.seconds_a_call = graph, machine, seconds_a_call
        self._prices: dict[int, _Price] = {}

    def forward(self, position: int, share: float = 1.0) -> float:
        """Of a call on a share of its map."""
        price = self._price(position)
        return share * price.maps + price.weights + self.seconds_a_call + self.fresh(share * price.made)

    def backward(self, position: int, share: float = 1.0, wanted: int = 1, weights: int = 0) -> float:
        """Of the backward pass of a call: a convolution runs once for each gradient that is ``wanted``, and each of
        ``weights`` among them is written and added to a sum.
        """
        price = self._price(position)
        seconds = max(wanted, 1) * share * price.maps + (1 + 2 * weights) * price.weights + self.seconds_a_call
        return seconds + wanted * self.fresh(share * price.made) + weights * self._crawling(position, share)

    def backward_whole(self, position: int, differentiable: Collection[int]) -> float:
        """Of the backward pass of a call on full maps, if it has one."""
        graph, node = self.graph, self.graph.nodes[position]
        if not any(output in differentiable for output in node.outputs):
            return 0.0
        wanted = [index for index in node.inputs if index in differentiable]
        weights = sum(is_parameter(graph, index) and is_weight(graph, index) for index in wanted)
        maps = sum(not is_parameter(graph, index) for index in wanted)
        return self.backward(position, 1.0, maps + weights, weights)

    def _crawling(self, position: int, share: float) -> float:
        """Of the gradient of a weight from maps that are too large for any but a slow kernel."""
        machine, graph, node = self.machine, self.graph, self.graph.nodes[position]
        if math.isinf(machine.crawling_elements) or node.op not in PRODUCTS:
            return 0.0
        maps = (graph.values[i] for i in (*node.inputs, *node.outputs) if graph.is_map(i))
        elements = share * max((value.elements for value in maps if value.dtype is torch.float32), default=0)
        return elements * machine.seconds_a_crawling_element if elements > machine.crawling_elements else 0.0

    def fresh(self, size: float) -> float:
        """Of having ``size`` bytes for the first time, where that is so large that the memory was never used before."""
        return size / self.machine.fresh_bytes_a_second if size >= self.machine.large_bytes else 0.0

    def traffic(self, size: float, times: float = 1.0) -> float:
        """Of reading or writing ``size`` bytes so many ``times``."""
        return size * times / self.machine.bytes_a_second

    def _price(self, position: int) -> _Price:
        price = self._prices.get(position)
        if price is None:
            price = self._prices[position] = self._priced(position)
        return price

    def _priced(self, position: int) -> _Price:
        machine, graph = self.machine, self.graph
        node, role = graph.nodes[position], graph.roles[position]
        if node.op in VIEWS:
            return _Price(0.0, 0.0, 0.0)
        made = float(sum(graph.values[o].bytes for o in node.outputs))
        read = [i for i in node.inputs if graph.is_map(i) or (role is Role.WHOLE and i in graph.dependent)]
        maps = made + sum(graph.values[i].bytes for i in read)
        weights = float(sum(graph.values[i].bytes for i in node.inputs if i not in read))
        if node.op in PRODUCTS:
            speed = machine.convolved_bytes_a_second
        elif role is not Role.REDUCE and family_of(node.op) in ("pooling", "resize"):
            speed = machine.pooled_bytes_a_second
        else:
            speed = machine.bytes_a_second
        arithmetic = self.operations(position) / machine.operations_a_second
        return _Price(arithmetic + maps / speed, weights / machine.weight_bytes_a_second, made)

    def operations(self, position: int) -> float:
        """Multiplications and additions of a convolution or matrix product on full maps, forward."""
        node = self.graph.nodes[position]
        count = PRODUCTS.get(node.op)
        return 0.0 if count is None else 2.0 * count(self.graph.values, node)


def _operand(values: Values, node: Node, number: int) -> Value:
    value: Value = values[node.args[number].index]
    return value


def _convolution(values: Values, node: Node) -> float:
    """Every element of the result is a sum over one filter."""
    weight = _operand(values, node, 1)
    return values[node.outputs[0]].elements * weight.elements / max(weight.shape[0], 1)


def _transposed(values: Values, node: Node) -> float:
    """Every element of the input is multiplied by one filter."""
    weight = _operand(values, node, 1)
    return _operand(values, node, 0).elements * weight.elements / max(weight.shape[0], 1)


def _matrix(values: Values, node: Node, first: int = 0) -> float:
    """``first``: which argument is the left factor."""
    return values[node.outputs[0]].elements * _operand(values, node, first).shape[-1]


def _sum_and_matrix(values: Values, node: Node) -> float:
    return _matrix(values, node, 1)


def _einsum(values: Values, node: Node) -> float:
    """As if all operands were multiplied at once; an ellipsis is taken to be short."""
    terms = node.args[0].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, ref in zip(terms, node.args[1], strict=True):
        sizes.update(zip(term.replace(".", ""), values[ref.index].shape, strict=False))
    return math.prod(sizes.values())


def _attention(values: Values, node: Node) -> float:
    """Queries with keys, and what comes of it with values."""
    query, key, value = (_operand(values, node, number) for number in range(3))
    return query.elements * key.shape[-2] * (1 + value.shape[-1] / max(query.shape[-1], 1))


PRODUCTS: dict[Any, Callable[[Values, Node], float]] = {
    aten.conv1d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.linear.default: _matrix,
    aten.matmul.default: _matrix,
    aten.mm.default: _matrix,
    aten.bmm.default: _matrix,
    aten.addmm.default: _sum_and_matrix,
    aten.baddbmm.default: _sum_and_matrix,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
}
"""Convolutions and matrix products, and the number of multiplications of each on full maps."""


def is_weight(graph: RowGraph, value: int) -> bool:
    """Whether a whole value is what a product multiplies by, and no bias or scale: its gradient is another product."""
    return len(graph.values[value].shape) > 1
