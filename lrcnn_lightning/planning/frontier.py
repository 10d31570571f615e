"""The frontier: how much memory buys how much time.

Of all plans that a search tries, those that no other, plain PyTorch included, beats in both. With them, on the same
axes, plain PyTorch and activation checkpointing (segment borders kept, one row, so nothing but whole segments is
computed again).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcnn_lightning.config import RowConfig, format_count, format_size
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.planner import Planner, plain_plan
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.search import search_plans

__all__ = ["Frontier", "Point", "find_frontier"]

_CHECKPOINTS = (2, 3, 4, 6, 8, 12, 16)
_FASTER = 1.05
"""More memory buys at least this factor of time from one point to the next."""
_OVERHEADS = (0.0, 0.35, 1.0, float("inf"))


@dataclass(frozen=True)
class Point:
    """One plan: predicted peak of activation memory in bytes, predicted extra work as a fraction, and what it is."""

    peak_bytes: int
    overhead: float
    plan: str


@dataclass(frozen=True)
class Frontier:
    """``points`` from the least memory to the least work: memory rises, work falls.

    There are none where plain PyTorch takes less of both than any plan that was tried.
    """

    points: tuple[Point, ...]
    checkpointing: tuple[Point, ...]
    plain: Point

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON)."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'activation peak':>16}  {'of plain':>8}  {'extra work':>10}  plan"]
        groups = (("", self.points), ("checkpointing, ", self.checkpointing), ("", (self.plain,)))
        for prefix, points in groups:
            for point in points:
                share = point.peak_bytes / max(self.plain.peak_bytes, 1)
                peak = format_size(point.peak_bytes)
                lines.append(f"{peak:>16}  {share:>8.0%}  {point.overhead:>+10.0%}  {prefix}{point.plan}")
        return "\n".join(lines)

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw memory against work (PNG, PDF or SVG by the ending), under a title such as the network's name."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        unit = 2**30 if self.plain.peak_bytes >= 2**30 else 2**20
        styles = (
            (self.points, "o-", "row-wise"),
            (self.checkpointing, "s--", "checkpointing"),
            ((self.plain,), "X", "plain PyTorch"),
        )
        for points, style, label in styles:
            x = [point.peak_bytes / unit for point in points]
            axis.plot(x, [100 * point.overhead for point in points], style, label=label)
        axis.set_xscale("log")
        # Plain numbers: the axis spans a decade or two, of which the usual powers of ten name one or two places.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title)
        axis.set_xlabel(f"predicted activation peak, {'GiB' if unit == 2**30 else 'MiB'}")
        axis.set_ylabel("predicted extra work, % of plain")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
        figure.savefig(path, dpi=130)


def find_frontier(problem: Problem, config: RowConfig) -> Frontier:
    """Search with several limits on the extra work, and keep what is worth having."""
    planner, plain = Planner(problem), plain_plan(problem)
    start = Point(plain.peak_bytes, 0.0, "plain PyTorch")
    tried: dict[Choices, tuple[float, float]] = {}
    for overhead in _OVERHEADS:
        search_plans(planner, config, None, overhead, tried)
    allowed = {choices: cost for choices, cost in tried.items() if math.isfinite(cost[0])}
    rows = [Point(int(peak), seconds / plain.cost.seconds - 1, _words(c)) for c, (peak, seconds) in allowed.items()]
    checkpoints = []
    for segments in _CHECKPOINTS if problem.training else ():
        plan = planner.plan(Choices("overlap", 1, segments, 1, "borders"))
        if planner.limit.oversized(plan) is None:
            checkpoints.append(Point(plan.peak_bytes, plan.overhead, format_count(segments, "segment")))
    chosen = [point for point in _best([*rows, start]) if point is not start]
    return Frontier(tuple(_thinned(chosen)), tuple(_best(checkpoints)), start)


def _best(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both, from the least memory on."""
    chosen: list[Point] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.overhead)):
        if not chosen or point.overhead < chosen[-1].overhead:
            chosen.append(point)
    return chosen


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Without those that are hardly faster than the one before."""
    chosen: list[Point] = []
    for point in points:
        if not chosen or (1 + chosen[-1].overhead) / (1 + point.overhead) >= _FASTER:
            chosen.append(point)
    return chosen


def _words(choices: Choices) -> str:
    """What a plan is, in a line; the rows of its segments are set apart by strokes where they differ."""
    parts = choices.parts
    modes = sorted({part.mode for part in parts} or {choices.mode})
    rows = [part.rows for part in parts] or [choices.rows]
    counted = format_count(rows[0], "row") if len(set(rows)) == 1 else f"{'/'.join(map(str, rows))} rows"
    keepings = sorted({part.keeping for part in parts} or {choices.keeping})
    segments = format_count(len(parts) or choices.segments, "segment")
    words = f"{' and '.join(modes)}, {counted}, {segments}, keeping {' and '.join(keepings)}"
    if choices.exceptions:
        words += f" but for {format_count(len(choices.exceptions), 'map')}"
    return words + (f", {choices.batch_chunks} batch chunks" if choices.batch_chunks > 1 else "")
