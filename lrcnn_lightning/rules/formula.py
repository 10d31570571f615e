"""Formulas: the gradient of an operation on the rows of a tile, without autograd.

    forward     arguments -> the result, and what the gradient needs of all that
    backward    what was needed, gradient of the result -> gradients of the arguments

The engine walks backward over the operations of a row itself. One with a formula costs its own calls alone, and where
the gradient does not depend on the result (``hollow``: that of a convolution) the result need not be computed. One
without is recorded by autograd, apart from all others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrcnn_lightning.graph import Context
from lrcnn_lightning.graph.switches import entered

__all__ = ["Formula", "NumberedCall", "Saved", "autocast_dtype", "flat"]

Saved = tuple[Any, ...]


class Formula(ABC):
    """The gradient of one operation on one tile, of the arguments whose gradient is wanted."""

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the formula holds for these arguments, by shapes and dtypes. Where not, autograd does it."""
        return True

    @abstractmethod
    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        """The result (None if it is to be ``hollow``), and what `backward` needs."""

    @abstractmethod
    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        """Gradients of the arguments, nested as these are; None where there is none, or none is wanted.

        Nobody else needs those of the results: what is taken from the list is let go as soon as it is not used.
        """


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix operation runs here, given the ambient autocast."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def flat(tree: Any) -> Iterator[Any]:
    """What is inside nested lists and tuples, in order."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from flat(item)
    else:
        yield tree


class NumberedCall(NamedTuple):
    """A call on tensors by their numbers, with a formula: ``arguments`` puts them in their places."""

    formula: Formula
    references: tuple[int, ...]
    """The numbers of the tensors among the arguments, in order."""
    arguments: Callable[[Sequence[Any]], tuple[Any, Any]]
    context: Context

    def forward(self, tensors: Mapping[int, Tensor]) -> tuple[Any, Saved] | None:
        """The result and what is saved, or None where the formula does not apply."""
        args, kwargs = self.arguments([tensors[number] for number in self.references])
        if not self.formula.applies(args, kwargs):
            return None
        with entered(self.context):
            return self.formula.forward(args, kwargs)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
        """Number and gradient of each tensor that has one."""
        places, _ = self.arguments([_Place(number) for number in self.references])
        for place, gradient in zip(flat(places), flat(self.formula.backward(saved, gradients)), strict=False):
            if isinstance(place, _Place) and gradient is not None:
                yield place.number, gradient


@dataclass(frozen=True)
class _Place:
    number: int
