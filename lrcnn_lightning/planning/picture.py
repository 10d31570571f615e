"""The picture that explains a program.

Left: one column a map, by the module that makes it, in the order of the network; image rows run down. Each row of the
plan has one colour; what it computes is filled, what it takes over from the row before (2PS) or computes again (OverL)
is hatched. Maps that are kept are outlined. Right: live activation memory over one step, as predicted, for this plan
and for plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrcnn_lightning.config import format_size
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.steps import RunRows
from lrcnn_lightning.rules import RowGraph

__all__ = ["draw"]

_COLUMNS = 48
"""Columns that are drawn at most; of a deeper network, evenly spaced ones."""


def draw(program: Program, cost: Cost, plain: Cost, path: str | Path) -> None:
    """Write the picture; the format follows the file's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    rows_axis, memory_axis = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _draw_rows(program, rows_axis)
    _draw_memory(((plain, "plain PyTorch"), (cost, program.mode)), memory_axis)
    title = f"{program.mode}: activation peak {format_size(cost.peak_bytes)}, plain {format_size(plain.peak_bytes)}"
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _columns(program: Program) -> list[tuple[Loop, int]]:
    """The loop and node of each column: the last loop of the forward pass that computes a map."""
    found: dict[int, Loop] = {}
    for segment in program.segments:
        for step in segment.forward:
            if isinstance(step, RunRows):
                found.update(dict.fromkeys(step.loop.nodes, step.loop))
    positions = sorted(found)
    if len(positions) > _COLUMNS:
        positions = [positions[i * (len(positions) - 1) // (_COLUMNS - 1)] for i in range(_COLUMNS)]
    return [(found[position], position) for position in positions]


def _draw_rows(program: Program, axis: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    kept = {i for segment in program.segments for i in (*segment.kept, *segment.outputs)}
    columns = _columns(program)
    for x, (loop, position) in enumerate(columns):
        value = program.graph.nodes[position].outputs[0]
        height = program.graph.height(value)
        previous = 0
        for r, row in enumerate(loop.rows):
            span = row.spans[position]
            colour = colormaps["tab20"](r % 20)
            # Under OverL everything is computed; what an earlier row had computed already is its halo.
            halo_end = span.new if span.lo < span.new else min(max(previous, span.lo), span.hi)
            if halo_end > span.lo:
                axis.add_patch(
                    Rectangle(
                        (x - 0.42, span.lo / height),
                        0.84,
                        (halo_end - span.lo) / height,
                        facecolor=colour,
                        alpha=0.35,
                        hatch="////",
                        edgecolor="black",
                        linewidth=0.2,
                    )
                )
            axis.add_patch(
                Rectangle(
                    (x - 0.42, halo_end / height),
                    0.84,
                    (span.hi - halo_end) / height,
                    facecolor=colour,
                    edgecolor="white",
                    linewidth=0.3,
                )
            )
            previous = max(previous, span.hi)
        if value in kept:
            axis.add_patch(Rectangle((x - 0.47, 0), 0.94, 1, fill=False, edgecolor="black", linewidth=1.6))
    axis.set_xlim(-0.7, len(columns) - 0.3)
    axis.set_ylim(1.01, -0.01)
    axis.set_xticks(range(len(columns)))
    axis.set_xticklabels([_label(program.graph, position) for _, position in columns], rotation=90, fontsize=6)
    axis.set_ylabel("image rows, from top (0) to bottom (1)")
    axis.set_title("rows (one colour each), halos hatched, kept maps outlined", fontsize=9)


def _label(graph: RowGraph, position: int) -> str:
    """The module that a map comes from, as ``layer1.0.conv2``, or the operation where it is the code's own."""
    node = graph.nodes[position]
    operation = (*str(node.op).split("."), "")[1] or str(node.op)
    alone = len({str(other.op) for other in graph.nodes if other.module == node.module and other.outputs}) == 1
    return node.module if node.module and alone else f"{node.module}: {operation}" if node.module else operation


def _draw_memory(costs: Sequence[tuple[Cost, str]], axis: Any) -> None:
    for cost, label in costs:
        steps = max(len(cost.timeline) - 1, 1)
        axis.fill_between(
            [i / steps for i in range(len(cost.timeline))],
            [live / 2**20 for live in cost.timeline],
            alpha=0.5,
            label=f"{label}: peak {format_size(cost.peak_bytes)}",
        )
    axis.set_xlabel("one training step, forward then backward")
    axis.set_ylabel("live activation memory, MiB (predicted)")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)  # below, where it hides no curve
