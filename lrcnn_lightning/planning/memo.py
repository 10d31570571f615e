"""What the plans of one graph have in common, remembered while many of them are tried.

Plans that differ in one segment have the others in common, and those that differ in what is kept of one map have most
loops in common. Segments are built once, the rows of a loop are found once, and what each costs is simulated once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lrcnn_lightning.planning.halos import Row
from lrcnn_lightning.planning.memory import Entry

if TYPE_CHECKING:
    from lrcnn_lightning.planning.builder import ProgramBuilder
    from lrcnn_lightning.planning.duration import Durations
    from lrcnn_lightning.planning.limit import Large
    from lrcnn_lightning.planning.loop import Loop, LoopRun
    from lrcnn_lightning.planning.passage import Passages
    from lrcnn_lightning.planning.program import SegmentProgram
    from lrcnn_lightning.planning.residency import Residencies

__all__ = ["LoopCost", "Memo", "Passage"]


class LoopCost(NamedTuple):
    """What one run of a loop takes: ``fixed_bytes`` are there before, or are full maps that it makes, and
    ``slab_bytes`` come on top at its peak; and how long it takes.
    """

    run: LoopRun
    fixed_bytes: int
    slab_bytes: int
    seconds: float


class Passage(NamedTuple):
    """What running a loop, or one direction of a segment, costs: bytes that it adds at its peak, seconds, and what it
    leaves in memory, where storages that were there before have the numbers that they had.

    ``name`` is that of the loop, by which its carries are known.
    """

    added_bytes: int
    seconds: float
    left: tuple[Entry, ...]
    name: str | None = None
    loops: tuple[LoopCost, ...] = ()
    """Of a segment: what its loops cost."""
    step_peaks: tuple[int, ...] = ()
    """Of a segment's backward pass: what it adds at the peak during each step, in bytes."""


@dataclass
class Memo:
    """Rows of loops by their nodes, targets, cuts and carries; passages by what is run and what else matters; segments
    (builder and program) by their nodes and what is chosen for them.
    """

    rows: dict[Any, tuple[tuple[int, ...], tuple[Row, ...]]] = field(default_factory=dict)
    loops: dict[Any, Loop] = field(default_factory=dict)
    """Loops by their name, rows and whatever else they are."""
    redivided: dict[tuple[int, int], tuple[Loop, Loop]] = field(default_factory=dict)
    """By a loop's ``id`` and another number of rows: the loop, and the one with these rows."""
    passages: dict[Any, Passage] = field(default_factory=dict)
    simulated: Passages | None = None
    """What simulates passages, and knows what every operation takes."""
    durations: Durations | None = None
    """What knows the price of every operation."""
    segments: dict[Any, tuple[ProgramBuilder, SegmentProgram]] = field(default_factory=dict)
    plain: dict[Any, SegmentProgram] = field(default_factory=dict)
    """Segments that run plainly, by their name, nodes and outputs."""
    differentiable: dict[frozenset[int], set[int]] = field(default_factory=dict)
    """The values that have a gradient, by the leaves that require one."""
    residencies: dict[Any, Residencies] = field(default_factory=dict)
    """What is kept of the maps of a segment, by its nodes and by what is chosen."""
    divided: dict[Any, SegmentProgram] = field(default_factory=dict)
    """Segments with other numbers of rows, by what they were and the rows of their loops."""
    largest: dict[Any, tuple[Large, tuple[Row, ...]]] = field(default_factory=dict)
    """The largest tensor of an operation of a loop, by the ``id`` of its rows (which are kept) and its samples."""
