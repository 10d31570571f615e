"""Operations that are ``cat`` or ``slice`` under other names, rewritten so."""

from __future__ import annotations

from typing import Any

import torch

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.expansion import Builder, expands

__all__ = ["expand_split", "expand_stacks"]

aten = torch.ops.aten


@expands(aten.hstack.default)
@expands(aten.vstack.default)
@expands(aten.dstack.default)
def expand_stacks(builder: Builder, node: Node) -> bool:
    """``hstack``, ``vstack``, ``dstack`` of maps (three dimensions or more): ``cat`` along dimension 1, 0, 2."""
    if any(len(builder.values[ref.index].shape) < 3 for ref in node.args[0]):
        return False
    dimension = {"vstack": 0, "hstack": 1, "dstack": 2}[node.op._schema.name.split("::")[1]]
    builder.emit(node, aten.cat.default, (node.args[0], dimension), node.outputs, "cat")
    return True


@expands(aten.split.Tensor)
@expands(aten.split_with_sizes.default)
@expands(aten.split.sizes)
@expands(aten.chunk.default)
def expand_split(builder: Builder, node: Node) -> bool:
    """``split`` and ``chunk`` along the row axis: each part is a crop."""
    value = builder.values[node.args[0].index]
    rank, row = len(value.shape), builder.row(node.args[0])
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if row is None or given % rank != row:
        return False
    start = 0
    for number, output in enumerate(node.outputs):
        stop = start + builder.values[output].shape[row]
        args = (node.args[0], row, start, stop, 1)
        builder.emit(node, aten.slice.Tensor, args, (output,), f"part{number}")
        start = stop
    return True
