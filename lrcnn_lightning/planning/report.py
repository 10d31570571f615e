"""A plan for people: tables of text."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

from lrcnn_lightning.config import format_size
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.loop import Loop
from lrcnn_lightning.planning.memory import PeakMemory
from lrcnn_lightning.planning.notes import Note
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.simulation import simulated
from lrcnn_lightning.planning.steps import RunRows, Segment
from lrcnn_lightning.planning.work import Work
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["held_at_peak", "report"]

_WIDTH = 150
"""Columns of the printed tables, at most."""

_POLICY = {
    "two_phase": "halos carried (two-phase sharing, 2PS)",
    "overlap": "halos recomputed (overlapping partitioning, OverL)",
    "plain": "plain PyTorch",
}


def report(program: Program, cost: Cost, plain: Cost, notes: Sequence[Note]) -> str:
    """A program as text: what runs by rows, what is kept and why, what runs whole, and the predictions."""
    lines = [f"plan: {program.mode}, {_POLICY[program.mode]}"]
    inputs = ", ".join(f"{v.name} {list(v.shape)}" for v in program.graph.graph.inputs)
    lines.append(f"  input            {inputs}")
    lines.append(
        f"  activation peak  {format_size(cost.peak_bytes)} predicted, "
        f"plain PyTorch {format_size(plain.peak_bytes)}"
        + (f" ({_times(plain.peak_bytes / cost.peak_bytes)})" if cost.peak_bytes else "")
    )
    lines.append(f"  extra work       {100 * (cost.seconds / plain.seconds - 1):+.0f} % predicted")
    if program.mode == "plain":
        lines.append("  every operation runs as the module's own forward does; it fits and is predicted to be fastest")
        return "\n".join(lines)
    lines.append(f"  batch chunks     {program.chunks}")
    lines += [f"  note             {note.text}" for note in notes]
    columns = (
        "segment",
        "operations",
        "stages",
        "rows",
        "lines a row",
        "halos",
        "carries",
        "kept, and why",
    )
    lines.append(_table(columns, [_segment_cells(program, segment) for segment in program.segments]))
    whole = program.graph.whole_nodes()
    if whole:
        lines.append("  runs whole (no row rule for what arrives):")
        work = Work(program.graph, program.machine, program.machine.seconds_a_call)
        cells = []
        for node in whole:
            shapes = ", ".join(str(list(program.graph.values[o].shape)) for o in node.outputs)
            size = format_size(sum(program.graph.values[o].bytes for o in node.outputs))
            share = work.forward(program.graph.nodes.index(node)) / plain.seconds
            cells.append((str(node.op), node.module or "the top", shapes, size, f"{100 * share:.1f} %"))
        lines.append(_table(("operation", "at", "makes", "of", "of plain time, forward"), cells))
    return "\n".join(lines)


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as text that fits any width."""
    from rich import box  # for those who print a plan alone
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numbers = ("stages", "rows", "lines a row", "carries", "of", "of plain time, forward")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None, legacy_windows=False).print(Padding(table, (0, 0, 0, 2)))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _times(ratio: float) -> str:
    """``2.5 times less``, and ``1.3 times more`` where a plan takes more than plain PyTorch."""
    return f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"


def _segment_cells(program: Program, segment: Segment) -> tuple[str, ...]:
    graph = program.graph
    names = [node.module or str(node.op) for node in (graph.nodes[p] for p in segment.nodes)]
    span = names[0] if names[0] == names[-1] else f"{names[0]} ... {names[-1]}"
    if segment.plain:
        return segment.name, span, "-", "whole", "-", "-", "-", "-"
    loops = [step.loop for step in segment.forward if isinstance(step, RunRows)]
    if not segment.loops():
        return segment.name, span, "0", "whole", "-", "-", "-", _kept(program, segment)
    most = max(segment.loops(), key=lambda loop: len(loop.rows))
    fewest = min(len(loop.rows) for loop in segment.loops())
    rows = str(fewest) if fewest == len(most.rows) else f"{fewest} to {len(most.rows)}"
    policy = "recomputed" if program.choices.part(segment.nodes[0]).mode == "overlap" else "from full maps"
    if any(loop.carries for loop in loops):
        policy = "carried"
    carried = sum(_carried_bytes(graph, loop) for loop in loops)
    return (
        segment.name,
        span,
        str(len(loops)),
        rows,
        _heights(most),
        policy,
        format_size(carried),
        _kept(program, segment),
    )


def _heights(loop: Loop) -> str:
    """Lines of the tallest target in the first, a middle and the last row: ``144, 128, 112``, or one number."""
    heights = [b - a for a, b in itertools.pairwise((0, *loop.cuts))]
    shown = [heights[0], heights[len(heights) // 2], heights[-1]]
    return str(shown[0]) if max(heights) - min(heights) <= 1 else ", ".join(map(str, shown))


def _kept(program: Program, segment: Segment) -> str:
    """What a segment keeps, by the reason, with its bytes."""
    graph, excepted = program.graph, dict(program.choices.exceptions)
    found: dict[str, list[int]] = {}
    for index in {*segment.kept, *segment.outputs} - {*segment.inputs}:
        if not graph.is_map(index):
            continue
        if index in segment.outputs:
            reason = "border"
        elif index in excepted:
            reason = "cheaper kept than made again"
        elif any(graph.roles[reader] is Role.REDUCE for reader in graph.readers[index]):
            reason = "normalised, and narrow"
        else:
            reason = "made whole"
        found.setdefault(reason, []).append(graph.values[index].bytes)
    texts = [f"{len(sizes)} {reason}: {format_size(sum(sizes))}" for reason, sizes in sorted(found.items())]
    return ", ".join(texts) or "nothing"


def _carried_bytes(graph: RowGraph, loop: Loop) -> int:
    total = 0.0
    for row in loop.rows:
        for position, span in row.spans.items():
            if span.lo < span.new:
                for value in graph.nodes[position].outputs:
                    total += graph.values[value].bytes * (span.new - span.lo) / graph.height(value)
    return int(total)


def held_at_peak(program: Program) -> str:
    """What makes the predicted peak: the largest maps by name, and everything else by kind, with their bytes."""
    memory = PeakMemory(program.machine)
    simulated(program, memory)
    named: dict[str, int] = {}
    for key, size in memory.at_peak.items():
        if key[0] in ("map", "gradient", "borrowed", "received"):
            node = program.graph.nodes[program.graph.producer[key[1]]] if key[1] in program.graph.producer else None
            where = f" of {node.module}" if node is not None and node.module else ""
            kind = "" if key[0] == "map" else "gradient of "
            text = f"{kind}{program.graph.values[key[1]].name}{where}"
        else:
            text = "carries between rows" if key[0] in ("keep", "carry", "handed") else "slabs of one row"
        named[text] = named.get(text, 0) + size
    largest = sorted(named.items(), key=lambda item: -item[1])
    shown = [f"{text} {format_size(size)}" for text, size in largest[:5]]
    if len(largest) > 5:
        shown.append(f"others {format_size(sum(size for _, size in largest[5:]))}")
    return ", ".join(shown)
