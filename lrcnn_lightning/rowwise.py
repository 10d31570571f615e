"""``rowwise(module)``: a module whose forward and backward pass run row by row, without Lightning.

The module stays what it is: same class, same parameters, same ``state_dict``. Only its ``forward`` is replaced, on the
instance, by a `RowwiseForward`, and `restore` takes that away again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import CaptureError, ConfigError, InputError, RowwiseError, UninitialisedError
from lrcnn_lightning.fake import new_mode
from lrcnn_lightning.forward import RowwiseForward
from lrcnn_lightning.graph import take_apart
from lrcnn_lightning.planning.frontier import Frontier, find_frontier
from lrcnn_lightning.planning.load import load_plan
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.selection import select_modules

__all__ = ["RowwiseForward", "frontier", "plan", "plan_of", "restore", "rowwise"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)


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
    and `InputError` for an input without a spatial axis. With ``on_unsupported="warn"`` such a module runs by its
    parts, or plainly. `PlanError` is raised where no plan fits ``memory_budget``.
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
    forward = RowwiseForward(module, config, divide=_divide)
    forward.given = None if plan is None else load_plan(plan)
    module.__dict__["forward"] = forward
    return module


def _divide(forward: RowwiseForward) -> list[RowwiseForward]:
    """Make the parts of a module run row by row, one level down."""
    parts = []
    for name, child in select_modules(forward.module).items():
        part = child.__dict__.get("forward")
        if not isinstance(part, RowwiseForward):
            path = f"{forward.name}.{name}" if forward.name else name
            part = child.__dict__["forward"] = RowwiseForward(child, forward.config, path, forward.notify, _divide)
        parts.append(part)
    return parts


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


def plan_of(module: nn.Module) -> Plan | None:
    """The plan by which a row-wise module runs: of its latest call with a backward pass, or else of its latest call.

    None before its first call, and where it does not run row by row (see ``on_unsupported``); its parts, which then do,
    have plans of their own. Under a strategy a module is row-wise for the time of a step; ``strategy.plans`` has the
    plans of all its modules at any time.

    Raises `ConfigError` for a module that is not row-wise.
    """
    forward = vars(module).get("forward") if isinstance(module, nn.Module) else None
    if not isinstance(forward, RowwiseForward):
        raise ConfigError(
            f"plan_of() takes a row-wise module, and this {type(module).__name__} is none; call rowwise(module) "
            "before, or lrcnn_lightning.plan(module, example) for the plan that it would have"
        )
    return forward.training_plan or forward.plan


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
        return find_frontier(executor.problem(args, kwargs), executor.config)


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
    with new_mode():

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
            captured = not isinstance(error, CaptureError) or isinstance(error, UninitialisedError)
            own = None if captured else executor.own_error(args, kwargs)
            if own is not None:
                raise InputError(
                    f"{executor.where} does not take this input, row by row or plainly: {type(own).__name__}: {own}"
                ) from own
            raise type(error)(f"{executor.where}: {error}") from error
