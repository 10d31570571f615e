"""Slab calls: what a row of a loop does, operation by operation, resolved once for every step to come.

A plan is for fixed shapes, so which lines of which tensor an operation reads, what of its result is new, is stored, is
handed to the next row, and after which operation a slab is dropped, are known before the first step:

    slab call    operands      from a slab, a full map or a whole value, each with its cuts
                 function      the rule's, prepared for the tile
                 sinks         where the gradient of each operand goes, and the rule's formula for them, if it has one
                 joins         the carry from the row above, before what is new
                 hands         the lines that the row below takes over
                 targets       what the row owns of the result: stored, reduced, or where gradients enter
                 drops         slabs that nothing reads any more

A step then looks nothing up but tensors: a row of many operations costs little more than these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import Cuts, cuts_of, taken
from lrcnn_lightning.graph import Context, CustomFunction, Ref, map_refs, references
from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.loop import BackwardPass, Loop
from lrcnn_lightning.rules import Interval, RowGraph, RowRule, Tile
from lrcnn_lightning.rules.formula import Formula, paired

__all__ = ["Part", "Prepared", "Sink", "SlabCall", "Target"]

_DEFAULT = Context()
_SLAB, _STORE = range(2)


class _Operand(NamedTuple):
    """Where a referenced value comes from."""

    table: int
    value: int
    cuts: Cuts

    def fetch(self, tables: tuple[Mapping[int, Any], ...]) -> Any:
        return taken(tables[self.table][self.value], self.cuts)


class _Recording:
    """Fetches operands; what has a sink is what ``record`` makes of it, once."""

    def __init__(self, sinks: Sequence[Sink | None], record: Callable[[int, Any], Any]) -> None:
        self._sinks, self._record = {sink.value for sink in sinks if sink is not None}, record
        self._recorded: dict[int, Any] = {}

    def __call__(self, operand: _Operand, tables: tuple[Mapping[int, Any], ...]) -> Any:
        value = operand.value
        if value not in self._sinks:
            return operand.fetch(tables)
        if value not in self._recorded:
            self._recorded[value] = self._record(value, operand.fetch(tables))
        return self._recorded[value]


class Part(NamedTuple):
    """Some lines of a slab of ``total`` lines."""

    axis: int
    start: int
    length: int
    total: int

    def of(self, slab: Tensor) -> Tensor:
        """These lines of the slab."""
        return lines(slab, self.axis, self.start, self.length)


class Sink(NamedTuple):
    """Where the gradient of an operand goes: to that of its slab, or of some lines of it (``part``); to that of a full
    map, in ``tile``; or, with neither, to the sum of a whole value.
    """

    value: int
    slab: bool = False
    part: Part | None = None
    tile: Tile | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is that of a whole value."""
        return not self.slab and self.tile is None


class Target(NamedTuple):
    """What a row owns of a value: the result of the call just made (``whole``), or a part of the slab."""

    value: int
    number: int
    """Of the output among those of its node."""
    whole: bool
    tile: Tile
    part: Part | None
    """Of the slab, if it is not all of it."""

    def owned(self, results: tuple[Any, ...], slabs: Mapping[int, Tensor]) -> Tensor:
        """The rows that the row of the loop owns."""
        if self.whole:
            result: Tensor = results[self.number]
            return result
        slab = slabs[self.value]
        return slab if self.part is None else self.part.of(slab)


class SlabCall:
    """One operation on one row of one chunk; ``wanted`` are the values that it gives a gradient to, if it is one that
    is to be differentiated.
    """

    __slots__ = (
        "_arguments",
        "_function",
        "_joins",
        "_kwargs",
        "_nested",
        "_operands",
        "_outputs",
        "carried",
        "context",
        "drops",
        "formula",
        "fresh",
        "hands",
        "head",
        "hollow",
        "position",
        "sinks",
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
        wanted: Collection[int] | None,
        hollow: bool,
        drops: tuple[int, ...],
    ) -> None:
        node, rule, span = graph.nodes[position], graph.rules[position], row.spans[position]
        assert isinstance(rule, RowRule)
        self.position, self.drops, self.hollow = position, drops, hollow
        self.context = None if node.context == _DEFAULT else node.context
        self._outputs = node.outputs
        self._function: Callable[..., Any] | None = None
        self._arguments: Sequence[Any] = node.args
        self._kwargs = node.kwargs
        self._operands: tuple[tuple[int, _Operand], ...] = ()
        self._nested: dict[int, _Operand] | None = None
        self.formula: Formula | None = None
        self.sinks: tuple[Sink | None, ...] = ()
        """One for each reference among the arguments, in order."""
        self.fresh = not isinstance(node.op, CustomFunction)
        """Whether nobody else has the gradients that the operation makes. A function of the user's may keep them."""
        if not span.computed.empty:
            self._prepare(graph, rule, span.computed, row, batch, made, wanted)
        joined = [graph.axes[value].row for value in node.outputs] if span.lo < span.new else []
        self._joins = tuple(row for row in joined if row is not None)
        self.head = span.new - span.lo if span.lo < span.new else 0
        """Lines of each slab that the row above has handed down."""
        self.hands = self._handed(graph, row, following)
        self.carried: tuple[tuple[int, Part], ...] = ()
        """Of each output: the lines at its end that the row below has taken over."""
        if following is not None:
            after, total = following.spans[position], span.hi - span.lo
            length = after.new - after.lo
            if length > 0:
                self.carried = tuple((v, self._lines(graph, v, total - length, length, total)) for v in node.outputs)
        targets = []
        for number, value in enumerate(node.outputs):
            owned = row.owned.get(value)
            if owned is not None and not owned.empty:
                whole = owned.length == span.computed.length
                part = self._part(graph, value, owned, span.lo, span.hi)
                targets.append(Target(value, number, whole, Tile(owned, batch), part))
        self.targets = tuple(targets)

    def _prepare(
        self,
        graph: RowGraph,
        rule: RowRule,
        computed: Interval,
        row: Row,
        batch: Interval,
        made: Collection[int],
        wanted: Collection[int] | None,
    ) -> None:
        node = graph.nodes[self.position]
        needed = rule.needed(computed)
        operands: dict[int, _Operand] = {}
        sinks: dict[int, Sink] = {}
        for value in node.inputs:
            if not graph.is_map(value):
                operands[value], sinks[value] = _Operand(_STORE, value, ()), Sink(value)
            elif value in made:
                span = row.spans[graph.producer[value]]
                part = self._part(graph, value, needed, span.lo, span.hi)
                operands[value] = _Operand(_SLAB, value, () if part is None else (part[:3],))
                sinks[value] = Sink(value, True, part)
            else:
                tile = Tile(needed, batch)
                operands[value] = _Operand(_STORE, value, cuts_of(graph.values[value].shape, graph.axes[value], tile))
                sinks[value] = Sink(value, False, None, tile)
        tile = Tile(computed, batch)
        self._function = rule.prepare(tile)
        if wanted is not None:
            given = {value for value in node.inputs if value in wanted and _is_differentiable(graph, value)}
            order = references((node.args, node.kwargs))
            self.sinks = tuple(sinks[ref.index] if ref.index in given else None for ref in order)
            if not any(references(node.kwargs)):
                self.formula = rule.formula(tile, map_refs(node.args, lambda ref: ref.index in given))
        if any(not isinstance(arg, Ref) and any(references(arg)) for arg in node.args) or any(references(node.kwargs)):
            self._nested = operands
        else:
            self._operands = tuple(
                (place, operands[arg.index]) for place, arg in enumerate(node.args) if isinstance(arg, Ref)
            )

    @staticmethod
    def _lines(graph: RowGraph, value: int, start: int, length: int, total: int) -> Part:
        row = graph.axes[value].row
        assert row is not None
        return Part(row, start, length, total)

    @classmethod
    def _part(cls, graph: RowGraph, value: int, wanted: Interval, lo: int, hi: int) -> Part | None:
        """Lines ``wanted`` of a slab that holds ``[lo, hi)``; None if these are all."""
        if hi - lo == wanted.length:
            return None
        return cls._lines(graph, value, wanted.lo - lo, wanted.length, hi - lo)

    def _handed(self, graph: RowGraph, row: Row, following: Row | None) -> tuple[tuple[int, Cuts], ...]:
        """Of each output, the lines of its slab that the row below takes over."""
        if following is None:
            return ()
        span, after = row.spans[self.position], following.spans[self.position]
        if after.lo >= after.new:
            return ()
        lines = (after.lo - span.lo, after.new - after.lo, span.hi - span.lo)
        return tuple((value, (self._lines(graph, value, *lines)[:3],)) for value in self._outputs)

    def __call__(
        self, slabs: dict[int, Tensor], store: Mapping[int, Any], carried: Mapping[int, Tensor]
    ) -> tuple[Any, ...]:
        """Run the operation: its slabs are put into ``slabs``; returns what was computed of each output."""
        results: tuple[Any, ...] = (None,) * len(self._outputs)
        if self._function is not None:
            args, kwargs = self.arguments(slabs, store)
            results = self.computed(args, kwargs)
        self.put(results, slabs, carried)
        return results

    @property
    def computes(self) -> bool:
        """Whether it computes anything, rather than take over all that it needs from the row above."""
        return self._function is not None

    def computed(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What it makes of its arguments."""
        assert self._function is not None
        if self.context is None:
            return as_tuple(self._function(args, kwargs))
        with entered(self.context):
            return as_tuple(self._function(args, kwargs))

    def put(self, results: tuple[Any, ...], slabs: dict[int, Tensor], carried: Mapping[int, Tensor]) -> None:
        """Put what was computed into ``slabs``, behind what the row above has handed down."""
        if self._joins and not self.hollow:
            for value, row, fresh in zip(self._outputs, self._joins, results, strict=True):
                slabs[value] = carried[value] if fresh is None else torch.cat([carried[value], fresh], row)
        elif self._function is not None:
            for value, fresh in zip(self._outputs, results, strict=True):
                slabs[value] = fresh

    def arguments(
        self,
        slabs: Mapping[int, Tensor],
        store: Mapping[int, Any],
        record: Callable[[int, Any], Any] | None = None,
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments, by place and by name. What has a sink is what ``record`` makes of it, given its value."""
        tables = (slabs, store)
        fetch: Callable[[_Operand, Any], Any] = _Operand.fetch if record is None else _Recording(self.sinks, record)
        nested = self._nested
        if nested is None:
            args = list(self._arguments)
            for place, operand in self._operands:
                args[place] = fetch(operand, tables)
            return args, self._kwargs
        args, kwargs = (
            map_refs(tree, lambda ref: fetch(nested[ref.index], tables)) for tree in (self._arguments, self._kwargs)
        )
        return args, kwargs

    def sunk(self, gradients: Sequence[Any]) -> Iterator[tuple[Sink, Tensor]]:
        """The gradients that a formula has made, and where they go."""
        sinks = iter(self.sinks)
        for argument, gradient in paired(self._arguments, gradients):
            if isinstance(argument, Ref):
                sink = next(sinks)
                if sink is not None and gradient is not None:
                    yield sink, gradient


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The results of an operation."""
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def _is_differentiable(graph: RowGraph, value: int) -> bool:
    """Whether a value can have a gradient."""
    dtype = graph.values[value].dtype
    return dtype.is_floating_point or dtype.is_complex


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
            calls = table[chunk, row] = self._made(loop, loop.nodes, chunk, row, None)
        return calls

    def backward(self, run: BackwardPass, chunk: int, row: int) -> tuple[SlabCall, ...]:
        """Those of a row of a backward pass, to be computed again."""
        table = self._calls.setdefault(id(run), (run, {}))[1]
        calls = table.get((chunk, row))
        if calls is None:
            calls = table[chunk, row] = self._made(run.loop, run.nodes, chunk, row, run)
        return calls

    def _made(
        self,
        loop: Loop,
        nodes: Collection[int],
        chunk: int,
        number: int,
        run: BackwardPass | None,
    ) -> tuple[SlabCall, ...]:
        graph = self.graph
        row, following = loop.rows[number], loop.rows[number + 1] if number + 1 < len(loop.rows) else None
        made = {output for position in nodes for output in graph.nodes[position].outputs}
        made -= set() if run is None else {*run.maps}
        drops = _drops(graph, nodes)

        def wanted(position: int) -> Collection[int] | None:
            if run is None or position not in run.differentiated:
                return None
            return frozenset(graph.nodes[position].inputs) - run.unwanted(graph, position)

        return tuple(
            SlabCall(
                graph,
                position,
                row,
                following,
                loop.chunks[chunk],
                made,
                wanted(position),
                run is not None and position in run.hollow,
                drops.get(position, ()),
            )
            for position in nodes
        )
