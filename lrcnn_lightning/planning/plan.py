"""The plan: what the engine does, as data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lrcnn_lightning.planning.builder import ProgramBuilder
from lrcnn_lightning.planning.cost import Cost, program_cost
from lrcnn_lightning.planning.keeping import Keeping, choose_residencies
from lrcnn_lightning.planning.limit import Large, find_oversized
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.memo import Memo
from lrcnn_lightning.planning.memory import Memory
from lrcnn_lightning.planning.plain import plain_cost
from lrcnn_lightning.planning.program import RunRows, SegmentProgram, drops_of
from lrcnn_lightning.planning.residency import Residency
from lrcnn_lightning.planning.room import with_room
from lrcnn_lightning.planning.segments import differentiable_values, segment_borders, stretches
from lrcnn_lightning.rules import Interval, Role, RowGraph, family_of

if TYPE_CHECKING:
    from lrcnn_lightning.planning.notes import Note
    from lrcnn_lightning.planning.saved import SavedPlan
    from lrcnn_lightning.planning.schedule import Instruction

__all__ = ["Choices", "Heights", "Part", "Plan", "build_plan", "carried_nodes", "plain_plan"]


_DEAR = ("contraction", "convolution", "pooling", "resize")
"""Families of operations that do more than read and write each element once or so."""

Heights = Literal["even", "balanced"]
"""Of the rows: all alike, or such that all need the same memory (`loop.balanced_cuts`)."""


@dataclass(frozen=True)
class Part:
    """What is chosen for the segment that begins with node ``first`` (a position in the graph)."""

    first: int
    mode: str
    rows: int
    keeping: Keeping
    heights: Heights = "even"


@dataclass(frozen=True)
class Choices:
    """What is free to choose in a plan.

    ``rows`` and ``segments`` are positive numbers, ``mode`` a halo policy by its paper's name (``two_phase`` or
    ``overlap``), ``keeping`` what is kept of the inputs of normalisations (`keeping.choose_residencies`). ``parts``,
    where there are any, say for each segment where it begins and what holds in it; the numbers before are then only
    those of the plan at large. ``exceptions`` are maps (values of the graph) that have another residency than
    ``keeping`` gives them. With ``rows_where_needed`` loops that stay below the peak of the plan are divided into fewer
    rows, as few as the peak allows.
    """

    mode: str = "two_phase"
    rows: int = 4
    segments: int = 1
    batch_chunks: int = 1
    keeping: Keeping = "lean"
    parts: tuple[Part, ...] = ()
    exceptions: tuple[tuple[int, Residency], ...] = ()
    heights: Heights = "even"
    rows_where_needed: bool = False

    def part(self, first: int) -> Part:
        """What holds for the segment that begins with the node ``first``."""
        before = [part for part in self.parts if part.first <= first]
        if before:
            return replace(before[-1], first=first)
        return Part(first, self.mode, self.rows, self.keeping, self.heights)


@dataclass(frozen=True, eq=False)
class Plan:
    """Segments in order, ready to be executed, and what they are predicted to cost.

    ``mode`` is ``"two_phase"``, ``"overlap"`` or ``"plain"`` (the module's own forward, which needs no rows).
    """

    graph: RowGraph
    choices: Choices
    segments: tuple[SegmentProgram, ...]
    differentiable: frozenset[int]
    training: bool
    prologue: tuple[int, ...] = field(default=())
    machine: Machine = field(default=CPU, repr=False)
    notes: tuple[Note, ...] = ()
    """In what it departs from the options that it was made for."""
    memo: Memo | None = field(default=None, repr=False)
    """What it has in common with others, while plans are searched for; its cost has no timeline then."""

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
        drops = drops_of(self.graph, self.prologue, read.union(self.graph.graph.output_values()))
        for segment in self.segments:
            if segment.plain:
                drops.update(drops_of(self.graph, segment.nodes, segment.outputs))
        return drops

    @cached_property
    def cost(self) -> Cost:
        """Predicted cost of one step."""
        return self.plain_cost if self.mode == "plain" else self.simulated()

    def simulated(self, memory: Memory | None = None) -> Cost:
        """The cost of one step, found in a ``memory`` that may remember more."""
        parts = (self.graph, self.prologue, self.segments, self.drops, self.differentiable, self.last_reader)
        return program_cost(*parts, self.machine, memory, None if memory else self.memo)

    @cached_property
    def oversized(self) -> Large | None:
        """The largest tensor that an operation has, if it has more elements than the machine allows."""
        return find_oversized(self)

    @cached_property
    def plain_cost(self) -> Cost:
        """Predicted cost of one step of plain PyTorch."""
        return plain_cost(self.graph, self.differentiable, self.machine)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of activation memory, in bytes."""
        return self.cost.peak_bytes

    @property
    def plain_peak_bytes(self) -> int:
        """Predicted peak of activation memory of plain PyTorch, in bytes."""
        return self.plain_cost.peak_bytes

    @property
    def overhead(self) -> float:
        """Predicted work over plain work, less one."""
        return self.cost.seconds / self.plain_cost.seconds - 1

    @property
    def rows(self) -> int:
        """The largest number of rows of any loop, forward or backward."""
        return max((len(loop.rows) for segment in self.segments for loop in segment.loops()), default=1)

    @property
    def chunks(self) -> int:
        """The number of parts into which the batch is divided."""
        return max((len(loop.chunks) for loop in self.loops()), default=1)

    @cached_property
    def explicit(self) -> Choices:
        """The choices that give this plan, segment by segment."""
        firsts = [s.nodes[0] for s in self.segments if not s.plain]
        return replace(self.choices, segments=len(firsts), parts=tuple(self.choices.part(first) for first in firsts))

    def loops(self) -> list[Loop]:
        """The forward loops, in order."""
        return [step.loop for s in self.segments for step in s.forward if isinstance(step, RunRows)]

    def __str__(self) -> str:
        from lrcnn_lightning.planning.report import report

        return report(self)

    def plot(self, path: str | Path) -> None:
        """Draw the plan to a file (PNG, PDF or SVG by its ending): the rows of each map, and memory over the step."""
        from lrcnn_lightning.planning.picture import draw

        draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON): choices, predictions, segments with their residencies and schedule."""
        from lrcnn_lightning.planning.data import as_data

        return as_data(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SavedPlan:
        """The plan that was saved as ``data``: to be read, printed, or given to ``rowwise(module, plan=...)``."""
        from lrcnn_lightning.planning.saved import load_plan

        return load_plan(data)

    @cached_property
    def schedule(self) -> tuple[Instruction, ...]:
        """Every step in order; ``str`` of one is a line that `planning.schedule.parse` reads back."""
        from lrcnn_lightning.planning.schedule import instructions

        return instructions(self)


def carried_nodes(graph: RowGraph, mode: str) -> frozenset[int]:
    """The nodes whose halo is carried. Under ``two_phase`` all that read several maps, and those that are dear:
    computing a few rows of any other again is cheaper than storing them, since their input is carried.
    """
    if mode == "overlap":
        return frozenset()
    carried = set()
    for position, role in enumerate(graph.roles):
        dear = family_of(graph.nodes[position].op) in _DEAR
        if role is Role.ROW and (dear or len(graph.maps_read[position]) > 1):
            carried.add(position)
    return frozenset(carried)


def build_plan(
    graph: RowGraph,
    leaves: Collection[int],
    training: bool,
    choices: Choices,
    machine: Machine = CPU,
    memo: Memo | None = None,
    most_bytes: float = math.inf,
) -> Plan:
    """Segments, residencies and row intervals for some choices.

    ``leaves`` are the inputs and parameters that require a gradient; without ``training`` there is no backward pass.
    A plan whose peak is above ``most_bytes``, or one of whose tensors is too large (`limit`), is not made to use its
    room: nobody wants it.
    """
    remembered, memo = memo is not None, memo or Memo()
    wanted = frozenset(leaves)
    if wanted not in memo.differentiable:
        memo.differentiable[wanted] = differentiable_values(graph, wanted)
    differentiable = memo.differentiable[wanted] if training else set()
    training = training and any(
        output in differentiable
        for node, role in zip(graph.nodes, graph.roles, strict=True)
        for output in node.outputs
        if role is not Role.PROLOGUE
    )
    carried: dict[str, frozenset[int]] = {}
    chunks = _chunks(graph, choices.batch_chunks)
    exceptions = dict(choices.exceptions)
    plain: list[tuple[tuple[int, ...], str]] = []
    for stretch in stretches(graph, differentiable, training):
        if stretch.kind == "plain":
            plain.append((stretch.nodes, "plain"))
        elif stretch.kind == "frozen":
            plain.append((stretch.nodes, "frozen"))
        else:
            plain.extend((nodes, "rows") for nodes in _runs(graph, stretch.nodes, choices))
    outputs_of = _borders(graph, [nodes for nodes, _ in plain])
    segments: list[SegmentProgram] = []
    builders: dict[int, ProgramBuilder] = {}
    for number, (nodes, kind) in enumerate(plain):
        name, outputs = f"s{number}", outputs_of[number]
        if kind == "plain":
            segments.append(memo.plain.setdefault((name, nodes, tuple(outputs)), _plain(graph, name, nodes, outputs)))
            continue
        part = choices.part(nodes[0])
        if part.mode not in carried:
            carried[part.mode] = carried_nodes(graph, part.mode)
        inside = frozenset(nodes)
        own = {value: kept for value, kept in exceptions.items() if graph.producer.get(value) in inside}
        choice = (nodes, tuple(outputs), part.keeping, tuple(own.items()))
        if choice not in memo.residencies:
            memo.residencies[choice] = choose_residencies(graph, nodes, outputs, part.keeping, own)
        residencies = memo.residencies[choice]
        key = (name, nodes, tuple(outputs), part, tuple(residencies.items()), tuple(chunks), kind)
        if key not in memo.segments:
            builder = ProgramBuilder(
                graph,
                name,
                nodes,
                outputs,
                residencies,
                part.rows,
                carried[part.mode],
                chunks,
                differentiable,
                on_demand=part.keeping != "borders",
                balanced=part.heights == "balanced",
                memo=memo,
            )
            memo.segments[key] = builder, builder.build(training=kind == "rows")
        builders[number], program = memo.segments[key]
        segments.append(program)
    prologue = tuple(p for p in range(len(graph.nodes)) if graph.roles[p] is Role.PROLOGUE)
    plan = Plan(graph, choices, tuple(segments), frozenset(differentiable), training, prologue, machine, memo=memo)
    if plan.oversized is None and (most_bytes == math.inf or plan.peak_bytes <= most_bytes):
        plan = with_room(plan, builders)
    return plan if remembered else replace(plan, memo=None)


def plain_plan(graph: RowGraph, leaves: Collection[int], training: bool, machine: Machine = CPU) -> Plan:
    """The plan that leaves the module as it is."""
    differentiable = differentiable_values(graph, leaves) if training else set()
    return Plan(graph, Choices("plain", 1, 1, 1), (), frozenset(differentiable), training, machine=machine)


def _runs(graph: RowGraph, nodes: Sequence[int], choices: Choices) -> list[tuple[int, ...]]:
    """The nodes of a stretch, cut where segments begin."""
    if not choices.parts:
        return segment_borders(graph, nodes, choices.segments, choices.rows)
    starts = {part.first for part in choices.parts}
    ends = [0, *(i for i, p in enumerate(nodes) if i and p in starts), len(nodes)]
    return [tuple(nodes[a:b]) for a, b in itertools.pairwise(ends)]


def _chunks(graph: RowGraph, count: int) -> list[Interval]:
    samples = max((graph.samples(value.index) for value in graph.values), default=0)
    if samples == 0 or not graph.batch_splits:
        return [Interval(0, samples)]
    count = max(1, min(count, samples))
    return [Interval(samples * i // count, samples * (i + 1) // count) for i in range(count)]


def _borders(graph: RowGraph, runs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per run: the values that it makes and that a later run reads or the module returns."""
    home = {o: i for i, nodes in enumerate(runs) for p in nodes for o in graph.nodes[p].outputs}
    crossing: set[int] = set(graph.graph.output_values())
    for i, nodes in enumerate(runs):
        for position in nodes:
            crossing.update(index for index in graph.nodes[position].inputs if home.get(index, i) != i)
    return [[o for p in nodes for o in graph.nodes[p].outputs if o in crossing] for nodes in runs]


def _plain(graph: RowGraph, name: str, nodes: Sequence[int], outputs: Sequence[int]) -> SegmentProgram:
    inside = {o for p in nodes for o in graph.nodes[p].outputs}
    inputs = tuple(dict.fromkeys(i for p in nodes for i in graph.nodes[p].inputs if i not in inside))
    return SegmentProgram(name, tuple(nodes), inputs, tuple(outputs), (), (), (), plain=True)
