"""The limit on what one operation reads or writes: how many elements a tensor may have.

Kernels count the elements of a tensor in 32 bits, here and there. Of a larger one they fail, take forever, or compute
something else. So no plan lets an operation have such a tensor (`Machine.most_elements`):

    slabs                        rows and chunks grow until they are below
    full maps                    may be larger: they are allocated, and then read and written slab by slab
    what runs whole              is named in an error, since no number of rows helps
    gradients at a border        the same, where autograd adds those of several segments up
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.graph import references
from lrcnn_lightning.planning.footprint import Footprints
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.steps import RunWhole, Segment
from lrcnn_lightning.rules import Interval, Role, RowGraph, RowRule

__all__ = ["Large", "Limit", "largest_map"]

_ON_THE_WAY = 8
"""A tensor that an operation makes on the way has at most so many times the elements of the largest in the graph."""


class Large(NamedTuple):
    """A tensor that an operation has: its elements, the node (position), and its shape, if it is not made on the way.

    ``by_rows``: whether it is a slab, which more rows or chunks make smaller.
    """

    elements: int
    node: int
    shape: tuple[int, ...]
    by_rows: bool

    def described(self, graph: RowGraph) -> str:
        """The operation, where it is, and the tensor, for a message."""
        node = graph.nodes[self.node]
        where = node.module or "the top"
        what = f"{self.elements:,} elements"
        if self.shape:
            what = f"{'a slab' if self.by_rows else 'a tensor'} of shape {list(self.shape)}, {what}"
        return f"{node.op} at {where} has {what}"


def largest_map(graph: RowGraph) -> int:
    """Elements of the largest map, on all samples."""
    return max((value.elements for value in graph.values if graph.is_map(value.index)), default=0)


class Limit:
    """The limit in the programs of one problem; what was found of a loop is remembered."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._footprints = Footprints.of(problem.graph, problem.differentiable, problem.machine)
        self._largest: dict[Any, tuple[Large, tuple[Row, ...]]] = {}
        """By the ``id`` of a loop's rows (which are kept) and its samples."""
        elements = max((value.elements for value in problem.graph.values), default=0)
        self._is_far = _ON_THE_WAY * elements <= problem.machine.most_elements

    def oversized(self, program: Program) -> Large | None:
        """The largest tensor that an operation of a program has, if it has more elements than the machine allows."""
        most, graph = self.problem.machine.most_elements, self.problem.graph
        if self._is_far:
            return None
        if program.mode == "plain":
            return _plain_oversized(graph, most)
        tensors = [_whole(graph, self._footprints, position) for position in self.problem.prologue]
        for segment in program.segments:
            tensors += [_whole(graph, self._footprints, position) for position in _run_whole(segment)]
            tensors += [self.largest(loop) for loop in segment.loops()]
        tensors += _added_up(graph, program.segments, self.problem.differentiable)
        largest = max(tensors, key=lambda large: large.elements, default=None)
        return largest if largest is not None and largest.elements > most else None

    def check(self, program: Program) -> None:
        """Prove that no operation of a program has a tensor that is too large. Raises `PlanError` for one that has."""
        large = self.oversized(program)
        if large is None:
            return
        graph, most, choices = program.graph, program.machine.most_elements, program.choices
        many = f"allowed are {most:,} elements, since kernels count them in 32 bits"
        if not large.by_rows:
            raise PlanError(
                f"{large.described(graph)}, and runs on full maps; {many}. No number of rows helps; what does: a "
                "smaller image or batch, or to leave this operation out of what runs row by row"
            )
        rows = -(-choices.rows * large.elements // most)
        height = graph.height(graph.nodes[large.node].outputs[0])
        advice = f"rows={rows} or more, rows='auto'," if rows <= height else "a narrower image,"
        raise PlanError(
            f"{large.described(graph)}, with rows={choices.rows} and batch_chunks={program.chunks}; {many}. What "
            f"helps: {advice} more batch_chunks where a batch can be divided, or a smaller image or batch"
        )

    def largest(self, loop: Loop) -> Large:
        """The largest tensor that an operation has on any row and chunk of a loop."""
        samples = max(chunk.length for chunk in loop.chunks)
        key: Any = (id(loop.rows), samples)
        if key not in self._largest:
            self._largest[key] = _largest_of_loop(self.problem.graph, self._footprints, loop, samples), loop.rows
        return self._largest[key][0]


def _plain_oversized(graph: RowGraph, most: int) -> Large | None:
    """The largest tensor that an operation of plain execution has, if it has more elements than ``most``."""
    found = (_of_values(graph, p, (*node.inputs, *node.outputs)) for p, node in enumerate(graph.nodes))
    largest = max(found, key=lambda large: large.elements, default=None)
    return largest if largest is not None and largest.elements > most else None


def _of_values(graph: RowGraph, position: int, values: Collection[int]) -> Large:
    """The largest of some full tensors; none where the node looks at one and copies nothing."""
    if getattr(graph.nodes[position].op, "is_view", False) or not values:
        return Large(0, position, (), False)
    value = graph.values[max(values, key=lambda index: graph.values[index].elements)]
    return Large(value.elements, position, value.shape, False)


def _whole(graph: RowGraph, footprints: Footprints, position: int) -> Large:
    """Of a node that runs on full tensors: what it reads, makes, and makes on the way."""
    node = graph.nodes[position]
    named = _of_values(graph, position, (*node.inputs, *node.outputs))
    if not node.outputs or graph.roles[position] is Role.PROLOGUE or not named.elements:
        return named
    passing = int(footprints.whole(position).largest)
    return named if passing <= named.elements else Large(passing, position, (), False)


def _run_whole(segment: Segment) -> Iterator[int]:
    """The nodes of a segment that run on full tensors."""
    if segment.plain:
        yield from segment.nodes
    else:
        yield from (step.node for step in segment.forward if isinstance(step, RunWhole))


def _added_up(graph: RowGraph, segments: Collection[Segment], differentiable: Collection[int]) -> Iterator[Large]:
    """Gradients of border maps that autograd gets from several sides, and adds up whole."""
    sides = Counter(ref.index for ref in references(graph.graph.outputs))
    for segment in segments:
        if segment.plain:
            sides.update(index for position in segment.nodes for index in graph.nodes[position].inputs)
        elif segment.backward:
            sides.update(segment.inputs)
    for value, count in sides.items():
        if count > 1 and value in differentiable and graph.is_map(value):
            info = graph.values[value]
            yield Large(info.elements, _named_by(graph, value), info.shape, False)


def _largest_of_loop(graph: RowGraph, footprints: Footprints, loop: Loop, samples: int) -> Large:
    largest = Large(0, loop.nodes[0] if loop.nodes else loop.reductions[0], (), True)

    def consider(position: int, value: int, rows: int) -> None:
        nonlocal largest
        shape = _slab_shape(graph, value, rows, samples)
        elements = torch.Size(shape).numel()
        if elements > largest.elements:
            largest = Large(elements, position, shape, True)

    reads: dict[int, int] = {}
    for row in loop.rows:
        for value, interval in (*row.reads.items(), *row.owned.items()):
            reads[value] = max(reads.get(value, 0), interval.length)
    for value, rows in reads.items():
        consider(_named_by(graph, value), value, rows)
    for position in loop.nodes:
        spans = [row.spans[position] for row in loop.rows]
        for value in graph.nodes[position].outputs:
            consider(position, value, max(span.hi - span.lo for span in spans))
        computed = [span.computed for span in spans if not span.computed.empty]
        for interval in {*computed[:1], *computed[-1:], *sorted(computed, key=_length)[-1:]}:
            share = _share(graph, position, samples) * _unevenness(graph, position, computed)
            elements = math.ceil(footprints.slab(position, interval).largest * share)
            if elements > largest.elements:
                largest = Large(elements, position, (), True)
    return largest


def _unevenness(graph: RowGraph, position: int, computed: Collection[Interval]) -> float:
    """How much larger a tensor may be on one row than on another that computes as many lines: it may read more."""
    rule = graph.rules[position]
    assert isinstance(rule, RowRule)
    lengths: dict[int, set[int]] = {}
    for interval in computed:
        lengths.setdefault(interval.length, set()).add(rule.needed(interval).length)
    if all(len(needed) == 1 for needed in lengths.values()):
        return 1.0
    return max((max(needed) + 1) / min(needed) for needed in lengths.values())


def _named_by(graph: RowGraph, value: int) -> int:
    """The node to name for a value: the one that makes it, or of an input the first that reads it."""
    return graph.producer[value] if value in graph.producer else next(iter(graph.readers.get(value, ())), 0)


def _length(interval: Interval) -> int:
    return interval.length


def _share(graph: RowGraph, position: int, samples: int) -> float:
    """The share of the batch."""
    batch = graph.samples(graph.nodes[position].outputs[0])
    return samples / batch if batch else 1.0


def _slab_shape(graph: RowGraph, value: int, rows: int, samples: int) -> tuple[int, ...]:
    """The shape of a slab of so many rows and samples."""
    shape, axes = list(graph.values[value].shape), graph.axes[value]
    if axes.row is not None:
        shape[axes.row] = rows
    if axes.batch is not None:
        shape[axes.batch] = samples
    return tuple(shape)
