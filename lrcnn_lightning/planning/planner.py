"""The planner: choices -> the plan that they give, and its price."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lrcnn_lightning.planning.builder import SegmentBuilder
from lrcnn_lightning.planning.choices import Choices, Part
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.data import choices_of
from lrcnn_lightning.planning.keeping import choose_residencies
from lrcnn_lightning.planning.limit import Limit
from lrcnn_lightning.planning.loops import Loops
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.residency import Residencies
from lrcnn_lightning.planning.room import Room
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.planning.segments import segment_borders, stretches
from lrcnn_lightning.planning.simulation import Simulator
from lrcnn_lightning.planning.steps import Segment
from lrcnn_lightning.rules import Interval, Role, RowGraph, family_of

__all__ = ["Planner", "carried_nodes", "plain_plan"]

_DEAR = ("contraction", "convolution", "pooling", "resize")
"""Families of operations that do more than read and write each element once or so."""


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


class Planner:
    """Makes and prices the plans of one problem, and remembers what they have in common: plans that differ in one
    segment have the others in common, and those that differ in what is kept of one map have most loops in common.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.limit = Limit(problem)
        self._simulator, self._loops = Simulator(problem), Loops(problem.graph)
        self._room = Room(self._simulator, self._loops, self.limit)
        self._builders: dict[Any, tuple[SegmentBuilder, Segment]] = {}
        """Segments by their nodes and by what is chosen for them."""
        self._plain: dict[Any, Segment] = {}
        self._residencies: dict[Any, Residencies] = {}
        self.stretches = stretches(problem.graph, problem.differentiable, problem.has_backward)
        self._carried = {mode: carried_nodes(problem.graph, mode) for mode in ("two_phase", "overlap")}

    def cost(self, plan: Plan) -> Cost:
        """What a plan costs, as `Plan.cost` but for the timeline, and sooner."""
        return plan.plain_cost if plan.mode == "plain" else self._simulator.cost(plan)

    def saved(self, saved: SavedPlan) -> Plan:
        """The plan that was saved.

        Raises `PlanError` where its axis or its operations are not those of the graph, and where an operation would
        have a tensor that is too large (`limit`).
        """
        saved.check_axis(self.problem.graph.axis)
        if saved.mode == "plain":
            return plain_plan(self.problem)
        plan = self.plan(choices_of(saved.data, self.problem.graph))
        self.limit.check(plan)
        return plan

    def plan(self, choices: Choices, most_bytes: float = math.inf) -> Plan:
        """Segments, residencies and row intervals for some choices.

        A plan whose peak is above ``most_bytes``, or one of whose tensors is too large (`limit`), is not made to use
        its room: nobody wants it.
        """
        chunks = _chunks(self.problem.graph, choices.batch_chunks)
        runs = list(self._runs(choices))
        segments: list[Segment] = []
        builders: dict[int, SegmentBuilder] = {}
        borders = _borders(self.problem.graph, [nodes for nodes, _ in runs])
        for number, ((nodes, kind), outputs) in enumerate(zip(runs, borders, strict=True)):
            name = f"s{nodes[0]}"  # where it begins: the same whatever is cut before it
            if kind == "plain":
                segments.append(self._plainly(name, nodes, tuple(outputs)))
            else:
                builders[number], segment = self._segment(name, nodes, kind, outputs, choices, chunks)
                segments.append(segment)
        program = Program(self.problem, choices, tuple(segments))
        if self.limit.oversized(program) is None and (
            most_bytes == math.inf or self._simulator.cost(program).peak_bytes <= most_bytes
        ):
            program = self._room.used(program, builders)
        return Plan(self.problem, choices, program.segments)

    def _runs(self, choices: Choices) -> Iterator[tuple[tuple[int, ...], str]]:
        """The nodes of each segment, and how they run (`segments.Stretch`)."""
        for stretch in self.stretches:
            if stretch.kind == "plain":
                yield stretch.nodes, "plain"
                continue
            count = choices.forward_segments if stretch.kind == "frozen" else choices.segments
            for nodes in _cut(self.problem.graph, stretch.nodes, choices, count):
                yield nodes, stretch.kind

    def _segment(
        self,
        name: str,
        nodes: tuple[int, ...],
        kind: str,
        outputs: Sequence[int],
        choices: Choices,
        chunks: Sequence[Interval],
    ) -> tuple[SegmentBuilder, Segment]:
        """A segment that runs by rows, and what built it."""
        graph, part, inside = self.problem.graph, choices.part(nodes[0], kind == "frozen"), frozenset(nodes)
        own = tuple((value, kept) for value, kept in choices.exceptions if graph.producer.get(value) in inside)
        key = (name, nodes, tuple(outputs), part, own, tuple(chunks), kind)
        if key not in self._builders:
            residencies = self._kept(nodes, outputs, part, own)
            builder = SegmentBuilder(
                self._loops,
                name,
                nodes,
                outputs,
                residencies,
                part.rows,
                self._carried[part.mode],
                chunks,
                self.problem.differentiable,
                on_demand=part.keeping != "borders",
                balanced=part.heights == "balanced",
            )
            self._builders[key] = builder, builder.build(training=kind == "rows")
        return self._builders[key]

    def _plainly(self, name: str, nodes: tuple[int, ...], outputs: tuple[int, ...]) -> Segment:
        key = name, nodes, outputs
        if key not in self._plain:
            self._plain[key] = _plain(self.problem.graph, name, nodes, outputs)
        return self._plain[key]

    def _kept(
        self, nodes: tuple[int, ...], outputs: Sequence[int], part: Part, exceptions: tuple[tuple[int, Any], ...]
    ) -> Residencies:
        key = (nodes, tuple(outputs), part.keeping, exceptions)
        if key not in self._residencies:
            graph = self.problem.graph
            self._residencies[key] = choose_residencies(graph, nodes, outputs, part.keeping, dict(exceptions))
        return self._residencies[key]


def plain_plan(problem: Problem) -> Plan:
    """The plan that leaves the module as it is."""
    return Plan(problem, Choices("plain", 1, 1, 1), ())


def _cut(graph: RowGraph, nodes: Sequence[int], choices: Choices, count: int) -> list[tuple[int, ...]]:
    """The nodes of a stretch, cut where segments begin."""
    if not choices.parts:
        return segment_borders(graph, nodes, count, choices.rows)
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


def _plain(graph: RowGraph, name: str, nodes: Sequence[int], outputs: Sequence[int]) -> Segment:
    inside = {o for p in nodes for o in graph.nodes[p].outputs}
    inputs = tuple(dict.fromkeys(i for p in nodes for i in graph.nodes[p].inputs if i not in inside))
    return Segment(name, tuple(nodes), inputs, tuple(outputs), (), (), (), plain=True)
