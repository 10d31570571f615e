"""Capture: a module and example inputs -> `Graph`.

``torch.export`` traces the module in its current train/eval state into ATen operations; this file turns the result
into the package's own data.  Context managers inside the module's code (``no_grad``, ``autocast``) come out as nested
graphs and are written inline, with the switch noted on each node.  Parameters and buffers are named, never copied.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import current_mode, new_mode
from lrcnn_lightning.graph.exported import Reader, Results
from lrcnn_lightning.graph.functional import dependent_values, functionalise
from lrcnn_lightning.graph.grad_mode import GradMode
from lrcnn_lightning.graph.graph import Graph, Ref
from lrcnn_lightning.graph.leaks import Leaks
from lrcnn_lightning.graph.opaque import refused_gradients
from lrcnn_lightning.graph.structure import Structure, take_apart
from lrcnn_lightning.graph.synchronised import recorded_sync_batch_norms

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
    devices = [tensor.device for _, tensor in tensors if tensor.is_cuda]
    _refuse_unknown(leaves, "it takes")
    names = _input_names(module, args, kwargs or {})
    places = [(place, names[place]) for place, _ in tensors]
    widened = [_is_widened(tensor) for _, tensor in tensors]
    leaks = Leaks()
    try:
        return _captured(module, leaves, structure, places, widened, devices, leaks)
    finally:
        leaks.undo()


def _captured(
    module: nn.Module,
    leaves: Sequence[Any],
    structure: Structure,
    places: Sequence[tuple[int, str]],
    widened: Sequence[bool],
    devices: Sequence[torch.device],
    leaks: Leaks,
) -> Graph:
    results = Results(module, leaks)
    traced = _Around(module) if isinstance(module, GraphModule) else module
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_forgotten, _forgotten),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if devices else torch.autocast("cpu", enabled=False),
            _cumulative_averages(module),
            recorded_sync_batch_norms(module),
            _quietly(),
        ):
            tensors = [leaves[place] for place, _ in places]
            examples = tuple(_example(tensor, wide) for tensor, wide in zip(tensors, widened, strict=True))
            with _of_tensors_alone(traced, leaves, structure, results):
                program = torch.export.export(traced, examples, strict=False)
    except (torch.OutOfMemoryError, CaptureError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CaptureError(f"{type(error).__name__}: {reason[0] if reason else 'no message'}") from error
    prefix = "" if traced is module else "inner"
    graph = functionalise(Reader(program, places, results, prefix).graph())
    _refuse_remembered(graph, results.memos)
    return replace(graph, outputs=graph.outputs[: len(graph.outputs) - results.memos])


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


_KNOWN = (type(None), bool, int, float, complex, str, bytes, slice, enum.Enum, torch.Tensor, torch.dtype, torch.device)


def _refuse_unknown(leaves: Sequence[Any], what: str) -> None:
    """An object of another kind could hide tensors, which a trace would freeze."""
    for leaf in leaves:
        if not isinstance(leaf, _KNOWN):
            raise CaptureError(
                f"{what} an object of type {type(leaf).__name__}; allowed are tensors, numbers, strings and None, in "
                "lists, tuples, dicts, dataclasses and whatever is registered with torch.utils._pytree"
            )


class _Around(nn.Module):
    """A module around a `GraphModule`, whose graph the trace would run without a look at its ``forward``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@contextlib.contextmanager
def _of_tensors_alone(
    module: nn.Module, leaves: Sequence[Any], structure: Structure, results: Results
) -> Iterator[None]:
    """The module as a function of its tensor arguments that returns a list of tensors: all that a trace has to know.

    Other arguments are as given, and containers of any kind stay outside of it.
    """
    own = module.forward
    present = module.__dict__.get("forward")

    def forward(*tensors: torch.Tensor) -> list[torch.Tensor]:
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = structure.put_together(filled)
        own_output = contextlib.redirect_stderr(results.stderr)
        with own_output, results.observation.observed(), results.leaks, refused_gradients(), GradMode():
            returned = own(*args, **kwargs)
        results.leaves, results.structure = take_apart(returned)
        _refuse_unknown(results.leaves, "it returns")
        results.leaves += [*results.observation.written, *results.observation.memos]
        results.memos = len(results.observation.memos)
        return [leaf for leaf in results.leaves if isinstance(leaf, torch.Tensor)]

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if present is not None:
            module.__dict__["forward"] = present


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


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the partial graphs that a failing trace prints to ``stderr``; the error says what is wrong."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


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


def _example(tensor: torch.Tensor, widened: bool) -> torch.Tensor:
    """A stand-in with the metadata of ``tensor`` and no history (the trace reads shapes only).

    The trace runs without autocast, where a map that autocast has made does not fit the module's parameters: it stands
    in as float32, without data.
    """
    if widened:
        shape, strides, device = tensor.shape, tensor.stride(), tensor.device
        with current_mode() or new_mode():
            made = torch.empty_strided(shape, strides, dtype=torch.float32, device=device)
        return made.requires_grad_(tensor.requires_grad)
    if tensor.is_inference():  # the trace refuses these; only their metadata matters
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return tensor.detach().requires_grad_(tensor.requires_grad)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes of operations on a device; some, such as ``meta``, it does not know."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _is_widened(tensor: torch.Tensor) -> bool:
    """Whether a tensor has fewer bits than float32 while autocast chooses those that each operation reads."""
    return tensor.dtype in (torch.float16, torch.bfloat16) and under_autocast(tensor.device)
