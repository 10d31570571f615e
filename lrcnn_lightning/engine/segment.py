"""One segment as one ``torch.autograd.Function``.

Its tensor inputs are the border values, parameters and prologue values that the segment reads; its outputs the border
values that it makes. Backward returns the gradient of each input once and never writes ``.grad``, so hooks, gradient
scaling, accumulation and data-parallel reducers see ordinary autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.backward import differentiate
from lrcnn_lightning.engine.maps import Gradients
from lrcnn_lightning.engine.rows import Carries, RowLoop, run_node
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.errors import DoubleBackwardError
from lrcnn_lightning.plan.program import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    SegmentProgram,
    Sweep,
)
from lrcnn_lightning.rules import Axes, RowGraph

__all__ = ["SegmentCall", "run_segment"]


@dataclass
class _Ambient:
    """Autocast and random state at the time of the forward pass, to be the same in the backward pass."""

    autocast: list[tuple[str, torch.dtype, bool]]

    @staticmethod
    def now(kinds: set[str]) -> _Ambient:
        known = sorted(filter(torch.amp.is_autocast_available, kinds))  # of some, such as ``meta``, it knows nothing
        return _Ambient([(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in known])

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@dataclass
class SegmentCall:
    """One call of a segment: the graph, the program, its slab calls, and the whole nodes' random states."""

    graph: RowGraph
    program: SegmentProgram
    prepared: Prepared
    random: dict[int, Any] = field(default_factory=dict)


def run_segment(call: SegmentCall, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Run a segment on the tensors of ``program.inputs``; returns those of ``program.outputs``."""
    return _Segment.apply(call, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SegmentCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        program = call.program
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.ambient = _Ambient.now({tensor.device.type for tensor in tensors} | {"cpu"})
        store: dict[int, Any] = dict(zip(program.inputs, tensors, strict=True))
        carries = _run_forward(call, store, training=bool(program.backward))
        outputs = tuple(store[index] for index in program.outputs)
        ctx.mark_non_differentiable(
            *(t for index, t in zip(program.outputs, outputs, strict=True) if index not in program.differentiable)
        )
        if program.backward:
            buffers = call.graph.buffers
            kept = [_copied(store[index]) if index in buffers else store[index] for index in program.kept]
            keys, carried = [], []
            for name, table in carries.items():
                for place, slabs in table.items():
                    for value, slab in slabs.items():
                        keys.append((name, place, value))
                        carried.append(slab)
            ctx.carry_keys = keys
            ctx.dtypes = [tensor.dtype for tensor in tensors]
            ctx.save_for_backward(*kept, *carried)
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Any, ...]:
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = _run_backward(ctx, output_gradients)
        if twice:
            present = [gradient for gradient in gradients if gradient is not None]
            history = [gradient for gradient in output_gradients if gradient is not None]
            sealed = iter(_OnceDifferentiable.apply(len(present), *present, *history))  # type: ignore[no-untyped-call]
            gradients = tuple(None if gradient is None else next(sealed) for gradient in gradients)
        return (None, *gradients)


def _copied(buffer: Tensor) -> Tensor:
    """A buffer, or a view of one, as it is now: another call in between may move the running statistics on.

    Expanded dimensions stay so.
    """
    compact = buffer.detach()
    for dimension, stride in enumerate(buffer.stride()):
        compact = compact.narrow(dimension, 0, 1) if stride == 0 and buffer.shape[dimension] > 1 else compact
    return compact.clone().expand(buffer.shape)


def _run_forward(call: SegmentCall, store: dict[int, Any], training: bool) -> dict[str, Carries]:
    graph = call.graph
    rows = RowLoop(call.prepared, store)
    carries: dict[str, Carries] = {}
    for step in call.program.forward:
        if isinstance(step, RunRows):
            with torch.autograd.profiler.record_function(f"lrcnn {step.loop.name}"):
                kept = rows.forward(step.loop, step.kept_carries)
            if step.kept_carries:
                carries[step.loop.name] = kept
        elif isinstance(step, (RunWhole, Effect)):
            node = graph.nodes[step.node]
            if training and _is_random(node.op):
                call.random[step.node] = _random_state(store, node.inputs)
            store.update(zip(node.outputs, run_node(node, store), strict=True))
        elif isinstance(step, Free):
            store.pop(step.value, None)
    return carries


def _run_backward(ctx: Any, output_gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    call: SegmentCall = ctx.call
    program, graph = call.program, call.graph
    saved = list(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()  # unless the graph is retained: what is freed below is then really free
    borders = len(program.kept)
    store: dict[int, Any] = dict(zip(program.kept, saved[:borders], strict=True))
    carries: dict[str, Carries] = {}
    for (name, place, value), slab in zip(ctx.carry_keys, saved[borders:], strict=True):
        carries.setdefault(name, {}).setdefault(place, {})[value] = slab
    del saved
    gradients = Gradients(lambda index: graph.values[index].shape, lambda index: graph.axes.get(index, Axes()))
    for index, given in zip(program.outputs, output_gradients, strict=True):
        if given is not None:
            gradients.lend(index, given)
    del output_gradients
    rows = RowLoop(call.prepared, store)
    with ctx.ambient.restored():
        for step in program.backward:
            if isinstance(step, BackwardRows):
                with torch.autograd.profiler.record_function(f"lrcnn {step.run.loop.name}"):
                    kept_carries = carries.get(step.carries or "", {})
                    differentiate(call.prepared, store, step.run, kept_carries, gradients, step.drops)
            elif isinstance(step, RunRows):
                rows.forward(step.loop)
            elif isinstance(step, Sweep):
                carries[step.loop.name] = rows.sweep(step.loop)
            elif isinstance(step, BackwardWhole):
                _backward_whole(call, step.node, store, gradients)
            elif isinstance(step, Free):
                store.pop(step.value, None)
            elif isinstance(step, FreeGradient):
                gradients.pop(step.value)
    results: list[Tensor | None] = []
    for position, index in enumerate(program.inputs):
        gradient = gradients.pop(index) if ctx.needs_input_grad[1 + position] else None
        if gradient is not None and gradient.dtype != ctx.dtypes[position]:
            gradient = gradient.to(ctx.dtypes[position])
        results.append(gradient)
    return tuple(results)


def _backward_whole(call: SegmentCall, position: int, store: dict[int, Any], gradients: Gradients) -> None:
    """Differentiate a node on full tensors: run it again under autograd, with the same random numbers."""
    node = call.graph.nodes[position]
    given = [gradients.get(output) for output in node.outputs]
    if all(gradient is None for gradient in given):
        return
    leaves: dict[int, Any] = {}
    for index in node.inputs:
        tensor = store[index].detach()
        leaves[index] = tensor.requires_grad_() if index in call.program.differentiable else tensor
    state = call.random.get(position)
    with _replayed(state), torch.enable_grad():
        outputs = run_node(node, leaves)
    roots = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
    wanted = [index for index in node.inputs if leaves[index].requires_grad]
    if not roots or not wanted:
        return
    found = torch.autograd.grad(
        [root for root, _ in roots],
        [leaves[index] for index in wanted],
        [seed.to(root.dtype) for root, seed in roots],
        allow_unused=True,
    )
    for index, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            gradients.add(index, gradient)


def _is_random(operation: Any) -> bool:
    return isinstance(operation, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in operation.tags


def _random_state(store: dict[int, Any], inputs: tuple[int, ...]) -> Any:
    devices = {store[index].device for index in inputs if store[index].is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


@contextlib.contextmanager
def _replayed(state: Any) -> Iterator[None]:
    """Random numbers from a state, and afterwards from where they were."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=list(state[1])):
        torch.set_rng_state(state[0])
        for device, device_state in state[1].items():
            torch.cuda.set_rng_state(device_state, device)
        yield


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients whose own gradient is refused, with an error that says so."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        raise DoubleBackwardError(
            "a gradient of a gradient was asked for (create_graph=True and then backward) through a row-wise module; "
            "row-wise backward can be differentiated once. Run this module plainly: leave it out of `modules`, or call "
            "`lrcnn_lightning.restore(module)`"
        )
