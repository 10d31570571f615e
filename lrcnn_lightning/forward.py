"""``RowwiseForward``: what stands in for a module's ``forward``, and the one place that decides how a call is served.

    call --> its graph ---------> its plan --> run
             capture, lower       search       segment by segment
               |                   |            | nothing has changed yet
               +---- a refusal ----+------------+
                        |
      on_unsupported="error": it is raised
      on_unsupported="warn":  one warning; from now on the module's own forward runs, and its parts row by row

A refusal is an `InputError` or a `CaptureError`: something that cannot be done in rows. Whatever else goes wrong on the
way is a fault of the package; it is a refusal as well, which asks for a report. What is for the user to see is raised:
errors of the module's own code, out-of-memory errors, wrong options, and a limit on memory that no plan fits.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from lrcnn_lightning.captures import LEAST, Captures, device_of, without_hooks
from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.engine.record import CallRecord
from lrcnn_lightning.engine.undo import Undone
from lrcnn_lightning.errors import (
    BudgetError,
    CaptureError,
    InputError,
    InternalError,
    RowwiseError,
    UninitialisedError,
    is_out_of_memory,
)
from lrcnn_lightning.graph import ONE_AT_A_TIME, capture, in_words, own_error, take_apart, under_autocast
from lrcnn_lightning.messages import (
    BACKWARD,
    Outcome,
    fewer_rows,
    least_memory,
    refused,
    to_report,
)
from lrcnn_lightning.planning.autocast import under_autocast_of
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.planning.search import choose_plan
from lrcnn_lightning.recent import Recent
from lrcnn_lightning.rules import RowGraph, lower
from lrcnn_lightning.stand_in import StandIn
from lrcnn_lightning.stepping_aside import steps_aside
from lrcnn_lightning.subclasses import with_subclasses, without_subclasses
from lrcnn_lightning.unrun import plain_peak

__all__ = ["RowwiseForward"]

Refusal: TypeAlias = InputError | CaptureError

_logger = logging.getLogger(__name__)

_MOST_CALLS = 200_000
"""Operations on slabs, together, of the plans that are remembered of a module: about 300 MB."""

_NOTHING = object()
"""Stands for a result that is not there."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _undivided(forward: RowwiseForward) -> list[RowwiseForward]:
    return []


class RowwiseForward(StandIn):
    """Stands in for a module's ``forward``.

    Graphs are remembered by what they depend on (shapes, dtypes, devices, Python arguments, the module's parts, and
    guards for whatever its code read of Python), plans by their graph and by which parameters and inputs require a
    gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RowConfig,
        name: str = "",
        notify: Callable[[str], None] = _warn,
        divide: Callable[[RowwiseForward], list[RowwiseForward]] = _undivided,
    ) -> None:
        super().__init__(module, name)
        self.config = config
        self.notify = notify
        """Takes what the user should know, once each."""
        self._said: set[str] = set()
        self.observe: Callable[[RowwiseForward, tuple[Any, ...], dict[str, Any]], None] | None = None
        """Told of each call once its plan is known."""
        self.plan: Plan | None = None
        """The plan of the latest call."""
        self.training_plan: Plan | None = None
        """The plan of the latest call with a backward pass."""
        self._pending: weakref.WeakSet[CallRecord] | None = None
        """Of calls whose backward pass may come."""
        self._graphs = Captures(module)
        self._plans: Recent[Any, tuple[Plan, Execution]] = Recent(_MOST_CALLS, LEAST)
        self.given: SavedPlan | None = None
        """A plan that was given; nothing is searched for then."""
        self.has_limit = not config.fits_free_memory
        """Whether the budget was asked for, so that a plan that does not fit it must not run."""
        self.is_called = False
        """Whether it has served a call."""
        self.refusal: Refusal | None = None
        """Why the latest call that did not run row by row did not."""
        self._refused: set[tuple[bool, Any]] = set()
        """In train (True) or eval mode: what is refused, or None for everything."""
        self._divide = divide
        self._parts: list[RowwiseForward] | None = None
        """What runs row by row in its place; None before it is needed."""
        self._asleep = 0
        self.is_part = False
        """Whether it is a part of a module that does not run row by row."""
        self._is_told_of = False
        """Whether the module that it is a part of says what becomes of it."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no plans: they are made again when needed."""
        state = self.__dict__.copy()
        state.update(plan=None, training_plan=None, _graphs=Captures(self.module), _plans=Recent(_MOST_CALLS, LEAST))
        state.update(notify=_warn, observe=None, refusal=None, _pending=None)
        return state

    # ------------------------------------------------------------------------------------------------ a call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._asleep or steps_aside():
            return self.original(*args, **kwargs)
        self.is_called = True
        if self._is_refused(args, kwargs):
            return self.original(*args, **kwargs)
        refusal: Refusal | None = None
        try:
            chosen, execution, inputs = self._prepare(args, kwargs)
        except Exception as error:
            refusal = self._as_refusal(error)
            if refusal is None:
                raise
        if refusal is not None:  # outside of the handler: an error of the module's own has no other behind it
            return self._without_rows(refusal, args, kwargs)
        self.plan = chosen
        if chosen.training:
            self.training_plan = chosen
        if self.observe is not None:
            self.observe(self, args, kwargs)
        if chosen.mode == "plain":
            with self._parts_asleep():
                return self.original(*args, **kwargs)
        try:
            return with_subclasses(execution(self.module, inputs), args, kwargs)
        except Undone as undone:
            refusal = self._as_refusal(undone.error)
        assert refusal is not None
        if self.config.on_unsupported == "error":
            # An error is as likely the module's own: of the values of tensors only a run knows.
            raise refusal.__cause__ or self._final(refusal)
        _log(self.where, refusal)  # first: with the traceback go the maps of the run that has failed
        return self._without_rows(refusal, args, kwargs, self.original(*args, **kwargs))

    @contextlib.contextmanager
    def _parts_asleep(self) -> Iterator[None]:
        """The module runs as one, and its parts plainly in it."""
        parts = self._parts or ()
        for part in parts:
            part._asleep += 1
        try:
            yield
        finally:
            for part in parts:
                part._asleep -= 1

    # ------------------------------------------------------------------------------------------ graph and plan

    def plan_for(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for a call with these arguments."""
        return self._prepare(tuple(args), dict(kwargs))[0]

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, Execution, list[Any]]:
        with ONE_AT_A_TIME:  # what another thread is capturing now may be what is needed here
            inputs, graph = self._situated(args, kwargs)
            grad = torch.is_grad_enabled()
            leaves = requires_grad_leaves(graph.graph, self.module, inputs) if grad else frozenset()
            plan_key = (graph, leaves, grad)
            chosen = self._plans.get(plan_key)
            if chosen is None:
                device = device_of(inputs)
                plan = self._planned(Problem(graph, leaves, grad and bool(leaves), Machine.of(device)), device)
                self._pending = weakref.WeakSet() if self._pending is None else self._pending
                chosen = plan, Execution(plan, self._told_by_engine, self._pending, self.is_part)
                self._plans.put(plan_key, chosen, plan.calls)
                self._warn_of(plan)
        return *chosen, inputs

    def _planned(self, problem: Problem, device: torch.device) -> Plan:
        if self.given is not None:
            return Planner(problem).saved(self.given)
        config, height = self.config, max(problem.graph.input_height, 1)
        if config.on_unsupported == "warn" and isinstance(config.rows, int) and config.rows > height:
            self._say("rows", fewer_rows(config.rows, height))
            config = replace(config, rows=height)
        try:
            return choose_plan(problem, config, device, [plan for plan, _ in self._plans.values()])
        except BudgetError as error:
            if self.has_limit or error.least is None:
                raise
            least: Plan = error.least
            self._say("memory", least_memory(least, error.budget))
            return least

    def _say(self, subject: str, text: str) -> None:
        """Tell the user something, once for each subject."""
        if subject not in self._said:
            self._said.add(subject)
            self.notify(f"{self.where}: {text}")

    def _told_by_engine(self, event: str) -> None:
        self._say(event, BACKWARD[event])

    def _warn_of(self, chosen: Plan) -> None:
        """Say once what a plan is not as asked for."""
        if chosen.chunks == self.config.batch_chunks:
            self._said.add("batch_chunks")  # a batch that is divided into fewer is the short one at the end
        for note in chosen.notes:
            self._say(note.option, note.text)

    def _situated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], RowGraph]:
        """The leaves of the arguments, and the graph for them with the dtypes that its values have in this call."""
        inputs, graph = self._captured(args, kwargs)
        device = device_of(inputs)
        return inputs, under_autocast_of(graph, device) if under_autocast(device) else graph

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], RowGraph]:
        """The leaves of the arguments, and the graph that serves a call with them."""
        args, kwargs = without_subclasses(args, kwargs)
        inputs, structure = take_apart((args, kwargs))
        graph, cause = self._graphs.find(inputs, structure)
        if graph is not None:
            return inputs, graph
        if cause is not None:
            self._say(
                "captures",
                f"{cause}, and was something else in each of the calls before. Each value is captured "
                "and planned anew, which takes seconds. Make it a tensor: a buffer, or an argument",
            )
        with without_hooks(self.module):
            captured = capture(self.module, args, kwargs)
        axis = self.config.axis if self.given is None else self.given.axis_of(self.config.axis)
        return inputs, self._graphs.remember(inputs, structure, lower(captured, axis))

    def problem(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        """What a plan for a training call with these arguments is made for."""
        inputs, graph = self._situated(args, kwargs)
        leaves = requires_grad_leaves(graph.graph, self.module, inputs)
        return Problem(graph, leaves, bool(leaves), Machine.of(device_of(inputs)))

    # ------------------------------------------------------------------------------------------------ refusals

    def own_error(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
        """The error that the module raises for these arguments with or without rows, as far as can be told."""
        with without_hooks(self.module):
            return own_error(self.module, args, kwargs)

    def _is_refused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call has been refused before."""
        if not self._refused:
            return False
        training = self.module.training
        return (training, None) in self._refused or (training, _kinds(args, kwargs)) in self._refused

    def _as_refusal(self, error: Exception) -> Refusal | None:
        """The refusal that an error is; None where it is to be raised. What the user has asked for is said here."""
        if isinstance(error, (InputError, CaptureError)):
            return error
        if isinstance(error, RowwiseError):
            raise type(error)(f"{self.where}: {error}") from error
        if is_out_of_memory(error):
            return None
        refusal = InternalError(in_words(error))
        refusal.__cause__ = error
        return refusal

    def _without_rows(
        self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any = _NOTHING
    ) -> Any:
        """Serve a call that cannot run row by row as is configured; ``result`` is that of a plain run, if it was made.

        An input that the module does not take gets the module's own error.
        """
        if isinstance(refusal, UninitialisedError):
            return self.original(*args, **kwargs)
        if result is _NOTHING and isinstance(refusal, CaptureError) and self.own_error(args, kwargs) is not None:
            # It raises what plain PyTorch raises, unless the error was for want of data after all.
            result = self.original(*args, **kwargs)
        if self.config.on_unsupported == "error":
            raise self._final(refusal)
        _log(self.where, refusal)
        if self._parts is None:
            self._parts = self._divide(self)
            for part in self._parts:
                part.is_part = True
        with self._told(refusal, args, kwargs):
            return self.original(*args, **kwargs) if result is _NOTHING else result

    def _final(self, refusal: Refusal) -> Exception:
        """The error that the user gets."""
        smaller = "Name smaller parts in `modules`" if self.name else "Call rowwise() on smaller parts of it"
        advice = f"{smaller}, or pass on_unsupported='warn' to run this one by its parts, or plainly"
        defect = to_report() if isinstance(refusal, InternalError) else ""
        error = type(refusal)(f"{self.where} cannot run row by row: {refusal}. {advice}{defect}")
        error.__cause__ = refusal
        return error

    @contextlib.contextmanager
    def _told(self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Remember a refusal, and say once, after the call or if memory ends it, what became of the module's parts.

        Nothing is remembered if the module's own code raises an error, and nothing is said of a whole model whose
        forward nobody has chosen, nor of the parts of a module that says so itself.
        """
        told = self._is_told_of or (self.passing and not self.name)
        before = [] if told else list(self._all_parts())
        for part in before:
            part._is_told_of = True
        key = (self.module.training, _kinds(args, kwargs) if isinstance(refusal, InputError) else None)
        self.refusal = refusal
        self._refused.add(key)
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                self.refusal = None
                self._refused.discard(key)
            raise
        finally:
            for part in () if told else (*before, *self._all_parts()):
                part._is_told_of = False
            if not told and self.refusal is refusal and str(refusal) not in self._said:
                self._said.add(str(refusal))
                peak = plain_peak(self.module, args, kwargs)
                defect = isinstance(refusal, InternalError)
                self.notify(refused(self.where, str(refusal), list(self._outcomes()), peak, defect))

    @property
    def parts(self) -> list[RowwiseForward]:
        """What runs row by row in its place, where it cannot run row by row as a whole."""
        return [part for part in self._all_parts() if part.plan is not None and part.plan.mode != "plain"]

    def _all_parts(self) -> Iterator[RowwiseForward]:
        for part in self._parts or ():
            yield part
            yield from part._all_parts()

    def _outcomes(self) -> Iterator[Outcome]:
        """What became of the parts that were called."""
        for part in self._parts or ():
            if part.refusal is not None:
                inner = list(part._outcomes())
                if not any(outcome.reason is None for outcome in inner):
                    yield Outcome(part.name, type(part.module).__name__, str(part.refusal))
                yield from inner
            elif part.plan is not None:
                yield Outcome(part.name, type(part.module).__name__, None)


def _kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the tensors among the arguments what decides whether they can be split."""
    leaves = take_apart((args, kwargs))[0]
    return tuple((leaf.dim(), leaf.is_floating_point()) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _log(where: str, refusal: Refusal) -> None:
    """Log the traceback, and let go of what it holds: whole maps, of a run that has failed."""
    if refusal.__traceback__ is not None or refusal.__cause__ is not None:
        _logger.debug("%s does not run row by row", where, exc_info=refusal)
    error: BaseException | None = refusal
    while error is not None:
        cause = error.__cause__ or error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error = cause
