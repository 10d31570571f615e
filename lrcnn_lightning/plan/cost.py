"""What a plan costs: the peak of its activation memory, and its work, without running it.

Memory is simulated allocation by allocation, in the order of the schedule: slabs made and dropped, full maps, carries,
what autograd saves for each recomputed operation, gradient maps, the gradients of parameters while they are summed.
Work is time on a nominal machine: floating-point operations, bytes moved, and a fixed price an operation call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lrcnn_lightning.graph import Value
from lrcnn_lightning.plan.halos import Span
from lrcnn_lightning.plan.loop import BackwardPass, Loop
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
from lrcnn_lightning.rules import Role, RowGraph, RowRule

__all__ = ["CPU", "Cost", "Machine", "Memory", "PeakMemory", "plain_cost", "program_cost"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Machine:
    """Nominal speeds. Only their ratios matter, since work is compared with plain work.

    The default is a CPU with few cores. There a large result costs far more a byte than a small one: its memory comes
    fresh from the operating system, page by page, where that of a slab is the one of the slab before.
    """

    operations_a_second: float = 300e9
    bytes_a_second: float = 20e9
    convolved_bytes_a_second: float = 7e9
    """Of the operands and results of a convolution, which are laid out anew."""
    large_bytes: float = 32 * 2**20
    """From this size on a result is fresh memory."""
    fresh_bytes_a_second: float = 2.8e9
    seconds_a_call: float = 12e-6
    seconds_a_slab: float = 350e-6
    """Of a call on a slab, with the cutting, carrying and dropping around it."""

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The nominal machine of a device: on a GPU all memory is equally near, and a call costs relatively more.

        Planning on the ``meta`` device is for the GPU, if there is one.
        """
        if device.type == "cpu" or (device.type == "meta" and not torch.cuda.is_available()):
            return CPU
        return Machine(40e12, 2e12, 2e12, float("inf"), 2e12, 8e-6, 60e-6)


CPU = Machine()


@dataclass(frozen=True)
class Cost:
    """``peak_bytes`` of activation memory, and ``seconds`` of nominal time, of one training step."""

    peak_bytes: int
    seconds: float
    timeline: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """Live bytes of activation memory after each allocation of the step."""
    peak_segment: int = 0
    """The number of the segment that is run, forward or backward, when the peak is reached."""


class Memory:
    """Live bytes by key, and their peak. A key is a tuple whose first entry names a family."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.timeline: list[int] = []
        """Live bytes after each allocation."""
        self._families: dict[str, dict[tuple[Any, ...], int]] = {}

    def allocate(self, key: tuple[Any, ...], size: float) -> None:
        """A tensor under a key that is not in use; under one in use, nothing happens."""
        family = self._families.setdefault(key[0], {})
        if key in family:
            return
        family[key] = int(size)
        self.live += int(size)
        self.peak = max(self.peak, self.live)
        self.timeline.append(self.live)

    def free(self, key: tuple[Any, ...]) -> None:
        """Drop it, if it is there."""
        family = self._families.get(key[0])
        if family:
            self.live -= family.pop(key, 0)

    def free_all(self, name: str, first: str | None = None) -> None:
        """Drop a family, or its keys whose second entry is ``first`` or begins with ``first`` and a dot."""
        family = self._families.get(name, {})
        chosen = [k for k in family if first is None or k[1] == first or k[1].startswith(f"{first}.")]
        for key in chosen:
            self.live -= family.pop(key)

    def free_matching(self, name: str, entries: tuple[Any, ...]) -> None:
        """Drop the keys of a family that go on with ``entries``."""
        family = self._families.get(name, {})
        for key in [k for k in family if k[1 : 1 + len(entries)] == entries]:
            self.live -= family.pop(key)

    def touch(self, size: float) -> None:
        """A tensor that lives for an instant."""
        self.peak = max(self.peak, self.live + int(size))

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._families.get(key[0], {})


class PeakMemory(Memory):
    """Also remembers what is live at the peak: key -> bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.at_peak: dict[tuple[Any, ...], int] = {}

    def allocate(self, key: tuple[Any, ...], size: float) -> None:
        before = self.peak
        super().allocate(key, size)
        if self.peak > before:
            self.at_peak = {key: size for family in self._families.values() for key, size in family.items()}


# What autograd saves, by operation: inputs, the result, both, or neither. Anything else: the inputs.
_SAVES_RESULT = {
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.reciprocal.default,
}
_SAVES_NOTHING = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.chunk.default,
    aten.split_with_sizes.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.avg_pool2d.default,
    aten.neg.default,
    aten.add.Scalar,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
}
_VIEWS = {
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.chunk.default,
    aten.split_with_sizes.default,
    aten.expand.default,
    aten.select.int,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.dropout.default,
}


class _Model:
    """Sizes and work of the nodes of a graph."""

    def __init__(self, graph: RowGraph, machine: Machine, seconds_a_call: float) -> None:
        self.graph, self.machine, self.seconds_a_call = graph, machine, seconds_a_call

    def bytes_of(self, value: int, rows: int, samples: int) -> float:
        """Bytes of a slab."""
        info = self.graph.values[value]
        size = float(info.bytes)
        if self.graph.height(value):
            size *= rows / self.graph.height(value)
        if self.graph.samples(value):
            size *= samples / self.graph.samples(value)
        return size

    def operations(self, position: int) -> float:
        """Multiplications and additions of a node on full maps, forward."""
        node = self.graph.nodes[position]
        name = str(node.op)
        out = self.graph.values[node.outputs[0]] if node.outputs else None
        if out is None:
            return 0.0
        if "conv" in name and len(node.inputs) > 1:
            weight: Value = self.graph.values[node.args[1].index]
            per_output = weight.elements / max(weight.shape[0], 1)
            if "transpose" in name:
                source: Value = self.graph.values[node.args[0].index]
                return 2.0 * source.elements * weight.elements / weight.shape[0]
            return 2.0 * out.elements * per_output
        if "linear" in name or "matmul" in name:
            features: int = self.graph.values[node.args[0].index].shape[-1]
            return 2.0 * out.elements * features
        return float(out.elements)

    def moved(self, position: int) -> float:
        """Bytes read and written by a node on full maps."""
        node = self.graph.nodes[position]
        if node.op in _VIEWS:
            return 0.0
        return float(sum(self.graph.values[i].bytes for i in (*node.inputs, *node.outputs)))

    def seconds(self, position: int, share: float, times: float = 1.0) -> float:
        """Time of a node on a share of its map."""
        machine, node = self.machine, self.graph.nodes[position]
        convolves = "conv" in str(node.op)
        arithmetic = self.operations(position) / machine.operations_a_second
        traffic = self.moved(position) / (machine.convolved_bytes_a_second if convolves else machine.bytes_a_second)
        if node.op not in _VIEWS:
            made = sum(self.graph.values[o].bytes for o in node.outputs)
            traffic += made / machine.fresh_bytes_a_second if made * share >= machine.large_bytes else 0.0
        return times * share * (arithmetic + traffic) + self.seconds_a_call

    def saved(self, position: int) -> tuple[bool, bool]:
        """Whether autograd saves the inputs, and the result, of a node."""
        operation = self.graph.nodes[position].op
        if operation in _SAVES_RESULT:
            return False, True
        return operation not in _SAVES_NOTHING, False

    def extra_saved(self, position: int, rows: int, samples: int) -> float:
        """Bytes saved beside inputs and result: the indices of maximum pooling."""
        node = self.graph.nodes[position]
        if "max_pool" in str(node.op):
            info = self.graph.values[node.outputs[0]]
            return self.bytes_of(node.outputs[0], rows, samples) / info.dtype.itemsize * 8
        return 0.0


class _Simulation:
    """Walks a program's schedule."""

    def __init__(self, graph: RowGraph, differentiable: Collection[int], machine: Machine) -> None:
        self.graph, self.differentiable = graph, differentiable
        self.model = _Model(graph, machine, machine.seconds_a_slab)
        self.memory = Memory()
        self.seconds = 0.0

    def _share(self, value: int, rows: int, samples: int) -> float:
        height, batch = self.graph.height(value), self.graph.samples(value)
        return (rows / height if height else 1.0) * (samples / batch if batch else 1.0)

    # ---------------------------------------------------------------- forward

    def forward(self, segment: SegmentProgram) -> None:
        for step in segment.forward:
            if isinstance(step, RunRows):
                self.rows(step.loop, step.kept_carries, stored=True)
            elif isinstance(step, (RunWhole, Effect)):
                self._whole(step.node)
            elif isinstance(step, Free):
                self.memory.free(("map", step.value))

    def _whole(self, position: int) -> None:
        for output in self.graph.nodes[position].outputs:
            self.memory.allocate(("map", output), self.graph.values[output].bytes)
        self.seconds += self.model.seconds(position, 1.0)

    def rows(self, loop: Loop, kept_carries: Collection[int], stored: bool) -> None:
        """The forward pass of a loop."""
        graph, memory = self.graph, self.memory
        for chunk, times in _sampled(len(loop.chunks)):
            samples = loop.chunks[chunk].length
            before = self.seconds
            previous = 0
            for r, alike in _sampled_rows(len(loop.rows)):
                row, start = loop.rows[r], self.seconds
                waiting = _waiting(graph, loop.nodes)
                following = loop.rows[r + 1] if r + 1 < len(loop.rows) else None
                for position in loop.nodes:
                    node, span = graph.nodes[position], row.spans[position]
                    self._make(position, span, samples)
                    for value in node.outputs:
                        if following is not None:
                            after = following.spans[position]
                            if after.lo < after.new:
                                key = ("keep" if position in kept_carries else "carry", loop.name, chunk, r, value)
                                size = self.model.bytes_of(value, after.new - after.lo, samples)
                                memory.allocate(key, size * times * alike if key[0] == "keep" else size)
                        if stored and value in loop.stored:
                            full = graph.values[value].bytes
                            if len(loop.rows) * len(loop.chunks) > 1 or ("slab", value) not in memory:
                                memory.allocate(("map", value), full)
                            else:
                                memory.free(("slab", value))
                                memory.allocate(("map", value), full)
                    for value in (*node.inputs, *node.outputs):
                        if value in node.inputs:
                            waiting[value] -= node.inputs.count(value)
                        if not waiting.get(value):
                            memory.free(("slab", value))
                            memory.free(("fresh", value))
                for value in [v for v in waiting if v in graph.producer]:
                    memory.free(("slab", value))
                    memory.free(("fresh", value))
                if r:
                    self._drop_carries(loop, chunk, previous, graph)
                previous = r
                self.seconds += (alike - 1) * (self.seconds - start)
            self._drop_carries(loop, chunk, previous, graph)
            self.seconds += (times - 1) * (self.seconds - before)
        for position in loop.reductions:
            for output in graph.nodes[position].outputs:
                memory.allocate(("map", output), graph.values[output].bytes)
            self.seconds += self.model.seconds(position, 1.0)

    def _drop_carries(self, loop: Loop, chunk: int, r: int, graph: RowGraph) -> None:
        for position in loop.nodes:
            for value in graph.nodes[position].outputs:
                self.memory.free(("carry", loop.name, chunk, r, value))

    def _make(self, position: int, span: Span, samples: int, hollow: bool = False) -> None:
        """Allocate what a node makes on one row."""
        graph, memory, model = self.graph, self.memory, self.model
        node = graph.nodes[position]
        if span.computed.empty or hollow:
            return
        rule = graph.rules[position]
        assert isinstance(rule, RowRule)
        for value in node.outputs:
            view = node.op in _VIEWS
            has_carry = span.lo < span.new
            size = 0.0 if view else model.bytes_of(value, span.computed.length, samples)
            memory.allocate(("fresh" if has_carry else "slab", value), size)
            if has_carry:
                memory.allocate(("slab", value), model.bytes_of(value, span.hi - span.lo, samples))
        padded = getattr(rule, "geometry", None)
        if padded is not None and padded.symmetric(span.computed) is None:
            above, below = padded.missing(span.computed)
            rows = padded.needed(span.computed).length + above + below
            memory.touch(model.bytes_of(node.inputs[0], rows, samples))
        self.seconds += model.seconds(position, self._share(node.outputs[0], span.computed.length, samples))

    # --------------------------------------------------------------- backward

    def backward(self, segment: SegmentProgram, kept_before: Collection[int]) -> None:
        """``kept_before``: what earlier segments keep for their own backward pass, which comes later."""
        memory = self.memory
        for step in segment.backward:
            if isinstance(step, BackwardRows):
                self._pass(step.run, step.carries if step.drops else None)
            elif isinstance(step, RunRows):
                self.rows(step.loop, (), stored=True)
            elif isinstance(step, Sweep):
                self.rows(step.loop, step.loop.carried, stored=False)
            elif isinstance(step, BackwardWhole):
                self._backward_whole(step.node)
            elif isinstance(step, Free):
                if step.value not in segment.outputs:
                    memory.free(("map", step.value))
            elif isinstance(step, FreeGradient) and step.value not in segment.outputs:
                memory.free(("gradient", step.value))
        for index in (*segment.kept, *segment.outputs):
            if index not in kept_before:
                memory.free(("map", index))
            if index in segment.outputs:
                memory.free(("gradient", index))
        memory.free_all("keep", segment.name)

    def _backward_whole(self, position: int) -> None:
        node = self.graph.nodes[position]
        size = sum(self.graph.values[o].bytes for o in node.outputs)
        self.memory.touch(size)
        for index in node.inputs:
            if index in self.differentiable and not _is_parameter(self.graph, index):
                self.memory.allocate(("gradient", index), self.graph.values[index].bytes)
        self.seconds += self.model.seconds(position, 1.0, 3.0)

    def _pass(self, run: BackwardPass, dropped: str | None) -> None:
        for chunk, times in _sampled(len(run.loop.chunks)):
            before = self.seconds
            handed: dict[int, float] = {}
            rows = _sampled_rows(len(run.loop.rows))
            for i, (r, alike) in reversed(list(enumerate(rows))):
                start = self.seconds
                handed = self._backward_row(run, chunk, r, handed)
                self.seconds += (alike - 1) * (self.seconds - start)
                if dropped is not None:
                    self._drop_kept(dropped, chunk, r)
                    if i and rows[i - 1][1] == 1:
                        self._drop_kept(dropped, chunk, rows[i - 1][0])
            for value in handed:
                self.memory.free(("handed", value))
            self.seconds += (times - 1) * (self.seconds - before)
        for value in run.wholes:
            # What becomes the gradient of a parameter is no activation memory.
            if not _is_parameter(self.graph, value):
                self.memory.allocate(("gradient", value), self.graph.values[value].bytes)

    def _drop_kept(self, loop: str, chunk: int, r: int) -> None:
        """The carries that row ``r`` (and those it stands for) kept."""
        self.memory.free_matching("keep", (loop, chunk, r))

    def _backward_row(self, run: BackwardPass, chunk: int, r: int, handed: dict[int, float]) -> dict[int, float]:
        graph, memory, model = self.graph, self.memory, self.model
        loop, row = run.loop, run.loop.rows[r]
        samples = loop.chunks[chunk].length
        waiting = _waiting(graph, run.nodes)
        injected = {graph.nodes[p].inputs[0] for p in run.injections}
        holders: dict[int, int] = {}  # slab -> how many differentiated nodes saved it

        def hold(value: int) -> None:
            holders[value] = holders.get(value, 0) + 1

        saved_by: dict[int, list[int]] = {}
        for position in run.nodes:
            node, span = graph.nodes[position], row.spans[position]
            hollow = position in run.hollow
            self._make(position, span, samples, hollow)
            if position in run.differentiated and not span.computed.empty:
                saves_inputs, saves_result = model.saved(position)
                saved = [i for i in node.inputs if graph.is_map(i)] if saves_inputs else []
                saved += list(node.outputs) if saves_result and not hollow else []
                for value in saved:
                    hold(value)
                saved_by[position] = saved
                extra = model.extra_saved(position, span.computed.length, samples)
                if extra:
                    memory.allocate(("extra", position), extra)
                for value in node.outputs:
                    if value in injected and not row.owned[value].empty:
                        size = model.bytes_of(value, row.owned[value].length, samples)
                        memory.allocate(("seed", value), size)
            for value in (*node.inputs, *node.outputs):
                if value in node.inputs:
                    waiting[value] -= 1
                if not waiting.get(value):
                    if not holders.get(value):
                        memory.free(("slab", value))
                    memory.free(("fresh", value))
        # The engine walks back: gradients of results come, those of inputs are made, what was saved is dropped.
        alive: dict[int, float] = {}
        for position in reversed(run.nodes):
            if position not in run.differentiated:
                continue
            node, span = graph.nodes[position], row.spans[position]
            if span.computed.empty:
                continue
            rule = graph.rules[position]
            assert isinstance(rule, RowRule)
            needed = rule.needed(span.computed)
            for value in node.outputs:
                memory.free(("handed", value))
            weights = [
                i for i in node.inputs if not graph.is_map(i) and i in run.wholes and graph.values[i].elements > 4096
            ]
            times = 0.0
            for index in weights:
                memory.touch(graph.values[index].bytes)  # added to the sum at once
                times += 1
            for index in node.inputs:
                if not graph.is_map(index) or index not in self.differentiable:
                    continue
                producer = graph.producer.get(index)
                if index not in run.maps and producer not in run.differentiated:
                    continue
                size = model.bytes_of(index, needed.length, samples)
                if node.op in _VIEWS or node.op in (aten.add.Tensor, aten.cat.default):
                    size = 0.0 if node.op is not aten.cat.default else size
                key = ("slab gradient", index)
                if key in memory:
                    memory.touch(size)
                memory.allocate(key, size)
                alive[index] = size
                times += 1
            for value in node.outputs:
                memory.free(("slab gradient", value))
                memory.free(("seed", value))
            for value in saved_by.get(position, []):
                holders[value] -= 1
                if not holders[value]:
                    memory.free(("slab", value))
            memory.free(("extra", position))
            share = self._share(node.outputs[0], span.computed.length, samples)
            self.seconds += model.seconds(position, share, max(times, 1.0))
        result: dict[int, float] = {}
        for position in run.nodes:
            span = row.spans[position]
            if position in run.differentiated and span.lo < span.new:
                for value in graph.nodes[position].outputs:
                    size = model.bytes_of(value, span.new - span.lo, samples)
                    memory.allocate(("handed", value), size)
                    result[value] = size
        for index in run.maps:
            memory.allocate(("gradient", index), graph.values[index].bytes)
        memory.free_all("slab gradient")
        memory.free_all("slab")
        memory.free_all("fresh")
        memory.free_all("seed")
        return result


def _sampled(chunks: int) -> list[tuple[int, int]]:
    """Chunks to simulate, and how many each stands for: they are alike but for a sample more or less."""
    return [(chunk, 1) for chunk in range(chunks)] if chunks <= 2 else [(0, chunks - 1), (chunks - 1, 1)]


def _sampled_rows(rows: int) -> list[tuple[int, int]]:
    """Rows to simulate, and how many each stands for: those of the middle are alike but for a line more or less."""
    if rows <= 6:
        return [(r, 1) for r in range(rows)]
    middle = rows // 2
    return [(0, 1), (1, 1), (middle, rows - 4), (rows - 2, 1), (rows - 1, 1)]


def _waiting(graph: RowGraph, nodes: Sequence[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for position in nodes:
        for value in graph.nodes[position].inputs:
            counts[value] = counts.get(value, 0) + 1
    return counts


def _is_parameter(graph: RowGraph, index: int) -> bool:
    return graph.values[index].kind.value in ("parameter", "buffer")


def program_cost(
    graph: RowGraph,
    segments: Sequence[SegmentProgram],
    differentiable: Collection[int],
    last_reader: dict[int, int],
    machine: Machine = CPU,
    memory: Memory | None = None,
) -> Cost:
    """The cost of one step of a program; ``memory`` may be one that remembers more."""
    simulation = _Simulation(graph, differentiable, machine)
    simulation.memory = memory or simulation.memory
    memory = simulation.memory
    peaks: dict[int, int] = {}  # peak so far -> the segment that was run when it was reached
    for number, segment in enumerate(segments):
        peaks.setdefault(memory.peak, number - 1)
        if segment.plain:
            for position in segment.nodes:
                simulation._whole(position)
        else:
            simulation.forward(segment)
        if not differentiable:
            for index in segment.inputs:
                if last_reader.get(index) == number:
                    memory.free(("map", index))
    if differentiable:
        for number, segment in reversed(list(enumerate(segments))):
            peaks.setdefault(memory.peak, min(number + 1, len(segments) - 1))
            if segment.plain:
                for position in reversed(segment.nodes):
                    simulation._backward_whole(position)
                    for output in graph.nodes[position].outputs:
                        memory.free(("map", output))
                        memory.free(("gradient", output))
            else:
                simulation.backward(segment, {index for earlier in segments[:number] for index in earlier.kept})
    return Cost(memory.peak, simulation.seconds, tuple(memory.timeline), peaks.get(memory.peak, 0))


def _shared_memory(graph: RowGraph, positions: Sequence[int]) -> list[int]:
    """For each value the one whose memory it is, in plain execution: views and results of in-place operations share."""
    memory_of = list(range(len(graph.values)))
    for position in positions:
        node = graph.nodes[position]
        if (node.in_place or node.op in _VIEWS) and node.inputs and node.inputs[0] in graph.producer:
            for output in node.outputs:
                memory_of[output] = memory_of[node.inputs[0]]
    return memory_of


def plain_cost(graph: RowGraph, differentiable: Collection[int], machine: Machine = CPU) -> Cost:
    """The cost of one step of plain, column-centric execution: what autograd saves stays until it is used."""
    model = _Model(graph, machine, machine.seconds_a_call)
    memory = Memory()
    seconds = 0.0
    holders: dict[int, int] = {}
    saved_by: dict[int, list[int]] = {}
    rest = [p for p in range(len(graph.nodes)) if graph.roles[p] is not Role.PROLOGUE]
    memory_of = _shared_memory(graph, rest)
    returned = {memory_of[value] for value in graph.graph.output_values()}
    waiting: dict[int, int] = {}
    for value, readers in graph.readers.items():
        waiting[memory_of[value]] = waiting.get(memory_of[value], 0) + len(readers)
    for position in rest:
        node = graph.nodes[position]
        for value in node.outputs:
            if memory_of[value] == value:
                memory.allocate(("map", value), graph.values[value].bytes)
        seconds += model.seconds(position, 1.0)
        if any(o in differentiable for o in node.outputs):
            inputs, result = model.saved(position)
            saved = [i for i in node.inputs if i in graph.producer] if inputs else []
            saved += list(node.outputs) if result else []
            saved = [memory_of[value] for value in saved]
            saved_by[position] = saved
            for value in saved:
                holders[value] = holders.get(value, 0) + 1
            samples = graph.samples(node.outputs[0]) or 1
            extra = model.extra_saved(position, graph.height(node.outputs[0]) or 1, samples)
            if extra:
                memory.allocate(("extra", position), extra)
        for value in node.inputs:
            waiting[memory_of[value]] -= 1
        for value in {memory_of[value] for value in (*node.inputs, *node.outputs)}:
            if not waiting[value] and not holders.get(value) and value not in returned:
                memory.free(("map", value))
    for value in returned:
        if not holders.get(value):
            memory.free(("map", value))
    for position in reversed(rest):
        node = graph.nodes[position]
        if not any(o in differentiable for o in node.outputs):
            continue
        times = 0.0
        for index in node.inputs:
            if index not in differentiable:
                continue
            times += 1
            if graph.values[index].kind.value == "parameter":
                continue
            free_of_cost = node.op in _VIEWS or node.op is aten.add.Tensor
            memory.allocate(("gradient", index), 0 if free_of_cost else graph.values[index].bytes)
        for value in node.outputs:
            memory.free(("gradient", value))
        for value in saved_by.get(position, []):
            holders[value] -= 1
            if not holders[value]:
                memory.free(("map", value))
        memory.free(("extra", position))
        seconds += model.seconds(position, 1.0, max(times, 1.0))
    return Cost(memory.peak, seconds, tuple(memory.timeline))
