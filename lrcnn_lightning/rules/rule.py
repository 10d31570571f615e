r"""What a row rule is, and the registry that finds one for an operation.

A rule answers three questions about one node of the graph:

    which dimension of each output is the row axis (and which the batch axis)?     ``axes``
    which rows of its inputs do the output rows [a, b) need?                       ``needed``
    how is the operation called on a slab?                                         ``run``

    input map         0 . . lo ======== hi . . H         needed([a, b)) = [lo, hi)
                              \          /
    output map          0 . . a ======= b . . H'         run(slab [lo, hi)) = slab [a, b)

A `Reduction` consumes rows and yields a whole value: a partial result per row, merged, finished once (a barrier).

A new operation is one function here in ``rules`` that is registered for its ATen overloads, and one line in its test
table.  An operation without a rule runs whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrcnn_lightning.graph import CustomFunction, Node, Ref, Value, is_elementwise, references
from lrcnn_lightning.rules.formula import Formula

__all__ = [
    "Axes",
    "Factory",
    "Family",
    "Interval",
    "Operator",
    "Reduction",
    "RowRule",
    "Scope",
    "Tile",
    "family_of",
    "find_factory",
    "register",
    "registered",
]


class Interval(NamedTuple):
    """Half-open rows ``[lo, hi)``, clipped to the map."""

    lo: int
    hi: int

    @property
    def length(self) -> int:
        return self.hi - self.lo

    @property
    def empty(self) -> bool:
        return self.hi <= self.lo


class Axes(NamedTuple):
    """Dimensions of a value along which it is split; ``None`` where it is not. Both ``None``: a whole value."""

    row: int | None = None
    batch: int | None = None


WHOLE = Axes()


class Tile(NamedTuple):
    """The part of an output that one call computes: its rows, and its samples of the batch."""

    rows: Interval
    batch: Interval


@dataclass(frozen=True)
class Operator:
    """An operation of the package, where ATen has none that can be split (for example moments, apart from their use).

    Calling it runs it on full tensors, differentiably.
    """

    name: str
    function: Callable[..., Any]
    effect: bool = False
    """Whether it does something beside its results."""
    draws: bool = False
    """Whether it takes random numbers."""
    constants: int = 0
    """How many of its results, the first ones, have no gradient."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __str__(self) -> str:
        return f"rowwise.{self.name}"

    __repr__ = __str__


@dataclass(frozen=True)
class Scope:
    """What a factory may ask about the values around its node."""

    values: Sequence[Value]
    axes: dict[int, Axes]
    node: Node

    def shape(self, ref: Any) -> tuple[int, ...]:
        """The shape of a referenced value; ``()`` for a Python number."""
        return self.values[ref.index].shape if isinstance(ref, Ref) else ()

    def of(self, ref: Any) -> Axes:
        """The axes of a referenced value; whole for a constant."""
        return self.axes.get(ref.index, WHOLE) if isinstance(ref, Ref) else WHOLE

    @property
    def rank(self) -> int:
        """The number of dimensions of the first argument."""
        return len(self.shape(self.node.args[0]))

    @property
    def output(self) -> Value:
        """The (first) output."""
        return self.values[self.node.outputs[0]]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def row_inputs(self) -> list[Ref]:
        """The inputs that have a row axis, in order."""
        return [ref for ref in references((self.node.args, self.node.kwargs)) if self.of(ref).row is not None]

    def only_first_has_rows(self) -> bool:
        """Whether the first argument has a row axis and no other has one."""
        rows = self.row_inputs()
        return len(rows) == 1 and bool(self.node.args) and rows[0] == self.node.args[0]


class RowRule(ABC):
    """How one node is computed on rows; see the module's docstring."""

    axes: tuple[Axes, ...]

    def needed(self, output: Interval) -> Interval:
        """The rows that the output rows need, of every input that has a row axis."""
        return output

    @abstractmethod
    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Any:
        """Compute the slab of ``tile``; row inputs come as slabs of exactly ``needed(tile.rows)``."""

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        """`run` for one tile, called at every step: what depends on the tile alone may be found out here, once."""
        return partial(self.run, tile=tile)

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        """The gradient by a formula, or None where autograd makes it.

        ``wanted`` is nested as the arguments are, and says of which the gradient is wanted.
        """
        return None

    @property
    def hollow(self) -> bool:
        """Whether the gradient is by a formula that does not depend on the result."""
        return False


class Reduction(ABC):
    """A row input reduced to whole values: a barrier. ``state`` is whatever `partial` returns."""

    axes: tuple[Axes, ...]
    keeps_batch: int | None = None
    """Dimension of the outputs that is still the batch, or ``None`` where the batch is reduced too."""

    @abstractmethod
    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        """The contribution of one slab, which holds ``rows`` of the input."""

    @abstractmethod
    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        """Two contributions as one."""

    @abstractmethod
    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The outputs of the node, from the contribution of all rows."""

    def coefficients(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
        """What `inject` takes of the finished outputs and their gradients, worked out once for all rows."""
        return outputs, gradients

    @abstractmethod
    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        """The gradient of the slab."""


Factory = Callable[[Scope], "RowRule | Reduction | None"]
FactoryType = TypeVar("FactoryType", bound=Factory)

Family = Literal["contraction", "convolution", "normalisation", "pointwise", "pooling", "reduction", "resize", "shape"]
"""What an operation does, and so what a row of it costs."""

_REGISTRY: dict[Any, tuple[Family, Factory]] = {}


def register(family: Family, *operations: Any) -> Callable[[FactoryType], FactoryType]:
    """Decorator: the factory makes the rule of these ATen overloads (or `Operator`s), which are all of a ``family``."""

    def add(factory: FactoryType) -> FactoryType:
        for operation in operations:
            if operation in _REGISTRY:
                raise ValueError(f"{operation} already has a row rule")
            _REGISTRY[operation] = (family, factory)
        return factory

    return add


def registered() -> dict[Any, Family]:
    """Every operation with a rule of its own, and its family."""
    return {operation: family for operation, (family, _) in _REGISTRY.items()}


def family_of(operation: Any) -> Family | None:
    """The family of an operation that has a rule; ``None`` for others, which always run whole."""
    if operation in _REGISTRY:
        return _REGISTRY[operation][0]
    return None if find_factory(operation) is None else "pointwise"


def find_factory(operation: Any) -> Factory | None:
    """The factory for an operation. Every ATen overload tagged pointwise has the pointwise one, as has every function
    with a backward of its own that is declared to act element by element.
    """
    if isinstance(operation, CustomFunction):
        return _REGISTRY["pointwise"][1] if is_elementwise(operation.function) and not operation.draws else None
    if operation in _REGISTRY:
        return _REGISTRY[operation][1]
    if isinstance(operation, torch._ops.OpOverload) and torch.Tag.pointwise in operation.tags:
        if operation._schema.is_mutable or torch.Tag.nondeterministic_seeded in operation.tags:
            return None
        return _REGISTRY["pointwise"][1]
    return None
