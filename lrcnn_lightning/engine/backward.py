"""The row loop, backward: compute each row again, differentiate it, drop it.

Rows from the bottom. Row r is computed again from the kept carry, differentiated operation by operation, the last one
first, and the gradient of its carry is handed up to row r-1, where it is added to the gradient of that tail:

    row r+1                                  [tail | new ...
                                              |  gradient of the carry
    row r               [tail | new ........ tail ]
                         |  gradient of the carry
    row r-1   [ ........ tail ]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import Gradients, cut
from lrcnn_lightning.engine.recorded import RecordedCall, recorded_call
from lrcnn_lightning.engine.rows import Carries
from lrcnn_lightning.engine.slab_gradients import SlabGradients
from lrcnn_lightning.engine.slabs import Prepared, Sink, SlabCall, Target
from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass
from lrcnn_lightning.rules import Axes, Interval, Reduction, Tile

__all__ = ["as_now", "differentiate"]

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
        self.slab_gradients = SlabGradients()
        self.lent: dict[int, int | None] = {}
        """Maps whose gradient is that of a slab, which others of this row may use; its memory, if it is of this row."""

    def differentiate(
        self, calls: tuple[SlabCall, ...], carried: dict[int, Tensor], from_below: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Add to the gradients; returns those of this row's carries, for the row above."""
        handed_up: dict[int, Tensor] = {}
        with torch.no_grad():
            recorded = self._recompute(calls, carried)
            self._inject_into_sources()
            with as_now(self.store, self.later):
                while recorded:
                    self._back(recorded.pop(), from_below, handed_up)
        self._own_maps()
        return handed_up

    # ---------------------------------------------------------------- computing again

    def _recompute(self, calls: tuple[SlabCall, ...], carried: dict[int, Tensor]) -> list[RecordedCall]:
        """Compute the row again. Slabs live on only where a formula or autograd saved them."""
        run, store = self.run, self.store
        slabs: dict[int, Tensor] = {}
        recorded: list[RecordedCall] = []
        for call in calls:
            if call.position in run.differentiated:
                results = self._recorded(call, slabs, carried, recorded)
                for target in call.targets:
                    if target.value in self.injections:
                        self._inject(target, target.owned(results, slabs))
            else:
                results = call(slabs, store, carried)
            del results  # with it goes what was computed, unless it is a slab or saved
            for value in call.drops:
                slabs.pop(value, None)
        return recorded

    def _recorded(
        self, call: SlabCall, slabs: dict[int, Tensor], carried: dict[int, Tensor], recorded: list[RecordedCall]
    ) -> tuple[Any, ...]:
        """Run a call such that it can be differentiated; returns what was computed."""
        results: tuple[Any, ...] = (None,) * len(self.graph.nodes[call.position].outputs)
        made = RecordedCall(call)
        if call.computes:
            results, made = recorded_call(call, slabs, self.store, self.origin, self._add_whole)
        recorded.append(made)
        call.put(results, slabs, carried)
        return results

    def _inject(self, target: Target, owned: Tensor | None) -> None:
        """Add to the gradient of a slab what the reductions that read it add."""
        value, tile = target.value, target.tile
        slab = self._stored(value, tile) if value in self.store else owned
        assert slab is not None
        for gradient in self._injected(value, slab.detach(), tile):
            self.slab_gradients.hold(gradient)
            self.slab_gradients.add(value, gradient, target.part)
            self.slab_gradients.let_go(gradient)

    # ---------------------------------------------------------------- backward

    def _back(self, recorded: RecordedCall, from_below: dict[int, Tensor], handed_up: dict[int, Tensor]) -> None:
        """Differentiate a call: the gradients of its results are complete, since all that reads them is done."""
        call = recorded.call
        outputs = self.graph.nodes[call.position].outputs
        gradients = [self._taken(call, number, value, recorded, from_below) for number, value in enumerate(outputs)]
        if all(gradient is None for gradient in gradients):
            return
        if call.head:
            handed_up.update(self._handed_up(call, outputs, gradients))
        if not call.computes:
            return
        own = list(map(partial(self._computed, call), outputs, gradients))
        del gradients
        self._route(call, recorded.differentiate(own))

    def _route(self, call: SlabCall, made: list[tuple[Sink, Tensor]]) -> None:
        """Add the gradients that were made."""
        slabs = self.slab_gradients
        for _, gradient in made if call.fresh else ():
            slabs.hold(gradient)
        while made:
            sink, gradient = made.pop(0)
            if sink.tile is None:
                slabs.add(sink.value, gradient, sink.part)
            else:
                alone = slabs.is_alone(gradient)
                if self.gradients.add_tile(sink.value, gradient, sink.tile, alone) and not alone:
                    self.lent[sink.value] = slabs.memory_here(gradient)
            if call.fresh:
                slabs.let_go(gradient)

    def _own_maps(self) -> None:
        """Nothing of the row is left: the gradients of slabs that have become those of maps are theirs alone."""
        memories = list(self.lent.values())
        for value, memory in self.lent.items():
            if memory is not None and memories.count(memory) == 1:
                self.gradients.own(value)

    def _axis(self, value: int) -> int:
        axis = self.graph.axes[value].row
        assert axis is not None
        return axis

    def _computed(self, call: SlabCall, value: int, gradient: Tensor | None) -> Tensor | None:
        """The gradient of what was computed, of that of the slab with the carry before it."""
        if gradient is None or not call.head:
            return gradient
        axis = self._axis(value)
        return lines(gradient, axis, call.head, gradient.shape[axis] - call.head)

    def _handed_up(
        self, call: SlabCall, values: Sequence[int], gradients: Sequence[Tensor | None]
    ) -> Iterator[tuple[int, Tensor]]:
        """The gradients of carries: copies, since they are parts of those of slabs, which must not live on."""
        for value, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                yield value, lines(gradient, self._axis(value), 0, call.head).clone()

    def _taken(
        self, call: SlabCall, number: int, value: int, recorded: RecordedCall, from_below: dict[int, Tensor]
    ) -> Tensor | None:
        """The gradient of a slab: from its readers and from reductions, from its map, and from the row below."""
        dtype = recorded.dtypes[number] if recorded.dtypes else None
        for target in call.targets:
            full = self.gradients.get(value) if target.value == value and value in self.run.outputs else None
            if full is not None:
                gradient = cut(full, self.graph.axes[value], target.tile)
                self.slab_gradients.add(value, gradient if dtype is None else gradient.to(dtype), target.part, True)
        for carried, part in call.carried:
            if carried == value and value in from_below:
                gradient = from_below[value]
                self.slab_gradients.add(value, gradient if dtype is None else gradient.to(dtype), part, True)
        return self.slab_gradients.take(value)

    def _add_whole(self, value: int, gradient: Tensor, alone: bool) -> None:
        """The gradient of a whole value, to which those of other rows will be added."""
        self.gradients.add(value, gradient, more=True, alone=alone)

    # ---------------------------------------------------------------- reductions

    def _stored(self, value: int, tile: Tile) -> Tensor:
        """The part of a full map that lies in ``tile``."""
        return cut(self.store[value], self.graph.axes[value], tile)

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
