"""The graphs of a module: which of them serves a call, and what they depend on.

A graph depends on the shapes of the tensors, on the arguments that are no tensors, on what the module is made of, and
on what its code read of Python (`graph.guards`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lrcnn_lightning.graph import Structure, processes, under_autocast
from lrcnn_lightning.rules import RowGraph

__all__ = ["CACHED", "Captures", "device_of", "put_back"]

CACHED = 16
"""Graphs and plans remembered a module: multi-scale training has a handful of shapes; more are captured again."""

_OFTEN = 4
"""Graphs for alike calls after which something must change with every call."""


class Captures:
    """The graphs of one module, the latest used last."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphs: list[tuple[Any, RowGraph]] = []

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[RowGraph]:
        return (graph for _, graph in self._graphs)

    def find(self, inputs: Sequence[Any], structure: Structure) -> tuple[RowGraph | None, str | None]:
        """The graph that serves a call with these leaves of arguments; or else, if calls that are alike are captured
        over and over, what changes.
        """
        key = self._key(inputs, structure)
        broken = None
        for known, graph in self._graphs:
            if known != key:
                continue
            broken = graph.graph.guards.broken()
            if broken is None:
                self._graphs.remove((known, graph))
                self._graphs.append((known, graph))
                return graph, None
        if broken is not None:
            value = getattr(broken.module, broken.name, None)
            cause = f"its forward reads {broken.name!r} of {type(broken.module).__name__}, which is now {value!r}"
            count = sum(known == key for known, _ in self._graphs)
        else:
            others = {known[1] for known, _ in self._graphs if known[0] == key[0]}
            cause = f"its arguments that are no tensors are now {list(key[1])}"
            count = 0 if key[1] in others else len(others)
        return None, cause if count == _OFTEN else None

    def remember(self, inputs: Sequence[Any], structure: Structure, graph: RowGraph) -> RowGraph:
        """Keep the graph for calls like this one."""
        self._graphs = [*self._graphs[1 - CACHED :], (self._key(inputs, structure), graph)]
        return graph

    def _key(self, inputs: Sequence[Any], structure: Structure) -> tuple[Any, ...]:
        tensors = tuple(_metadata(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor))
        others = tuple(_metadata(leaf) for leaf in inputs if not isinstance(leaf, torch.Tensor))
        return (tensors, others, structure, under_autocast(device_of(inputs)), processes(), *_parts(self.module))


def _parts(module: nn.Module) -> Iterator[Any]:
    """Of what a module is made: its submodules, their parameters and buffers, and hooks that may change what they
    return or compute a weight. The numbers of hooks are never used twice; ids are of modules that are alive.
    """
    for child in module.modules():
        yield id(child), type(child)
        for tables in (child._parameters, child._buffers):
            yield tuple((name, None if t is None else (t.shape, t.dtype, t.device)) for name, t in tables.items())
        hooks = (vars(child)[name].items() for name in _HOOKS)
        yield tuple(k for table in hooks for k, hook in table if child is not module or _computes_weight(hook))


def device_of(inputs: Iterable[Any]) -> torch.device:
    return next((leaf.device for leaf in inputs if isinstance(leaf, torch.Tensor)), torch.device("cpu"))


def _metadata(leaf: Any) -> Any:
    """What capture depends on, of one argument."""
    if isinstance(leaf, torch.Tensor):
        # On a GPU the memory that operations take depends on the memory format.
        last = leaf.device.type != "cpu" and leaf.dim() > 3 and leaf.stride(1) == 1
        return tuple(leaf.shape), leaf.dtype, leaf.device, last
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return leaf


def _computes_weight(hook: object) -> bool:
    """Whether a hook is one of PyTorch's own that compute a weight (old-style weight norm, pruning)."""
    return type(hook).__module__.startswith("torch.nn.utils.")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def put_back(module: nn.Module, previous: Callable[..., Any] | None) -> Iterator[None]:
    """The module with its own forward and without its own hooks, for the time of the capture.

    Hooks on the module itself run around every call, outside of the graph; tracing must not run them as well. Those
    by which PyTorch computes a weight (old-style weight norm, pruning) stay: they are part of the computation.
    """
    present = module.__dict__.pop("forward", None)
    if previous is not None:
        module.__dict__["forward"] = previous
    hooks = {name: module.__dict__[name] for name in _HOOKS}
    for name, table in hooks.items():
        kept = ((k, hook) for k, hook in table.items() if _computes_weight(hook))
        module.__dict__[name] = OrderedDict(kept)
    try:
        yield
    finally:
        module.__dict__.update(hooks)
        module.__dict__.pop("forward", None)
        if present is not None:
            module.__dict__["forward"] = present
