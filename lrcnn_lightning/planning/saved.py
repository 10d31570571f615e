"""A plan that was saved: its numbers, and the choices from which it is made again for a module."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcnn_lightning.config import format_count, format_size
from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.planning.data import choices_of
from lrcnn_lightning.planning.limit import check_limit
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.plan import Plan, build_plan, plain_plan
from lrcnn_lightning.rules import RowGraph

__all__ = ["SavedPlan", "load_plan", "load_plans"]

_NEEDED = ("mode", "rows", "batch_chunks", "segments", "peak_bytes", "plain_peak_bytes", "overhead")


@dataclass(frozen=True)
class SavedPlan:
    """The data of a plan (`Plan.to_dict`), perhaps edited.

    What may be edited: ``batch_chunks``, and of each of the ``segments`` the operation that it begins with, its mode,
    rows and keeping, and ``exceptions``: map name -> residency (``"keep"``, ``"transient"``, ``"stream"``,
    ``"transient/stream"``), for single maps. The predictions, the residencies and the schedule follow from these when
    the plan is used.
    """

    data: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [key for key in _NEEDED if key not in self.data]
        if missing:
            raise PlanError(
                f"this is not the data of a plan: {', '.join(missing)} missing; it comes from plan.to_dict()"
            )
        if not isinstance(self.axis, int | None):
            raise PlanError(f"the axis of the plan is {self.axis!r}; allowed is a dimension of the input, such as 2")

    @property
    def mode(self) -> str:
        return str(self.data["mode"])

    @property
    def axis(self) -> int | None:
        """The dimension of the input along which rows are cut; None in the data of older versions."""
        axis: int | None = self.data.get("axis")
        return axis

    def axis_of(self, asked: int | str) -> int | str:
        """The axis to lower a graph along: the one that was asked for, and for ``"auto"`` that of the plan."""
        return self.axis if asked == "auto" and self.axis is not None else asked

    @property
    def rows(self) -> int:
        return int(self.data["rows"])

    @property
    def peak_bytes(self) -> int:
        """The peak of activation memory that was predicted, in bytes."""
        return int(self.data["peak_bytes"])

    @property
    def plain_peak_bytes(self) -> int:
        """That of plain PyTorch, in bytes."""
        return int(self.data["plain_peak_bytes"])

    @property
    def overhead(self) -> float:
        """The work that was predicted over plain work, less one."""
        return float(self.data["overhead"])

    def to_dict(self) -> dict[str, Any]:
        """The data, as a copy."""
        return copy.deepcopy(self.data)

    def __str__(self) -> str:
        lines = [
            f"saved plan: {self.mode}, {format_size(self.peak_bytes)} predicted, plain PyTorch "
            f"{format_size(self.plain_peak_bytes)}, extra work {100 * self.overhead:+.0f} %"
        ]
        for part in self.data["segments"]:
            rows = format_count(part["rows"], "row")
            lines.append(f"  from {part['first']}: {part['mode']}, {rows}, keeping {part['keeping']}")
        return "\n".join(lines)

    def of(self, graph: RowGraph, leaves: Collection[int], training: bool, machine: Machine = CPU) -> Plan:
        """The plan for a graph.

        Raises `PlanError` where its axis or its operations are not those of the graph, and where an operation would
        have a tensor that is too large (`limit`).
        """
        if self.axis is not None and graph.axis != self.axis:
            raise PlanError(
                f"the plan cuts dimension {self.axis} of the input into rows, and here it is dimension {graph.axis}; "
                "leave out `axis`, which is then that of the plan, or make a plan for this axis"
            )
        if self.mode == "plain":
            return plain_plan(graph, leaves, training, machine)
        plan = build_plan(graph, leaves, training, choices_of(self.data, graph), machine)
        check_limit(plan)
        return plan


def load_plan(given: Plan | SavedPlan | Mapping[str, Any] | str | Path) -> SavedPlan:
    """A plan, its data, or a JSON file with it, as a saved plan. Raises `PlanError` for anything else."""
    if isinstance(given, SavedPlan):
        return given
    if isinstance(given, Plan):
        return SavedPlan(given.to_dict())
    if isinstance(given, Mapping):
        return SavedPlan(copy.deepcopy(dict(given)))
    if isinstance(given, (str, Path)):
        return SavedPlan(_read(given))
    raise PlanError(f"a plan is a Plan, its data or a JSON file, given was {type(given).__name__}")


def load_plans(given: Mapping[str, Any] | str | Path) -> dict[str, SavedPlan]:
    """Plans by module name, from plans or their data, or from a JSON file. Raises `PlanError` for anything else."""
    table = _read(given) if isinstance(given, (str, Path)) else given
    if "peak_bytes" in table:
        raise PlanError("this is one plan; here plans go by module name, as in {'backbone': plan.to_dict()}")
    return {name: load_plan(plan) for name, plan in table.items()}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"the plan {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"the plan {str(path)!r} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"the plan {str(path)!r} is not a JSON object")
    return data
