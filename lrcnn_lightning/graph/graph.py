"""The graph: values, and nodes that compute them, as plain data.

A graph is in single-assignment form: each value is produced by one node, or is given (a user input, a parameter, a
buffer, a constant).  Arguments of a node hold `Ref`s where tensors go and plain Python constants elsewhere, nested in
the lists, tuples and dicts of the ATen signature.

    values   x  weight  c1  relu  ...          one row each: name, shape, dtype, kind
    nodes    c1 = aten.conv2d(x, weight, ...)
             relu = aten.relu(c1)
    outputs  {"out": relu}                     a pytree
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lrcnn_lightning.graph.guards import Guards
from lrcnn_lightning.graph.structure import Structure

__all__ = [
    "Context",
    "Graph",
    "Node",
    "Prefix",
    "Ref",
    "Value",
    "ValueKind",
    "Write",
    "dense_strides",
    "map_refs",
    "references",
]


@dataclass(frozen=True)
class Ref:
    """A tensor argument: the index of a value in ``Graph.values``."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


class ValueKind(enum.Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    COMPUTED = "computed"


@dataclass(frozen=True)
class Value:
    """One tensor of the graph, as the capture saw it.

    ``source`` is the qualified name of a parameter, a buffer or a tensor that is an attribute, the position among the
    flat user inputs, or the key of a tensor in ``Graph.constants``.  ``dtype`` is that of execution without autocast;
    under autocast the engine follows the tensors it gets.
    ``strides`` are those that the module's own code gives it; ``None`` for values that its code does not have.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: ValueKind = ValueKind.COMPUTED
    source: str | int | None = None
    strides: tuple[int, ...] | None = None

    @cached_property
    def elements(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @cached_property
    def bytes(self) -> int:
        """The size in bytes of a dense tensor of this shape and dtype."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Context:
    """Switches that the module's own code set around a node (``torch.no_grad()``, ``torch.autocast(...)``)."""

    grad: bool = True
    autocast: tuple[str, torch.dtype, bool] | None = None


@dataclass(frozen=True)
class Node:
    """One operation.

    ``op`` is an ATen overload or an operation of the package (``rules``); ``module`` is the path of the submodule
    whose code called it, for messages.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    module: str = ""
    context: Context = Context()

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the values that the node reads, in order of appearance, repeated ones once."""
        return tuple(dict.fromkeys(ref.index for ref in references((self.args, self.kwargs))))


@dataclass(frozen=True)
class Write:
    """An attribute that the module's code sets: the submodule's path, its name, and how its value is nested.

    ``buffer``: it is a buffer, persistent or not; None for an ordinary attribute.
    """

    path: str
    name: str
    structure: Structure
    buffer: bool | None = None


@dataclass(frozen=True)
class Prefix:
    """Nodes that run before all others, as they were written, on the caller's tensors (`prefix`).

    ``results`` are the values they compute that the graph reads. There these are inputs, behind the flat arguments.
    """

    nodes: tuple[Node, ...] = ()
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A captured module: values, nodes in execution order, and the pytree of its outputs.

    ``outputs`` are the leaves of what the module returns, in ``structure``: a `Ref` or a plain constant. After them
    come the leaves of attributes that its code sets at every call (``writes``). ``guards`` are what the code read of
    Python while it was captured. ``source`` is the graph as the code has it, where this one is in functional form.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    structure: Structure
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    writes: tuple[Write, ...] = ()
    guards: Guards = field(default=Guards(), repr=False, compare=False)
    arguments: int = 0
    """The number of flat arguments of a call."""
    prefix: Prefix = Prefix()
    source: Graph | None = field(default=None, repr=False, compare=False)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The user's tensor inputs, in flat order."""
        return tuple(value for value in self.values if value.kind is ValueKind.INPUT)

    def producers(self) -> dict[int, int]:
        """Value index -> position in ``nodes`` of the node that computes it."""
        return {output: position for position, node in enumerate(self.nodes) for output in node.outputs}

    def readers(self) -> dict[int, list[int]]:
        """Value index -> positions in ``nodes`` of the nodes that read it."""
        table: dict[int, list[int]] = {value.index: [] for value in self.values}
        for position, node in enumerate(self.nodes):
            for index in node.inputs:
                table[index].append(position)
        return table

    def output_values(self) -> tuple[int, ...]:
        """Indices of the values that the module returns, each once."""
        return tuple(dict.fromkeys(ref.index for ref in references(self.outputs)))

    def __str__(self) -> str:
        lines = []
        for value in self.values:
            if value.kind is not ValueKind.COMPUTED:
                lines.append(f"{value.kind.value:9} %{value.index} {value.name}: {list(value.shape)}")
        for node in self.nodes:
            targets = ", ".join(f"%{i} {list(self.values[i].shape)}" for i in node.outputs)
            lines.append(f"{targets} = {node.op}{node.args!r}  # {node.module}")
        lines.append(f"return {self.outputs!r}")
        return "\n".join(lines)


def references(tree: Any) -> Iterator[Ref]:
    """The `Ref`s inside nested lists, tuples and dicts, in order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from references(item)


def map_refs(tree: Any, replace: Callable[[Ref], Any]) -> Any:
    """A copy of nested lists, tuples and dicts with each `Ref` replaced."""
    if isinstance(tree, Ref):
        return replace(tree)
    if isinstance(tree, list):
        return [map_refs(item, replace) for item in tree]
    if isinstance(tree, tuple):
        return tuple(map_refs(item, replace) for item in tree)
    if isinstance(tree, dict):
        return {key: map_refs(item, replace) for key, item in tree.items()}
    return tree


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie without gaps, in any order of the dimensions, and none stands for several."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)) if all(shape) else ():
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def dense_strides(shape: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides without gaps of a shape, its dimensions in the order of other strides; contiguous without these.

    The order is that in which PyTorch lays out a new tensor like another one (``infer_dense_strides``): an expanded
    dimension, of stride 0, stays where it is.
    """
    inner_first = list(reversed(range(len(shape))))
    if order is not None:
        for number in range(1, len(shape)):
            place = number
            for before in reversed(range(number)):
                outer, inner = inner_first[before], inner_first[place]
                if _comes_after(outer, inner, shape, order):
                    inner_first[before], inner_first[place] = inner, outer
                    place = before
                elif 0 < order[outer] < order[inner]:
                    break
    strides, step = [0] * len(shape), 1
    for dimension in inner_first:
        strides[dimension] = step
        step *= max(shape[dimension], 1)
    return tuple(strides)


def _comes_after(dimension: int, other: int, shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a dimension that was taken to be further inside than another is further outside."""
    mine, others = order[dimension], order[other]
    if 0 in (mine, others):
        return False
    return mine > others or (mine == others and shape[dimension] > shape[other])
