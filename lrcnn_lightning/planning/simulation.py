"""A program simulated: the peak of its activation memory, and its work, without running it.

Memory is simulated allocation by allocation, in the order of the schedule: slabs made and dropped, full maps, carries,
what autograd saves for each recomputed operation, gradient maps, the gradients of parameters while they are summed.
Work is time on a nominal machine: floating-point operations, bytes moved, and a fixed price an operation call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lrcnn_lightning.planning.cost import Cost, LoopCost
from lrcnn_lightning.planning.duration import Durations
from lrcnn_lightning.planning.loop import BackwardPass, Loop, LoopRun
from lrcnn_lightning.planning.memory import Entry, Key, Memory
from lrcnn_lightning.planning.passage import Passages
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.retained import is_parameter
from lrcnn_lightning.planning.steps import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    Segment,
    Sweep,
)
from lrcnn_lightning.planning.wholes import Wholes

__all__ = ["Simulator", "simulated"]


class Passage(NamedTuple):
    """What running a loop, or one direction of a segment, costs: bytes that it adds at its peak, seconds, and what it
    leaves in memory, where storages that were there before have the numbers that they had.

    ``name`` is that of the loop, by which its carries are known.
    """

    added_bytes: int
    seconds: float
    left: tuple[Entry, ...]
    name: str | None = None
    loops: tuple[LoopCost, ...] = ()
    """Of a segment: what its loops cost."""
    step_peaks: tuple[int, ...] = ()
    """Of a segment's backward pass: what it adds at the peak during each step, in bytes."""


class Simulator:
    """Prices the programs of one problem. What they have in common is simulated once, so a cost has no timeline."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.durations = Durations(problem.graph, problem.machine, problem.differentiable)
        self._passages = Passages(problem.graph, problem.differentiable, problem.machine)
        self._remembered: dict[Any, Passage] = {}
        """By what is run and whatever else it depends on."""
        self._costs: WeakKeyDictionary[Program, Cost] = WeakKeyDictionary()

    def cost(self, program: Program) -> Cost:
        """What a program costs."""
        cost = self._costs.get(program)
        if cost is None:
            memory = Memory(self.problem.machine)
            walk = _Walk(self.problem, self._passages, self.durations, memory, self._remembered)
            cost = self._costs[program] = walk.through(program)
        return cost


def simulated(program: Program, memory: Memory | None = None) -> Cost:
    """The cost of one step of a program, allocation by allocation; ``memory`` may be one that remembers more."""
    problem = program.problem
    passages = Passages(problem.graph, problem.differentiable, problem.machine)
    durations = Durations(problem.graph, problem.machine, problem.differentiable)
    return _Walk(problem, passages, durations, memory or Memory(problem.machine)).through(program)


class _Walk:
    """Walks the schedule of a program; with ``remembered`` passages, only through what is not among them."""

    def __init__(
        self,
        problem: Problem,
        passages: Passages,
        durations: Durations,
        memory: Memory,
        remembered: dict[Any, Passage] | None = None,
    ) -> None:
        self.graph, self.differentiable = problem.graph, problem.differentiable
        self.passages, self.durations, self.remembered = passages, durations, remembered
        self.work = durations.work
        self.wholes = Wholes(self.graph, passages.footprints, self.differentiable)
        self._work_in(memory)
        self.drops: Mapping[int, Sequence[int]] = {}
        self.seconds = 0.0
        self.start = 0
        """What was live when the segment that is run began, in bytes."""
        self.step_peaks: list[int] = []
        """The peak during each step of the backward pass of a segment, in bytes."""
        self.loops: list[LoopCost] = []
        """Of the segment that is run."""
        self.segments: list[tuple[int, tuple[LoopCost, ...]]] = []

    def through(self, program: Program) -> Cost:
        """The cost of a program."""
        graph, memory, segments, prologue = self.graph, self.memory, program.segments, program.problem.prologue
        self.drops = program.drops
        peaks: dict[int, int] = {}  # peak so far -> the segment that was run when it was reached
        step_peaks: dict[str, tuple[int, ...]] = {}
        kept: frozenset[int] = frozenset()
        kept_before: list[frozenset[int]] = []  # by the segments before each
        for segment in segments:
            kept_before.append(kept)
            kept |= frozenset(segment.kept)
        if graph.cast_bytes:
            memory.allocate(("cast",), graph.cast_bytes)
        self.wholes.plainly(prologue, self.drops)  # the same in every plan, and it counts as no work
        for number, segment in enumerate(segments):
            peaks.setdefault(memory.peak, number - 1)
            self.run_forward(segment)
            for index in segment.inputs:
                if program.last_reader.get(index) == number and index not in kept:
                    memory.free(("map", index))
        memory.free(("cast",))
        if self.differentiable:
            for index in graph.graph.output_values():
                if index not in kept:
                    memory.free(("map", index))  # as where a step returns its loss
                if index in self.differentiable:
                    memory.allocate(("gradient", index), 0)  # it comes from outside
            for number, segment in reversed(list(enumerate(segments))):
                peaks.setdefault(memory.peak, min(number + 1, len(segments) - 1))
                step_peaks[segment.name] = self.run_backward(segment, kept_before[number])
            self.wholes.differentiate_plainly(prologue)
        timeline, peak_segment = tuple(memory.timeline), peaks.get(memory.peak, 0)
        return Cost(memory.peak, self.seconds, timeline, peak_segment, step_peaks, tuple(self.segments))

    def _work_in(self, memory: Memory) -> None:
        self.memory = self.passages.memory = self.wholes.memory = memory

    def _once(
        self, key: tuple[Any, ...], entries: Sequence[Entry], run: Callable[[], None], name: str | None = None
    ) -> tuple[Passage, int]:
        """Run something once in a memory of its own, and let every run with the same ``key`` have the same effect.

        ``entries``: what is in memory before, of that which it looks at or frees. Among keys of memory ``name`` stands
        for the loop of which they are, and may be another in each run. Also returned are the bytes that were live
        before.
        """
        assert self.remembered is not None
        memory = self.memory
        key = (*key, tuple((e.key[2:] if e.key[1] == name else e.key, *e[1:]) for e in entries))
        passage = self.remembered.get(key)
        if passage is None:
            outside = self.start, self.seconds, self.loops, self.step_peaks
            self._work_in(Memory.beginning_with(entries, memory.machine))
            self.start, self.seconds, self.loops, self.step_peaks = self.memory.live, 0.0, [], []
            run()
            peaks = tuple(peak - self.start for peak in self.step_peaks)
            added = self.memory.peak - self.start
            passage = Passage(added, self.seconds, self.memory.left(), name, tuple(self.loops), peaks)
            self.remembered[key] = passage
            self._work_in(memory)
            self.start, self.seconds, self.loops, self.step_peaks = outside
        rest = memory.live
        memory.touch(passage.added_bytes)
        memory.replace(entries, _of_loop(passage, name))
        self.seconds += passage.seconds
        return passage, rest

    def _loop(
        self, run: LoopRun, carries: Any, name: str | None, entries: Sequence[Entry], simulate: Callable[[], None]
    ) -> None:
        """Simulate a loop, or take over what is known of one that is alike but for its ``name``; ``carries``: what
        becomes of them.
        """

        def timed() -> None:
            simulate()
            self.seconds += self.durations.of(run)

        if self.remembered is None:
            timed()
            return
        passage, before = self._once((run.key, carries), entries, timed, name)
        stays = self.memory.live - before
        self.loops.append(LoopCost(run, self.memory.live - self.start, passage.added_bytes - stays, passage.seconds))

    def run_forward(self, segment: Segment) -> None:
        """Simulate the forward pass of a segment."""
        run = partial(self._plainly if segment.plain else self._forward, segment)
        if self.remembered is None:
            run()
            return
        entries = self.memory.given(self.memory.of("map", segment.inputs))
        passage, rest = self._once((segment, "forward"), entries, run)
        self.segments.append((rest, passage.loops))

    def run_backward(self, segment: Segment, kept_before: Collection[int]) -> tuple[int, ...]:
        """Simulate the backward pass of a segment: the peak during each step of it, in bytes.

        ``kept_before``: what earlier segments keep for their own backward pass, which comes later.
        """
        memory = self.memory
        kept = frozenset(kept_before).intersection((*segment.kept, *segment.outputs))
        run = partial(self._differentiate_plainly, segment)
        if not segment.plain:
            run = partial(self._backward, segment, kept)
        if self.remembered is None:
            self.step_peaks = []
            run()
            return tuple(self.step_peaks)
        seen = {*segment.inputs, *(o for p in segment.nodes for o in self.graph.nodes[p].outputs)}
        keys = [*memory.of("map", seen), *memory.of("gradient", seen), *memory.within("keep", segment.name)]
        if segment.plain:
            keys += self.wholes.saved(segment.nodes)
        passage, rest = self._once((segment, kept), memory.given(keys), run)
        self.segments.append((rest, passage.loops))
        return tuple(peak + rest for peak in passage.step_peaks)

    # ---------------------------------------------------------------- plainly

    def _plainly(self, segment: Segment) -> None:
        self.wholes.plainly(segment.nodes, self.drops)
        self.seconds += sum(self.work.forward(position) for position in segment.nodes)

    def _differentiate_plainly(self, segment: Segment) -> None:
        self.wholes.differentiate_plainly(segment.nodes)
        self.seconds += sum(self._backward_seconds(position) for position in segment.nodes)

    def _backward_seconds(self, position: int) -> float:
        return self.work.backward_whole(position, self.differentiable)

    # ---------------------------------------------------------------- forward

    def _forward(self, segment: Segment) -> None:
        for step in segment.forward:
            if isinstance(step, RunRows):
                self._rows(step.loop, step.kept_carries, stored=True)
            elif isinstance(step, (RunWhole, Effect)):
                self.wholes.run(step.node)
                self.seconds += self.work.forward(step.node)
            elif isinstance(step, Free):
                self.memory.free(("map", step.value))
        staying = {*segment.outputs, *segment.kept}
        for position in segment.nodes:
            for output in self.graph.nodes[position].outputs:
                if output not in staying:
                    self.memory.free(("map", output))

    def _rows(self, loop: Loop, kept_carries: frozenset[int], stored: bool) -> None:
        entries = _flags(self.memory.of("map", loop.stored))
        simulate = partial(self.passages.rows, loop, kept_carries, stored)
        self._loop(LoopRun(loop, stored), kept_carries, loop.name, entries, simulate)

    def _backward_rows(self, run: BackwardPass, dropped: str | None) -> None:
        gradients = self.memory.of("gradient", (*run.maps, *run.wholes))
        present = frozenset(key[1] for key in gradients if key[1] in run.maps)
        entries = _flags([*gradients, *self.memory.of("lent", run.maps)])
        if dropped is not None:
            carries, count = self.memory.given(self.memory.matching("keep", (dropped,))), len(entries)
            entries += tuple(entry._replace(storage=entry.storage + count) for entry in carries)
        simulate = partial(self.passages.backward_rows, run, dropped)
        self._loop(LoopRun(run.loop, backward=run, made=present), dropped is None, dropped, entries, simulate)

    def _backward(self, segment: Segment, kept_before: Collection[int]) -> None:
        graph, memory = self.graph, self.memory
        memory.mark()
        received = [index for index in segment.inputs if ("gradient", index) in memory]
        for index in received:  # from other segments: autograd adds this one's to it at the end
            memory.rename(("gradient", index), ("received", index))
        for step in segment.backward:
            if isinstance(step, BackwardRows):
                self._borrow(segment, step.run.maps)
                self._backward_rows(step.run, step.carries if step.drops else None)
            elif isinstance(step, RunRows):
                self._rows(step.loop, frozenset(), stored=True)
            elif isinstance(step, Sweep):
                self._rows(step.loop, step.loop.carried, stored=False)
            elif isinstance(step, BackwardWhole):
                self._borrow(segment, graph.nodes[step.node].inputs)
                self.wholes.differentiate(step.node, again=True)
                self.seconds += self.work.forward(step.node) + self._backward_seconds(step.node)
            elif isinstance(step, Free):
                memory.free(("map", step.value))
            elif isinstance(step, FreeGradient) and (
                step.value not in segment.outputs or ("borrowed", step.value) in memory
            ):
                memory.free(("gradient", step.value))
            if isinstance(step, (BackwardRows, BackwardWhole, Sweep)):
                self.step_peaks.append(memory.mark())
        for index in (*segment.kept, *segment.outputs):
            if index not in kept_before:
                memory.free(("map", index))
            if index in segment.outputs:
                memory.free(("gradient", index))
                memory.free(("borrowed", index))
        memory.free_all("keep", segment.name)
        for index in segment.inputs:
            if is_parameter(graph, index):  # its sum becomes its ``.grad``
                memory.free(("gradient", index))
        for index in received:
            ours = memory.size(("gradient", index))
            if ours > memory.size(("received", index)):  # which takes no memory where it comes of a loss
                memory.free(("received", index))
            else:
                memory.free(("gradient", index))
                memory.rename(("received", index), ("gradient", index))

    def _borrow(self, segment: Segment, values: Collection[int]) -> None:
        """The gradient of an output is autograd's, for as long as the segment runs: what adds to it makes a copy."""
        memory = self.memory
        for value in values:
            if value in segment.outputs and ("gradient", value) in memory and ("borrowed", value) not in memory:
                memory.rename(("gradient", value), ("borrowed", value))


def _flags(keys: Iterable[Key]) -> tuple[Entry, ...]:
    """That something is under these keys, whatever it is."""
    return tuple(Entry(key, 0, number) for number, key in enumerate(keys))


def _of_loop(passage: Passage, name: str | None) -> tuple[Entry, ...]:
    """What a passage leaves, with the name of the loop that runs instead of that of the loop that was simulated."""
    if passage.name == name:
        return passage.left
    return tuple(
        entry._replace(key=(entry.key[0], name, *entry.key[2:])) if entry.key[1] == passage.name else entry
        for entry in passage.left
    )
