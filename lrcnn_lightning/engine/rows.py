"""The row loop, forward: run a `Loop` slab by slab, without autograd.

Rows from the top. A slab of a carried value is what the row before handed down and what is new:

    row r-1   [ ........ tail ]
                         |  carry
    row r               [tail | new ........ tail ]
                                              |  carry
    row r+1                                  [tail | new ...
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.maps import cut, taken, write
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.graph import Context, Node, map_refs
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.rules import Interval, Reduction, RowGraph, Tile

__all__ = ["Carries", "RowLoop", "run_node"]

# (chunk, row) -> value -> the rows that row + 1 takes over.
Carries = dict[tuple[int, int], dict[int, Tensor]]

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


class RowLoop:
    """Runs loops over one set of full maps and whole values (``store``: value -> tensor)."""

    def __init__(self, prepared: Prepared, store: dict[int, Any]) -> None:
        self.prepared, self.graph, self.store = prepared, prepared.graph, store

    def forward(self, loop: Loop, kept_carries: Collection[int] = (), bare: bool = False) -> Carries:
        """Run the loop: write its stored maps, finish its reductions, return the carries of the nodes
        ``kept_carries``. A ``bare`` run is for these alone: nothing is written or reduced.
        """
        graph, store = self.graph, self.store
        kept: Carries = {}
        keep_outputs = {output for position in kept_carries for output in graph.nodes[position].outputs}
        reductions = _Reductions(graph, loop, store)
        stored = frozenset(() if bare else loop.stored)
        for chunk, batch in enumerate(loop.chunks):
            carried: dict[int, Tensor] = {}
            for r, row in enumerate(loop.rows):
                slabs: dict[int, Tensor] = {}
                handed: dict[int, Tensor] = {}
                if not bare:
                    reductions.add_sources(row.owned, batch, chunk)
                for call in self.prepared.forward(loop, chunk, r):
                    results = call(slabs, store, carried)
                    for value, cuts in call.hands:
                        handed[value] = taken(slabs[value], cuts).clone(memory_format=torch.preserve_format)
                    for target in () if bare else call.targets:
                        owned = target.owned(results, slabs)
                        reductions.add(target.value, owned, target.tile, chunk)
                        if target.value in stored:
                            value, shape = target.value, graph.values[target.value].shape
                            store[value] = write(store.get(value), owned, shape, graph.axes[value], target.tile)
                        del owned
                    del results  # with it goes what was computed, unless it is a slab
                    for value in call.drops:
                        slabs.pop(value, None)
                carried = handed
                if keep_outputs and r + 1 < len(loop.rows):
                    kept[chunk, r] = {value: carry for value, carry in handed.items() if value in keep_outputs}
        if not bare:
            reductions.finish()
        return kept

    def sweep(self, loop: Loop) -> Carries:
        """Run the loop for its carries alone."""
        return self.forward(loop, loop.carried, bare=True)


class _Reductions:
    """The running results of a loop's reductions, one a chunk of the batch."""

    def __init__(self, graph: RowGraph, loop: Loop, store: dict[int, Any]) -> None:
        self.graph, self.loop, self.store = graph, loop, store
        self._readers: dict[int, list[int]] = {}
        for position in loop.reductions:
            self._readers.setdefault(graph.nodes[position].inputs[0], []).append(position)
        self._from_border = [value for value in self._readers if value in loop.sources]
        self._states: dict[tuple[int, int], Any] = {}

    def add_sources(self, owned: Mapping[int, Interval], batch: Interval, chunk: int) -> None:
        """Take in the rows that a row of the loop owns, of values that are read from their full maps."""
        for value in self._from_border:
            if not owned[value].empty:
                tile = Tile(owned[value], batch)
                self.add(value, cut(self.store[value], self.graph.axes[value], tile), tile, chunk)

    def add(self, value: int, owned: Tensor, tile: Tile, chunk: int) -> None:
        """Take in rows of a value."""
        for position in self._readers.get(value, ()):
            rule = self.graph.rules[position]
            assert isinstance(rule, Reduction)
            part = rule.partial(owned, tile.rows)
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
