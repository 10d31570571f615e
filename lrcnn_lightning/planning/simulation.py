"""What a plan costs: the peak of its activation memory, and its work, without running it.

Memory is simulated allocation by allocation, in the order of the schedule: slabs made and dropped, full maps, carries,
what autograd saves for each recomputed operation, gradient maps, the gradients of parameters while they are summed.
Work is time on a nominal machine: floating-point operations, bytes moved, and a fixed price an operation call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lrcnn_lightning.planning.duration import Durations
from lrcnn_lightning.planning.loop import BackwardPass, Loop, LoopRun
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.memo import LoopCost, Memo, Passage
from lrcnn_lightning.planning.memory import Entry, Key, Memory
from lrcnn_lightning.planning.passage import Passages
from lrcnn_lightning.planning.program import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    SegmentProgram,
    Sweep,
)
from lrcnn_lightning.planning.retained import is_parameter
from lrcnn_lightning.planning.wholes import Wholes
from lrcnn_lightning.rules import RowGraph

__all__ = ["Cost", "program_cost"]


@dataclass(frozen=True)
class Cost:
    """``peak_bytes`` of activation memory, and ``seconds`` of nominal time, of one training step."""

    peak_bytes: int
    seconds: float
    timeline: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """Live bytes of activation memory after each allocation of the step."""
    peak_segment: int = 0
    """The number of the segment that is run, forward or backward, when the peak is reached."""
    step_peaks: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Per segment, by its name: the peak during each step of its backward pass, in bytes. Loops that restore maps are
    part of the step that follows them."""
    passages: tuple[tuple[int, tuple[LoopCost, ...]], ...] = field(default=(), repr=False, compare=False)
    """The loops of each segment, forward and backward, and what else is there while they run, in bytes."""

    @property
    def loops(self) -> Iterator[LoopCost]:
        """Of every run of a loop, in order."""
        for rest, loops in self.passages:
            for run, fixed, slabs, seconds in loops:
                yield LoopCost(run, fixed + rest, slabs, seconds)


class _Simulation:
    """Walks a program's schedule."""

    def __init__(
        self,
        graph: RowGraph,
        differentiable: Collection[int],
        drops: Mapping[int, Sequence[int]],
        machine: Machine,
        memory: Memory | None,
        memo: Memo | None,
    ) -> None:
        self.graph, self.differentiable, self.drops = graph, differentiable, drops
        known = memo or Memo()
        self.passages = known.simulated = known.simulated or Passages(graph, differentiable, machine)
        self.durations = known.durations = known.durations or Durations(graph, machine, differentiable)
        self.work = self.durations.work
        self.wholes = Wholes(graph, self.passages.footprints, differentiable)
        self._work_in(memory or Memory(machine))
        self.memo = memo
        self.seconds = 0.0
        self.start = 0
        """What was live when the segment that is run began, in bytes."""
        self.step_peaks: list[int] = []
        """The peak during each step of the backward pass of a segment, in bytes."""
        self.loops: list[LoopCost] = []
        """Of the segment that is run."""
        self.segments: list[tuple[int, tuple[LoopCost, ...]]] = []

    def _work_in(self, memory: Memory) -> None:
        self.memory = self.passages.memory = self.wholes.memory = memory

    def _once(
        self, key: tuple[Any, ...], given: Sequence[Entry], run: Callable[[], None], name: str | None = None
    ) -> tuple[Passage, int]:
        """Run something once in a memory of its own, and let every run with the same ``key`` have the same effect.

        ``given``: what is in memory before, of that which it looks at or frees. Among keys of memory ``name`` stands
        for the loop of which they are, and may be another in each run. Also returned are the bytes that were live
        before.
        """
        assert self.memo is not None
        memory = self.memory
        key = (*key, tuple((e.key[2:] if e.key[1] == name else e.key, *e[1:]) for e in given))
        found = self.memo.passages.get(key)
        if found is None:
            outside = self.start, self.seconds, self.loops, self.step_peaks
            self._work_in(Memory.beginning_with(given, memory.machine))
            self.start, self.seconds, self.loops, self.step_peaks = self.memory.live, 0.0, [], []
            run()
            peaks = tuple(peak - self.start for peak in self.step_peaks)
            added = self.memory.peak - self.start
            found = Passage(added, self.seconds, self.memory.left(), name, tuple(self.loops), peaks)
            self.memo.passages[key] = found
            self._work_in(memory)
            self.start, self.seconds, self.loops, self.step_peaks = outside
        rest = memory.live
        memory.touch(found.added_bytes)
        memory.replace(given, _of_loop(found, name))
        self.seconds += found.seconds
        return found, rest

    def _loop(
        self, run: LoopRun, carries: Any, name: str | None, given: Sequence[Entry], simulate: Callable[[], None]
    ) -> None:
        """Simulate a loop, or take over what is known of one that is alike but for its ``name``; ``carries``: what
        becomes of them.
        """

        def timed() -> None:
            simulate()
            self.seconds += self.durations.of(run)

        if self.memo is None:
            timed()
            return
        found, before = self._once((run.key, carries), given, timed, name)
        stays = self.memory.live - before
        self.loops.append(LoopCost(run, self.memory.live - self.start, found.added_bytes - stays, found.seconds))

    def run_prologue(self, nodes: Sequence[int]) -> None:
        """Simulate what does not depend on the data: the same in every plan, and it counts as no work."""
        self.wholes.plainly(nodes, self.drops)

    def run_forward(self, segment: SegmentProgram) -> None:
        """Simulate the forward pass of a segment."""
        run = partial(self._plainly if segment.plain else self._forward, segment)
        if self.memo is None:
            run()
            return
        given = self.memory.given(self.memory.of("map", segment.inputs))
        found, rest = self._once((segment, "forward"), given, run)
        self.segments.append((rest, found.loops))

    def run_backward(self, segment: SegmentProgram, kept_before: Collection[int]) -> tuple[int, ...]:
        """Simulate the backward pass of a segment: the peak during each step of it, in bytes.

        ``kept_before``: what earlier segments keep for their own backward pass, which comes later.
        """
        memory = self.memory
        kept = frozenset(kept_before).intersection((*segment.kept, *segment.outputs))
        run = partial(self._differentiate_plainly, segment)
        if not segment.plain:
            run = partial(self._backward, segment, kept)
        if self.memo is None:
            self.step_peaks = []
            run()
            return tuple(self.step_peaks)
        seen = {*segment.inputs, *(o for p in segment.nodes for o in self.graph.nodes[p].outputs)}
        keys = [*memory.of("map", seen), *memory.of("gradient", seen), *memory.within("keep", segment.name)]
        if segment.plain:
            keys += self.wholes.saved(segment.nodes)
        found, rest = self._once((segment, kept), memory.given(keys), run)
        self.segments.append((rest, found.loops))
        return tuple(peak + rest for peak in found.step_peaks)

    # ---------------------------------------------------------------- plainly

    def _plainly(self, segment: SegmentProgram) -> None:
        self.wholes.plainly(segment.nodes, self.drops)
        self.seconds += sum(self.work.forward(position) for position in segment.nodes)

    def _differentiate_plainly(self, segment: SegmentProgram) -> None:
        self.wholes.differentiate_plainly(segment.nodes)
        self.seconds += sum(self._backward_seconds(position) for position in segment.nodes)

    def _backward_seconds(self, position: int) -> float:
        return self.work.backward_whole(position, self.differentiable)

    # ---------------------------------------------------------------- forward

    def _forward(self, segment: SegmentProgram) -> None:
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
        given = _flags(self.memory.of("map", loop.stored))
        simulate = partial(self.passages.rows, loop, kept_carries, stored)
        self._loop(LoopRun(loop, stored), kept_carries, loop.name, given, simulate)

    def _backward_rows(self, run: BackwardPass, dropped: str | None) -> None:
        known = self.memory.of("gradient", (*run.maps, *run.wholes))
        made = frozenset(key[1] for key in known if key[1] in run.maps)
        given = _flags(known)
        if dropped is not None:
            carries = self.memory.given(self.memory.matching("keep", (dropped,)))
            given += tuple(entry._replace(storage=entry.storage + len(known)) for entry in carries)
        simulate = partial(self.passages.backward_rows, run, dropped)
        self._loop(LoopRun(run.loop, backward=run, made=made), dropped is None, dropped, given, simulate)

    def _backward(self, segment: SegmentProgram, kept_before: Collection[int]) -> None:
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

    def _borrow(self, segment: SegmentProgram, values: Collection[int]) -> None:
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


def program_cost(
    graph: RowGraph,
    prologue: Sequence[int],
    segments: Sequence[SegmentProgram],
    drops: Mapping[int, Sequence[int]],
    differentiable: Collection[int],
    last_reader: Mapping[int, int],
    machine: Machine = CPU,
    memory: Memory | None = None,
    memo: Memo | None = None,
) -> Cost:
    """The cost of one step of a program; ``memory`` may be one that remembers more.

    With a ``memo`` of what other plans of the graph cost it is found sooner, but has no timeline.
    """
    simulation = _Simulation(graph, differentiable, drops, machine, memory, memo)
    memory = simulation.memory
    peaks: dict[int, int] = {}  # peak so far -> the segment that was run when it was reached
    step_peaks: dict[str, tuple[int, ...]] = {}
    kept = {index for segment in segments for index in segment.kept}
    if graph.cast_bytes:
        memory.allocate(("cast",), graph.cast_bytes)
    simulation.run_prologue(prologue)
    for number, segment in enumerate(segments):
        peaks.setdefault(memory.peak, number - 1)
        simulation.run_forward(segment)
        for index in segment.inputs:
            if last_reader.get(index) == number and index not in kept:
                memory.free(("map", index))
    memory.free(("cast",))
    if differentiable:
        for index in graph.graph.output_values():
            if index not in kept:
                memory.free(("map", index))  # as where a step returns its loss
            if index in differentiable:
                memory.allocate(("gradient", index), 0)  # it comes from outside
        for number, segment in reversed(list(enumerate(segments))):
            peaks.setdefault(memory.peak, min(number + 1, len(segments) - 1))
            kept_before = {index for earlier in segments[:number] for index in earlier.kept}
            step_peaks[segment.name] = simulation.run_backward(segment, kept_before)
        simulation.wholes.differentiate_plainly(prologue)
    return Cost(
        memory.peak,
        simulation.seconds,
        tuple(memory.timeline),
        peaks.get(memory.peak, 0),
        step_peaks,
        tuple(simulation.segments),
    )
