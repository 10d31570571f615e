"""``rowwise(module)``: a module whose forward and backward pass run row by row, without Lightning.

The module stays what it is: same class, same parameters, same ``state_dict``. Only its ``forward`` is replaced, on the
instance, by a `RowwiseForward`, and `restore` takes that away again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrcnn_lightning.captures import CACHED, Captures, device_of, put_back
from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.errors import CaptureError, ConfigError, InputError, RowwiseError
from lrcnn_lightning.graph import capture, own_error, take_apart, under_autocast
from lrcnn_lightning.messages import inner_hooks
from lrcnn_lightning.plan.autocast import under_autocast_of
from lrcnn_lightning.plan.frontier import Frontier, find_frontier
from lrcnn_lightning.plan.machine import Machine
from lrcnn_lightning.plan.plan import Plan
from lrcnn_lightning.plan.saved import SavedPlan, load_plan
from lrcnn_lightning.plan.search import choose_plan
from lrcnn_lightning.rules import RowGraph, lower
from lrcnn_lightning.subclasses import with_subclasses, without_subclasses

__all__ = ["RowwiseForward", "frontier", "plan", "restore", "rowwise"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)

_NAMED = 5
"""Modules that a warning names at most; a profiler puts a hook on every one."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class RowwiseForward:
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
        unsupported: Any = None,
        notify: Callable[[str], None] = _warn,
    ) -> None:
        self.module, self.config, self.name = module, config, name
        self.notify = notify
        """Takes what the user should know, once each."""
        self._said: set[str] = set()
        self.observe: Callable[[RowwiseForward, tuple[Any, ...], dict[str, Any]], None] | None = None
        """Told of each call once its plan is known."""
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self.plan: Plan | None = None
        """The plan of the latest call."""
        self.training_plan: Plan | None = None
        """The plan of the latest call with a backward pass."""
        self._graphs = Captures(module)
        self._plans: OrderedDict[Any, Execution] = OrderedDict()
        self._unsupported: Callable[[RowwiseForward, CaptureError, Callable[[], Any]], Any] | None = unsupported
        self._runs_plain = False
        self.given: SavedPlan | None = None
        """A plan that was given; nothing is searched for then."""
        self.passing = False
        """Whether it is there for the time of a step only, and not for good as by `rowwise`."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no plans: they are made again when needed."""
        state = self.__dict__.copy()
        state.update(
            plan=None, training_plan=None, _graphs=Captures(self.module), _plans=OrderedDict(), _unsupported=None
        )
        state.update(notify=_warn, observe=None)
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle made during a step, of a teacher or for a file, has the module's own forward.

        No step would ever take a row-wise one away from it.
        """
        if not self.passing:
            return super().__reduce_ex__(protocol)
        return _plain_forward, (self.module, self.previous)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._runs_plain or torch.compiler.is_compiling() or _is_transformed():
            return self.original(*args, **kwargs)
        uncaptured: CaptureError | None = None
        try:
            execution, inputs = self._prepare(args, kwargs)
        except CaptureError as error:
            uncaptured = error
        except RowwiseError as error:
            raise type(error)(f"{self._where()}: {error}") from error
        if uncaptured is not None:  # outside of the handler: an error of the module's own has no other behind it
            return self._uncaptured(uncaptured, args, kwargs)
        self.plan = chosen = execution.plan
        if chosen.training:
            self.training_plan = chosen
        if self.observe is not None:
            self.observe(self, args, kwargs)
        if chosen.mode == "plain":
            return self.original(*args, **kwargs)
        return with_subclasses(execution(self.module, inputs), args, kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def plan_for(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for a call with these arguments."""
        return self._prepare(tuple(args), dict(kwargs))[0].plan

    def _where(self) -> str:
        kind = type(self.module).__name__
        return f"row-wise module {self.name!r} ({kind})" if self.name else f"row-wise module {kind}"

    def _smaller(self) -> str:
        """How a smaller part is named: in a strategy modules have names."""
        return "Name smaller parts in `modules`" if self.name else "Call rowwise() on smaller parts of it"

    def _smaller_for_hooks(self) -> str:
        return "name smaller modules in `modules`" if self.name else "call rowwise() on smaller modules"

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Execution, list[Any]]:
        inputs, graph = self._situated(args, kwargs)
        grad = torch.is_grad_enabled()
        leaves = requires_grad_leaves(graph.graph, self.module, inputs) if grad else frozenset()
        plan_key = (graph, leaves, grad)
        chosen = self._plans.get(plan_key)
        if chosen is None:
            training, device = grad and bool(leaves), device_of(inputs)
            if self.given is not None:
                found = self.given.of(graph, leaves, training, Machine.of(device))
            else:
                found = choose_plan(graph, leaves, training, self.config, device)
            chosen = _remember(self._plans, plan_key, Execution(found))
            self._warn_of(found)
        self._plans.move_to_end(plan_key)
        return chosen, inputs

    def _warn_of(self, chosen: Plan) -> None:
        """Say once what a plan is not as asked for, and which hooks a row-wise run passes by."""
        if chosen.chunks == self.config.batch_chunks:
            self._said.add("batch_chunks")  # a batch that is divided into fewer is the short one at the end
        for note in chosen.notes:
            if note.option not in self._said:
                self._said.add(note.option)
                self.notify(f"{self._where()}: {note.text}")
        hooked = [path for path in inner_hooks(self.name, self.module, chosen) if path not in self._said]
        if hooked:
            self._said.update(hooked)
            more = f" and {len(hooked) - _NAMED} more" if len(hooked) > _NAMED else ""
            self.notify(
                f"hooks inside of row-wise modules do not run, because no full feature map passes there: "
                f"{', '.join(hooked[:_NAMED])}{more}. Hooks on a row-wise module itself run; "
                f"{self._smaller_for_hooks()}"
            )

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
        if cause is not None and "captures" not in self._said:
            self._said.add("captures")
            self.notify(
                f"{self._where()}: {cause}, and was something else in each of the calls before. Each value is captured "
                "and planned anew, which takes seconds. Make it a tensor: a buffer, or an argument"
            )
        with put_back(self.module, self.previous):
            captured = capture(self.module, args, kwargs)
        axis = self.config.axis if self.given is None else self.given.axis_of(self.config.axis)
        return inputs, self._graphs.remember(inputs, structure, lower(captured, axis))

    def situation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[RowGraph, frozenset[int], bool, torch.device]:
        """What a plan for a training call is made from: graph, values with a gradient, whether any, device."""
        inputs, graph = self._situated(args, kwargs)
        leaves = requires_grad_leaves(graph.graph, self.module, inputs)
        return graph, leaves, bool(leaves), device_of(inputs)

    def own_error(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
        """The error that the module raises for these arguments with or without rows, as far as can be told."""
        with put_back(self.module, self.previous):
            return own_error(self.module, args, kwargs)

    def _uncaptured(self, error: CaptureError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that cannot be captured: an input that the module does not take gets the module's own error."""

        def run() -> Any:
            return self.original(*args, **kwargs)

        if self.own_error(args, kwargs) is not None:
            result = run()  # which raises what plain PyTorch raises, unless it was for want of data after all
            return self._without_rows(error, lambda: result)
        return self._without_rows(error, run)

    def _without_rows(self, error: CaptureError, run: Callable[[], Any]) -> Any:
        """A module that cannot be captured: what the configuration asks for. ``run`` is the plain call."""
        if self._unsupported is not None:
            return self._unsupported(self, error, run)
        message = (
            f"{self._where()} cannot be captured: {error}. Allowed is what torch.export can trace: Python code whose "
            f"branches do not depend on the values of tensors. {self._smaller()}, or pass on_unsupported='warn' to run "
            "this one plainly"
        )
        if self.config.on_unsupported == "error":
            raise CaptureError(message) from error
        self.notify(f"{message} (on_unsupported='warn': it runs plainly)")
        self._runs_plain = True
        return run()


_V = TypeVar("_V")


def _plain_forward(module: nn.Module, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """A module's forward without rows; ``previous`` is one that the user has set on the instance."""
    return MethodType(type(module).forward, module) if previous is None else previous


def _remember(table: OrderedDict[Any, _V], key: Any, value: _V) -> _V:
    table[key] = value
    while len(table) > CACHED:
        table.popitem(last=False)
    return value


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) is running, which has tensors of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def rowwise(
    module: ModuleType, *, plan: Plan | SavedPlan | Mapping[str, Any] | str | Path | None = None, **options: Any
) -> ModuleType:
    """Make ``module`` run row by row, in place, and return it.

    ``options`` are the fields of `RowConfig`. Instead of those that plan, ``plan`` may be a plan for this module, its
    data (``plan.to_dict()``, perhaps edited), or a JSON file with it. The first call with a new input
    shape captures and plans the module.
    Parameters, buffers, hooks on the module and its ``state_dict`` stay as they are; `restore` undoes it.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    >>> y = rowwise(net, mode="two_phase", rows=4)(torch.randn(1, 3, 32, 32))    # N C H W
    >>> y.shape
    torch.Size([1, 8, 32, 32])

    Raises `ConfigError` for a wrong option; the first call raises `CaptureError` for a module that cannot be captured
    (unless ``on_unsupported="warn"``) and `InputError` for an input without a spatial axis.
    """
    config = _config("rowwise()", options)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"rowwise() takes a torch.nn.Module, given was {type(module).__name__}")
    planning = sorted({*options} - {"axis", "on_unsupported"})
    if plan is not None and planning:
        raise ConfigError(
            f"{planning[0]}={options[planning[0]]!r} is for planning, and a plan was given: leave out one"
        )
    restore(module)
    forward = RowwiseForward(module, config)
    forward.given = None if plan is None else load_plan(plan)
    module.__dict__["forward"] = forward
    return module


def _config(caller: str, options: Mapping[str, Any]) -> RowConfig:
    """The configuration of one module, which is passed itself rather than named."""
    config = RowConfig.from_options(**options)
    if config.modules != "auto":
        raise ConfigError(
            f"modules={config.modules!r} is for the Lightning strategies; here, pass the submodule itself to {caller}"
        )
    return config


def restore(module: ModuleType) -> ModuleType:
    """Give the module (and its submodules) their own forward back, and return it."""
    for child in module.modules():
        patched = child.__dict__.get("forward")
        if isinstance(patched, RowwiseForward):
            del child.__dict__["forward"]
            if patched.previous is not None:
                child.__dict__["forward"] = patched.previous
    return module


def plan(module: nn.Module, example: Any, **options: Any) -> Plan:
    """The plan for ``module(example)``, without running anything.

    ``example`` is a tensor (``N C H W`` or another map), a tuple of arguments or a dict of keyword arguments. Tensors
    on the ``meta`` device stand for inputs of any size and take no memory. Gradients are planned for as the module's
    parameters require them.
    """
    with _rehearsal(module, example, options) as (executor, args, kwargs):
        return executor.plan_for(args, kwargs)


def frontier(module: nn.Module, example: Any, **options: Any) -> Frontier:
    """Activation memory against extra work for ``module(example)``: the plans worth having, without running anything.

    Takes what `plan` takes; numbers that are given (``rows``, ``segments``, ``mode``) are not varied.
    """
    with _rehearsal(module, example, options) as (executor, args, kwargs):
        graph, leaves, training, device = executor.situation(args, kwargs)
        return find_frontier(graph, leaves, training, executor.config, device)


@contextlib.contextmanager
def _rehearsal(
    module: nn.Module, example: Any, options: dict[str, Any]
) -> Iterator[tuple[RowwiseForward, tuple[Any, ...], dict[str, Any]]]:
    """A forward and its arguments as fake tensors, which have shapes and no bytes."""
    config = _config("plan() or frontier()", options)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, tuple):
        args = example
    else:
        args = (example,)
    if not any(isinstance(leaf, torch.Tensor) for leaf in take_apart((args, kwargs))[0]):
        numbers = isinstance(example, (tuple, list)) and all(isinstance(size, int) for size in example)
        shape = ", ".join(map(str, example)) if numbers and example else "1, 3, 512, 512"
        raise InputError(
            f"{type(module).__name__}: the example has no tensor (given: {example!r}; allowed: a tensor, a tuple of "
            f"arguments, a dict of keyword arguments); for a shape, pass "
            f'torch.empty({shape}, device="meta"), which takes no memory'
        )
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    restoring = module.__dict__.get("forward")
    previous = restoring.previous if isinstance(restoring, RowwiseForward) else restoring
    with FakeTensorMode(allow_non_fake_inputs=True):

        def real(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta or device.type == "meta":
                return tensor
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return made.requires_grad_(tensor.requires_grad)

        leaves, structure = take_apart((args, kwargs))
        leaves = [real(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = structure.put_together(leaves)
        executor = RowwiseForward(module, config, notify=lambda text: None)  # the plan itself has the notes
        executor.previous = previous
        try:
            with torch.enable_grad():
                yield executor, args, kwargs
        except RowwiseError as error:
            own = executor.own_error(args, kwargs) if isinstance(error, CaptureError) else None
            if own is not None:
                raise InputError(
                    f"{executor._where()} does not take this input, row by row or plainly: {type(own).__name__}: {own}"
                ) from own
            raise type(error)(f"{executor._where()}: {error}") from error
