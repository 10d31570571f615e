"""What a run says about itself: the paragraph at its start, and the warnings of what a user may not expect.

Each is a text; who says it, when and how often is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lrcnn_lightning.config import RowConfig, format_count, format_size
from lrcnn_lightning.engine.segment import CHANGED_ARGUMENT, CHANGED_MAP, SECOND_DERIVATIVE
from lrcnn_lightning.graph import HookCall
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.rules import RowGraph, find_factory

__all__ = [
    "BACKWARD",
    "Outcome",
    "fewer_rows",
    "least_memory",
    "needless_rows",
    "never_called",
    "outside_call",
    "path",
    "refused",
    "summary",
    "to_report",
]

BACKWARD = {
    SECOND_DERIVATIVE: (
        "its gradient is differentiated (create_graph=True): for that its segments run plainly, one after the other, "
        "which is exact and takes the memory of plain PyTorch for the largest of them"
    ),
    CHANGED_ARGUMENT: (
        "an argument of it was changed in place after the call (as by `x += y`), by the code of the module around it, "
        "which cannot run row by row: it was computed once more, from a copy, and a copy is kept from now on; "
        "`x = x + y` does without"
    ),
    CHANGED_MAP: (
        "a map that it has returned was changed in place (as by `features += ...`), and is kept for the backward pass "
        "as well: it was computed once more, and from now on what it returns and keeps is copied, which takes the "
        "memory of these maps; `features = features + ...` does without"
    ),
}
"""What to say of a backward pass that takes more than was planned, by what the engine tells."""
_NAMED = 5
"""Modules that a warning names at most; a profiler puts a hook on every one."""
_PLACES = 3
"""Places that are named at most of an operation that runs whole; an attention network has dozens."""


def path(*names: str) -> str:
    """Names of modules joined by dots, empty ones left out."""
    return ".".join(name for name in names if name)


def summary(name: str, module: nn.Module, plan: Plan) -> str:
    """One module of the report: what it does, what it is predicted to cost, and what of it runs whole, and why."""
    calls = "" if plan.training else " without gradients"
    text = f"{name or 'the LightningModule'} ({type(module).__name__}){calls}: "
    peak, plain = format_size(plan.peak_bytes), format_size(plan.plain_peak_bytes)
    if plan.mode == "plain":
        return text + f"plain PyTorch, which fits: activation peak {plain} predicted"
    segments = sum(not segment.plain for segment in plan.segments)
    parts = ", ".join(
        (format_count(plan.rows, "row"), format_count(segments, "segment"), format_count(plan.chunks, "batch chunk"))
    )
    text += (
        f"{plan.mode}, {parts}; "
        f"activation peak {peak} predicted (plain PyTorch {plain}), extra work {100 * plan.overhead:+.0f} % predicted"
    )
    whole = list(_whole(name, plan.graph))
    return f"{text}; runs whole: {', '.join(whole)}" if whole else f"{text}; nothing runs whole"


def _whole(name: str, graph: RowGraph) -> Iterator[str]:
    """The operations that run whole, each with its places, the size of its results, and the reason."""
    places: dict[tuple[str, str], list[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for node in graph.whole_nodes():
        if isinstance(node.op, HookCall):
            reason = "hooks see full maps"
        elif not any(graph.is_map(index) for index in node.inputs):
            reason = "what it reads has no rows"
        elif find_factory(node.op) is None:
            reason = "it has no row rule"
        else:
            reason = "its row rule does not hold for what arrives"
        key = (str(node.op), reason)
        places.setdefault(key, []).append(path(name, node.module) or "the top")
        sizes[key] = sizes.get(key, 0) + sum(graph.values[index].bytes for index in node.outputs)
    for (operation, reason), where in places.items():
        shown = list(dict.fromkeys(where))
        more = f" and {len(shown) - _PLACES} more" if len(shown) > _PLACES else ""
        size = format_size(sizes[operation, reason])
        yield f"{operation} at {', '.join(shown[:_PLACES])}{more} ({size}; {reason})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


class Outcome(NamedTuple):
    """What became of a part of a module that does not run row by row."""

    name: str
    kind: str
    reason: str | None
    """Why it does not run row by row either; None where it does."""


def refused(where: str, reason: str, parts: Sequence[Outcome], peak: int | None, defect: bool) -> str:
    """The warning that a module cannot run row by row: why, what runs in its place, and what that takes.

    Args:
        where: The module.
        reason: Why it cannot.
        parts: What became of its parts, as far as they were called.
        peak: The activation peak of all of it run plainly, in bytes, if it is known.
        defect: Whether it is a fault of this package or of PyTorch's tracing.
    """
    by_rows = [part.name for part in parts if part.reason is None]
    text = f"{where} cannot run row by row{' as a whole' if by_rows else ''}: {reason}."
    if by_rows:
        text += f" Its parts do, each by itself: {_listed(by_rows)}."
    for part in parts:
        if part.reason is not None:
            text += f" {part.name} ({part.kind}) cannot either: {part.reason}."
    if by_rows:
        text += " What is left of it runs plainly"
        text += "" if peak is None else f"; all of it plainly takes {format_size(peak)} of activation memory"
    else:
        text += " It runs plainly"
        text += "" if peak is None else f", which takes {format_size(peak)} of activation memory for this input"
    return f"{text} (on_unsupported='error' raises an error instead){to_report() if defect else ''}"


def to_report() -> str:
    """What to do where the fault is not the user's."""
    return (
        ". This is a fault of lrcnn-lightning, or of PyTorch's tracing, and not of your code: please report it, with "
        "the traceback that the logger 'lrcnn_lightning' has at level DEBUG"
    )


def fewer_rows(asked: int, height: int) -> str:
    """The warning that an input has fewer rows than were asked for."""
    return f"rows={asked} is more than the {format_count(height, 'row')} of this input, which is as many as there are"


def least_memory(plan: Plan, free: int) -> str:
    """The warning that a plan is used although it is predicted not to fit into ``free`` bytes."""
    return (
        f"no plan fits the {format_size(free)} that can be used: the one of least memory is used, with an activation "
        f"peak of {format_size(plan.peak_bytes)} predicted (plain PyTorch {format_size(plan.plain_peak_bytes)}). "
        "Should the device run out of memory, a smaller batch or image, half precision, or freezing the first layers "
        "help"
    )


def needless_rows(config: RowConfig, plans: Mapping[str, Plan], free: int) -> str | None:
    """The warning that plain PyTorch would have fitted into ``free`` bytes, and would have been faster.

    Nothing is said where the planner was free to choose, where a limit on memory was asked for, or where rows are
    predicted to take no longer.
    """
    by_rows = {name: plan for name, plan in plans.items() if plan.mode != "plain" and plan.training}
    given = config.given_choices
    plain = sum(plan.plain_peak_bytes for plan in by_rows.values())
    overhead = max((plan.overhead for plan in by_rows.values()), default=0.0)
    if not given or not by_rows or config.memory_budget != "auto" or plain > free or overhead < 0.005:
        return None
    return (
        f"this batch fits without rows: plain PyTorch is predicted to take {format_size(plain)} of activation memory, "
        f"and {format_size(free)} can be used; {', '.join(given)} costs {100 * overhead:+.0f} % extra work. "
        'Trainer(strategy="lrcnn") takes rows only where they are needed; a memory_budget says how much may be used'
    )


def never_called(modules: Mapping[str, Sequence[str]]) -> str | None:
    """The warning that the first step has called none of the modules that were to run row by row; for each its parts.

    Nothing is said where there are none.
    """
    if not modules:
        return None
    first = next(iter(modules))
    parts = [part for parts in modules.values() for part in parts] or [f"{first}.encoder"]
    return (
        f"the first step has not called {', '.join(modules)}, so nothing ran "
        f"row by row: a module does where it is called itself, as in `self.{first}(x)`, and not where other "
        "methods of it or its parts are. Name in `modules` what the step calls, for example "
        f"modules={parts[:_PLACES]!r}"
    )


def outside_call(name: str) -> str:
    """The warning that a row-wise module was called where rows are not in force."""
    return (
        f"{name or 'the LightningModule'} was called outside of the Trainer's steps (by a callback, or for "
        "`example_input_array`), and ran plainly: the result is right, and it took the memory of plain PyTorch. Where "
        "that is too much, call it inside of `with trainer.strategy.row_by_row():`"
    )
