"""Lowering: a captured graph -> a `RowGraph`, in which every node has a role and every value its axes.

The row axis is propagated from the inputs through the rules.  Where an operation has no rule for the axes that arrive,
it runs whole; its result, if it is a map again, gets a row axis anew, so that what follows streams.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

import torch

from lrcnn_lightning.errors import InputError
from lrcnn_lightning.graph import DrawOrder, Graph, Node, Value, ValueKind, buffer_values, dependent_values
from lrcnn_lightning.rules.expansion import Builder
from lrcnn_lightning.rules.rule import WHOLE, Axes, Reduction, RowRule, Scope, find_factory
from lrcnn_lightning.rules.synchronised import merge_processes
from lrcnn_lightning.rules.unread import useful

__all__ = ["Role", "RowGraph", "lower"]


class Role(enum.Enum):
    """How a node is executed."""

    PROLOGUE = "prologue"
    """Does not depend on the input's data: once a step, under ordinary autograd, before all rows."""
    ROW = "row"
    """On slabs."""
    REDUCE = "reduce"
    """On slabs, into a whole value: a barrier."""
    WHOLE = "whole"
    """On full maps or whole values: a barrier."""


@dataclass(frozen=True, eq=False)
class RowGraph:
    """A graph with the role and rule of each node, and the axes of each value."""

    graph: Graph
    roles: tuple[Role, ...]
    rules: tuple[RowRule | Reduction | None, ...]
    axes: dict[int, Axes]
    batch_splits: bool
    captured: Graph
    """The graph as it was before operations were expanded: what plain execution runs."""
    autocast: tuple[str, torch.dtype] | None = None
    """The kind of device and the dtype, where the dtypes of values are those under autocast."""
    cast_bytes: int = 0
    """Copies of weights that autocast keeps."""

    @cached_property
    def values(self) -> tuple[Value, ...]:
        return self.graph.values

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return self.graph.nodes

    @cached_property
    def learned(self) -> dict[str, Any]:
        """What was found out by running its operations on tensors without data, by what it is."""
        return {}

    @cached_property
    def skeleton(self) -> tuple[Any, ...]:
        """What it is but for the sizes of its values: equal for graphs of one module on inputs of two sizes, unless its
        code does something else for one of them.
        """
        nodes = tuple((node.name, node.op, node.inputs, node.outputs) for node in self.nodes)
        values = tuple((value.name, value.dtype, len(value.shape)) for value in self.values)
        return nodes, values, self.roles, self.axis, self.batch_splits, self.autocast

    @cached_property
    def producer(self) -> dict[int, int]:
        """Value -> position of the node that computes it."""
        return self.graph.producers()

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """Value -> positions of the nodes that read it."""
        return self.graph.readers()

    @cached_property
    def value_names(self) -> list[str]:
        """A name for each value, of its own and without blanks: weights by the qualified name."""
        return _unique(str(v.source) if v.kind.value in ("parameter", "buffer") else v.name for v in self.values)

    @cached_property
    def node_names(self) -> list[str]:
        """A name for each node, of its own and without blanks."""
        return _unique(node.name for node in self.nodes)

    @property
    def axis(self) -> int | None:
        """The dimension along which the inputs are cut into rows; None where none is."""
        return next((self.axes[value.index].row for value in self.graph.inputs if self.is_map(value.index)), None)

    @cached_property
    def dependent(self) -> set[int]:
        """Values that depend on the data of an input."""
        return dependent_values(self.graph)

    @cached_property
    def buffers(self) -> frozenset[int]:
        """Buffers and views of them."""
        return buffer_values(self.graph)

    def height(self, value: int) -> int:
        """The number of rows of a value; 0 for a whole value."""
        return self._heights[value]

    def samples(self, value: int) -> int:
        """The size of the batch axis of a value; 0 if it has none."""
        return self._samples[value]

    @property
    def input_height(self) -> int:
        """The largest number of rows of an input."""
        return max((self.height(value.index) for value in self.graph.inputs), default=0)

    @property
    def input_samples(self) -> int:
        """The largest batch of an input; 0 if none has a batch axis."""
        return max((self.samples(value.index) for value in self.graph.inputs), default=0)

    def is_map(self, value: int) -> bool:
        """Whether the value has a row axis."""
        return value in self._maps

    @cached_property
    def _heights(self) -> list[int]:
        rows = [self.axes.get(value.index, WHOLE).row for value in self.values]
        return [0 if row is None else value.shape[row] for value, row in zip(self.values, rows, strict=True)]

    @cached_property
    def _samples(self) -> list[int]:
        batches = [self.axes.get(value.index, WHOLE).batch for value in self.values]
        return [0 if batch is None else value.shape[batch] for value, batch in zip(self.values, batches, strict=True)]

    @cached_property
    def _maps(self) -> frozenset[int]:
        return frozenset(value for value, axes in self.axes.items() if axes.row is not None)

    @cached_property
    def maps_read(self) -> tuple[tuple[int, ...], ...]:
        """Of each node: the maps among its inputs."""
        return tuple(tuple(filter(self.is_map, node.inputs)) for node in self.nodes)

    @cached_property
    def communicates(self) -> bool:
        """Whether it exchanges data with other processes, which must then do the same."""
        return any(node.op is merge_processes for node in self.nodes)

    @cached_property
    def barriers(self) -> int:
        """The number of reductions, behind which a loop has to begin anew."""
        return sum(role is Role.REDUCE for role in self.roles)

    def whole_nodes(self) -> list[Node]:
        """Nodes that read or write a map and run whole all the same."""
        return [
            node
            for node, role in zip(self.nodes, self.roles, strict=True)
            if role is Role.WHOLE and any(self.is_map(index) for index in (*node.inputs, *node.outputs))
        ]


def _unique(names: Iterable[str]) -> list[str]:
    """The names without blanks and commas, with their number where two agree."""
    plain = [name.replace(" ", "_").replace(",", "_") for name in names]
    count = Counter(plain)
    return [name if count[name] == 1 else f"{name}%{index}" for index, name in enumerate(plain)]


def lower(graph: Graph, axis: int | str = "auto") -> RowGraph:
    """Assign axes, rules and roles.

    ``axis`` is the dimension of the input that is split, or ``"auto"``: the longest spatial one (of equals the
    first; of a volume on the CPU the last).
    Nodes of which nobody reads the results are left out (`unread`).
    Raises `InputError` when no input has a spatial axis, or the given one is none.
    """
    dimension, seed = _row_dimension(graph, axis)
    rank, samples = len(seed.shape), seed.shape[0]
    axes = {value.index: _seed(value, dimension, rank, samples) for value in graph.inputs}
    dependent = set(axes)
    builder = Builder(graph, axes)
    roles: list[Role] = []
    rules: list[RowRule | Reduction | None] = []
    batch_splits, order = True, DrawOrder()
    for node in _expanded(graph, builder, dependent):
        rule = None
        if not order.waits(node, not dependent.isdisjoint(node.inputs)):
            roles.append(Role.PROLOGUE)
            rules.append(None)
            continue
        dependent.update(node.outputs)
        if any(axes.get(index, WHOLE).row is not None for index in node.inputs):
            factory = find_factory(node.op)
            rule = None if factory is None else factory(Scope(builder.values, axes, node))
            if isinstance(rule, RowRule) and _without_rows(builder, node, rule):
                rule = None
        rules.append(rule)
        if isinstance(rule, RowRule):
            roles.append(Role.ROW)
            axes.update(zip(node.outputs, rule.axes, strict=True))
            batch_splits = batch_splits and all(given.batch is not None for given in rule.axes)
        elif rule is not None:
            roles.append(Role.REDUCE)
        else:
            roles.append(Role.WHOLE)
            for output in node.outputs:
                axes[output] = _seed(builder.values[output], dimension, rank, samples)
    kept = useful(builder.nodes, rules, graph.output_values())
    nodes = tuple(compress(builder.nodes, kept))
    unmade = {output for node in builder.nodes for output in node.outputs}
    unmade -= {output for node in nodes for output in node.outputs}
    axes = {index: given for index, given in axes.items() if index not in unmade}
    expanded = replace(graph, values=tuple(builder.values), nodes=nodes)
    return RowGraph(expanded, tuple(compress(roles, kept)), tuple(compress(rules, kept)), axes, batch_splits, graph)


def _without_rows(builder: Builder, node: Node, rule: RowRule) -> bool:
    """Whether a result has no rows, as an empty slice of a map has: there is nothing to loop over."""
    given = zip(node.outputs, rule.axes, strict=True)
    return any(axes.row is not None and builder.values[output].shape[axes.row] == 0 for output, axes in given)


def _expanded(graph: Graph, builder: Builder, dependent: set[int]) -> Iterator[Node]:
    """The nodes, those that can be expanded replaced. The axes of all values before a node are known when it comes."""
    for node in graph.nodes:
        if any(index in dependent for index in node.inputs):
            yield from builder.add(node)
        else:
            builder.nodes.append(node)
            yield node


def _row_dimension(graph: Graph, axis: int | str) -> tuple[int, Value]:
    """The dimension that is split, and the largest input, whose maps have it."""
    maps = [value for value in graph.inputs if len(value.shape) >= 3 and value.dtype.is_floating_point]
    if not maps:
        shapes = ", ".join(f"{list(v.shape)}{'' if v.dtype.is_floating_point else f' {v.dtype}'}" for v in graph.inputs)
        raise InputError(
            f"no input has a spatial axis: the shapes are [{shapes}]; "
            "allowed are maps such as N C H W, N C D H W or N C L"
        )
    largest = max(maps, key=lambda value: value.elements)
    rank = len(largest.shape)
    if axis == "auto":
        # For a volume on the CPU PyTorch chooses by N * C * D * H whether oneDNN convolves it, and what it takes
        # instead is many times slower: slabs that are thin in W are not affected.
        order = 1 if rank == 5 and largest.device.type == "cpu" else -1
        return max(range(2, rank), key=lambda d: (largest.shape[d], order * d)), largest
    assert isinstance(axis, int)
    dimension = axis + rank if axis < 0 else axis
    spatial = 2 <= dimension < rank
    if not spatial or largest.shape[dimension] < 2:
        allowed = ["'auto'", *(str(d) for d in range(2, rank) if largest.shape[d] > 1)]
        what = f"has size {largest.shape[dimension]} in" if spatial else "is no spatial axis of"
        raise InputError(
            f"axis={axis} {what} an input of shape {list(largest.shape)}: "
            f"allowed {'is' if len(allowed) == 1 else 'are'} {', '.join(allowed)}"
        )
    return dimension, largest


def _seed(value: Value, dimension: int, rank: int, samples: int) -> Axes:
    """The axes of a map that is given or comes from a whole operation.

    The first dimension is the batch if it is as long as the input's: attention by windows folds others into it.
    """
    is_map = len(value.shape) == rank and isinstance(value.dtype, torch.dtype) and value.shape[dimension] > 1
    if not is_map or value.kind not in (ValueKind.INPUT, ValueKind.COMPUTED):
        return WHOLE
    return Axes(dimension, 0 if value.shape[0] == samples else None)
