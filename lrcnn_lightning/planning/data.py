"""A program as plain data, and its choices from such data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.planning.choices import Choices, Heights, Part
from lrcnn_lightning.planning.keeping import Keeping
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.residency import Residency
from lrcnn_lightning.rules import RowGraph

__all__ = ["as_data", "choices_of"]


def as_data(program: Program) -> dict[str, Any]:
    """The choices of a program and what follows from them, as JSON-ready data."""
    graph, choices = program.graph, program.explicit
    return {
        "mode": program.mode,
        "axis": graph.axis,
        "rows": choices.rows,
        "rows_where_needed": choices.rows_where_needed,
        "batch_chunks": choices.batch_chunks,
        "segments": [
            {
                "first": graph.node_names[part.first],
                "mode": part.mode,
                "rows": part.rows,
                "keeping": part.keeping,
                "heights": part.heights,
            }
            for part in choices.parts
        ],
        "exceptions": {graph.value_names[value]: str(residency) for value, residency in choices.exceptions},
        "training": program.training,
        "inputs": {v.name: list(v.shape) for v in graph.graph.inputs},
        "residency": {
            graph.value_names[i]: str(r) for segment in program.segments for i, r in segment.residencies.items()
        },
    }


def choices_of(data: Mapping[str, Any], graph: RowGraph) -> Choices:
    """The choices in the data of a plan, for a graph with nodes of the same names.

    Raises `PlanError` where the data does not fit.
    """
    positions = {name: position for position, name in enumerate(graph.node_names)}
    parts = []
    for number, given in enumerate(data["segments"]):
        if given["first"] not in positions:
            raise PlanError(
                f"segment {number} of the plan begins with {given['first']!r}, and this module has no operation of "
                f"that name; its operations are {', '.join(list(positions)[:6])}, ... (see `plan.to_dict()`)"
            )
        if given["mode"] not in ("two_phase", "overlap") or not isinstance(given["rows"], int) or given["rows"] < 1:
            raise PlanError(
                f"segment {number} of the plan: mode {given['mode']!r}, rows {given['rows']!r}; allowed are the modes "
                "'two_phase' and 'overlap', and a positive number of rows"
            )
        if given["keeping"] not in get_args(Keeping):
            allowed = ", ".join(get_args(Keeping))
            raise PlanError(f"segment {number} of the plan: keeping {given['keeping']!r}; allowed are {allowed}")
        heights = given.get("heights", "even")
        if heights not in get_args(Heights):
            raise PlanError(f"segment {number} of the plan: heights {heights!r}; allowed are 'even' and 'balanced'")
        parts.append(Part(positions[given["first"]], given["mode"], given["rows"], given["keeping"], heights))
    values = {name: index for index, name in enumerate(graph.value_names)}
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
        rows_where_needed=bool(data.get("rows_where_needed", False)),
    )
