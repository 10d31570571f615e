"""What is free to choose in a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lrcnn_lightning.planning.keeping import Keeping
from lrcnn_lightning.planning.residency import Residency

__all__ = ["Choices", "Heights", "Part"]

Heights = Literal["even", "balanced"]
"""Of the rows: all alike, or such that all need the same memory (`loop.balanced_cuts`)."""


@dataclass(frozen=True)
class Part:
    """What is chosen for the segment that begins with node ``first`` (a position in the graph)."""

    first: int
    mode: str
    rows: int
    keeping: Keeping
    heights: Heights = "even"


@dataclass(frozen=True)
class Choices:
    """What is free to choose in a plan.

    ``rows`` and ``segments`` are positive numbers, ``mode`` a halo policy by its paper's name (``two_phase`` or
    ``overlap``), ``keeping`` what is kept of the inputs of normalisations (`keeping.choose_residencies`). ``parts``,
    where there are any, say for each segment where it begins and what holds in it; the numbers before are then only
    those of the plan at large. ``exceptions`` are maps (values of the graph) that have another residency than
    ``keeping`` gives them. ``forward_segments`` and ``forward_keeping`` hold where nothing is differentiated: in a
    frozen prefix, and in all of a network that is not trained. With ``rows_where_needed`` loops that stay below the
    peak of the plan are divided into fewer rows, as few as the peak allows.
    """

    mode: str = "two_phase"
    rows: int = 4
    segments: int = 1
    batch_chunks: int = 1
    keeping: Keeping = "lean"
    parts: tuple[Part, ...] = ()
    exceptions: tuple[tuple[int, Residency], ...] = ()
    heights: Heights = "even"
    rows_where_needed: bool = False
    forward_segments: int = 1
    forward_keeping: Keeping = "borders"

    def part(self, first: int, forward_only: bool = False) -> Part:
        """What holds for the segment that begins with the node ``first``."""
        before = [part for part in self.parts if part.first <= first]
        if before:
            return before[-1] if before[-1].first == first else replace(before[-1], first=first)
        return Part(first, self.mode, self.rows, self.forward_keeping if forward_only else self.keeping, self.heights)
