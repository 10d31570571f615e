"""Random numbers: which nodes draw them, and which have to wait for others to draw first.

A generator gives its numbers in the order in which they are drawn, so those of a step are drawn in the order of the
module's code. What does not read the data, as the mask of a dropout does not, is drawn before all rows, but for what
comes after an operation that does: how many numbers that draws may depend on the data.

    conv -> dropout -> rrelu -> dropout          mask 1 | rows: conv, masked | rrelu | mask 2 | rows: masked
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lrcnn_lightning.graph.graph import Node

__all__ = ["DrawOrder", "draws"]

aten = torch.ops.aten

_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
"""They draw a mask by the shape of what they read, apart from its data (`rules.dropout`)."""

_SILENT: dict[str, tuple[Any, ...]] = {"train": (False,), "training": (False,), "dropout": (0,), "dropout_p": (0,)}
"""Values of arguments with which nothing is drawn."""


@cache
def _silent(op: Any) -> tuple[tuple[int, str, Any, tuple[Any, ...]], ...] | None:
    """Of an operation that may draw: the arguments by which it does not, each by its place, name, default and these
    values; ``None`` for any other operation.
    """
    if not isinstance(op, torch._ops.OpOverload):
        return () if getattr(op, "draws", False) else None
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return None
    silent = {**_SILENT, "p": (0, 1)} if op in _DROPOUTS else _SILENT
    arguments = enumerate(op._schema.arguments)
    return tuple((i, a.name, a.default_value, silent[a.name]) for i, a in arguments if a.name in silent)


def draws(node: Node) -> bool:
    """Whether a node takes random numbers; of operations of others, those tagged ``nondeterministic_seeded`` do."""
    silent = _silent(node.op)
    if silent is None:
        return False
    for place, name, default, values in silent:
        given = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
        if given in values:
            return False
    return True


class DrawOrder:
    """Told of the nodes of a graph in order, says which of them have to wait for the data."""

    def __init__(self) -> None:
        self._data_drew = False

    def waits(self, node: Node, reads: bool) -> bool:
        """Whether a node cannot run before all rows: it ``reads`` what depends on the data, or draws after one did."""
        random = draws(node)
        waits = reads or (random and self._data_drew)
        if reads and random and node.op not in _DROPOUTS:
            self._data_drew = True
        return waits
