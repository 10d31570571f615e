"""A segment's program, as data: what its forward and its backward pass do, step by step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lrcnn_lightning.planning.loop import BackwardPass, Loop
from lrcnn_lightning.planning.residency import Residencies
from lrcnn_lightning.rules import RowGraph

__all__ = [
    "BackwardRows",
    "BackwardWhole",
    "Effect",
    "Free",
    "FreeGradient",
    "RunRows",
    "RunWhole",
    "Segment",
    "Step",
    "Sweep",
    "drops_of",
    "reads_of",
    "writes_of",
]


@dataclass(frozen=True)
class RunRows:
    """Run a loop forward, and keep what the nodes in ``kept_carries`` carry for the backward pass."""

    loop: Loop
    kept_carries: frozenset[int] = frozenset()


@dataclass(frozen=True)
class RunWhole:
    """Run a whole node (its position)."""

    node: int


@dataclass(frozen=True)
class Effect:
    """Run a node that changes a buffer, once a step."""

    node: int


@dataclass(frozen=True)
class Free:
    """Drop a full map or whole value."""

    value: int


@dataclass(frozen=True)
class FreeGradient:
    """Drop a gradient map: it has been handed on."""

    value: int


@dataclass(frozen=True)
class BackwardRows:
    """Run a backward pass, with the carries that were kept under the loop's name ``carries``.

    The last pass that reads them (``drops``) drops each row's carries as soon as that row is done: the rows run from
    the bottom, so the first row, the largest under two-phase sharing, finds none of the others' left.
    """

    run: BackwardPass
    carries: str | None
    drops: bool = False


@dataclass(frozen=True)
class Sweep:
    """Run a loop for its carries alone: the forward pass kept none that serve it."""

    loop: Loop


@dataclass(frozen=True)
class BackwardWhole:
    """Differentiate a whole node (its position)."""

    node: int


Step = RunRows | RunWhole | Effect | Sweep | BackwardRows | BackwardWhole | Free | FreeGradient


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment.

    ``inputs`` and ``outputs`` are values at its borders (inputs include parameters and prologue values); ``kept`` are
    the values, of its inside and of its inputs, that its backward pass reads. A running statistic that is only
    updated is not among them, so a later call may change it.
    """

    name: str
    nodes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kept: tuple[int, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    plain: bool = False
    differentiable: frozenset[int] = frozenset()
    residencies: Residencies = field(default_factory=dict)

    def loops(self) -> list[Loop]:
        """The loops of the forward and of the backward pass, in order."""
        steps = (*self.forward, *self.backward)
        return [
            step.run.loop if isinstance(step, BackwardRows) else step.loop
            for step in steps
            if isinstance(step, (RunRows, Sweep, BackwardRows))
        ]


def drops_of(graph: RowGraph, nodes: Sequence[int], kept: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Of nodes that run plainly: after which of them which values that they make are dropped, but for ``kept``."""
    made = {output for position in nodes for output in graph.nodes[position].outputs}
    last: dict[int, int] = {}
    for position in nodes:
        node = graph.nodes[position]
        last.update(dict.fromkeys(made.intersection((*node.inputs, *node.outputs)).difference(kept), position))
    result: dict[int, tuple[int, ...]] = {}
    for value, position in last.items():
        result[position] = (*result.get(position, ()), value)
    return result


def reads_of(graph: RowGraph, step: Step) -> tuple[int, ...]:
    """The full maps and whole values that a step reads."""
    if isinstance(step, (RunRows, Sweep)):
        inner = {o for p in step.loop.nodes for o in graph.nodes[p].outputs}
        wholes = [i for p in step.loop.nodes for i in graph.nodes[p].inputs if not graph.is_map(i)]
        return tuple(dict.fromkeys((*(s for s in step.loop.sources if s not in inner), *wholes)))
    if isinstance(step, (RunWhole, Effect)):
        return graph.nodes[step.node].inputs
    if isinstance(step, BackwardWhole):
        return graph.nodes[step.node].inputs
    if isinstance(step, BackwardRows):
        run = step.run
        wholes = [i for p in run.nodes for i in graph.nodes[p].inputs if not graph.is_map(i)]
        for position in run.injections:
            wholes.extend(graph.nodes[position].outputs)
        maps = [
            graph.nodes[p].inputs[0]
            for p in run.injections
            if graph.producer.get(graph.nodes[p].inputs[0]) in run.hollow
        ]
        return tuple(dict.fromkeys((*run.loop.sources, *wholes, *maps)))
    return ()


def writes_of(graph: RowGraph, step: Step) -> tuple[int, ...]:
    """The full maps and whole values that a step makes."""
    if isinstance(step, RunRows):
        outputs = [o for p in step.loop.reductions for o in graph.nodes[p].outputs]
        return (*step.loop.stored, *outputs)
    if isinstance(step, RunWhole):
        return graph.nodes[step.node].outputs
    return ()
