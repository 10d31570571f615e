"""Nodes of which nobody reads the results: left out, unless they do something else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lrcnn_lightning.graph import Node
from lrcnn_lightning.rules.rule import Operator, Reduction, RowRule

__all__ = ["useful"]


def useful(nodes: Sequence[Node], rules: Sequence[RowRule | Reduction | None], outputs: Iterable[int]) -> list[bool]:
    """For each node: whether the values ``outputs``, or an effect, depend on it."""
    read = set(outputs)
    found = []
    for node, rule in zip(reversed(nodes), reversed(rules), strict=True):
        needed = any(output in read for output in node.outputs) or (rule is None and _has_effect(node))
        if needed:
            read.update(node.inputs)
        found.append(needed)
    return found[::-1]


def _has_effect(node: Node) -> bool:
    """Whether a node that runs whole changes a tensor, or takes random numbers, of which those after it get others."""
    op = node.op
    if isinstance(op, Operator):
        return op.effect
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return True  # nothing is known of it
    if op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags:
        return True
    # These move running statistics, and their schema does not say so.
    statistics = op._schema.name.endswith(("batch_norm", "instance_norm", "batch_norm_impl_index"))
    return statistics and bool(node.args[5])
