"""The row loop, backward: compute each row again, differentiate it, drop it.

Rows from the bottom. Row r is computed again from the kept carry, differentiated, and the gradient of its carry is
handed up to row r-1, where it is added to the gradient of that tail:

    row r+1                                  [tail | new ...
                                              |  gradient of the carry
    row r               [tail | new ........ tail ]
                         |  gradient of the carry
    row r-1   [ ........ tail ]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import Gradients, cut, taken
from lrcnn_lightning.engine.rows import Carries
from lrcnn_lightning.engine.slabs import Prepared, SlabCall, Target
from lrcnn_lightning.graph.tap import tapped
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass
from lrcnn_lightning.rules import Axes, Interval, Reduction, Tile

__all__ = ["differentiate"]

NOTHING = Interval(0, 0)
_NONE: Mapping[int, Tensor] = {}


def differentiate(
    prepared: Prepared,
    store: dict[int, Any],
    run: BackwardPass,
    carries: Carries,
    gradients: Gradients,
    drops: bool = False,
    later: Mapping[int, Tensor] = _NONE,
) -> None:
    """Differentiate a pass and add to the gradients of its maps and wholes; drop the carries that are used up.

    ``later``: weights whose data has been changed since the forward pass, as they are now (see `as_now`).
    """
    for chunk, batch in reversed(list(enumerate(run.loop.chunks))):
        from_below: dict[int, Tensor] = {}
        coefficients: dict[int, Any] = {}
        origin = torch.zeros((), requires_grad=True)
        for r in reversed(range(len(run.loop.rows))):
            row = _BackwardRow(prepared, store, run, run.loop.rows[r], batch, gradients, origin, coefficients, later)
            calls = prepared.backward(run, chunk, r)
            from_below = row.differentiate(calls, carries.get((chunk, r - 1), {}), from_below)
            if drops:
                carries.pop((chunk, r - 1), None)


@contextlib.contextmanager
def as_now(store: Mapping[int, Any], later: Mapping[int, Tensor]) -> Iterator[None]:
    """While a row is differentiated, weights that a later call has changed by ``weight.data`` are as they are now.

    Plain autograd has computed a result with the weight as it was, and multiplies a gradient by the weight as it is.
    """
    if not later:
        yield
        return
    before = {index: store[index].clone() for index in later if index in store}
    try:
        for index in before:
            store[index].data.copy_(later[index].detach())
        yield
    finally:
        for index, tensor in before.items():
            store[index].data.copy_(tensor)


def _is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def _hand_up(handed_up: dict[int, Tensor], value: int, gradient: Tensor) -> None:
    # The gradient is a view of that of the whole slab, which must not live on.
    handed_up[value] = gradient.clone()


def _edge(tensor: Tensor) -> torch.autograd.graph.GradientEdge:
    """The place of a tensor in autograd's graph, which is all that is needed to start there: the tensor itself may go.

    A function that is written in Python lives as long as its results do. A view's node owns it, so that is the place.
    """
    if isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction):
        with torch.enable_grad():
            tensor = torch.ops.aten.alias.default(tensor)  # the gradient of a view by shape may have other strides
    return torch.autograd.graph.get_gradient_edge(tensor)


class _Lazy(dict[int, Tensor]):
    """Tensors made when first read.

    Autograd runs what was made last first. A tap that is made just before the operation that reads it is run just
    after that operation's backward, so the gradient does not wait for the end of the row.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, value: int) -> Tensor:
        self[value] = self._make(value)
        return self[value]


class _BackwardRow:
    """One row of a backward pass: recomputed, differentiated, dropped."""

    def __init__(
        self,
        prepared: Prepared,
        store: dict[int, Any],
        run: BackwardPass,
        row: Row,
        batch: Interval,
        gradients: Gradients,
        origin: Tensor,
        coefficients: dict[int, Any],
        later: Mapping[int, Tensor],
    ) -> None:
        self.graph, self.store, self.run, self.row, self.batch = prepared.graph, store, run, row, batch
        self.gradients, self.origin, self.coefficients, self.later = gradients, origin, coefficients, later
        self.injections: dict[int, list[int]] = {}
        for position in run.injections:
            self.injections.setdefault(self.graph.nodes[position].inputs[0], []).append(position)
        self.roots: list[Any] = []
        self.seeds: list[Tensor] = []

    def differentiate(
        self, calls: tuple[SlabCall, ...], carried: dict[int, Tensor], from_below: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Add to the gradients; returns those of this row's carries, for the row above."""
        graph, run = self.graph, self.run
        handed_up: dict[int, Tensor] = {}

        def tap_carry(value: int) -> Tensor:
            carry = carried[value]
            if graph.producer[value] in run.differentiated and _is_differentiable(carry):
                return self._tap(carry, partial(_hand_up, handed_up, value))
            return carry

        self._recompute(calls, _Lazy(tap_carry), from_below)
        self._inject_into_sources()
        if self.roots:
            with as_now(self.store, self.later):
                torch.autograd.grad(self.roots, [self.origin], self.seeds, allow_unused=True)
        return handed_up

    def _tap(self, tensor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """The tensor, such that its gradient is given to ``receive`` the moment autograd has it, and then dropped."""
        with torch.enable_grad():
            return tapped(tensor.detach(), self.origin, receive)

    def _tap_input(self, value: int) -> Tensor:
        """A whole value, or the slab of a source map, that this pass collects the gradient of."""
        if not self.graph.is_map(value):
            return self._tap(self.store[value], partial(self.gradients.add, value, more=True))
        tile = Tile(self.row.reads[value], self.batch)
        return self._tap(self._stored(value, tile), partial(self.gradients.add_tile, value, tile=tile))

    def _stored(self, value: int, tile: Tile) -> Tensor:
        """The part of a full map that lies in ``tile``."""
        return cut(self.store[value], self.graph.axes[value], tile)

    def _recompute(
        self, calls: tuple[SlabCall, ...], carried: dict[int, Tensor], from_below: dict[int, Tensor]
    ) -> None:
        """Compute the row again and note where gradients enter it. Slabs live on only where autograd saved them."""
        run, store = self.run, self.store
        slabs: dict[int, Tensor] = {}
        taps = _Lazy(self._tap_input)
        with torch.enable_grad():
            for call in calls:
                if call.position in run.differentiated:
                    results = call(slabs, store, taps, carried)
                    for target in call.targets:
                        self._seed_target(target, target.owned(results, slabs))
                    for value, cuts in call.carried:
                        if value in from_below and slabs[value].requires_grad:
                            self._seed(taken(slabs[value], cuts), from_below[value])
                else:
                    with torch.no_grad():
                        results = call(slabs, store, taps, carried)
                del results  # with it goes what was computed, unless it is a slab or saved
                for value in call.drops:
                    slabs.pop(value, None)

    def _seed(self, tensor: Tensor, gradient: Tensor) -> None:
        self.roots.append(tensor if tensor.grad_fn is None else _edge(tensor))
        self.seeds.append(gradient.to(tensor.dtype))

    def _seed_target(self, target: Target, owned: Tensor) -> None:
        """The gradient of a target's rows: from its map, and from the reductions that read it."""
        if not owned.requires_grad:
            return
        value, tile = target.value, target.tile
        full = self.gradients.get(value) if value in self.run.outputs else None
        if full is not None:
            self._seed(owned, cut(full, self.graph.axes[value], tile))
        if value in self.injections:
            values = self._stored(value, tile) if value in self.store else owned.detach()
            for gradient in self._injected(value, values, tile):
                self._seed(owned, gradient)

    def _inject_into_sources(self) -> None:
        """A reduction that reads a map straight from the border adds to the gradient of that map."""
        for value in self.injections:
            interval = self.row.owned[value]
            if value in self.run.maps and not interval.empty:
                tile = Tile(interval, self.batch)
                for gradient in self._injected(value, self._stored(value, tile).detach(), tile):
                    self.gradients.add_tile(value, gradient, tile)

    def _injected(self, value: int, slab: Tensor, tile: Tile) -> Iterator[Tensor]:
        """What each reduction of a value adds to the gradient of its slab, which lies in ``tile``."""
        for position in self.injections[value]:
            rule = self.graph.rules[position]
            assert isinstance(rule, Reduction)
            with torch.no_grad():
                if position not in self.coefficients:
                    self.coefficients[position] = self._coefficients(position, rule)
                if self.coefficients[position] is not None:
                    yield rule.inject(slab, tile.rows, self.coefficients[position])

    def _coefficients(self, position: int, rule: Reduction) -> Any:
        """What a reduction injects with, or None if its results have no gradient."""
        node = self.graph.nodes[position]
        gradients = [self.gradients.get(output) for output in node.outputs]
        if all(gradient is None for gradient in gradients):
            return None
        outputs: list[Tensor] = [self.store[output] for output in node.outputs]
        if rule.keeps_batch is not None:
            axes, samples = Axes(None, rule.keeps_batch), Tile(NOTHING, self.batch)
            gradients = [None if g is None else cut(g, axes, samples) for g in gradients]
            outputs = [cut(output, axes, samples) for output in outputs]
        return rule.coefficients(outputs, gradients)
