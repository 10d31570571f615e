"""Plans for many sizes: a new size takes over the decisions of a plan for one that is near.

Where borders stand, what is kept and how halos come are decisions about the network more than about the size of its
input. Multi-scale training and detection give an input of another size at every step, and a search for each would take
longer than the training. So decisions are taken over where they still do what was asked for:

    plan for 512 x 512 (searched for)                       input of 640 x 576
      segments, keeping, modes, exceptions   ----------->     the same
      rows 8                                 -- scaled -->    rows 10, more while the budget is exceeded
                                                              nothing that keeps the budget: a search

Only what was searched for is taken over, and only by sizes that are near, so that a series of sizes does not drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.plain import plain_seconds
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner, plain_plan
from lrcnn_lightning.planning.problem import Problem

__all__ = ["transferred"]

_NEAR = math.log(4)
"""How far sizes may be apart: the logarithm of what their elements and their heights differ by, together."""
_LARGER = 1.5
_TRIES = 4
_MORE_ROWS = 1.5
_WORSE = 1.1
"""A plan may take so many times the share of plain PyTorch's memory that the other one takes."""


def transferred(problem: Problem, config: RowConfig, budget: int | None, plans: Iterable[Plan]) -> Plan | None:
    """A plan by the decisions of one of the ``plans`` for another size, if one of them is near and suits.

    ``budget`` is in bytes. Where processes take part in the step there is none: they have to decide alike.
    """
    if problem.graph.communicates or problem.graph.axis is None:
        return None
    near = min(
        (plan for plan in plans if not plan.is_transferred and _alike(plan.problem, problem)),
        key=lambda plan: _distance(plan.problem, problem),
        default=None,
    )
    if near is None or _distance(near.problem, problem) > _NEAR:
        return None
    if near.mode == "plain":
        return _plainly(problem, near, budget)
    planner, choices = Planner(problem), near.explicit
    if config.rows == "auto":
        choices = _with_rows(choices, _ratio(near.problem, problem, budget is not None), problem.graph.input_height)
    for _ in range(_TRIES):
        plan = planner.plan(choices)
        if planner.limit.oversized(plan) is None and _suits(planner, plan, near, config, budget):
            exact = plan.on(near.machine)  # with the workspaces of its own rows, where these are tried on the device
            if exact.machine == plan.machine or budget is None or exact.peak_bytes <= budget:
                return replace(exact, is_transferred=True, notes=near.notes)
        more = _with_rows(choices, _MORE_ROWS, problem.graph.input_height)
        if config.rows != "auto" or budget is None or more == choices:
            return None
        choices = more
    return None


def _plainly(problem: Problem, near: Plan, budget: int | None) -> Plan | None:
    """Plain PyTorch, where it is not for the budget that it was chosen, but because rows save nothing: of a much larger
    input they may.
    """
    plan = replace(plain_plan(problem), is_transferred=True, notes=near.notes)
    larger = _elements(problem) > _LARGER * _elements(near.problem)
    return None if budget is not None or larger or plan.oversized is not None else plan


def _alike(one: Problem, other: Problem) -> bool:
    """Whether two problems are the same but for sizes."""
    if (one.training, one.leaves) != (other.training, other.leaves):
        return False
    return replace(one.machine, interpolates=True) == other.machine and one.graph.skeleton == other.graph.skeleton


def _elements(problem: Problem) -> int:
    return max(sum(value.elements for value in problem.graph.graph.inputs), 1)


def _distance(one: Problem, other: Problem) -> float:
    """How different the sizes of two problems are."""
    heights = max(one.graph.input_height, 1) / max(other.graph.input_height, 1)
    return abs(math.log(_elements(one) / _elements(other))) + abs(math.log(heights))


def _ratio(near: Problem, problem: Problem, limited: bool) -> float:
    """By what the rows grow: as the input does, so that slabs stay as they are where memory is ``limited``; or else as
    its height does, so that rows do.
    """
    if limited:
        return _elements(problem) / _elements(near)
    return max(problem.graph.input_height, 1) / max(near.graph.input_height, 1)


def _with_rows(choices: Choices, factor: float, height: int) -> Choices:
    """The choices with so many times the rows."""

    def scaled(rows: int) -> int:
        return rows if rows == 1 else max(2, min(math.ceil(rows * factor), height))

    parts = tuple(replace(part, rows=scaled(part.rows)) for part in choices.parts)
    return replace(choices, rows=scaled(choices.rows), parts=parts)


def _suits(planner: Planner, plan: Plan, near: Plan, config: RowConfig, budget: int | None) -> bool:
    """Whether a plan keeps what was asked for about as well as the one whose decisions it takes over."""
    cost = planner.cost(plan)
    if budget is not None:
        return cost.peak_bytes <= budget
    grown = _elements(plan.problem) / _elements(near.problem)  # as plain PyTorch's memory has, too
    in_time = cost.seconds <= (1 + config.max_overhead) * plain_seconds(plan.problem)
    return cost.peak_bytes <= _WORSE * grown * near.peak_bytes and (in_time or near.overhead > config.max_overhead)
