"""The problem: what a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.segments import differentiable_values
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A graph, which of its ``leaves`` (inputs and parameters) require a gradient, whether a backward pass is wanted
    (``training``), and the machine that it is for.
    """

    graph: RowGraph
    leaves: frozenset[int]
    training: bool
    machine: Machine = CPU

    @cached_property
    def differentiable(self) -> frozenset[int]:
        """The values that have a gradient."""
        return frozenset(differentiable_values(self.graph, self.leaves)) if self.training else frozenset()

    @cached_property
    def has_backward(self) -> bool:
        """Whether anything is differentiated that depends on the input's data."""
        graph = self.graph
        return any(
            output in self.differentiable
            for node, role in zip(graph.nodes, graph.roles, strict=True)
            for output in node.outputs
            if role is not Role.PROLOGUE
        )

    @cached_property
    def prologue(self) -> tuple[int, ...]:
        """The nodes (positions) that do not depend on the input's data."""
        return tuple(p for p, role in enumerate(self.graph.roles) if role is Role.PROLOGUE)
