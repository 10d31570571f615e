"""Slab calls: what a row of a loop does, operation by operation, resolved once for every step to come.

A plan is for fixed shapes, so which lines of which tensor an operation reads, what of its result is new, is stored, is
handed to the next row, and after which operation a slab is dropped, are known before the first step:

    slab call    operands      from a slab, a full map, a whole value or a tap, each with its cuts
                 function      the rule's, prepared for the tile
                 joins         the carry from the row above, before what is new
                 hands         the lines that the row below takes over
                 targets       what the row owns of the result: stored, reduced, or where gradients enter
                 drops         slabs that nothing reads any more

A step then looks nothing up but tensors: a row of many operations costs little more than these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import Cuts, cuts_of, taken
from lrcnn_lightning.graph import Context, Ref, map_refs, references
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass, Loop
from lrcnn_lightning.rules import Interval, RowGraph, RowRule, Tile

__all__ = ["Prepared", "SlabCall", "Target"]

_DEFAULT = Context()
_SLAB, _STORE, _TAP = range(3)


class _Operand(NamedTuple):
    """Where a referenced value comes from."""

    table: int
    value: int
    cuts: Cuts

    def fetch(self, tables: tuple[Mapping[int, Any], ...]) -> Any:
        return taken(tables[self.table][self.value], self.cuts)


class Target(NamedTuple):
    """What a row owns of a value: the result of the call just made (``whole``), or a part of the slab."""

    value: int
    number: int
    """Of the output among those of its node."""
    whole: bool
    cuts: Cuts
    tile: Tile

    def owned(self, results: tuple[Any, ...], slabs: Mapping[int, Tensor]) -> Tensor:
        """The rows that the row of the loop owns."""
        if self.whole:
            result: Tensor = results[self.number]
            return result
        return taken(slabs[self.value], self.cuts)


class SlabCall:
    """One operation on one row of one chunk."""

    __slots__ = (
        "_arguments",
        "_context",
        "_function",
        "_hollow",
        "_joins",
        "_kwargs",
        "_nested",
        "_operands",
        "_outputs",
        "carried",
        "drops",
        "hands",
        "position",
        "targets",
    )

    def __init__(
        self,
        graph: RowGraph,
        position: int,
        row: Row,
        following: Row | None,
        batch: Interval,
        made: Collection[int],
        tapped: Collection[int],
        hollow: bool,
        drops: tuple[int, ...],
    ) -> None:
        node, rule, span = graph.nodes[position], graph.rules[position], row.spans[position]
        assert isinstance(rule, RowRule)
        self.position, self.drops = position, drops
        self._context = None if node.context == _DEFAULT else node.context
        self._outputs = node.outputs
        self._function: Callable[..., Any] | None = None
        self._hollow: Callable[..., Any] | None = None
        self._arguments: Sequence[Any] = ()
        self._kwargs = node.kwargs
        self._operands: tuple[tuple[int, _Operand], ...] = ()
        self._nested: dict[int, _Operand] | None = None
        if not span.computed.empty:
            self._prepare(graph, rule, span.computed, row, batch, made, tapped, hollow)
        joined = [graph.axes[value].row for value in node.outputs] if span.lo < span.new else []
        self._joins = tuple(row for row in joined if row is not None)
        self.hands = self._handed(graph, row, following)
        self.carried: tuple[tuple[int, Cuts], ...] = ()
        """Of each output: the lines at its end that the row below has taken over."""
        if following is not None:
            after = following.spans[position]
            length = after.new - after.lo
            if length > 0:
                self.carried = tuple(
                    (v, self._lines(graph, v, span.hi - span.lo - length, length)) for v in node.outputs
                )
        targets = []
        for number, value in enumerate(node.outputs):
            owned = row.owned.get(value)
            if owned is not None and not owned.empty:
                whole = owned.length == span.computed.length
                cuts = () if whole else self._part(graph, value, owned, span.lo, span.hi)
                targets.append(Target(value, number, whole, cuts, Tile(owned, batch)))
        self.targets = tuple(targets)

    def _prepare(
        self,
        graph: RowGraph,
        rule: RowRule,
        computed: Interval,
        row: Row,
        batch: Interval,
        made: Collection[int],
        tapped: Collection[int],
        hollow: bool,
    ) -> None:
        node = graph.nodes[self.position]
        needed = rule.needed(computed)
        operands: dict[int, _Operand] = {}
        for value in node.inputs:
            if not graph.is_map(value):
                operands[value] = _Operand(_TAP if value in tapped else _STORE, value, ())
            elif value in tapped:
                lo, hi = row.reads[value]
                operands[value] = _Operand(_TAP, value, self._part(graph, value, needed, lo, hi))
            elif value in made:
                span = row.spans[graph.producer[value]]
                operands[value] = _Operand(_SLAB, value, self._part(graph, value, needed, span.lo, span.hi))
            else:
                cuts = cuts_of(graph.values[value].shape, graph.axes[value], Tile(needed, batch))
                operands[value] = _Operand(_STORE, value, cuts)
        tile = Tile(computed, batch)
        self._function = rule.prepare(tile)
        if hollow:
            self._hollow = lambda args, kwargs: rule.hollow(args, kwargs, tile)
        nested = any(not isinstance(arg, Ref) and any(references(arg)) for arg in node.args)
        if not nested and not any(references(node.kwargs)):
            self._arguments = node.args
            self._operands = tuple(
                (place, operands[arg.index]) for place, arg in enumerate(node.args) if isinstance(arg, Ref)
            )
        else:
            self._arguments, self._nested = node.args, operands

    @staticmethod
    def _lines(graph: RowGraph, value: int, start: int, length: int) -> Cuts:
        row = graph.axes[value].row
        assert row is not None
        return ((row, start, length),)

    @classmethod
    def _part(cls, graph: RowGraph, value: int, wanted: Interval, lo: int, hi: int) -> Cuts:
        """The cuts that make lines ``wanted`` of a slab that holds ``[lo, hi)``."""
        if hi - lo == wanted.length:
            return ()
        return cls._lines(graph, value, wanted.lo - lo, wanted.length)

    def _handed(self, graph: RowGraph, row: Row, following: Row | None) -> tuple[tuple[int, Cuts], ...]:
        """Of each output, the lines of its slab that the row below takes over."""
        if following is None:
            return ()
        span, after = row.spans[self.position], following.spans[self.position]
        if after.lo >= after.new:
            return ()
        cuts = (after.lo - span.lo, after.new - after.lo)
        return tuple((value, self._lines(graph, value, *cuts)) for value in self._outputs)

    def __call__(
        self,
        slabs: dict[int, Tensor],
        store: Mapping[int, Any],
        taps: Mapping[int, Tensor],
        carried: Mapping[int, Tensor],
    ) -> tuple[Any, ...]:
        """Run the operation: its slabs are put into ``slabs``; returns what was computed of each output."""
        results: tuple[Any, ...]
        if self._function is None:
            results = (None,) * len(self._outputs)
        elif self._context is None:
            results = self._run((slabs, store, taps))
        else:
            with entered(self._context):
                results = self._run((slabs, store, taps))
        if self._joins:
            for value, row, fresh in zip(self._outputs, self._joins, results, strict=True):
                slabs[value] = carried[value] if fresh is None else torch.cat([carried[value], fresh], row)
        elif self._function is not None:
            for value, fresh in zip(self._outputs, results, strict=True):
                slabs[value] = fresh
        return results

    def _run(self, tables: tuple[Mapping[int, Any], ...]) -> tuple[Any, ...]:
        assert self._function is not None
        args, kwargs = list(self._arguments), self._kwargs
        for place, operand in self._operands:
            args[place] = operand.fetch(tables)
        nested = self._nested
        if nested is not None:
            args, kwargs = (map_refs(tree, lambda ref: nested[ref.index].fetch(tables)) for tree in (args, kwargs))
        result = None if self._hollow is None else self._hollow(args, kwargs)
        if result is None:
            result = self._function(args, kwargs)
        return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def _drops(graph: RowGraph, nodes: Collection[int]) -> dict[int, tuple[int, ...]]:
    """After each node: the slabs made in this row that no later node reads."""
    made = {output for position in nodes for output in graph.nodes[position].outputs}
    last: dict[int, int] = {}
    for position in nodes:
        last.update(dict.fromkeys(graph.nodes[position].outputs, position))
        last.update((value, position) for value in graph.nodes[position].inputs if value in made)
    result: dict[int, list[int]] = {}
    for value, position in last.items():
        result.setdefault(position, []).append(value)
    return {position: tuple(values) for position, values in result.items()}


class Prepared:
    """The slab calls of loops and backward passes, made when first asked for."""

    def __init__(self, graph: RowGraph) -> None:
        self.graph = graph
        # By identity: a plan's loops live as long as the plan. The loop is kept so that no other takes its place.
        self._calls: dict[int, tuple[Any, dict[tuple[int, int], tuple[SlabCall, ...]]]] = {}

    def forward(self, loop: Loop, chunk: int, row: int) -> tuple[SlabCall, ...]:
        """Those of a row of a loop, run forward."""
        table = self._calls.setdefault(id(loop), (loop, {}))[1]
        calls = table.get((chunk, row))
        if calls is None:
            calls = table[chunk, row] = self._made(loop, loop.nodes, chunk, row, (), ())
        return calls

    def backward(self, run: BackwardPass, chunk: int, row: int) -> tuple[SlabCall, ...]:
        """Those of a row of a backward pass, to be computed again."""
        table = self._calls.setdefault(id(run), (run, {}))[1]
        calls = table.get((chunk, row))
        if calls is None:
            tapped = frozenset((*run.wholes, *run.maps))
            calls = table[chunk, row] = self._made(run.loop, run.nodes, chunk, row, tapped, run.hollow)
        return calls

    def _made(
        self,
        loop: Loop,
        nodes: Collection[int],
        chunk: int,
        number: int,
        tapped: Collection[int],
        hollow: Collection[int],
    ) -> tuple[SlabCall, ...]:
        graph = self.graph
        row, following = loop.rows[number], loop.rows[number + 1] if number + 1 < len(loop.rows) else None
        made = {output for position in nodes for output in graph.nodes[position].outputs}
        drops = _drops(graph, nodes)
        return tuple(
            SlabCall(
                graph,
                position,
                row,
                following,
                loop.chunks[chunk],
                made,
                tapped,
                position in hollow,
                drops.get(position, ()),
            )
            for position in nodes
        )
