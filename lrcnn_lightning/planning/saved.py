"""A plan that was saved: its numbers, and the choices from which it is made again for a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrcnn_lightning.config import format_count, format_size
from lrcnn_lightning.errors import PlanError

__all__ = ["SavedPlan"]

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

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> SavedPlan:
        """A copy of the data, as a saved plan."""
        return cls(copy.deepcopy(dict(data)))

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

    def check_axis(self, axis: int | None) -> None:
        """Raises `PlanError` where a graph is cut along another axis of the input."""
        if self.axis is not None and axis != self.axis:
            raise PlanError(
                f"the plan cuts dimension {self.axis} of the input into rows, and here it is dimension {axis}; "
                "leave out `axis`, which is then that of the plan, or make a plan for this axis"
            )
