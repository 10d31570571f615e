"""A call on slabs that waits for the gradients of its results.

It was run by a formula, which has saved what it needs, or under autograd, in a graph of its own:

    formula      forward -> saved            backward of the formula -> gradients, one for each sink
    autograd     taps -> operation -> edges      autograd.grad from the edges -> taps, which receive the gradients
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.slabs import Sink, SlabCall, as_tuple
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.graph.tap import tapped

__all__ = ["RecordedCall", "recorded_call"]

AddWhole = Callable[[int, Tensor, bool], None]
"""Takes the gradient of a whole value, and whether nobody else has it."""


class RecordedCall:
    """A call that computed nothing: its slabs are what the row above has handed down."""

    dtypes: tuple[torch.dtype, ...] = ()
    """Of the results, as far as they were made."""

    def __init__(self, call: SlabCall) -> None:
        self.call = call

    def differentiate(self, gradients: list[Tensor | None]) -> list[tuple[Sink, Tensor]]:
        """The gradients of the operands by those of the results, which are let go as soon as they are not needed.

        Those of whole values are added to their sums at once.
        """
        return []


class _ByFormula(RecordedCall):
    def __init__(self, call: SlabCall, results: tuple[Any, ...], saved: tuple[Any, ...], add_whole: AddWhole) -> None:
        super().__init__(call)
        self.dtypes = tuple(result.dtype for result in results if result is not None)
        self._saved: tuple[Any, ...] | None = saved
        self._add_whole = add_whole

    def differentiate(self, gradients: list[Tensor | None]) -> list[tuple[Sink, Tensor]]:
        formula, saved = self.call.formula, self._saved
        assert formula is not None and saved is not None
        self._saved, made = None, []
        for sink, gradient in self.call.sunk(formula.backward(saved, gradients)):
            if sink.is_whole:
                self._add_whole(sink.value, gradient, True)
            else:
                made.append((sink, gradient))
        return made


class _ByAutograd(RecordedCall):
    def __init__(self, call: SlabCall, origin: Tensor, add_whole: AddWhole) -> None:
        super().__init__(call)
        self._origin, self._add_whole = origin, add_whole
        self._sinks = {sink.value: sink for sink in call.sinks if sink is not None}
        self._edges: tuple[Any, ...] = ()
        self._received: list[tuple[Sink, Tensor]] = []

    def run(self, slabs: Mapping[int, Tensor], store: Mapping[int, Any]) -> tuple[Any, ...]:
        """The results."""
        with torch.enable_grad():
            results = self.call.computed(*self.call.arguments(slabs, store, self._tap))
        self.dtypes = tuple(result.dtype for result in results)
        self._edges = tuple(_edge(result) if result.requires_grad else None for result in results)
        return results

    def differentiate(self, gradients: list[Tensor | None]) -> list[tuple[Sink, Tensor]]:
        pairs = [(e, g) for e, g in zip(self._edges, gradients, strict=True) if e is not None and g is not None]
        self._edges = ()
        gradients.clear()
        if pairs:
            edges, seeds = map(list, zip(*pairs, strict=True))
            del pairs
            torch.autograd.grad(edges, [self._origin], seeds, allow_unused=True)
        return self._received

    def _tap(self, value: int, tensor: Tensor) -> Tensor:
        return tapped(tensor.detach(), self._origin, partial(self._receive, self._sinks[value]))

    def _receive(self, sink: Sink, gradient: Tensor) -> None:
        if sink.is_whole:
            self._add_whole(sink.value, gradient, False)
        else:
            self._received.append((sink, gradient))


def recorded_call(
    call: SlabCall, slabs: Mapping[int, Tensor], store: Mapping[int, Any], origin: Tensor, add_whole: AddWhole
) -> tuple[tuple[Any, ...], RecordedCall]:
    """Run a call: its results, and what waits for their gradients. ``origin`` is what taps hang on."""
    formula = call.formula
    if formula is not None:
        args, kwargs = call.arguments(slabs, store)
        if formula.applies(args, kwargs):
            with contextlib.nullcontext() if call.context is None else entered(call.context):
                result, saved = formula.forward(args, kwargs, call.hollow)
            results = as_tuple(result)
            return results, _ByFormula(call, results, saved, add_whole)
        del args, kwargs
    made = _ByAutograd(call, origin, add_whole)
    return made.run(slabs, store), made


def _edge(tensor: Tensor) -> torch.autograd.graph.GradientEdge:
    """The place of a tensor in autograd's graph, which is all that is needed to start there: the tensor itself may go.

    A function that is written in Python lives as long as its results do. A view's node owns it, so that is the place.
    """
    if isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction):
        with torch.enable_grad():
            tensor = torch.ops.aten.alias.default(tensor)  # the gradient of a view by shape may have other strides
    return torch.autograd.graph.get_gradient_edge(tensor)
