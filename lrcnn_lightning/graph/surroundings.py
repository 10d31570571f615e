"""What a module's code may leave changed around it, and putting it back.

A trace or a rehearsal runs the module's code once more than the user has asked for, and an error may end it anywhere.
So it runs `undisturbed`, after which all of this is as it was:

    switches        grad mode, autocast, default dtype, determinism, anomaly detection, threads, kernels of cuDNN, ...
    stacks          modes of functions and of operations, transforms of ``torch.func``, levels of forward-mode
                    differentiation, hooks on what autograd saves
    tables          parameters, buffers, submodules and hooks of the module, hooks on all modules, attributes of classes
    random states   of PyTorch on the CPU and on every GPU, of generators of the module, of Python and of NumPy

A forward that leaves switches, stacks, hooks or seeds changed where it *ends* does so at every call, which a captured
graph would not do again: it is refused (`balanced`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.fx import Tracer
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, _ModuleStackTracer
from torch.nn.modules import module as of_all_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import with_data
from lrcnn_lightning.graph.saved_hooks import pop_saved_hooks, saved_hooks
from lrcnn_lightning.graph.state import random_states, same_items, set_random_states

__all__ = ["ONE_AT_A_TIME", "balanced", "is_rehearsed", "is_rehearsed_elsewhere", "undisturbed"]

ONE_AT_A_TIME = threading.RLock()
"""Held while a module's code is traced: for that time a trace changes the module, and classes of PyTorch."""


_under_way: list[int] = []
"""The thread that runs a module's code for a trace or a rehearsal, once for each that is inside of another."""


def is_rehearsed() -> bool:
    """Whether this thread runs a module's code for a trace or a rehearsal, and not because the user has called it."""
    return bool(_under_way) and threading.get_ident() in _under_way


def is_rehearsed_elsewhere() -> bool:
    """Whether another thread does. Flags of the process by which PyTorch says that it traces say nothing then."""
    return bool(_under_way) and not is_rehearsed()


class _Kept(NamedTuple):
    """One thing that is kept as it is. ``read`` makes a snapshot, equal to others of the same; ``write`` goes back."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    refused: bool = True
    """Whether a forward that has changed it cannot be captured."""


class _Items:
    """What is in a table, compared by identity."""

    def __init__(self, table: Any) -> None:
        self.content = dict(table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Items) and same_items(self.content, other.content)

    __hash__ = None  # type: ignore[assignment]


class _State:
    """The state of a generator."""

    def __init__(self, state: torch.Tensor) -> None:
        self.tensor, self.bytes = state, state.numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self.bytes == other.bytes

    __hash__ = None  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------ switches


def _pair(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (first(), second())


def _set_determinism(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _autocast(kind: str) -> _Kept:
    def write(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(kind, value[0])
        torch.set_autocast_dtype(kind, value[1])

    read = _pair(lambda: torch.is_autocast_enabled(kind), lambda: torch.get_autocast_dtype(kind))
    return _Kept(f"autocast on {kind}", read, write)


def _precision() -> str | None:
    """None where PyTorch's old and new switches of it were mixed, which it does not read."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


def _set_precision(value: str | None) -> None:
    if value is not None:
        torch.set_float32_matmul_precision(value)


_C: Any = torch._C
_SWITCHES = (
    _Kept("the grad mode", torch.is_grad_enabled, _C._set_grad_enabled),
    _Kept("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Kept(
        "torch.use_deterministic_algorithms()",
        _pair(torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled),
        _set_determinism,
    ),
    _Kept(
        "torch.autograd.set_detect_anomaly()",
        _pair(torch.is_anomaly_enabled, torch.is_anomaly_check_nan_enabled),
        lambda value: torch.set_anomaly_enabled(*value),
    ),
    _Kept("torch.set_num_threads()", torch.get_num_threads, torch.set_num_threads),
    _Kept("torch.set_float32_matmul_precision()", _precision, _set_precision),
    _autocast("cpu"),
    _autocast("cuda"),
    _Kept("the cache of autocast", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    _Kept("torch.backends.cudnn.enabled", _C._get_cudnn_enabled, _C._set_cudnn_enabled),
    _Kept("torch.backends.cudnn.benchmark", _C._get_cudnn_benchmark, _C._set_cudnn_benchmark),
    _Kept("torch.backends.cudnn.deterministic", _C._get_cudnn_deterministic, _C._set_cudnn_deterministic),
    _Kept("flash attention", _C._get_flash_sdp_enabled, _C._set_sdp_use_flash),
    _Kept("memory-efficient attention", _C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient),
    _Kept("plain attention", _C._get_math_sdp_enabled, _C._set_sdp_use_math),
)

# -------------------------------------------------------------------------------------------------------- stacks


def _undo_transforms(depth: int) -> None:
    if _functorch.get_dynamic_layer_stack_depth() > depth:
        # PyTorch 2.6 raises an error of its own when nothing is left.
        with contextlib.suppress(RuntimeError):
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _undo_levels(level: int) -> None:
    while forward_ad._current_level > level:
        forward_ad.exit_dual_level()  # type: ignore[no-untyped-call]


def _back_to(entries: Callable[[], Any], pop: Callable[[], Any], push: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Leave what was entered, and enter what was left."""

    def write(before: tuple[Any, ...]) -> None:
        present = list(entries())
        while present and tuple(map(id, present)) != tuple(map(id, before[: len(present)])):
            present.pop()
            pop()
        for entry in before[len(present) :]:
            push(entry)

    return write


def _stack(name: str, entries: Callable[[], Any], pop: Callable[[], Any], push: Callable[[Any], Any]) -> _Kept:
    return _Kept(name, lambda: tuple(entries()), _back_to(entries, pop, push))


def _undo_saved_hooks(before: tuple[Any, ...] | None) -> None:
    # How many there are PyTorch does not say.
    while (present := saved_hooks()) is not None and present != before:
        pop_saved_hooks()


_STACKS = (
    _Kept("a transform of torch.func", _functorch.get_dynamic_layer_stack_depth, _undo_transforms),
    _Kept("a level of forward-mode differentiation", lambda: forward_ad._current_level, _undo_levels),
    _stack(
        "a mode of torch functions",
        _get_current_function_mode_stack,
        *(_C._pop_torch_function_stack, _C._push_on_torch_function_stack),
    ),
    _stack("a mode of tensor operations", _get_current_dispatch_mode_stack, _pop_mode, _push_mode),
    _Kept("hooks on saved tensors", saved_hooks, _undo_saved_hooks),
)

# -------------------------------------------------------------------------------------------------------- tables

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _table(name: str, table: dict[Any, Any], refused: bool) -> _Kept:
    def write(before: _Items) -> None:
        table.clear()
        table.update(before.content)

    return _Kept(name, lambda: _Items(table), write, refused)


def _attributes(kind: type) -> _Kept:
    """The attributes of a class. That a forward changes one (a count, a warning that was given) is not seen."""

    def read() -> _Items:
        return _Items({name: value for name, value in vars(kind).items() if not name.startswith(("__annot", "_abc"))})

    def write(before: _Items) -> None:
        present = read().content
        for name in present.keys() - before.content.keys():
            delattr(kind, name)
        for name, value in before.content.items():
            if present.get(name, before) is not value:
                setattr(kind, name, value)

    return _Kept(f"the class {kind.__name__}", read, write, refused=False)


def _tables(module: nn.Module) -> Iterator[_Kept]:
    for path, child in module.named_modules():
        where = f" of {path}" if path else ""
        for name in ("_parameters", "_buffers", "_modules"):
            yield _table(f"{name[1:]}{where}", vars(child)[name], refused=False)
        for name in _HOOKS:
            if isinstance(vars(child).get(name), dict):
                yield _table(f"hooks{where}", vars(child)[name], refused=True)
    for name, table in vars(of_all_modules).items():
        if name.startswith("_global") and isinstance(table, dict):
            yield _table("hooks on all modules", table, refused=True)
    for kind in {kind for child in module.modules() for kind in type(child).__mro__ if kind is not object}:
        yield _attributes(kind)


# ------------------------------------------------------------------------------------------------- random states


def _generator(name: str, read: Callable[[], torch.Tensor], write: Callable[[torch.Tensor], Any]) -> _Kept:
    def read_state() -> _State:
        with with_data():
            return _State(read())

    def write_state(state: _State) -> None:
        with with_data():
            write(state.tensor)

    return _Kept(name, read_state, write_state)


def _random(module: nn.Module) -> Iterator[_Kept]:
    yield _generator("PyTorch's random state", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            yield _cuda_generator(device)
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Generator):
                yield _generator(f"the generator {path}{'.' if path else ''}{name}", value.get_state, value.set_state)
    # `Observation` tells of these in words of its own.
    yield _Kept("random numbers of Python and NumPy", random_states, set_random_states, refused=False)


def _cuda_generator(device: int) -> _Kept:
    return _generator(
        f"the random state of cuda:{device}",
        lambda: torch.cuda.get_rng_state(device),
        lambda state: torch.cuda.set_rng_state(state, device),
    )


# ------------------------------------------------------------------------------------------------------- contexts


def _kept(module: nn.Module) -> list[_Kept]:
    # Stacks first: what else is read and written must not go through modes and transforms that are left open.
    return [*_STACKS, *_SWITCHES, *_tables(module), *_random(module)]


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Whatever the code inside does or breaks off, everything around it is afterwards as it was.

    One thread at a time: others wait until the first is done.
    """
    with ONE_AT_A_TIME:
        before = [(kept, kept.read()) for kept in _kept(module)]
        _under_way.append(threading.get_ident())
        try:
            with _traced_alone():
                yield
        finally:
            _under_way.pop()
            for kept, value in before:
                if kept.read() != value:
                    kept.write(value)


@contextlib.contextmanager
def _traced_alone() -> Iterator[None]:
    """A tracer takes part in the calls of all modules, whoever makes them: those of other threads are not for it."""
    thread, before = threading.get_ident(), []
    for kind in (_ModuleStackTracer, PythonKeyTracer, Tracer):
        own = {name: vars(kind)[name] for name in ("call_module", "getattr") if name in vars(kind)}
        before += [(kind, name, function) for name, function in own.items()]

    def call_module(own: Any) -> Callable[..., Any]:
        def called(tracer: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return forward(*args, **kwargs)
            return own(tracer, module, forward, args, kwargs)

        return called

    def attribute(own: Any) -> Callable[..., Any]:
        def looked_up(tracer: Any, name: Any, value: Any, cache: Any) -> Any:
            return own(tracer, name, value, cache) if threading.get_ident() == thread else value

        return looked_up

    for kind, name, function in before:
        setattr(kind, name, call_module(function) if name == "call_module" else attribute(function))
    try:
        yield
    finally:
        for kind, name, function in before:
            setattr(kind, name, function)


@contextlib.contextmanager
def balanced(module: nn.Module) -> Iterator[None]:
    """Raise `CaptureError` where the code inside ends with something changed that a graph would not change again."""
    before = [(kept, kept.read()) for kept in _kept(module) if kept.refused]
    yield
    changed: list[str] = []
    for kept, value in before:
        if kept.read() != value:
            changed.append(kept.name)
            if kept in _STACKS:  # what is read after it would go through what is left open
                break
    if changed:
        raise CaptureError(
            f"its forward leaves {', '.join(changed[:3])} changed, which a captured graph would not do again; set it "
            "back before the end (a `with` block does), or do so outside of the module"
        )
