"""The schedule: every step of a plan in order, as text that can be parsed back, and a proof that it is sound.

One line is one instruction, made of words without blanks::

    s0 forward rows s0.f1 0..7 reads=conv1,weight writes=conv2,mean,variance keeps=s0.f1
    s0 forward free conv1
    s0 backward rows s0.b2 7..0 reads=x,conv2 gradients=y into=conv2,weight drops=s0.f1
    s0 backward free-gradient y

``reads`` and ``writes`` are full maps and whole values, ``gradients`` the gradients that are read, ``into`` those that
are added to, ``keeps``, ``uses`` and ``drops`` the carries of a loop. `validate` needs nothing but the instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lrcnn_lightning.errors import PlanError
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.steps import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    Segment,
    Step,
    Sweep,
    reads_of,
    writes_of,
)
from lrcnn_lightning.rules import RowGraph

__all__ = ["Instruction", "instructions", "parse", "validate"]

_LISTS = ("reads", "writes", "gradients", "into")
_CARRIES = ("keeps", "uses", "drops")


@dataclass(frozen=True)
class Instruction:
    """One step, by names. ``first`` and ``last`` are the rows of a loop in the order in which they run."""

    segment: str
    direction: str
    """``enter``, ``forward``, ``leave`` (what is kept), or ``backward``."""
    verb: str
    subject: str
    first: int = -1
    last: int = -1
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    into: tuple[str, ...] = ()
    keeps: str = ""
    uses: str = ""
    drops: str = ""

    def __str__(self) -> str:
        words = [self.segment, self.direction, self.verb, self.subject]
        if self.first >= 0:
            words.append(f"{self.first}..{self.last}")
        words += [f"{key}={','.join(getattr(self, key))}" for key in _LISTS if getattr(self, key)]
        words += [f"{key}={getattr(self, key)}" for key in _CARRIES if getattr(self, key)]
        return " ".join(words)


def instructions(program: Program) -> tuple[Instruction, ...]:
    """The schedule of a program: all segments forward, then backward in reverse."""
    result: list[Instruction] = []
    rows = [segment for segment in program.segments if not segment.plain]
    names = program.graph.value_names
    for segment in rows:
        result.append(Instruction(segment.name, "enter", "with", "inputs", writes=_of(names, segment.inputs)))
        result += [_instruction(program.graph, names, segment, "forward", step) for step in segment.forward]
        result.append(Instruction(segment.name, "leave", "with", "outputs", reads=_of(names, segment.outputs)))
    for segment in reversed(rows):
        if segment.backward:
            outputs = _of(names, [o for o in segment.outputs if o in segment.differentiable])
            kept = _of(names, segment.kept)
            result.append(Instruction(segment.name, "enter", "with", "gradients", reads=kept, into=outputs))
            result += [_instruction(program.graph, names, segment, "backward", step) for step in segment.backward]
    return tuple(result)


def _of(names: Sequence[str], values: Iterable[int]) -> tuple[str, ...]:
    return tuple(names[value] for value in values)


def _instruction(graph: RowGraph, names: Sequence[str], segment: Segment, direction: str, step: Step) -> Instruction:
    reads, writes = _of(names, reads_of(graph, step)), _of(names, writes_of(graph, step))
    if isinstance(step, (RunRows, Sweep)):
        verb, carries = ("sweep", step.loop.name) if isinstance(step, Sweep) else ("rows", "")
        if isinstance(step, RunRows) and step.kept_carries:
            carries = step.loop.name
        last = len(step.loop.rows) - 1
        return Instruction(segment.name, direction, verb, step.loop.name, 0, last, reads, writes, keeps=carries)
    if isinstance(step, RunWhole | Effect):
        verb = "whole" if isinstance(step, RunWhole) else "effect"
        return Instruction(segment.name, direction, verb, graph.nodes[step.node].name, reads=reads, writes=writes)
    if isinstance(step, BackwardRows):
        run = step.run
        seeds = [o for o in run.outputs if graph.producer[o] in run.differentiated]
        seeds += [o for p in run.injections for o in graph.nodes[p].outputs if o in segment.differentiable]
        return Instruction(
            segment.name,
            direction,
            "rows",
            run.loop.name,
            len(run.loop.rows) - 1,
            0,
            reads,
            gradients=_of(names, seeds),
            into=_of(names, (*run.maps, *run.wholes)),
            uses="" if step.drops else step.carries or "",
            drops=step.carries or "" if step.drops else "",
        )
    if isinstance(step, BackwardWhole):
        node = graph.nodes[step.node]
        into = _of(names, (i for i in node.inputs if i in segment.differentiable))
        given = _of(names, (o for o in node.outputs if o in segment.differentiable))
        return Instruction(segment.name, direction, "whole", node.name, reads=reads, gradients=given, into=into)
    if isinstance(step, Free):
        return Instruction(segment.name, direction, "free", names[step.value])
    assert isinstance(step, FreeGradient)
    return Instruction(segment.name, direction, "free-gradient", names[step.value])


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of a text, one a line. Raises `PlanError` for a line that is none."""
    result = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 4:
            raise PlanError(
                f"line {number} of the schedule is {line!r}: a segment, a direction, a verb and a name begin it"
            )
        segment, direction, verb, subject, *rest = words
        fields: dict[str, object] = {}
        for word in rest:
            key, given, value = word.partition("=")
            if given and key in _LISTS:
                fields[key] = tuple(value.split(","))
            elif given and key in _CARRIES:
                fields[key] = value
            elif ".." in word and not given:
                fields["first"], fields["last"] = (int(part) for part in word.split(".."))
            else:
                raise PlanError(
                    f"line {number} of the schedule: {word!r} is unknown; allowed are first..last and "
                    f"{', '.join(f'{key}=' for key in (*_LISTS, *_CARRIES))}"
                )
        result.append(Instruction(segment, direction, verb, subject, **fields))  # type: ignore[arg-type]
    return tuple(result)


def validate(schedule: Sequence[Instruction]) -> None:
    """Prove a schedule sound, segment by segment, without running it.

    Every value that is read is there; every gradient is complete before it is read; nothing is freed twice; carries
    are kept before they are used, and not used after they were dropped. Raises `PlanError` at the first line that
    breaks a rule.
    """
    kept: dict[str, set[str]] = {}
    state = _State()
    for position, line in enumerate(schedule):
        try:
            if line.direction == "enter" and line.subject == "inputs":
                state = _State(live=set(line.writes), carries_of=state.carries_of)
            elif line.direction == "leave":
                state.require(line.reads)
                kept[line.segment] = state.live
                state.carries_of[line.segment] = state.carries
                state = _State(carries_of=state.carries_of)
            elif line.direction == "enter":
                before = kept.get(line.segment, set())
                missing = [name for name in line.reads if name not in before]
                if missing:
                    raise PlanError(f"{missing[0]!r} is kept for the backward pass and was freed in the forward pass")
                carries = state.carries_of.get(line.segment, set())
                state = _State(set(line.reads), set(line.into), carries, state.carries_of)
            else:
                later = [other for other in schedule[position + 1 :] if other.segment == line.segment]
                state.apply(line, later)
        except PlanError as error:
            raise PlanError(f"line {position + 1} of the schedule, {str(line)[:100]!r}: {error}") from None


class _State:
    """What is there between two instructions."""

    def __init__(
        self,
        live: set[str] | None = None,
        gradients: set[str] | None = None,
        carries: set[str] | None = None,
        carries_of: dict[str, set[str]] | None = None,
    ) -> None:
        self.live, self.gradients = live or set(), gradients or set()
        self.carries = carries or set()
        self.carries_of: dict[str, set[str]] = {} if carries_of is None else carries_of

    def require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.live:
                raise PlanError(f"{name!r} is read and is not there: it was freed, or nothing has made it")

    def apply(self, line: Instruction, later: Sequence[Instruction]) -> None:
        """Check one instruction and do what it says. ``later`` are those of the same segment after it."""
        if line.verb == "free":
            self.require((line.subject,))
            self.live.discard(line.subject)
            return
        if line.verb == "free-gradient":
            if any(line.subject in other.gradients for other in later if other.direction == "backward"):
                raise PlanError(f"the gradient of {line.subject!r} is dropped and read later")
            self.gradients.discard(line.subject)
            return
        self.require(line.reads)
        for name in line.gradients:
            if any(name in other.into for other in later if other.direction == "backward"):
                raise PlanError(f"the gradient of {name!r} is read before it is complete")
        for loop in (line.uses, line.drops):
            if loop and loop not in self.carries:
                raise PlanError(f"the carries of {loop} are read and are not there")
        self.live.update(line.writes)
        self.gradients.update(line.into)
        if line.keeps:
            self.carries.add(line.keeps)
        self.carries.discard(line.drops)
