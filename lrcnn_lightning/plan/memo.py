"""What the plans of one graph have in common, remembered while many of them are tried.

Plans that differ in one segment, or in what is kept of one map, have most loops in common: their rows are found once,
and what they cost is simulated once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lrcnn_lightning.plan.halos import Row

if TYPE_CHECKING:
    from lrcnn_lightning.plan.builder import ProgramBuilder
    from lrcnn_lightning.plan.passage import Passages
    from lrcnn_lightning.plan.program import SegmentProgram

__all__ = ["Memo", "Passage"]


class Passage(NamedTuple):
    """What running a loop once costs: bytes at its peak, seconds, and what it leaves in memory (key, bytes).

    ``name`` is that of the loop, by which its carries are known.
    """

    peak_bytes: int
    seconds: float
    left: tuple[tuple[tuple[Any, ...], int], ...]
    name: str | None


@dataclass
class Memo:
    """Rows of loops by their nodes, targets, cuts and carries; passages by their rows and what else matters; segments
    (builder and program) by their nodes and what is chosen for them.
    """

    rows: dict[Any, tuple[tuple[int, ...], tuple[Row, ...]]] = field(default_factory=dict)
    passages: dict[Any, Passage] = field(default_factory=dict)
    simulated: Passages | None = None
    """What simulates passages, and knows the price of every operation."""
    segments: dict[Any, tuple[ProgramBuilder, SegmentProgram]] = field(default_factory=dict)
