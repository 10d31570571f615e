"""Expansion: operations that are rewritten as several, before rows are considered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.graph import Graph, Node, Ref, Value, dependent_values

__all__ = ["Builder", "expand", "expands"]

Expansion = Callable[["Builder", Node], bool]

_EXPANSIONS: dict[Any, Expansion] = {}


def expands(operation: Any) -> Callable[[Expansion], Expansion]:
    """Decorator: the function emits the nodes that stand for ``operation``, or returns False to leave it."""

    def add(expansion: Expansion) -> Expansion:
        _EXPANSIONS[operation] = expansion
        return expansion

    return add


class Builder:
    """A graph under construction.

    ``dimension`` is the input's dimension that is split: most likely, but not surely, that of the map at hand.
    """

    def __init__(self, graph: Graph, dimension: int) -> None:
        self.dimension = dimension
        self.values = list(graph.values)
        self.nodes: list[Node] = []

    def value(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Ref:
        """Add a computed value."""
        index = len(self.values)
        self.values.append(Value(index, name, shape, dtype, device))
        return Ref(index)

    def emit(self, origin: Node, op: Any, args: tuple[Any, ...], outputs: tuple[int, ...], part: str) -> None:
        """Add a node in the place of ``origin``."""
        self.nodes.append(replace(origin, name=f"{origin.name}.{part}", op=op, args=args, kwargs={}, outputs=outputs))


def expand(graph: Graph, dimension: int) -> Graph:
    """The graph with each expandable operation on a value that depends on the input rewritten."""
    dependent = dependent_values(graph)
    builder = Builder(graph, dimension)
    for node in graph.nodes:
        expansion = _EXPANSIONS.get(node.op)
        if expansion is None or not any(index in dependent for index in node.inputs) or not expansion(builder, node):
            builder.nodes.append(node)
    return replace(graph, values=tuple(builder.values), nodes=tuple(builder.nodes))
