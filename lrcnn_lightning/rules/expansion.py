"""Expansion: operations that are rewritten as several, for which there are row rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.graph import Graph, Node, Ref, Value
from lrcnn_lightning.rules.rule import WHOLE, Axes

__all__ = ["Builder", "expanded", "expands"]

Expansion = Callable[["Builder", Node], bool]

_EXPANSIONS: dict[Any, Expansion] = {}


def expands(operation: Any) -> Callable[[Expansion], Expansion]:
    """Decorator: the function emits the nodes that stand for ``operation``, or returns False to leave it."""

    def add(expansion: Expansion) -> Expansion:
        _EXPANSIONS[operation] = expansion
        return expansion

    return add


def expanded() -> list[Any]:
    """The operations that are rewritten where that lets rows through."""
    return list(_EXPANSIONS)


class Builder:
    """A graph under construction, node by node; ``axes`` are those of the values so far."""

    def __init__(self, graph: Graph, axes: Mapping[int, Axes]) -> None:
        self.axes = axes
        self._graph = graph
        self.values = list(graph.values)
        self.nodes: list[Node] = []

    def row(self, ref: Ref) -> int | None:
        """The row axis of a value, or None."""
        return self.axes.get(ref.index, WHOLE).row

    def only_read_by(self, node: Node, ref: Ref) -> Node | None:
        """The node that makes a value, if nobody but ``node`` ever sees it."""
        readers = self._graph.readers().get(ref.index, [])
        if len(readers) != 1 or self._graph.nodes[readers[0]] is not node or ref.index in self._graph.output_values():
            return None
        return next((made for made in reversed(self.nodes) if made.outputs == (ref.index,)), None)

    def add(self, node: Node) -> list[Node]:
        """Add a node, or those that stand for it, and return what was added."""
        start = len(self.nodes)
        expansion = _EXPANSIONS.get(node.op)
        if expansion is None or not expansion(self, node):
            self.nodes.append(node)
        return self.nodes[start:]

    def value(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Ref:
        """Add a computed value."""
        index = len(self.values)
        self.values.append(Value(index, name, shape, dtype, device))
        return Ref(index)

    def like(self, origin: Node, value: Value, part: str, shape: tuple[int, ...] | None = None) -> Ref:
        """Add a computed value with the dtype, the device and, unless given, the shape of another."""
        given = value.shape if shape is None else shape
        return self.value(f"{origin.name}_{part}", given, value.dtype, value.device)

    def batches_of(self, node: Node, running_mean: Ref) -> Ref:
        """The count of batches that belongs to a running mean, as it is when ``node`` runs.

        A copy: the buffer itself counts on where a layer is called again, before any rows run.
        """
        source = str(self.values[running_mean.index].source).replace("running_mean", "num_batches_tracked")
        buffer = next(value for value in self.values if value.source == source)
        count = self.like(node, buffer, "batches")
        self.emit(node, torch.ops.aten.clone.default, (Ref(buffer.index),), (count.index,), "batches")
        return count

    def emit(self, origin: Node, op: Any, args: tuple[Any, ...], outputs: tuple[int, ...], part: str) -> None:
        """Add a node in the place of ``origin``."""
        self.nodes.append(replace(origin, name=f"{origin.name}.{part}", op=op, args=args, kwargs={}, outputs=outputs))
