"""Hooks of submodules: run as in plain PyTorch, on full maps, between rows.

    with hooks on `layer1`                          in the graph
    ----------------------                          ------------
    h = stem(x)                                     h  = stem(x)
    y = layer1(h)                                   h' = enter(h)            pre-hooks; backward hooks
                                                    y  = layer1's code(h')
    z = layer2(y)                                   y' = leave(h', y)        forward hooks; backward hooks
                                                    z  = layer2(y')

``enter`` and ``leave`` run whole, under ordinary autograd and once a step, so that a hook may look at a map, keep it
for a loss, return another one, or register a hook on the tensor.  What they read and return is kept.
"""

from __future__ import annotations

import contextlib
import dis
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import current_mode, is_fake
from lrcnn_lightning.graph.live import stand_in
from lrcnn_lightning.graph.recorder import record_call, unrecorded
from lrcnn_lightning.graph.structure import CONSTANTS, Structure, take_apart

__all__ = ["HOOK_TABLES", "HookCall", "computes_weight", "recorded_hooks"]

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def computes_weight(hook: object) -> bool:
    """Whether a hook is one of PyTorch's own that compute a weight (old-style weight norm, pruning)."""
    kind = type(hook).__module__ if getattr(hook, "__module__", None) is None else hook.__module__
    return kind.startswith("torch.nn.utils.") or type(hook).__module__.startswith("torch.nn.utils.")


def _own_hooks(module: nn.Module, table: str) -> list[tuple[int, Callable[..., Any]]]:
    """The hooks of a module that are no part of its computation, by their numbers."""
    return [(number, hook) for number, hook in vars(module)[table].items() if not computes_weight(hook)]


@dataclass
class _Calls:
    """What ``enter`` hands to ``leave``, in one call of the module."""

    backward: BackwardHook | None = None


@dataclass(frozen=True, eq=False)
class HookCall:
    """The hooks of a submodule at its entrance or its exit, as an operation on the tensors of its arguments.

    ``leaves`` are those of ``(args, kwargs)``, and at the exit of ``(args, kwargs, result)``; those at ``tensors`` are
    given. Of these, the ones at ``results`` are returned, as the hooks leave them.
    """

    module: nn.Module
    path: str
    at_exit: bool
    leaves: tuple[Any, ...]
    structure: Structure
    tensors: tuple[int, ...]
    results: tuple[int, ...]
    calls: _Calls = field(default_factory=_Calls)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves: list[Any] = list(self.leaves)
        for place, tensor in zip(self.tensors, tensors, strict=True):
            leaves[place] = tensor
        if any(map(is_fake, tensors)):  # hooks are not for tensors without data: the planner tries operations on them
            return tuple(leaves[place] for place in self.results)
        tree = self.structure.put_together(leaves)
        tree = self._leave(*tree) if self.at_exit else self._enter(*tree)
        returned, structure = take_apart(tree)
        for place in self.results:
            before, after = leaves[place], returned[place] if structure == self.structure else None
            if not isinstance(after, Tensor) or after.shape != before.shape:
                raise CaptureError(
                    f"a hook of {self.path!r} returns something of another shape or structure than it was given, which "
                    "row-wise modules cannot follow; allowed are tensors of the same shapes, or None"
                )
        return tuple(returned[place] for place in self.results)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        for number, hook in _own_hooks(module, "_forward_pre_hooks"):
            if number in module._forward_pre_hooks_with_kwargs:
                changed = hook(module, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = hook(module, args)
                if changed is not None:
                    args = changed if isinstance(changed, tuple) else (changed,)
        full, _ = module._get_backward_hooks()  # type: ignore[no-untyped-call]
        before = module._get_backward_pre_hooks()  # type: ignore[no-untyped-call]
        self.calls.backward = BackwardHook(module, full, before) if full or before else None
        if self.calls.backward is not None:
            args = self.calls.backward.setup_input_hook(args)  # type: ignore[no-untyped-call]
        return args, kwargs

    def _leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        module = self.module
        for number, hook in _own_hooks(module, "_forward_hooks"):
            named = number in module._forward_hooks_with_kwargs
            changed = hook(module, args, kwargs, result) if named else hook(module, args, result)
            result = result if changed is None else changed
        if self.calls.backward is not None:
            result = self.calls.backward.setup_output_hook(result)  # type: ignore[no-untyped-call]
        return args, kwargs, result

    @property
    def __name__(self) -> str:
        return f"hooks_at_{'exit' if self.at_exit else 'entrance'}"

    def __str__(self) -> str:
        return f"hooks at the {'exit' if self.at_exit else 'entrance'} of {self.path}"

    __repr__ = __str__


@contextlib.contextmanager
def recorded_hooks(root: nn.Module) -> Iterator[None]:
    """Let the trace that is running record the hooks of submodules instead of running them."""
    with contextlib.ExitStack() as stack:
        for path, module in root.named_modules():
            if path and any(_own_hooks(module, table) for table in HOOK_TABLES):
                stack.enter_context(_recorded(module, path))
        yield


@contextlib.contextmanager
def _recorded(module: nn.Module, path: str) -> Iterator[None]:
    """Let one module's hooks be recorded: for the time of the trace, its tables have others in their place."""
    if _own_hooks(module, "_backward_hooks") and not module._is_full_backward_hook:
        raise CaptureError(
            f"{path!r} has a hook of register_backward_hook(), which PyTorch has deprecated; use "
            "register_full_backward_hook()"
        )
    tables = {name: vars(module)[name] for name in HOOK_TABLES}
    backward = any(_own_hooks(module, name) for name in ("_backward_hooks", "_backward_pre_hooks"))
    at_entrance = backward or bool(_own_hooks(module, "_forward_pre_hooks"))
    at_exit = backward or bool(_own_hooks(module, "_forward_hooks"))
    read = any(_reads_arguments(hook) for _, hook in _own_hooks(module, "_forward_hooks"))
    calls = _Calls()

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _record(HookCall, module, path, False, (args, kwargs), len(take_apart((args, kwargs))[0]), True, calls)

    def leave(_: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        tree = (args, kwargs, result)
        return _record(HookCall, module, path, True, tree, len(take_apart(result)[0]), read, calls)[2]

    for name, table in tables.items():
        kept = ((number, hook) for number, hook in table.items() if computes_weight(hook))
        vars(module)[name] = OrderedDict(kept)
    handles = []
    if at_entrance:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    if at_exit:
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        vars(module).update(tables)


def _record(
    kind: type[HookCall],
    module: nn.Module,
    path: str,
    at_exit: bool,
    tree: tuple[Any, ...],
    last: int,
    arguments: bool,
    calls: _Calls,
) -> Any:
    """Record a call, whose results are the tensors among the ``last`` leaves of ``tree``; returns the tree with these.

    Without ``arguments`` the hooks do not look at the others, which need not exist then.
    """
    leaves, structure = take_apart(tree)
    for leaf in leaves:
        if not isinstance(leaf, (*CONSTANTS, Tensor)):
            raise CaptureError(f"{path!r} has hooks, and takes or returns an object of type {type(leaf).__name__}")
    first = len(leaves) - last
    results = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and place >= first]
    taken = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (arguments or place >= first)]
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    call = kind(module, path, at_exit, constants, structure, tuple(taken), tuple(results), calls)
    mode = current_mode()
    assert mode is not None
    with unrecorded():
        fresh = tuple(stand_in(leaves[place], mode) for place in results)
    record_call(call, [leaves[place] for place in taken], fresh)
    for place, tensor in zip(results, fresh, strict=True):
        leaves[place] = tensor
    return structure.put_together(leaves)


def _reads_arguments(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook looks at the arguments of its module, as far as its code tells."""
    position = 1
    while isinstance(hook, (MethodType, partial)):
        if isinstance(hook, partial):
            if hook.args or hook.keywords:
                return True
            hook = hook.func
        else:
            position += 1
            hook = hook.__func__
    if not isinstance(hook, FunctionType):
        return True
    code = hook.__code__
    if code.co_argcount <= position or {"locals", "eval", "exec", "vars"} & set(code.co_names):
        return True
    name = code.co_varnames[position]
    if name in code.co_cellvars:
        return True
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if "LOAD_FAST" in instruction.opname and (value == name or (isinstance(value, tuple) and name in value)):
            return True
    return False
