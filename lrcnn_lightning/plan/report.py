"""A plan for people: a table, and plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrcnn_lightning.config import format_size
from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.plan.cost import program_cost
from lrcnn_lightning.plan.keeping import KEEPINGS, Keeping
from lrcnn_lightning.plan.loop import Loop
from lrcnn_lightning.plan.memory import PeakMemory
from lrcnn_lightning.plan.program import RunRows, SegmentProgram
from lrcnn_lightning.plan.residency import Residency
from lrcnn_lightning.plan.schedule import instructions
from lrcnn_lightning.rules import RowGraph

if TYPE_CHECKING:
    from lrcnn_lightning.plan.plan import Choices, Plan

__all__ = ["as_data", "choices_of", "held_at_peak", "report"]

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
        + (f" ({_times(plan.plain_peak_bytes / plan.peak_bytes)})" if plan.peak_bytes else "")
    )
    lines.append(f"  extra work       {100 * plan.overhead:+.0f} % predicted")
    if plan.mode == "plain":
        lines.append("  every operation runs as the module's own forward does; it fits and is predicted to be fastest")
        return "\n".join(lines)
    lines.append(f"  batch chunks     {plan.chunks}")
    lines += [f"  note             {note.text}" for note in plan.notes]
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


def _times(ratio: float) -> str:
    """``2.5 times less``, and ``1.3 times more`` where a plan takes more than plain PyTorch."""
    return f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"


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


def held_at_peak(plan: Plan) -> str:
    """What makes the predicted peak: the largest maps by name, and everything else by kind, with their bytes."""
    memory = PeakMemory()
    program_cost(plan.graph, plan.segments, plan.differentiable, plan.last_reader, plan.machine, memory)
    named: dict[str, int] = {}
    for key, size in memory.at_peak.items():
        if key[0] in ("map", "gradient"):
            node = plan.graph.nodes[plan.graph.producer[key[1]]] if key[1] in plan.graph.producer else None
            where = f" of {node.module}" if node is not None and node.module else ""
            kind = "gradient of " if key[0] == "gradient" else ""
            text = f"{kind}{plan.graph.values[key[1]].name}{where}"
        else:
            text = "carries between rows" if key[0] in ("keep", "carry", "handed") else "slabs of one row"
        named[text] = named.get(text, 0) + size
    largest = sorted(named.items(), key=lambda item: -item[1])
    shown = [f"{text} {format_size(size)}" for text, size in largest[:5]]
    if len(largest) > 5:
        shown.append(f"others {format_size(sum(size for _, size in largest[5:]))}")
    return ", ".join(shown)


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data."""
    graph, choices = plan.graph, plan.explicit
    return {
        "mode": plan.mode,
        "rows": choices.rows,
        "batch_chunks": choices.batch_chunks,
        "segments": [
            {
                "first": graph.nodes[part.first].name,
                "mode": part.mode,
                "rows": part.rows,
                "keeping": part.keeping,
            }
            for part in choices.parts
        ],
        "exceptions": {graph.values[value].name: str(residency) for value, residency in choices.exceptions},
        "training": plan.training,
        "peak_bytes": plan.peak_bytes,
        "plain_peak_bytes": plan.plain_peak_bytes,
        "overhead": plan.overhead,
        "inputs": {v.name: list(v.shape) for v in graph.graph.inputs},
        "residency": {
            graph.values[i].name: str(r) for segment in plan.segments for i, r in segment.residencies.items()
        },
        "schedule": [str(line) for line in instructions(plan)],
    }


def choices_of(data: Mapping[str, Any], graph: RowGraph) -> Choices:
    """The choices in the data of a plan, for a graph with nodes of the same names.

    Raises `PlanError` where the data does not fit.
    """
    from lrcnn_lightning.plan.plan import Choices, Part

    positions = {node.name: position for position, node in enumerate(graph.nodes)}
    parts = []
    for number, given in enumerate(data["segments"]):
        if given["first"] not in positions:
            raise PlanError(
                f"segment {number} of the plan begins with {given['first']!r}, and this module has no operation of "
                f"that name; its operations are {', '.join(list(positions)[:6])}, ... (see `plan.to_dict()`)"
            )
        if given["mode"] not in _POLICY or not isinstance(given["rows"], int) or given["rows"] < 1:
            raise PlanError(
                f"segment {number} of the plan: mode {given['mode']!r}, rows {given['rows']!r}; allowed are the modes "
                "'two_phase' and 'overlap', and a positive number of rows"
            )
        if given["keeping"] not in KEEPINGS:
            raise PlanError(
                f"segment {number} of the plan: keeping {given['keeping']!r}; allowed are {', '.join(KEEPINGS)}"
            )
        parts.append(Part(positions[given["first"]], given["mode"], given["rows"], given["keeping"]))
    values = {value.name: value.index for value in graph.values}
    exceptions = []
    for name, text in data.get("exceptions", {}).items():
        if name not in values:
            raise PlanError(f"exceptions of the plan: this module has no map {name!r} (see `plan.to_dict()`)")
        try:
            exceptions.append((values[name], Residency.parse(text)))
        except ValueError as error:
            raise PlanError(f"exceptions of the plan: {name!r} is {text!r}; {error}") from error
    keeping: Keeping = parts[0].keeping if parts else "lean"
    ordered = tuple(sorted(parts, key=lambda part: part.first))
    return Choices(
        data["mode"],
        data["rows"],
        max(1, len(parts)),
        data["batch_chunks"],
        keeping,
        ordered,
        tuple(sorted(exceptions)),
    )
