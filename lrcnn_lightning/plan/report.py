"""A plan for people: a table, and plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrcnn_lightning.config import format_size
from lrcnn_lightning.plan.loop import Loop
from lrcnn_lightning.plan.program import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    SegmentProgram,
    Step,
    Sweep,
)
from lrcnn_lightning.rules import RowGraph

if TYPE_CHECKING:
    from lrcnn_lightning.plan.plan import Plan

__all__ = ["as_data", "report", "step_text"]

_POLICY = {
    "two_phase": "halos carried (two-phase sharing, 2PS)",
    "overlap": "halos recomputed (overlapping partitioning, OverL)",
    "plain": "plain PyTorch",
}


def report(plan: Plan) -> str:
    """The plan as text: what runs by rows, what is kept, what runs whole, and the predictions."""
    lines = [f"plan: {plan.mode}, {_POLICY[plan.mode]}"]
    inputs = ", ".join(f"{v.name} {list(v.shape)}" for v in plan.graph.graph.inputs)
    lines.append(f"  input            {inputs}")
    lines.append(
        f"  activation peak  {format_size(plan.peak_bytes)} predicted, "
        f"plain PyTorch {format_size(plan.plain_peak_bytes)}"
        + (f" ({plan.plain_peak_bytes / plan.peak_bytes:.1f} times less)" if plan.peak_bytes else "")
    )
    lines.append(f"  extra work       {100 * plan.overhead:+.0f} % predicted")
    if plan.mode == "plain":
        lines.append("  every operation runs as the module's own forward does; it fits and is predicted to be fastest")
        return "\n".join(lines)
    chunks = max((len(loop.chunks) for loop in plan.loops()), default=1)
    lines.append(f"  batch chunks     {chunks}")
    lines.append(f"  {'segment':8} {'stages':>6} {'rows':>5}  {'carries':>10}  {'kept':>10}  operations")
    for segment in plan.segments:
        lines.append("  " + _segment_line(plan.graph, segment))
    whole = plan.graph.whole_nodes()
    if whole:
        lines.append("  runs whole (no row rule for what arrives):")
        for node in whole:
            shapes = ", ".join(str(list(plan.graph.values[o].shape)) for o in node.outputs)
            size = format_size(sum(plan.graph.values[o].bytes for o in node.outputs))
            lines.append(f"    {node.op} at {node.module or 'the top'}: {shapes}, {size}")
    return "\n".join(lines)


def _segment_line(graph: RowGraph, segment: SegmentProgram) -> str:
    names = [node.module or str(node.op) for node in (graph.nodes[p] for p in segment.nodes)]
    span = names[0] if names[0] == names[-1] else f"{names[0]} ... {names[-1]}"
    if segment.plain:
        return f"{segment.name:8} {'-':>6} {'whole':>5}  {'-':>10}  {'-':>10}  {span}"
    loops = [step.loop for step in segment.forward if isinstance(step, RunRows)]
    rows = max(len(loop.rows) for loop in loops)
    carried = sum(_carried_bytes(graph, loop) for loop in loops)
    kept = sum(graph.values[i].bytes for i in {*segment.kept, *segment.outputs} - {*segment.inputs} if graph.is_map(i))
    return f"{segment.name:8} {len(loops):>6} {rows:>5}  {format_size(carried):>10}  {format_size(kept):>10}  {span}"


def _carried_bytes(graph: RowGraph, loop: Loop) -> int:
    total = 0.0
    for row in loop.rows:
        for position, span in row.spans.items():
            if span.lo < span.new:
                for value in graph.nodes[position].outputs:
                    total += graph.values[value].bytes * (span.new - span.lo) / graph.height(value)
    return int(total)


def step_text(graph: RowGraph, step: Step) -> str:
    """One step of the schedule in words."""

    def name(index: int) -> str:
        return graph.values[index].name

    if isinstance(step, RunRows):
        return f"rows {step.loop.name} 0..{len(step.loop.rows) - 1}"
    if isinstance(step, Sweep):
        return f"sweep {step.loop.name} 0..{len(step.loop.rows) - 1}"
    if isinstance(step, RunWhole):
        return f"whole {graph.nodes[step.node].name}"
    if isinstance(step, Effect):
        return f"effect {graph.nodes[step.node].name}"
    if isinstance(step, BackwardRows):
        into = " ".join(name(i) for i in (*step.run.maps, *step.run.wholes))
        return f"backward {step.run.loop.name} {len(step.run.loop.rows) - 1}..0 -> {into}"
    if isinstance(step, BackwardWhole):
        return f"backward-whole {graph.nodes[step.node].name}"
    if isinstance(step, Free):
        return f"free {name(step.value)}"
    assert isinstance(step, FreeGradient)
    return f"free-gradient {name(step.value)}"


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data."""
    graph = plan.graph
    return {
        "mode": plan.mode,
        "rows": plan.choices.rows,
        "segments": plan.choices.segments,
        "batch_chunks": plan.choices.batch_chunks,
        "keeping": plan.choices.keeping,
        "training": plan.training,
        "peak_bytes": plan.peak_bytes,
        "plain_peak_bytes": plan.plain_peak_bytes,
        "overhead": plan.overhead,
        "inputs": {v.name: list(v.shape) for v in graph.graph.inputs},
        "program": [
            {
                "name": segment.name,
                "operations": [graph.nodes[p].name for p in segment.nodes],
                "plain": segment.plain,
                "residency": {graph.values[i].name: str(r) for i, r in segment.residencies.items()},
                "kept": [graph.values[i].name for i in segment.kept],
                "forward": [step_text(graph, step) for step in segment.forward],
                "backward": [step_text(graph, step) for step in segment.backward],
            }
            for segment in plan.segments
        ],
    }
