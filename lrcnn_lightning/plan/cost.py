"""What a plan costs: the peak of its activation memory, and its work, without running it.

Memory is simulated allocation by allocation, in the order of the schedule: slabs made and dropped, full maps, carries,
what autograd saves for each recomputed operation, gradient maps, the gradients of parameters while they are summed.
Work is time on a nominal machine: floating-point operations, bytes moved, and a fixed price an operation call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lrcnn_lightning.plan.duration import Durations
from lrcnn_lightning.plan.loop import BackwardPass, Loop, LoopRun
from lrcnn_lightning.plan.machine import CPU, Machine
from lrcnn_lightning.plan.memo import LoopCost, Memo, Passage
from lrcnn_lightning.plan.memory import Memory
from lrcnn_lightning.plan.passage import Passages
from lrcnn_lightning.plan.program import (
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
from lrcnn_lightning.plan.retained import is_parameter, sum_bytes
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
        machine: Machine,
        memory: Memory | None,
        memo: Memo | None,
    ) -> None:
        self.graph, self.differentiable = graph, differentiable
        known = memo or Memo()
        self.passages = known.simulated = known.simulated or Passages(graph, differentiable, machine)
        self.durations = known.durations = known.durations or Durations(graph, machine, differentiable)
        self.work = self.durations.work
        self.machine = machine
        self.memory = self.passages.memory = memory or Memory(machine)
        self.memo = memo
        self.seconds = 0.0
        self.step_peaks: list[int] = []
        """The peak during each step of the backward pass of a segment, in bytes."""
        self.loops: list[LoopCost] = []
        """Of the segment that is run."""
        self.segments: list[tuple[int, tuple[LoopCost, ...]]] = []

    def _once(
        self, key: tuple[Any, ...], given: dict[tuple[Any, ...], int], run: Callable[[], None], name: str | None = None
    ) -> tuple[Passage, int]:
        """Run something once in a memory of its own, and let every run with the same ``key`` have the same effect.

        ``given``: what is in memory before, of that which it looks at or frees. Among keys of memory ``name`` stands
        for the loop of which they are, and may be another in each run. Also returned are the bytes that are there and
        were not given.
        """
        assert self.memo is not None
        memory = self.memory
        key = (*key, tuple((k[2:] if k[1] == name else k, size) for k, size in given.items()))
        found = self.memo.passages.get(key)
        if found is None:
            outside = self.seconds, self.loops, self.step_peaks
            self.memory = self.passages.memory = Memory(self.machine)
            self.seconds, self.loops, self.step_peaks = 0.0, [], []
            for k, size in given.items():
                self.memory.put(k, size)
            run()
            left = tuple(self.memory.entries())
            found = Passage(self.memory.peak, self.seconds, left, name, tuple(self.loops), tuple(self.step_peaks))
            self.memo.passages[key] = found
            self.memory = self.passages.memory = memory
            self.seconds, self.loops, self.step_peaks = outside
        rest = memory.live - sum(given.values())
        memory.touch(found.peak_bytes - sum(given.values()))
        after = {(k[0], name, *k[2:]) if k[1] == found.name else k: size for k, size in found.left}
        for k in given:
            if k not in after:
                memory.free(k)
        for k, size in after.items():
            memory.put(k, size)
        self.seconds += found.seconds
        return found, rest

    def _loop(
        self,
        run: LoopRun,
        carries: Any,
        name: str | None,
        given: dict[tuple[Any, ...], int],
        simulate: Callable[[], None],
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
        before = self.memory.live
        found, _ = self._once((run.key, carries), given, timed, name)
        own, left = found.peak_bytes - sum(given.values()), self.memory.live
        self.loops.append(LoopCost(run, left, own - (left - before), found.seconds))

    def run_forward(self, segment: SegmentProgram) -> None:
        """Simulate the forward pass of a segment."""
        if segment.plain:
            for position in segment.nodes:
                self._whole(position, plain=True)
        elif self.memo is None:
            self._forward(segment)
        else:
            found, rest = self._once((segment, "forward"), {}, lambda: self._forward(segment))
            self.segments.append((rest, found.loops))

    def run_backward(self, segment: SegmentProgram, kept_before: Collection[int]) -> tuple[int, ...]:
        """Simulate the backward pass of a segment: the peak during each step of it, in bytes.

        ``kept_before``: what earlier segments keep for their own backward pass, which comes later.
        """
        graph, memory = self.graph, self.memory
        if segment.plain:
            for position in reversed(segment.nodes):
                self._backward_whole(position, plain=True)
                self.memory.free(("extra", position))
                for output in graph.nodes[position].outputs:
                    memory.free(("map", output))
                    memory.free(("gradient", output))
            return ()
        if self.memo is None:
            self.step_peaks = []
            self._backward(segment, kept_before)
            return tuple(self.step_peaks)
        seen = {*segment.inputs, *(o for p in segment.nodes for o in graph.nodes[p].outputs)}
        given = {**memory.of("map", seen), **memory.of("gradient", seen), **memory.within("keep", segment.name)}
        kept = frozenset(kept_before).intersection((*segment.kept, *segment.outputs))
        found, rest = self._once((segment, kept), given, lambda: self._backward(segment, kept))
        self.segments.append((rest, found.loops))
        return tuple(peak + rest for peak in found.step_peaks)

    # ---------------------------------------------------------------- forward

    def _forward(self, segment: SegmentProgram) -> None:
        for step in segment.forward:
            if isinstance(step, RunRows):
                self._rows(step.loop, step.kept_carries, stored=True)
            elif isinstance(step, (RunWhole, Effect)):
                self._whole(step.node)
            elif isinstance(step, Free):
                self.memory.free(("map", step.value))

    def _whole(self, position: int, plain: bool = False) -> None:
        """A node on full maps; in a ``plain`` segment autograd saves what it needs beside these."""
        node = self.graph.nodes[position]
        if node.outputs:
            footprint = self.passages.footprints.whole(position)
            saved = footprint.extra if plain and any(o in self.differentiable for o in node.outputs) else 0.0
            self.memory.touch(sum(footprint.results) + max(saved + footprint.recompute, footprint.forward))
            if saved:
                self.memory.allocate(("extra", position), saved)
        for output in self.graph.nodes[position].outputs:
            self.memory.allocate(("map", output), self.graph.values[output].bytes)
        self.seconds += self.work.forward(position)

    def _rows(self, loop: Loop, kept_carries: frozenset[int], stored: bool) -> None:
        given = {k: 0 for v in loop.stored if (k := ("map", v)) in self.memory}
        simulate = partial(self.passages.rows, loop, kept_carries, stored)
        self._loop(LoopRun(loop, stored), kept_carries, loop.name, given, simulate)

    def _backward_rows(self, run: BackwardPass, dropped: str | None) -> None:
        given = {k: 0 for v in (*run.maps, *run.wholes) if (k := ("gradient", v)) in self.memory}
        made = frozenset(k[1] for k in given if k[1] in run.maps)
        if dropped is not None:
            given.update(self.memory.matching("keep", (dropped,)))
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
                self._borrow(segment, graph.maps_read[step.node])
                self._backward_whole(step.node)
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
            memory.free(("gradient", index))
            memory.rename(("received", index), ("gradient", index))

    def _borrow(self, segment: SegmentProgram, values: Collection[int]) -> None:
        """The gradient of an output is autograd's, for as long as the segment runs: what adds to it makes a copy."""
        memory = self.memory
        for value in values:
            if value in segment.outputs and ("gradient", value) in memory and ("borrowed", value) not in memory:
                memory.rename(("gradient", value), ("borrowed", value))

    def _backward_whole(self, position: int, plain: bool = False) -> None:
        """The gradients of a node on full maps, which is run again for them but in a ``plain`` segment."""
        node = self.graph.nodes[position]
        if node.outputs and any(o in self.differentiable for o in node.outputs):
            footprint = self.passages.footprints.whole(position)
            again = 0.0 if plain else sum(footprint.results) + footprint.extra
            self.memory.touch(again + max(0.0 if plain else footprint.recompute, footprint.backward))
        for index in node.inputs:
            if index in self.differentiable:
                summed = not plain and not self.graph.is_map(index)
                size = sum_bytes(self.graph, index) if summed else self.graph.values[index].bytes
                if size and (summed or not is_parameter(self.graph, index)):
                    self.memory.allocate(("gradient", index), size)
        self.seconds += self.work.forward(position) + self.work.backward(position, 1.0, 2, 1)


def program_cost(
    graph: RowGraph,
    segments: Sequence[SegmentProgram],
    differentiable: Collection[int],
    last_reader: dict[int, int],
    machine: Machine = CPU,
    memory: Memory | None = None,
    memo: Memo | None = None,
) -> Cost:
    """The cost of one step of a program; ``memory`` may be one that remembers more.

    With a ``memo`` of what other plans of the graph cost it is found sooner, but has no timeline.
    """
    simulation = _Simulation(graph, differentiable, machine, memory, memo)
    memory = simulation.memory
    peaks: dict[int, int] = {}  # peak so far -> the segment that was run when it was reached
    step_peaks: dict[str, tuple[int, ...]] = {}
    kept = _kept(graph, segments) if differentiable else set()
    if graph.cast_bytes:
        memory.allocate(("cast",), graph.cast_bytes)
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
        for number, segment in reversed(list(enumerate(segments))):
            peaks.setdefault(memory.peak, min(number + 1, len(segments) - 1))
            kept_before = {index for earlier in segments[:number] for index in earlier.kept}
            step_peaks[segment.name] = simulation.run_backward(segment, kept_before)
    return Cost(
        memory.peak,
        simulation.seconds,
        tuple(memory.timeline),
        peaks.get(memory.peak, 0),
        step_peaks,
        tuple(simulation.segments),
    )


def _kept(graph: RowGraph, segments: Sequence[SegmentProgram]) -> set[int]:
    """What is still there in the backward pass: what segments keep, and whatever plain ones read or make."""
    kept = {index for segment in segments for index in segment.kept}
    for segment in segments:
        if segment.plain:
            kept.update(segment.inputs)
            kept.update(output for position in segment.nodes for output in graph.nodes[position].outputs)
    return kept
