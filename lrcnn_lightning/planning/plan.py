"""The plan: a program, what it is predicted to cost, and how it is shown and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.data import as_data
from lrcnn_lightning.planning.limit import Large, Limit
from lrcnn_lightning.planning.notes import Note
from lrcnn_lightning.planning.picture import draw
from lrcnn_lightning.planning.plain import plain_cost
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.report import report
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.planning.schedule import Instruction, instructions
from lrcnn_lightning.planning.simulation import simulated

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan(Program):
    """A program with its predictions."""

    notes: tuple[Note, ...] = ()
    """In what it departs from the options that it was made for."""
    is_transferred: bool = False
    """Whether its decisions are those of a plan for another size (`transfer`)."""

    @cached_property
    def cost(self) -> Cost:
        """Predicted cost of one step."""
        return self.plain_cost if self.mode == "plain" else simulated(self)

    @cached_property
    def plain_cost(self) -> Cost:
        """Predicted cost of one step of plain PyTorch."""
        return plain_cost(self.problem)

    @cached_property
    def oversized(self) -> Large | None:
        """The largest tensor that an operation has, if it has more elements than the machine allows."""
        return Limit(self.problem).oversized(self)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of activation memory, in bytes."""
        return self.cost.peak_bytes

    @property
    def plain_peak_bytes(self) -> int:
        """Predicted peak of activation memory of plain PyTorch, in bytes."""
        return self.plain_cost.peak_bytes

    @property
    def overhead(self) -> float:
        """Predicted work over plain work, less one."""
        return self.cost.seconds / self.plain_cost.seconds - 1

    @cached_property
    def schedule(self) -> tuple[Instruction, ...]:
        """Every step in order; ``str`` of one is a line that `planning.schedule.parse` reads back."""
        return instructions(self)

    def __str__(self) -> str:
        return report(self, self.cost, self.plain_cost, self.notes)

    def plot(self, path: str | Path) -> None:
        """Draw the plan to a file (PNG, PDF or SVG by its ending): the rows of each map, and memory over the step."""
        draw(self, self.cost, self.plain_cost, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON): choices, predictions, segments with their residencies and schedule."""
        predictions = {
            "peak_bytes": self.peak_bytes,
            "plain_peak_bytes": self.plain_peak_bytes,
            "overhead": self.overhead,
        }
        return {**as_data(self), **predictions, "schedule": [str(line) for line in self.schedule]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SavedPlan:
        """The plan that was saved as ``data``: to be read, printed, or given to ``rowwise(module, plan=...)``."""
        return SavedPlan.of(data)
