"""What a user should know of a plan that is not what was asked for: shown in its report, and warned of once.

A plan may have fewer parts than were asked for, because there is nothing more to divide, and may take more time than
was allowed, because nothing faster was found. Neither is an error: the last batch of an epoch is often a short one.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrcnn_lightning.config import RowConfig, format_size
from lrcnn_lightning.planning.cost import Cost
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.rules import Role

__all__ = ["Note", "notes"]


@dataclass(frozen=True)
class Note:
    """A sentence on a plan, and the option that it is about."""

    option: str
    text: str


def notes(program: Program, cost: Cost, plain: Cost, config: RowConfig, budget: int | None) -> tuple[Note, ...]:
    """In what a program departs from the configuration; ``plain`` is what plain PyTorch costs, ``budget`` in bytes."""
    if program.mode == "plain":
        return ()
    notes = [_segments(program, config), _batch_chunks(program, config)]
    if budget is None and program.training:
        notes.append(_overhead(program, cost, plain, config) or _savings(cost, plain))
    return tuple(note for note in notes if note is not None)


def _segments(program: Program, config: RowConfig) -> Note | None:
    used = sum(1 for segment in program.segments if not segment.plain and segment.backward)
    if not program.training or not isinstance(config.segments, int) or used >= config.segments:
        return None
    return Note(
        "segments",
        f"segments={config.segments} is more than there are places to cut: {used} "
        f"{'is' if used == 1 else 'are'} used; allowed is any number, and segments='auto' lets the planner choose",
    )


def _batch_chunks(program: Program, config: RowConfig) -> Note | None:
    used = program.chunks
    if not isinstance(config.batch_chunks, int) or used >= config.batch_chunks:
        return None
    reason, advice = f"it has {program.graph.input_samples}", "a larger batch can be divided more often"
    if not program.graph.batch_splits:
        reason, advice = "an operation mixes its samples", "rows are a way to divide the work all the same"
    return Note(
        "batch_chunks",
        f"batch_chunks={config.batch_chunks} is more than the batch can be divided into ({reason}): {used} "
        f"{'is' if used == 1 else 'are'} used; {advice}, and batch_chunks='auto' lets the planner choose",
    )


def _overhead(program: Program, cost: Cost, plain: Cost, config: RowConfig) -> Note | None:
    overhead = cost.seconds / plain.seconds - 1
    if overhead <= config.max_overhead:
        return None
    fixed = " or ".join(config.given_choices)
    freer = f"leave out {fixed}, so that the planner has more to choose from; " if fixed else ""
    helps = (
        f"{freer}a memory_budget, for the fastest plan that fits; a larger image, of which rows cost less; or, if that "
        f"time is acceptable, max_overhead={_rounded_up(overhead):g}"
    )
    if _too_small(program, plain):
        helps = (
            "a larger image; or to run this module plainly, by leaving it out of `modules` or with mode='auto': its "
            "maps are too small for rows to pay, and the calls for a single row take longer than plain PyTorch's step"
        )
    return Note(
        "max_overhead",
        f"no plan was found whose extra work is within max_overhead={config.max_overhead:g}; the one with the least is "
        f"used: {100 * overhead:+.0f} % predicted, activation peak {format_size(cost.peak_bytes)} (plain PyTorch "
        f"{format_size(plain.peak_bytes)}). What helps: {helps}",
    )


def _too_small(program: Program, plain: Cost) -> bool:
    """Whether the calls for one row, forward, again and backward, take longer than a plain step."""
    calls = 3 * sum(role in (Role.ROW, Role.REDUCE) for role in program.graph.roles)
    return calls * program.machine.seconds_a_slab > plain.seconds


def _savings(cost: Cost, plain: Cost) -> Note | None:
    if cost.peak_bytes < plain.peak_bytes:
        return None
    overhead = cost.seconds / plain.seconds - 1
    return Note(
        "savings",
        f"rows save no memory here: activation peak {format_size(cost.peak_bytes)} predicted, plain PyTorch "
        f"{format_size(plain.peak_bytes)}, with {100 * overhead:+.0f} % extra work. What helps: a larger "
        "max_overhead; a larger image or batch, of which rows save more; or to run this module plainly, by leaving it "
        "out of `modules` or with mode='auto'",
    )


def _rounded_up(overhead: float) -> float:
    """A value of ``max_overhead`` that allows this one, with two digits."""
    return (int(overhead * 100) + 1) / 100
