"""One segment as one ``torch.autograd.Function``.

Its tensor inputs are the border values, parameters and prologue values that the segment reads; its outputs the border
values that it makes. Backward returns the gradient of each input once and never writes ``.grad``, so hooks, gradient
scaling, accumulation and data-parallel reducers see ordinary autograd.

Its gradients are a function of its inputs and of the gradients of its outputs. Where that is to be differentiated
(``create_graph=True``), it is a ``Function`` as well, whose backward runs the segment plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.engine.backward import as_now, differentiate
from lrcnn_lightning.engine.maps import Gradients
from lrcnn_lightning.engine.record import (
    Ambient,
    CallRecord,
    SegmentCall,
    replayed,
    run_forward,
    run_plainly,
)
from lrcnn_lightning.engine.rows import Carries, RowLoop, run_node
from lrcnn_lightning.errors import DoubleBackwardError
from lrcnn_lightning.planning.steps import (
    BackwardRows,
    BackwardWhole,
    Free,
    FreeGradient,
    RunRows,
    Segment,
    Sweep,
)
from lrcnn_lightning.rules import Axes

__all__ = ["CHANGED_ARGUMENT", "CHANGED_MAP", "INTACT", "SECOND_DERIVATIVE", "run_segment"]

CHANGED_MAP = "a map that was returned has been changed"
CHANGED_ARGUMENT = "an argument has been changed"
INTACT = "nothing that is kept has been changed"
SECOND_DERIVATIVE = "a gradient is differentiated"
"""What a backward pass tells of; `INTACT` is no news."""

Tell = Callable[[str], None]
_Gradients = tuple[Tensor | None, ...]


def run_segment(
    call: SegmentCall, tensors: list[Tensor], record: CallRecord | None = None, tell: Tell = lambda event: None
) -> tuple[Tensor, ...]:
    """Run a segment on the tensors of ``program.inputs``; returns those of ``program.outputs``.

    ``tell`` is told of a backward pass that takes more than was planned: `CHANGED_MAP`, `SECOND_DERIVATIVE`.
    """
    return _Segment.apply(call, record or CallRecord(), tell, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SegmentCall, record: CallRecord, tell: Tell, *tensors: Tensor) -> tuple[Tensor, ...]:
        program = call.program
        ctx.set_materialize_grads(False)
        ctx.call, ctx.record, ctx.tell = call, record, tell
        ctx.ambient = Ambient.now({tensor.device.type for tensor in tensors} | {"cpu"})
        store: dict[int, Any] = dict(zip(program.inputs, tensors, strict=True))
        if program.backward:
            record.note(call, store)
        carries = run_forward(call, store)
        store.update({index: _as_result(store[index], store, program) for index in program.outputs})
        outputs = tuple(store[index] for index in program.outputs)
        ctx.mark_non_differentiable(
            *(t for index, t in zip(program.outputs, outputs, strict=True) if index not in program.differentiable)
        )
        if program.backward:
            buffers = call.graph.buffers
            kept = [_copied(store[index]) if index in buffers else store[index] for index in program.kept]
            ctx.carry_keys = [key for key, _ in _slabs(carries)]
            ctx.dtypes = [tensor.dtype for tensor in tensors]
            ctx.save_for_backward(*kept, *(slab for _, slab in _slabs(carries)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Any, ...]:
        kept, carries, later = _kept(ctx)
        job = _Job(ctx.call, ctx.ambient, ctx.tell, ctx.needs_input_grad[3:], ctx.dtypes, later=later)
        transformed = any(map(_is_of_a_transform, output_gradients))
        if not torch.is_grad_enabled() and not transformed:
            return (None, None, None, *_run_backward(job, kept, carries, output_gradients))
        sources = _sources(ctx, kept)
        if sources is None:
            with torch.no_grad():
                gradients = _run_backward(job, kept, carries, output_gradients)
            return (None, None, None, *_sealed(gradients))
        if transformed:  # tensors of the transform: not for rows
            return (None, None, None, *_plain_gradients(job, sources, output_gradients, torch.is_grad_enabled()))
        given = [gradient for gradient in output_gradients if gradient is not None]
        job.present = tuple(gradient is not None for gradient in output_gradients)
        job.read = tuple(sources)
        job.run = lambda gradients: _run_backward(job, kept, carries, gradients)
        results = _Differentiated.apply(job, *sources.values(), *given)  # type: ignore[no-untyped-call]
        return (None, None, None, *results)


@dataclass
class _Job:
    """A backward pass of a segment: which gradients are wanted, in which dtypes, and of what."""

    call: SegmentCall
    ambient: Ambient
    tell: Tell
    wanted: Sequence[bool]
    dtypes: Sequence[torch.dtype]
    read: tuple[int, ...] = ()
    """The inputs of the segment that its gradients depend on."""
    present: tuple[bool, ...] = ()
    """Which of the outputs have a gradient."""
    run: Callable[[_Gradients], _Gradients] | None = None
    later: Mapping[int, Tensor] = field(default_factory=dict)
    """Weights whose data a later call has changed, as they are now."""


class _Differentiated(torch.autograd.Function):
    """The gradients of a segment's inputs, from these and the gradients of its outputs."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> _Gradients:
        ctx.set_materialize_grads(False)
        ctx.job = job
        ctx.save_for_backward(*tensors)
        assert job.run is not None
        gradients = job.run(_scattered(job.present, tensors[len(job.read) :]))
        job.run = None
        return gradients

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        job: _Job = ctx.job
        job.tell(SECOND_DERIVATIVE)
        higher = torch.is_grad_enabled()
        made = [
            tensor.view_as(tensor) if higher else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        ctx.maybe_clear_saved_tensors()
        count = len(job.read)
        sources = dict(zip(job.read, made[:count], strict=True))
        firsts = _plain_gradients(job, sources, _scattered(job.present, made[count:]), True)
        with torch.enable_grad():
            pairs = [(f, s) for f, s in zip(firsts, seconds, strict=True) if f is not None and s is not None]
            roots = [(first, second) for first, second in pairs if first.requires_grad]
            wanted = [tensor for tensor in made if tensor.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [first for first, _ in roots],
                    wanted,
                    [second for _, second in roots],
                    allow_unused=True,
                    create_graph=higher,
                )
                if roots and wanted
                else [None] * len(wanted)
            )
        return (None, *(next(found) if tensor.requires_grad else None for tensor in made))


def _plain_gradients(job: _Job, sources: dict[int, Tensor], output_gradients: _Gradients, graph: bool) -> _Gradients:
    """The gradients of the segment's inputs by running it plainly; with ``graph`` they can be differentiated."""
    call = job.call
    program = call.program
    with torch.enable_grad(), job.ambient.restored():
        wanted = [i for i, w in zip(program.inputs, job.wanted, strict=True) if w and i in sources]
        store: dict[int, Any] = {i: t if t.requires_grad or i not in wanted else _leaf(t) for i, t in sources.items()}
        leaves = [store[index] for index in wanted]
        run_plainly(call, store)
        roots = [
            (store[index], gradient.to(store[index].dtype))
            for index, gradient in zip(program.outputs, output_gradients, strict=True)
            if gradient is not None and store[index].requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if roots and leaves:
            found = torch.autograd.grad(
                [root for root, _ in roots],
                leaves,
                [gradient for _, gradient in roots],
                allow_unused=True,
                create_graph=graph,
            )
    table = dict(zip(wanted, found, strict=True))
    return tuple(table.get(index) for index in program.inputs)


def _is_of_a_transform(tensor: Tensor | None) -> bool:
    """Whether a tensor stands for several, as under ``vmap`` and with ``is_grads_batched=True``."""
    functions = torch._C._functorch
    return tensor is not None and (
        functions.is_functorch_wrapped_tensor(tensor) or functions.is_legacy_batchedtensor(tensor)
    )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _scattered(present: Sequence[bool], tensors: Sequence[Tensor]) -> _Gradients:
    """The tensors in the places that are present, and None in the others."""
    remaining = iter(tensors)
    return tuple(next(remaining) if there else None for there in present)


def _slabs(carries: dict[str, Carries]) -> list[tuple[tuple[str, tuple[int, int], int], Tensor]]:
    """The carries one by one: loop, place and value of each."""
    return [
        ((name, place, value), slab)
        for name, table in carries.items()
        for place, slabs in table.items()
        for value, slab in slabs.items()
    ]


def _kept(ctx: Any) -> tuple[dict[int, Any], dict[str, Carries], dict[int, Tensor]]:
    """What the forward pass has kept: values, and carries by loop; and what has become of weights since then.

    Where somebody has changed a map that was returned to him, or a later call of the module the data of a weight, the
    forward pass is made once more.
    """
    call: SegmentCall = ctx.call
    later, changed = ctx.record.later(call), None
    try:
        saved = list(ctx.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        changed = error
    if later or changed is not None:
        store = ctx.record.inputs(call, ctx.ambient)
        if store is None:  # changed is something else, or it comes from what is lost
            raise changed or RuntimeError(
                "a weight was changed by weight.data in a later call of a row-wise module, and what its forward pass "
                "had read is no longer there to make it again: call backward before the next call"
            )
        inputs = dict(store)
        with torch.no_grad(), ctx.ambient.restored():
            again = run_forward(call, store, again=True)
        ctx.maybe_clear_saved_tensors()
        if not later:
            ctx.tell(CHANGED_ARGUMENT if ctx.record.needs_copies else CHANGED_MAP)
        return {index: store.get(index, inputs.get(index)) for index in call.program.kept}, again, later
    ctx.tell(INTACT)
    ctx.maybe_clear_saved_tensors()  # unless the graph is retained: what is freed below is then really free
    borders = len(call.program.kept)
    carries: dict[str, Carries] = {}
    for (name, place, value), slab in zip(ctx.carry_keys, saved[borders:], strict=True):
        carries.setdefault(name, {}).setdefault(place, {})[value] = slab
    return dict(zip(call.program.kept, saved[:borders], strict=True)), carries, {}


def _sources(ctx: Any, kept: dict[int, Any]) -> dict[int, Tensor] | None:
    """The inputs that a segment's gradients depend on, with their history; None if there is one that is lost."""
    call: SegmentCall = ctx.call
    if call.graph.communicates:  # other processes would have to run the segment again, too
        return None
    sources: dict[int, Tensor] = {}
    for index in call.needed():
        tensor = kept.get(index)
        if tensor is None or (tensor.requires_grad is False and index in call.program.differentiable):
            tensor = ctx.record.value(index, ctx.ambient, history=True)
        if tensor is None:
            return None
        sources[index] = tensor
    return sources


def _as_result(tensor: Tensor, store: dict[int, Any], program: Segment) -> Tensor:
    """An output as no view, which autograd would not allow to be changed in place.

    It is copied where its memory is also that of something kept, since a change of it would not be noticed.
    """
    if not tensor._is_view():
        return tensor
    memory = tensor.untyped_storage()._cdata
    others = (store[i] for i in (*program.kept, *program.inputs) if i in store and store[i] is not tensor)
    return tensor.clone() if any(other.untyped_storage()._cdata == memory for other in others) else tensor.data


def _copied(buffer: Tensor) -> Tensor:
    """A buffer, or a view of one, as it is now: another call in between may move the running statistics on.

    Expanded dimensions stay so.
    """
    compact = buffer.detach()
    for dimension, stride in enumerate(buffer.stride()):
        compact = compact.narrow(dimension, 0, 1) if stride == 0 and buffer.shape[dimension] > 1 else compact
    return compact.clone().expand(buffer.shape)


def _run_backward(
    job: _Job, store: dict[int, Any], carries: dict[str, Carries], output_gradients: _Gradients
) -> _Gradients:
    """The gradients of the segment's inputs, row by row; what is kept is dropped on the way."""
    call = job.call
    program, graph = call.program, call.graph
    gradients = Gradients(lambda index: graph.values[index].shape, lambda index: graph.axes.get(index, Axes()))
    for index, given in zip(program.outputs, output_gradients, strict=True):
        if given is not None:
            gradients.lend(index, given)
    del output_gradients
    rows = RowLoop(call.prepared, store)
    with torch.no_grad(), job.ambient.restored():
        for step in program.backward:
            if isinstance(step, BackwardRows):
                with torch.autograd.profiler.record_function(f"lrcnn {step.run.loop.name}"):
                    kept_carries = carries.get(step.carries or "", {})
                    differentiate(call.prepared, store, step.run, kept_carries, gradients, step.drops, job.later)
            elif isinstance(step, RunRows):
                rows.forward(step.loop)
            elif isinstance(step, Sweep):
                carries[step.loop.name] = rows.sweep(step.loop)
            elif isinstance(step, BackwardWhole):
                _backward_whole(call, step.node, store, gradients, job.later)
            elif isinstance(step, Free):
                store.pop(step.value, None)
            elif isinstance(step, FreeGradient):
                gradients.pop(step.value)
    results: list[Tensor | None] = []
    for index, wanted, dtype in zip(program.inputs, job.wanted, job.dtypes, strict=True):
        gradient = gradients.pop(index) if wanted else None
        if gradient is not None and gradient.dtype != dtype:
            gradient = gradient.to(dtype)
        results.append(gradient)
    return tuple(results)


def _backward_whole(
    call: SegmentCall, position: int, store: dict[int, Any], gradients: Gradients, later: Mapping[int, Tensor]
) -> None:
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
    with replayed(state), torch.enable_grad():
        outputs = run_node(node, leaves)
    roots = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
    wanted = [index for index in node.inputs if leaves[index].requires_grad]
    if not roots or not wanted:
        return
    with as_now(store, later):
        found = torch.autograd.grad(
            [root for root, _ in roots],
            [leaves[index] for index in wanted],
            [seed.to(root.dtype) for root, seed in roots],
            allow_unused=True,
        )
    for index, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            gradients.add(index, gradient)


def _sealed(gradients: _Gradients) -> _Gradients:
    """The gradients, whose own gradient is refused whatever is made of them."""
    present = [gradient for gradient in gradients if gradient is not None]
    anchor = torch.zeros((), requires_grad=True)
    sealed = iter(_Sealed.apply(anchor, *present))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(sealed) for gradient in gradients)


class _Sealed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        raise DoubleBackwardError(
            "a gradient of a gradient was asked for (create_graph=True and then backward) through a row-wise module, "
            "and what it depends on is no longer there: an input that was changed or dropped after the call, or, with "
            "a synchronised BatchNorm, what other processes have. Keep the input, or run this module plainly: leave it "
            "out of `modules`, or call `lrcnn_lightning.restore(module)`"
        )
