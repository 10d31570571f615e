"""Saved plans from what users give: plans, their data, or files with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.saved import SavedPlan

__all__ = ["load_plan", "load_plans"]


def load_plan(given: Plan | SavedPlan | Mapping[str, Any] | str | Path) -> SavedPlan:
    """A plan, its data, or a JSON file with it, as a saved plan. Raises `PlanError` for anything else."""
    if isinstance(given, SavedPlan):
        return given
    if isinstance(given, Plan):
        return SavedPlan.of(given.to_dict())
    if isinstance(given, Mapping):
        return SavedPlan.of(given)
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
