"""Bringing TRANSIENT maps back for the backward pass, by computing them again.

Maps m1 -> m2 -> m3 -> m4, each computed from the one before, of which the backward pass reads the last one first:

    in one sweep    rows: m1 m2 m3 m4 | b4 | b3 | b2 | b1                        least work, all alive at once
    on demand       rows: .. .. .. m4 | b4 | rows: .. .. m3 | b3 | ...           a chain of n is walked n times
    with room       rows: .. m2 .. m4 | b4 | rows: m3 | b3 | b2 | rows: m1 | b1

With room, what a walk passes on the way to a map that is due is stored too, as far as nothing more is alive at any step
than at the peak of the whole plan: less work for no memory. Those that are due soonest come first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lrcnn_lightning.planning.loop import Loop, closure
from lrcnn_lightning.planning.steps import RunRows, Step
from lrcnn_lightning.rules import RowGraph

__all__ = ["Restores"]


class Restores:
    """Puts the loops that restore maps before the steps of a backward pass that read them."""

    def __init__(
        self,
        graph: RowGraph,
        steps: Sequence[Step],
        reads: Sequence[Collection[int]],
        restored: Sequence[int],
        at_hand: Collection[int],
        make: Callable[[int, Sequence[int], Collection[int], Collection[int]], Loop],
    ) -> None:
        """``reads``: what each step reads. ``at_hand``: the maps that need not be restored. ``make``: a loop from the
        number of the step that follows it, its nodes, its sources and what it stores.
        """
        self.graph, self.steps, self.at_hand, self.make = graph, steps, at_hand, make
        wanted = set(restored)
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for i, read in enumerate(reads):
            for value in wanted.intersection(read):
                self.first.setdefault(value, i)
                self.last[value] = i
        self.restored = [value for value in restored if value in self.first]
        self.passes = False
        """Whether any loop on demand passes maps that a later one has to compute again."""

    def in_one_sweep(self) -> list[Step]:
        """All before the first step."""
        if not self.restored:
            return list(self.steps)
        nodes, sources = closure(self.graph, self.restored, self.at_hand)
        return [RunRows(self.make(0, nodes, sources, self.restored)), *self.steps]

    def on_demand(self, room: Sequence[int] | None = None) -> list[Step]:
        """Each before the first step that reads it, or earlier where there is ``room`` (bytes, at each step)."""
        left = [0] * len(self.steps) if room is None else list(room)
        stored: set[int] = set()
        result: list[Step] = []
        for i, step in enumerate(self.steps):
            due = [value for value in self.restored if self.first[value] == i and value not in stored]
            if due:
                available = {*self.at_hand, *(value for value in stored if self.last[value] >= i)}
                nodes, sources = closure(self.graph, due, available)
                stored.update(due)
                early = self._early(i, nodes, stored, left)
                stored.update(early)
                result.append(RunRows(self.make(i, nodes, sources, due + early)))
            result.append(step)
        return result

    def _early(self, i: int, nodes: Sequence[int], stored: Collection[int], left: list[int]) -> list[int]:
        """What the loop of ``nodes`` before step ``i`` stores beside what is due; takes it from the room ``left``."""
        made = {output for position in nodes for output in self.graph.nodes[position].outputs}
        passed = [value for value in self.restored if value in made and value not in stored]
        self.passes = self.passes or bool(passed)
        early = []
        for value in sorted(passed, key=lambda value: self.first[value]):
            size, until = self.graph.values[value].bytes, range(i, self.first[value])
            if all(left[k] >= size for k in until):
                early.append(value)
                for k in until:
                    left[k] -= size
        return early
