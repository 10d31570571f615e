"""Work: the time that operations take on a nominal machine.

    time of a call = operations / speed  +  bytes of its maps / speed  +  bytes of its weights / speed  +  a fixed price

On a slab the first two shrink with its share of the map; the weights and the fixed price do not. That is what many
rows cost.
"""

from __future__ import annotations

from typing import NamedTuple

from lrcnn_lightning.graph import Value
from lrcnn_lightning.plan.machine import Machine
from lrcnn_lightning.plan.retained import VIEWS
from lrcnn_lightning.rules import RowGraph, RowRule

__all__ = ["Work", "is_large", "is_weight"]

_SMALL = 4096
"""Elements of biases and scales, at most."""


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
        return seconds + wanted * self.fresh(share * price.made)

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
        node, rule = graph.nodes[position], graph.rules[position]
        if node.op in VIEWS:
            return _Price(0.0, 0.0, 0.0)
        made = float(sum(graph.values[o].bytes for o in node.outputs))
        whole = [i for i in node.inputs if not graph.is_map(i)]
        maps = made + sum(graph.values[i].bytes for i in node.inputs if graph.is_map(i))
        weights = float(sum(graph.values[i].bytes for i in whole))
        if is_product(str(node.op)):
            speed = machine.convolved_bytes_a_second
        elif isinstance(rule, RowRule) and rule.family in ("window", "resize"):
            speed = machine.pooled_bytes_a_second
        else:
            speed = machine.bytes_a_second
        arithmetic = self.operations(position) / machine.operations_a_second
        return _Price(arithmetic + maps / speed, weights / machine.weight_bytes_a_second, made)

    def operations(self, position: int) -> float:
        """Multiplications and additions of a convolution or matrix product on full maps, forward."""
        node = self.graph.nodes[position]
        name = str(node.op)
        if not node.outputs or not is_product(name):
            return 0.0
        out = self.graph.values[node.outputs[0]]
        if "conv" in name:
            weight: Value = self.graph.values[node.args[1].index]
            if "transpose" in name:
                source: Value = self.graph.values[node.args[0].index]
                return 2.0 * source.elements * weight.elements / weight.shape[0]
            return 2.0 * out.elements * weight.elements / max(weight.shape[0], 1)
        features: int = self.graph.values[node.args[0].index].shape[-1]
        return 2.0 * out.elements * features


def is_product(name: str) -> bool:
    """Whether an operation is a convolution or a matrix product."""
    return any(part in name for part in ("conv", "linear", "matmul", "addmm", "bmm"))


def is_weight(graph: RowGraph, value: int) -> bool:
    """Whether a whole value is what a product multiplies by, and no bias or scale: its gradient is another product."""
    return len(graph.values[value].shape) > 1


def is_large(graph: RowGraph, value: int) -> bool:
    """Whether the gradient of a whole value is worth counting: of a weight, not of a bias or a scale."""
    return graph.values[value].elements > _SMALL
