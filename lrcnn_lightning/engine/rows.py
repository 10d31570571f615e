"""The row loop: run a `Loop` forward, or differentiate it, slab by slab.

Forward, rows from the top. A slab of a carried value is what the row before handed down and what is new:

    row r-1   [ ........ tail ]
                         |  carry
    row r               [tail | new ........ tail ]
                                              |  carry
    row r+1                                  [tail | new ...

Backward, rows from the bottom. Row r is computed again from the kept carry, differentiated, and the gradient of its
carry is handed up to row r-1, where it is added to the gradient of that tail:

    row r+1                                  [tail | new ...
                                              |  gradient of the carry
    row r               [tail | new ........ tail ]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import Gradients, cut, write
from lrcnn_lightning.graph import Context, Node, Ref, map_refs
from lrcnn_lightning.plan.halos import Row, Span
from lrcnn_lightning.plan.loop import BackwardPass, Loop
from lrcnn_lightning.rules import Axes, Interval, Reduction, RowGraph, RowRule, Tile

__all__ = ["Carries", "RowLoop", "Slabs", "entered", "run_node"]

NOTHING = Interval(0, 0)

# (chunk, row) -> value -> the rows that row + 1 takes over.
Carries = dict[tuple[int, int], dict[int, Tensor]]


@contextlib.contextmanager
def entered(context: Context) -> Iterator[None]:
    """The switches that the module's code had set around a node."""
    with contextlib.ExitStack() as stack:
        if not context.grad:
            stack.enter_context(torch.no_grad())
        if context.autocast is not None:
            device, dtype, enabled = context.autocast
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


_DEFAULT = Context()


def run_node(node: Node, tensors: dict[int, Any]) -> tuple[Any, ...]:
    """Run a node on full tensors; its outputs as a tuple."""
    args = map_refs(node.args, lambda ref: tensors[ref.index])
    kwargs = map_refs(node.kwargs, lambda ref: tensors[ref.index])
    if node.context == _DEFAULT:
        result = node.op(*args, **kwargs)
    else:
        with entered(node.context):
            result = node.op(*args, **kwargs)
    if not node.outputs:
        return ()
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def _is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


class RowLoop:
    """Runs loops over one set of full maps and whole values (``store``: value -> tensor)."""

    def __init__(self, graph: RowGraph, store: dict[int, Any]) -> None:
        self.graph, self.store = graph, store

    # ---------------------------------------------------------------- forward

    def forward(self, loop: Loop, kept_carries: Collection[int] = ()) -> Carries:
        """Run the loop without autograd: write its stored maps, finish its reductions, return the kept carries."""
        graph = self.graph
        kept: Carries = {}
        keep_outputs = {output for position in kept_carries for output in graph.nodes[position].outputs}
        reductions = _Reductions(graph, loop, self.store)
        for chunk, batch in enumerate(loop.chunks):
            carried: dict[int, Tensor] = {}
            for r, row in enumerate(loop.rows):
                slabs = Slabs(graph, self.store, loop.nodes, row, batch)
                following = loop.rows[r + 1] if r + 1 < len(loop.rows) else None
                handed: dict[int, Tensor] = {}
                for value in reductions.from_border:
                    reductions.add(value, slabs, chunk)
                for position in loop.nodes:
                    for value, slab in slabs.compute(position, carried).items():
                        if following is not None:
                            carry = _carry(slab, graph.axes[value], row.spans[position], following.spans[position])
                            if carry is not None:
                                handed[value] = carry
                        if value in loop.stored:
                            self._write(value, slabs)
                        reductions.add(value, slabs, chunk)
                    slabs.release(position)
                carried = handed
                if keep_outputs and following is not None:
                    kept[chunk, r] = {value: carry for value, carry in handed.items() if value in keep_outputs}
        reductions.finish()
        return kept

    def sweep(self, loop: Loop) -> Carries:
        """Run the loop for its carries alone."""
        bare = replace(loop, stored=(), reductions=())
        return self.forward(bare, loop.carried)

    def _write(self, value: int, slabs: Slabs) -> None:
        tile = Tile(slabs.row.owned[value], slabs.batch)
        if not tile.rows.empty:
            shape = self.graph.values[value].shape
            owned = slabs.owned(value)
            self.store[value] = write(self.store.get(value), owned, shape, self.graph.axes[value], tile)

    # --------------------------------------------------------------- backward

    def backward(self, run: BackwardPass, carries: Carries, gradients: Gradients, drops: bool = False) -> None:
        """Differentiate a pass and add to the gradients of its maps and wholes; drop the carries that are used up."""
        for chunk, batch in reversed(list(enumerate(run.loop.chunks))):
            from_below: dict[int, Tensor] = {}
            for r in reversed(range(len(run.loop.rows))):
                row = _BackwardRow(self.graph, self.store, run, run.loop.rows[r], batch, gradients)
                from_below = row.differentiate(carries.get((chunk, r - 1), {}), from_below)
                if drops:
                    carries.pop((chunk, r - 1), None)


class _Reductions:
    """The running results of a loop's reductions, one a chunk of the batch."""

    def __init__(self, graph: RowGraph, loop: Loop, store: dict[int, Any]) -> None:
        self.graph, self.loop, self.store = graph, loop, store
        self._readers: dict[int, list[int]] = {}
        for position in loop.reductions:
            self._readers.setdefault(graph.nodes[position].inputs[0], []).append(position)
        self.from_border = [value for value in self._readers if value in loop.sources]
        self._states: dict[tuple[int, int], Any] = {}

    def add(self, value: int, slabs: Slabs, chunk: int) -> None:
        """Take in the rows that this row of the loop owns."""
        if value not in self._readers or slabs.row.owned[value].empty:
            return
        owned = slabs.owned(value)
        for position in self._readers[value]:
            rule = self.graph.rules[position]
            assert isinstance(rule, Reduction)
            part = rule.partial(owned, slabs.row.owned[value])
            before = self._states.get((position, chunk))
            self._states[position, chunk] = part if before is None else rule.merge(before, part)

    def finish(self) -> None:
        """Put the outputs into the store: over all chunks, or by chunk where the batch is not reduced."""
        for position in self.loop.reductions:
            rule, node = self.graph.rules[position], self.graph.nodes[position]
            assert isinstance(rule, Reduction)
            states = [self._states[position, chunk] for chunk in range(len(self.loop.chunks))]
            if rule.keeps_batch is None:
                state = states[0]
                for other in states[1:]:
                    state = rule.merge(state, other)
                outputs = list(rule.finish(state))
            else:
                parts = zip(*(rule.finish(state) for state in states), strict=True)
                outputs = [part[0] if len(part) == 1 else torch.cat(part, rule.keeps_batch) for part in parts]
            self.store.update(zip(node.outputs, outputs, strict=True))


def _carry(slab: Tensor, axes: Axes, span: Span, following: Span) -> Tensor | None:
    """A copy of the rows of ``slab`` that the next row takes over."""
    if following.lo >= following.new:
        return None
    assert axes.row is not None
    rows = slab.narrow(axes.row, following.lo - span.lo, following.new - following.lo)
    return rows.clone(memory_format=torch.preserve_format)


class Slabs:
    """The slabs of one row of one chunk: made, read, and dropped after their last reader."""

    def __init__(
        self, graph: RowGraph, store: dict[int, Any], nodes: Collection[int], row: Row, batch: Interval
    ) -> None:
        self.graph, self.store, self.row, self.batch = graph, store, row, batch
        self.taps: dict[int, Tensor] = {}
        self.tapped: frozenset[int] = frozenset()
        self._slabs: dict[int, tuple[Tensor, int]] = {}
        self._fresh: dict[int, Tensor] = {}
        self._waiting: dict[int, int] = {}
        for position in nodes:
            for value in graph.nodes[position].inputs:
                self._waiting[value] = self._waiting.get(value, 0) + 1

    def rows_of(self, value: int, interval: Interval) -> Tensor:
        """Rows of a value: from a slab of this row, or from its full map."""
        axes = self.graph.axes[value]
        if value in self.tapped and value not in self._slabs:
            self._slabs[value] = (self.taps[value], self.row.reads[value].lo)
        if value not in self._slabs:
            full: Tensor = self.store[value]
            return cut(full, axes, Tile(interval, self.batch))
        slab, start = self._slabs[value]
        assert axes.row is not None
        if slab.shape[axes.row] == interval.length:
            return slab
        return slab.narrow(axes.row, interval.lo - start, interval.length)

    def owned(self, value: int) -> Tensor:
        """The rows that this row of the loop owns: without a cut where they are what was just computed."""
        interval = self.row.owned[value]
        fresh = self._fresh.get(value)
        row = self.graph.axes[value].row
        assert row is not None
        if fresh is not None and fresh.shape[row] == interval.length:
            return fresh
        return self.rows_of(value, interval)

    def compute(self, position: int, carried: dict[int, Tensor], hollow: bool = False) -> dict[int, Tensor]:
        """Run a node on this row; its slabs by value."""
        node, rule = self.graph.nodes[position], self.graph.rules[position]
        assert isinstance(rule, RowRule)
        span = self.row.spans[position]
        outputs: tuple[Any, ...] = (None,) * len(node.outputs)
        if not span.computed.empty:
            needed = rule.needed(span.computed)

            def argument(ref: Ref) -> Any:
                if self.graph.is_map(ref.index):
                    return self.rows_of(ref.index, needed)
                return self.taps[ref.index] if ref.index in self.tapped else self.store[ref.index]

            args, kwargs = map_refs(node.args, argument), map_refs(node.kwargs, argument)
            tile = Tile(span.computed, self.batch)
            if node.context == _DEFAULT:
                result = _call(rule, args, kwargs, tile, hollow)
            else:
                with entered(node.context):
                    result = _call(rule, args, kwargs, tile, hollow)
            outputs = tuple(result) if isinstance(result, (list, tuple)) else (result,)
        made: dict[int, Tensor] = {}
        for value, fresh in zip(node.outputs, outputs, strict=True):
            slab = fresh
            if fresh is not None:
                self._fresh[value] = fresh
            if span.lo < span.new:
                row = self.graph.axes[value].row
                assert row is not None
                carry = carried[value]
                slab = carry if fresh is None else torch.cat([carry, fresh], row)
            if slab is not None:
                self._slabs[value] = (slab, span.lo)
                made[value] = slab
        return made

    def release(self, position: int) -> None:
        """After a node: drop its inputs that nothing in this row still reads, and its outputs that nothing reads."""
        node = self.graph.nodes[position]
        for value in node.inputs:
            self._waiting[value] -= 1
        for value in (*node.inputs, *node.outputs):
            if not self._waiting.get(value):
                self._slabs.pop(value, None)
                self._fresh.pop(value, None)


def _call(rule: RowRule, args: Any, kwargs: Any, tile: Tile, hollow: bool) -> Any:
    if hollow:
        stand_in = rule.hollow(args, kwargs, tile)
        if stand_in is not None:
            return stand_in
    return rule.run(args, kwargs, tile)


def _hand_up(handed_up: dict[int, Tensor], value: int, gradient: Tensor) -> None:
    # The gradient is a view of that of the whole slab, which must not live on.
    handed_up[value] = gradient.clone()


class _Tap(torch.autograd.Function):
    """The identity, where a gradient leaves autograd for the place where it is summed.

    Collected by ``autograd.grad`` instead, the weight gradients of all layers of a row would exist at once.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, origin: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.receive(gradient)
        return None, None, None


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
        graph: RowGraph,
        store: dict[int, Any],
        run: BackwardPass,
        row: Row,
        batch: Interval,
        gradients: Gradients,
    ) -> None:
        self.graph, self.store, self.run, self.row, self.batch = graph, store, run, row, batch
        self.gradients = gradients
        self.origin = torch.zeros((), requires_grad=True)
        self.injections: dict[int, list[int]] = {}
        for position in run.injections:
            self.injections.setdefault(graph.nodes[position].inputs[0], []).append(position)
        self.roots: list[Any] = []
        self.seeds: list[Tensor] = []

    def differentiate(self, carried: dict[int, Tensor], from_below: dict[int, Tensor]) -> dict[int, Tensor]:
        """Add to the gradients; returns those of this row's carries, for the row above."""
        graph, run = self.graph, self.run
        handed_up: dict[int, Tensor] = {}

        def tap_carry(value: int) -> Tensor:
            carry = carried[value]
            if graph.producer[value] in run.differentiated and _is_differentiable(carry):
                return self._tap(carry, partial(_hand_up, handed_up, value))
            return carry

        self._recompute(_Lazy(tap_carry), from_below)
        self._inject_into_sources()
        if self.roots:
            torch.autograd.grad(self.roots, [self.origin], self.seeds, allow_unused=True)
        return handed_up

    def _tap(self, tensor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """The tensor, such that its gradient is given to ``receive`` the moment autograd has it, and then dropped."""
        with torch.enable_grad():
            result: Tensor = _Tap.apply(tensor.detach(), self.origin, receive)  # type: ignore[no-untyped-call]
        return result

    def _tap_input(self, value: int) -> Tensor:
        """A whole value, or the slab of a source map, that this pass collects the gradient of."""
        if not self.graph.is_map(value):
            return self._tap(self.store[value], partial(self.gradients.add, value))
        tile = Tile(self.row.reads[value], self.batch)
        slab = cut(self.store[value], self.graph.axes[value], tile)
        return self._tap(slab, partial(self.gradients.add_tile, value, tile=tile))

    def _recompute(self, carried: dict[int, Tensor], from_below: dict[int, Tensor]) -> None:
        """Compute the row again and note where gradients enter it. Slabs live on only where autograd saved them."""
        run = self.run
        slabs = Slabs(self.graph, self.store, run.nodes, self.row, self.batch)
        slabs.taps, slabs.tapped = _Lazy(self._tap_input), frozenset((*run.wholes, *run.maps))
        for position in run.nodes:
            differentiated = position in run.differentiated
            with torch.set_grad_enabled(differentiated):
                made = slabs.compute(position, carried, hollow=position in run.hollow)
                for value, slab in made.items() if differentiated else ():
                    if not self.row.owned.get(value, NOTHING).empty:
                        self._seed_target(value, slabs.owned(value))
                    if value in from_below:
                        self._seed_carry(value, slab, from_below[value], self.row.spans[position])
            slabs.release(position)

    def _seed(self, tensor: Tensor, gradient: Tensor) -> None:
        # The place in autograd's graph is all that is needed: the tensor itself may go.
        edge = tensor if tensor.grad_fn is None else torch.autograd.graph.get_gradient_edge(tensor)
        self.roots.append(edge)
        self.seeds.append(gradient.to(tensor.dtype))

    def _seed_target(self, value: int, owned: Tensor) -> None:
        """The gradient of a target's rows: from its map, and from the reductions that read it."""
        if not owned.requires_grad:
            return
        tile = Tile(self.row.owned[value], self.batch)
        full = self.gradients.get(value) if value in self.run.outputs else None
        if full is not None:
            self._seed(owned, cut(full, self.graph.axes[value], tile))
        if value in self.injections:
            known = value in self.store
            values = cut(self.store[value], self.graph.axes[value], tile) if known else owned.detach()
            for gradient in self._injected(value, values, tile):
                self._seed(owned, gradient)

    def _seed_carry(self, value: int, slab: Tensor, gradient: Tensor, span: Span) -> None:
        """The gradient that the row below handed up for the tail of this slab."""
        if not slab.requires_grad:
            return
        row = self.graph.axes[value].row
        assert row is not None
        length = gradient.shape[row]
        self._seed(slab.narrow(row, span.hi - span.lo - length, length), gradient)

    def _inject_into_sources(self) -> None:
        """A reduction that reads a map straight from the border adds to the gradient of that map."""
        for value in self.injections:
            interval = self.row.owned[value]
            if value in self.run.maps and not interval.empty:
                tile = Tile(interval, self.batch)
                slab = cut(self.store[value], self.graph.axes[value], tile).detach()
                for gradient in self._injected(value, slab, tile):
                    self.gradients.add_tile(value, gradient, tile)

    def _injected(self, value: int, slab: Tensor, tile: Tile) -> Iterator[Tensor]:
        """What each reduction of a value adds to the gradient of its slab, which lies in ``tile``."""
        for position in self.injections[value]:
            node, rule = self.graph.nodes[position], self.graph.rules[position]
            assert isinstance(rule, Reduction)
            given = [self.gradients.get(output) for output in node.outputs]
            if all(gradient is None for gradient in given):
                continue
            outputs: list[Tensor] = [self.store[output] for output in node.outputs]
            if rule.keeps_batch is not None:
                axes, samples = Axes(None, rule.keeps_batch), Tile(NOTHING, self.batch)
                given = [None if g is None else cut(g, axes, samples) for g in given]
                outputs = [cut(output, axes, samples) for output in outputs]
            with torch.no_grad():
                yield rule.inject(slab, tile.rows, outputs, given)
