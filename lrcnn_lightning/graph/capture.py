"""Capture: a module and example inputs -> `Graph`.

The module's own code runs once, in its current train/eval state, on tensors without data (`tracing`), and what it
calls is read into the package's own data (`recorded`).  Parameters and buffers are named, never copied.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from lrcnn_lightning.errors import CaptureError, is_out_of_memory
from lrcnn_lightning.graph.functional import dependent_values, functionalise
from lrcnn_lightning.graph.graph import Graph, Ref
from lrcnn_lightning.graph.leaks import Leaks
from lrcnn_lightning.graph.prefix import with_prefix
from lrcnn_lightning.graph.reasons import reason_of
from lrcnn_lightning.graph.recorded import read
from lrcnn_lightning.graph.structure import refuse_unknown, take_apart
from lrcnn_lightning.graph.surroundings import undisturbed
from lrcnn_lightning.graph.synchronised import recorded_sync_batch_norms
from lrcnn_lightning.graph.tracing import Trace
from lrcnn_lightning.graph.views import without_aliases

__all__ = ["CUMULATIVE", "capture", "under_autocast"]

CUMULATIVE = -1.0
"""The momentum in the graph of a normalisation whose running statistics are averages over all batches so far."""


def capture(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Trace ``module(*args, **kwargs)`` into a `Graph`; nothing is computed and nothing changes.

    Random state, buffers and gradients are left alone.  Raises `CaptureError` when the module's code cannot be traced,
    for example because a branch depends on the values of a tensor.
    """
    if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        raise CaptureError("it contains a TorchScript module, which has no Python code to trace")
    _refuse_sharded(module)
    leaves, structure = take_apart((tuple(args), dict(kwargs or {})))
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    refuse_unknown(leaves, "it takes")
    names = _input_names(module, args, kwargs or {})
    leaks = Leaks()
    trace = Trace(module, leaves, structure, leaks)
    try:
        with undisturbed(module):
            recorded = _recorded(trace, [tensor for _, tensor in tensors])
            graph = read(recorded, trace, [(place, names[place]) for place, _ in tensors])
            graph = functionalise(with_prefix(without_aliases(graph)))
            del recorded
    finally:
        trace.forget()
        leaks.undo()
    if leaks.lost is not None:
        raise CaptureError(
            f"its forward puts a tensor that depends on the data into a {leaks.lost} outside of the module, which a "
            "captured graph would not do again; return it, or keep it as an attribute"
        )
    _refuse_remembered(graph, trace.memos)
    return replace(graph, outputs=graph.outputs[: len(graph.outputs) - trace.memos])


def _recorded(trace: Trace, tensors: Sequence[torch.Tensor]) -> GraphModule:
    """The trace's operations, recorded without anything around that would change or see them."""
    on_cuda = any(tensor.is_cuda for tensor in tensors)
    widened = [_is_widened(tensor) for tensor in tensors]
    try:
        with (
            _disable_current_modes(),  # whoever looks on, as a measurement does, must not see the trace
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_forgotten, _forgotten),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if on_cuda else contextlib.nullcontext(),
            _cumulative_averages(trace.module),
            recorded_sync_batch_norms(trace.module),
        ):
            return trace.run(widened)
    except CaptureError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        before = error.__context__  # a mode that the code has left open ends the trace with an error of its own
        raise before if isinstance(before, CaptureError) else reason_of(error) from error


def _forgotten(saved: object) -> Any:
    """Nothing of a trace is differentiated, and the hooks of the user, as checkpointing has them, must not see it."""


def _refuse_remembered(graph: Graph, count: int) -> None:
    """Raise if one of the last ``count`` outputs, which the code keeps for its next call, depends on the data."""
    dependent = dependent_values(graph)
    for output in graph.outputs[len(graph.outputs) - count :]:
        if isinstance(output, Ref) and output.index in dependent:
            raise CaptureError(
                f"its forward remembers {graph.values[output.index].name!r}, which depends on the data, for the next "
                "call, which a captured graph would not do; return it, or register a buffer for it"
            )


def _input_names(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """For each leaf of the arguments: the name of the parameter that it belongs to."""
    known = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    named = [(known[i] if i < len(known) else f"input {i}", arg) for i, arg in enumerate(args)]
    return [name for name, arg in (*named, *kwargs.items()) for _ in take_apart(arg)[0]]


@contextlib.contextmanager
def _cumulative_averages(module: nn.Module) -> Iterator[None]:
    """BatchNorm with ``momentum=None`` reads its count of batches in Python, which cannot be traced: for the time of
    the trace it has the momentum ``CUMULATIVE``, which the rules recognise.
    """
    changed = [
        child
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.momentum is None
    ]
    for child in changed:
        child.momentum = CUMULATIVE
    try:
        yield
    finally:
        for child in changed:
            child.momentum = None


def _refuse_sharded(module: nn.Module) -> None:
    """Raise for parameters that are in pieces on several devices, which no operation but their own puts together.

    FSDP2's ``fully_shard`` does so for the time of a call of the module that it was given, not for one inside of it.
    """
    sharded = [name for name, parameter in module.named_parameters() if _is_sharded(parameter)]
    if sharded:
        raise CaptureError(
            f"its parameters are sharded over several devices ({', '.join(sharded[:3])}"
            f"{', ...' if len(sharded) > 3 else ''}); allowed is fully_shard() of the row-wise module itself, or of "
            "modules around it, and none inside of it"
        )


def _is_sharded(parameter: torch.Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes of operations on a device; some, such as ``meta``, it does not know."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _is_widened(tensor: torch.Tensor) -> bool:
    """Whether a tensor has fewer bits than float32 while autocast chooses those that each operation reads."""
    return tensor.dtype in (torch.float16, torch.bfloat16) and under_autocast(tensor.device)
