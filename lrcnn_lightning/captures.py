"""The graphs of a module: which of them serves a call, and what they depend on.

A graph depends on the shapes and layouts of the tensors, on the arguments that are no tensors, on what the module is
made of, and on what its code read of Python (`graph.guards`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lrcnn_lightning.errors import UninitialisedError
from lrcnn_lightning.graph import HOOK_TABLES, Structure, computes_weight, marks_of, processes, under_autocast
from lrcnn_lightning.recent import Recent
from lrcnn_lightning.rules import RowGraph

__all__ = ["LEAST", "MOST_NODES", "Captures", "device_of", "without_hooks"]

MOST_NODES = 20_000
"""Nodes, together, of the graphs that are remembered of a module: about 200 MB. Training at many sizes has a graph for
each of them: of ResNet-50 sixty are remembered."""

LEAST = 16
"""Graphs and plans that are remembered, however large they are."""

_NAMED = 3
"""Tensors that a message names at most."""

_OFTEN = 4
"""Graphs for alike calls after which something must change with every call."""


class Captures:
    """The graphs of one module, the latest used last."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphs: Recent[RowGraph, Any] = Recent(MOST_NODES, LEAST)
        """What each depends on."""

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[RowGraph]:
        return iter(self._graphs)

    def find(self, inputs: Sequence[Any], structure: Structure) -> tuple[RowGraph | None, str | None]:
        """The graph that serves a call with these leaves of arguments; or else, if calls that are alike are captured
        over and over, what changes.
        """
        key = self._key(inputs, structure)
        broken = None
        alike = [graph for graph, other in self._graphs.items() if other == key]
        for graph in alike:
            broken = graph.graph.guards.broken()
            if broken is None:
                self._graphs.get(graph)
                return graph, None
        if broken is not None:
            value = getattr(broken.module, broken.name, None)
            cause = f"its forward reads {broken.name!r} of {type(broken.module).__name__}, which is now {value!r}"
            count = len(alike)
        else:
            others = {other[1] for other in self._graphs.values() if other[0] == key[0]}
            cause = f"its arguments that are no tensors are now {list(key[1])}"
            count = 0 if key[1] in others else len(others)
        return None, cause if count == _OFTEN else None

    def remember(self, inputs: Sequence[Any], structure: Structure, graph: RowGraph) -> RowGraph:
        """Keep the graph for calls like this one."""
        self._graphs.put(graph, self._key(inputs, structure), len(graph.nodes))
        return graph

    def _key(self, inputs: Sequence[Any], structure: Structure) -> tuple[Any, ...]:
        tensors = tuple(
            (_metadata(leaf), *sorted(marks_of(leaf).items(), key=repr))
            for leaf in inputs
            if isinstance(leaf, torch.Tensor)
        )
        others = tuple(_metadata(leaf) for leaf in inputs if not isinstance(leaf, torch.Tensor))
        return (tensors, others, structure, under_autocast(device_of(inputs)), processes(), *_parts(self.module))


def _parts(module: nn.Module) -> Iterator[Any]:
    """Of what a module is made: its submodules, their parameters and buffers, and hooks that may change what they
    return or compute a weight. The numbers of hooks are never used twice; ids are of modules that are alive.

    Raises `UninitialisedError` for lazy layers before their first call.
    """
    for child in module.modules():
        yield id(child), type(child)
        for tables in (child._parameters, child._buffers):
            if any(tensor is not None and is_lazy(tensor) for tensor in tables.values()):
                raise UninitialisedError(_shapeless(module))
            yield tuple((name, None if t is None else _metadata(t)) for name, t in tables.items())
        hooks = (vars(child)[name].items() for name in HOOK_TABLES)
        yield tuple(k for table in hooks for k, hook in table if child is not module or computes_weight(hook))


def _shapeless(module: nn.Module) -> str:
    tensors = (*module.named_parameters(), *module.named_buffers())
    names = [name for name, tensor in tensors if is_lazy(tensor)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"its lazy layers have no shapes yet ({', '.join(names[:_NAMED])}{more}); call it once with an input such as "
        "it will be given, which initialises them"
    )


def device_of(inputs: Iterable[Any]) -> torch.device:
    return next((leaf.device for leaf in inputs if isinstance(leaf, torch.Tensor)), torch.device("cpu"))


def _metadata(leaf: Any) -> Any:
    """What capture depends on, of one argument."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device, _is_channels_last(leaf)
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return leaf


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether convolutions take a tensor for one in that layout, and give their results the same."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    known = tensor.dim() in formats and not tensor.is_contiguous()
    return known and tensor.is_contiguous(memory_format=formats[tensor.dim()])


@contextlib.contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The module without its own hooks, for the time of a capture.

    Hooks on the module itself run around every call, outside of the graph; tracing must not run them as well. Those
    by which PyTorch computes a weight (old-style weight norm, pruning) stay: they are part of the computation.
    """
    hooks = {name: module.__dict__[name] for name in HOOK_TABLES}
    for name, table in hooks.items():
        kept = ((k, hook) for k, hook in table.items() if computes_weight(hook))
        module.__dict__[name] = OrderedDict(kept)
    try:
        yield
    finally:
        module.__dict__.update(hooks)
