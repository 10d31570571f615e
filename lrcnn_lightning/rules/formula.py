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

__all__ = ["Formula", "NumberedCall", "Saved", "autocast_dtype", "paired"]

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


def paired(arguments: Sequence[Any], gradients: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """What is inside the arguments, which may be nested, in order, and the gradient of each, or None."""
    for place, argument in enumerate(arguments):
        gradient = gradients[place] if place < len(gradients) else None
        if isinstance(argument, (list, tuple)):
            yield from paired(argument, () if gradient is None else gradient)
        else:
            yield argument, gradient


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
        for place, gradient in paired(places, self.formula.backward(saved, gradients)):
            if isinstance(place, _Place) and gradient is not None:
                yield place.number, gradient


@dataclass(frozen=True)
class _Place:
    number: int
