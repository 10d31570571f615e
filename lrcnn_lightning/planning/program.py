"""A program: the segments that were built from some choices, in order, as data that the engine walks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.steps import RunRows, Segment, drops_of
from lrcnn_lightning.rules import RowGraph

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """Segments in order, ready to be executed.

    ``mode`` is ``"two_phase"``, ``"overlap"`` or ``"plain"`` (the module's own forward, which needs no rows).
    """

    problem: Problem
    choices: Choices
    segments: tuple[Segment, ...]

    @property
    def graph(self) -> RowGraph:
        return self.problem.graph

    @property
    def machine(self) -> Machine:
        return self.problem.machine

    def on(self, machine: Machine) -> Self:
        """The same on another machine."""
        return replace(self, problem=replace(self.problem, machine=machine))

    @property
    def training(self) -> bool:
        """Whether it has a backward pass."""
        return self.problem.has_backward

    @property
    def mode(self) -> str:
        modes = {part.mode for part in self.choices.parts}
        return modes.pop() if len(modes) == 1 else self.choices.mode

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """Value -> index of the last segment that reads it; module outputs are never dropped."""
        last: dict[int, int] = {}
        for i, segment in enumerate(self.segments):
            for index in segment.inputs:
                last[index] = i
        for index in self.graph.graph.output_values():
            last.pop(index, None)
        return last

    @cached_property
    def drops(self) -> dict[int, tuple[int, ...]]:
        """After which node that runs plainly which values are dropped."""
        read = {index for segment in self.segments for index in segment.inputs}
        drops = drops_of(self.graph, self.problem.prologue, read.union(self.graph.graph.output_values()))
        for segment in self.segments:
            if segment.plain:
                drops.update(drops_of(self.graph, segment.nodes, segment.outputs))
        return drops

    @property
    def rows(self) -> int:
        """The largest number of rows of any loop, forward or backward."""
        return max((len(loop.rows) for segment in self.segments for loop in segment.loops()), default=1)

    @property
    def chunks(self) -> int:
        """The number of parts into which the batch is divided."""
        return max((len(loop.chunks) for loop in self.loops()), default=1)

    @property
    def calls(self) -> int:
        """Operations on slabs: one for each node of a loop, each row and each chunk of the batch."""
        loops = (loop for segment in self.segments for loop in segment.loops())
        return sum(len(loop.nodes) * len(loop.rows) * len(loop.chunks) for loop in loops)

    @cached_property
    def explicit(self) -> Choices:
        """The choices that give this program, segment by segment."""
        segments = [segment for segment in self.segments if not segment.plain]
        parts = tuple(self.choices.part(segment.nodes[0], not segment.backward) for segment in segments)
        return replace(self.choices, segments=len(parts), parts=parts)

    def loops(self) -> list[Loop]:
        """The forward loops, in order."""
        return [step.loop for s in self.segments for step in s.forward if isinstance(step, RunRows)]
