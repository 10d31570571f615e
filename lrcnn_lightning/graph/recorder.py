"""The recorder: PyTorch's tracer (``torch.fx.experimental.proxy_tensor``), as far as the package speaks to it itself.

While a module's code is traced, each tensor without data is known to the tracer as the result of a recorded node.  An
operation of the package's own is recorded by hand: a node is added, and its results are made known as this node's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

__all__ = ["forget", "record_attribute", "record_call", "recorded", "recorded_graph", "root", "unrecorded"]


def recorded(function: Callable[..., Any], *examples: Tensor) -> GraphModule:
    """What a function of tensors without data calls, before autograd takes operations apart."""
    return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*examples)


def forget(program: GraphModule, root: nn.Module | None) -> None:
    """Let go of the tensors that a recorded program and what it was recorded on refer to."""
    for node in program.graph.nodes:
        node.meta.clear()
    for module in (program, root):
        if module is not None:
            for table in (vars(module), module._parameters, module._buffers):
                for name in [name for name, value in table.items() if isinstance(value, Tensor)]:
                    del table[name]


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """A context in which operations are neither recorded nor seen by modes of functions."""
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        yield


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None, "nothing is being traced"
    return mode.tracer


def root() -> nn.Module:
    """What the trace that is running keeps its attributes on."""
    module: nn.Module = _tracer().root
    return module


def recorded_graph() -> Graph:
    """The nodes recorded so far."""
    graph: Graph = _tracer().graph
    return graph


def record_call(call: Callable[..., Any], operands: Sequence[Tensor], results: tuple[Tensor, ...]) -> None:
    """Record that ``call`` makes ``results`` of ``operands``."""
    tracer = _tracer()
    proxy = tracer.create_proxy("call_function", call, tuple(map(tracer.unwrap_proxy, operands)), {})
    track_tensor_tree(results, proxy, constant=None, tracer=tracer)


def record_attribute(name: str, tensor: Tensor) -> None:
    """Record that ``tensor`` is the attribute ``name`` of the trace."""
    tracer = _tracer()
    setattr(tracer.root, name, tensor)
    track_tensor_tree(tensor, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer)
