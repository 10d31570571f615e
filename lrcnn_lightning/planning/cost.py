"""What a plan costs, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lrcnn_lightning.planning.loop import LoopRun

__all__ = ["Cost", "LoopCost"]


class LoopCost(NamedTuple):
    """What one run of a loop takes: ``fixed_bytes`` are there before, or are full maps that it makes, and
    ``slab_bytes`` come on top at its peak; and how long it takes.
    """

    run: LoopRun
    fixed_bytes: int
    slab_bytes: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """``peak_bytes`` of activation memory, and ``seconds`` of nominal time, of one training step."""

    peak_bytes: int
    seconds: float
    timeline: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """Live bytes of activation memory after each allocation of the step."""
    peak_segment: int = 0
    """The number of the segment that is run, forward or backward, when the peak is reached."""
    step_peaks: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Per segment, by its name: the peak during each step of its backward pass, in bytes. Loops that restore maps are
    part of the step that follows them."""
    passages: tuple[tuple[int, tuple[LoopCost, ...]], ...] = field(default=(), repr=False, compare=False)
    """The loops of each segment, forward and backward, and what else is there while they run, in bytes."""

    @property
    def loops(self) -> Iterator[LoopCost]:
        """Of every run of a loop, in order."""
        for rest, loops in self.passages:
            for run, fixed, slabs, seconds in loops:
                yield LoopCost(run, fixed + rest, slabs, seconds)
