"""Trials: an operation is run once on tensors without data, to see what it and its gradient hold.

A table of what is saved is wrong for the operation that is not in it, and says nothing of what an operation makes
and drops on the way. So both are observed, in three runs of one call:

    run                    bytes at the peak, beside the results
    recorded               by its formula or by autograd: the same; then results and inputs are dropped one by one: what
                           stays is saved
    backward               bytes at the peak, beside what was saved and the gradients of the results;
                           which gradients of inputs are views of those of the results
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lrcnn_lightning.fake import FakeTensorMode, new_mode
from lrcnn_lightning.graph import Node, Value, dense_strides, is_dense, map_refs
from lrcnn_lightning.graph.saved_hooks import TOLD, saved_hooks
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.graph.tap import tapped
from lrcnn_lightning.monitor.meter import MemoryMeter
from lrcnn_lightning.planning.workspace import Call, kernel_call
from lrcnn_lightning.rules.formula import NumberedCall

__all__ = ["Autocast", "Operand", "Trial", "called", "results_of", "tried", "without_data"]


class Operand(NamedTuple):
    """What stands for a value in a trial: ``counted`` if it is a map or slab, which is memory of the step; ``wanted``
    if its gradient is.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    counted: bool
    wanted: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


class Trial(NamedTuple):
    """What one call takes. Inputs and results go by their numbers."""

    views: tuple[int | None, ...]
    """Of each result: the input whose memory it has."""
    saved_inputs: tuple[int, ...]
    saved_results: tuple[int, ...]
    passed_on: dict[int, int]
    """Input -> the result whose gradient's memory the input's gradient has."""
    forward: float
    """Bytes at the peak where it is only run, beside the inputs and the results."""
    recompute: float
    """Bytes at the peak where it is recorded, beside the inputs, the results and what is saved beside these."""
    extra: float
    """Bytes saved beside inputs and results."""
    backward: float
    """Bytes at the peak of the backward pass, beside what is saved and the gradients of the results."""
    whole: float
    """Bytes of the gradients of inputs that are not counted: parameters, mostly."""
    results: tuple[float, ...]
    """Bytes of each result, 0 for a view."""
    gradients: dict[int, float]
    """Bytes of the gradient of each counted input that has one."""
    largest: float
    """Elements of the largest tensor that is made on the way, forward or backward, gradients of weights left out."""
    kernels: tuple[tuple[Call, ...], tuple[Call, ...]] = ((), ())
    """The calls whose kernels may take memory for themselves, forward and backward."""
    gaps: tuple[bool, ...] = ()
    """Whether each result is a part of a larger tensor, with gaps between its elements."""
    by_formula: bool = False
    """Whether the gradients are those of a formula."""


_SCALARS = 64  # bytes of the root, and of what single numbers an operation makes


@cache
def _fake_mode() -> FakeTensorMode:
    """One for all trials: tensors of several do not go together."""
    return new_mode()


Autocast = tuple[str, torch.dtype]
"""The kind of device and the dtype."""


def _without_hooks() -> AbstractContextManager[Any]:
    """Hooks of the user, as checkpointing has them, must not see what is saved here; without any, none are needed."""
    if TOLD and saved_hooks() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)


@contextmanager
def without_data(autocast: Autocast | None = None) -> Iterator[None]:
    """Tensors that are made here have no data, whatever modes are in force outside; ``autocast`` is, or none."""
    with _disable_current_modes(), _fake_mode(), _without_hooks():
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        with ExitStack() as switches:
            for kind in kinds:
                switches.enter_context(torch.autocast(kind, enabled=False))
            if autocast is not None:
                kind, dtype = autocast
                switches.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            yield


@contextmanager
def _keeping_copies(autocast: Autocast) -> Iterator[None]:
    """As in a step, where autocast copies each weight once."""
    kind, dtype = autocast
    with torch.autocast(kind, dtype=dtype, cache_enabled=True):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def called(node: Node, tensors: Mapping[int, Tensor]) -> Any:
    """A node on full tensors, by their indices."""
    args, kwargs = (map_refs(tree, lambda ref: tensors[ref.index]) for tree in (node.args, node.kwargs))
    with entered(node.context):
        return node.op(*args, **kwargs)


def results_of(node: Node, tensors: Mapping[int, Tensor], values: Sequence[Value]) -> dict[int, Tensor]:
    """What a node makes of tensors without data, by the indices of its outputs: those of the captured shape.

    An operation that does not run without data makes nothing; it is taken to make what was captured.
    """
    try:
        results = called(node, tensors)
    except Exception:
        return {}
    results = results if isinstance(results, (list, tuple)) else (results,)
    return {
        index: result
        for index, result in zip(node.outputs, results, strict=False)
        if isinstance(result, Tensor) and tuple(result.shape) == tuple(values[index].shape)
    }


class _Kind(NamedTuple):
    """What the gradient of a result is like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _gradients(made: list[_Given], kinds: Mapping[int, _Kind]) -> list[Tensor | None]:
    """Gradients of results, which are noted but not held."""
    gradients: list[Tensor | None] = []
    for number, (shape, strides, dtype, device) in kinds.items():
        gradient = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        storage = gradient.untyped_storage()
        made.append(_Given(number, storage.nbytes(), weakref.ref(storage)))
        gradients.append(gradient)
    return gradients


class _Source(torch.autograd.Function):
    """Where the gradients of results come from: autograd alone holds them, as if a later operation had made them."""

    @staticmethod
    def forward(ctx: Any, made: list[_Given], kinds: Mapping[int, _Kind], *results: Tensor) -> Tensor:
        ctx.made, ctx.kinds = made, kinds
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, None, *_gradients(ctx.made, ctx.kinds))


class _Given(NamedTuple):
    """The gradient of a result."""

    number: int
    nbytes: int
    storage: weakref.ref[torch.UntypedStorage]


def tried(
    call: Callable[[Mapping[int, Tensor]], Any],
    operands: Mapping[int, Operand],
    autocast: Autocast | None = None,
    by_format: bool = False,
    recorded: NumberedCall | None = None,
) -> Trial:
    """Try a call that takes its operands by number; ``by_format``: gradients come in the memory format of the results.
    ``recorded`` is the call with a formula for its gradients, if there is one; otherwise autograd makes them.

    Raises whatever the call raises.
    """
    kernels: list[Call] = []

    def note(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        call = kernel_call(operation, args, kwargs)
        kernels.extend(() if call is None else (call,))
        return 0

    with without_data(autocast), MemoryMeter(passing=note) as meter:
        return _Attempt(call, operands, meter, kernels, by_format, recorded, autocast).run()


class _Attempt:
    """The runs of one call."""

    def __init__(
        self,
        call: Callable[[Mapping[int, Tensor]], Any],
        operands: Mapping[int, Operand],
        meter: MemoryMeter,
        kernels: list[Call],
        by_format: bool,
        recorded: NumberedCall | None,
        autocast: Autocast | None,
    ) -> None:
        self.by_format, self.recorded, self.autocast = by_format, recorded, autocast
        self.saved: tuple[Any, ...] | None = None
        self.call, self.operands, self.meter, self.kernels = call, operands, meter, kernels
        self.origin = torch.zeros((), requires_grad=True)
        self.given: list[_Given] = []
        self.received: dict[int, Tensor] = {}
        self.whole = 0.0

    def run(self) -> Trial:
        meter, operands = self.meter, self.operands
        tensors = {number: operand.make() for number, operand in operands.items()}
        meter.sizes_born.clear()
        forward = self._forward(tensors)
        meter.reset_peak()
        self.kernels.clear()
        results = self._differentiable(tensors)
        forward_kernels = tuple(self.kernels)
        self.kernels.clear()
        recompute = meter.peak_bytes - meter.live_bytes
        views, sizes = _memory(list(tensors.values()), results)
        gaps = tuple(isinstance(r, Tensor) and not is_dense(r.shape, r.stride()) for r in results)
        kinds = self._kinds(results)
        root = None if self.saved is not None else self._root(results, kinds)
        saved_results = [k for k in range(len(results)) if self._stays(results, k) and sizes[k]]
        by_formula = self.saved is not None
        numbers, held = list(tensors), list(tensors.values())
        tensors.clear()
        stays = [number for k, number in enumerate(numbers) if self._stays(held, k)]
        extra = meter.live_bytes - sum(sizes[k] for k in saved_results)
        extra -= sum(operands[number].bytes for number in stays)
        backward, gradients, passed_on = self._backward(root, kinds)
        return Trial(
            tuple(None if view is None else numbers[view] for view in views),
            tuple(number for number in stays if operands[number].counted),
            tuple(saved_results),
            passed_on,
            float(forward),
            float(recompute),
            float(max(extra - _SCALARS, 0)),
            float(backward),
            self.whole,
            tuple(sizes),
            gradients,
            self._largest(),
            (forward_kernels, tuple(self.kernels)),
            gaps,
            by_formula,
        )

    def _largest(self) -> float:
        whole = {math.prod(operand.shape) for operand in self.operands.values() if not operand.counted}
        return float(max(self.meter.sizes_born - whole, default=0))

    def _results(self, tensors: Mapping[int, Tensor]) -> list[Any]:
        results = self.call(tensors)
        return list(results) if isinstance(results, (list, tuple)) else [results]

    def _forward(self, tensors: Mapping[int, Tensor]) -> int:
        """Bytes of the run. The copies that autocast makes of weights are kept, and not of this call: they are made in
        a call before.
        """
        weights = [tensors[number] for number, operand in self.operands.items() if not operand.counted]
        weights = [tensor for tensor in weights if self.autocast is not None and tensor.is_floating_point()]
        with torch.no_grad(), nullcontext() if self.autocast is None else _keeping_copies(self.autocast):
            for tensor in weights:
                tensor.requires_grad_()
            if weights:
                self._results(tensors)
            self.meter.reset_peak()
            self.kernels.clear()
            results = self._results(tensors)
            forward = self.meter.peak_bytes - self.meter.live_bytes
            del results
            for tensor in weights:
                tensor.requires_grad_(False)
        return forward

    def _differentiable(self, tensors: dict[int, Tensor]) -> list[Any]:
        """The results, and what their gradients need: by the formula, if it applies, or by autograd."""
        if self.recorded is not None:
            with torch.no_grad():
                made = self.recorded.forward(tensors)
            if made is not None:
                result, self.saved = made
                return list(result) if isinstance(result, (list, tuple)) else [result]
        with torch.enable_grad():
            for number, operand in self.operands.items():
                if operand.wanted:
                    receive = partial(self._receive, number)
                    tensors[number] = tapped(tensors[number], self.origin, receive)  # as in the engine
            return self._results(tensors)

    def _kinds(self, results: Sequence[Any]) -> dict[int, _Kind]:
        """Of each result that has a gradient: what that is like."""
        return {
            number: _Kind(
                tuple(result.shape),
                dense_strides(result.shape, result.stride() if self.by_format else None),
                result.dtype,
                result.device,
            )
            for number, result in enumerate(results)
            if isinstance(result, Tensor)
            and (result.requires_grad if self.saved is None else result.is_floating_point() or result.is_complex())
        }

    def _root(self, results: Sequence[Any], kinds: Mapping[int, _Kind]) -> Tensor | None:
        """A number whose gradient makes those of the results."""
        if not kinds:
            return None
        with torch.enable_grad():
            root: Tensor = _Source.apply(self.given, kinds, *(results[k] for k in kinds))  # type: ignore[no-untyped-call]
        return root

    def _stays(self, tensors: list[Any], number: int) -> bool:
        """Drop a tensor: whether its memory stays."""
        before = self.meter.live_bytes
        tensors[number] = None
        return self.meter.live_bytes == before

    def _receive(self, number: int, gradient: Tensor) -> None:
        if self.operands[number].counted:
            self.received[number] = gradient
        else:
            self.whole += gradient.untyped_storage().nbytes()  # the engine adds it to a sum and drops it

    def _backward(
        self, root: Tensor | None, kinds: Mapping[int, _Kind]
    ) -> tuple[float, dict[int, float], dict[int, int]]:
        """Bytes at the peak; bytes of the gradients of the counted inputs, and whose memory they have."""
        if not kinds or not any(operand.wanted for operand in self.operands.values()):
            return 0.0, {}, {}
        self.meter.reset_peak()
        before = self.meter.live_bytes
        if root is not None:
            torch.autograd.grad([root], [self.origin], allow_unused=True)
        else:
            assert self.recorded is not None and self.saved is not None
            with torch.no_grad():
                for number, gradient in self.recorded.backward(self.saved, _gradients(self.given, kinds)):
                    self._receive(number, gradient)
            self.saved = None
        peak = self.meter.peak_bytes - before - sum(given.nbytes for given in self.given)
        gradients: dict[int, float] = {}
        passed_on: dict[int, int] = {}
        for number, gradient in self.received.items():
            storage = gradient.untyped_storage()
            gradients[number] = float(storage.nbytes())
            for given in self.given:
                if given.storage() is storage:
                    gradients[number] = 0.0
                    passed_on[number] = given.number
        return max(peak, 0.0), gradients, passed_on


def _memory(inputs: Sequence[Tensor], results: Sequence[Any]) -> tuple[list[int | None], list[float]]:
    """Of each result: the input whose memory it has, or its bytes, where no result before has the same memory."""
    places = {tensor.untyped_storage()._cdata: number for number, tensor in enumerate(inputs)}
    known: set[int] = set()
    views: list[int | None] = []
    sizes: list[float] = []
    for result in results:
        if not isinstance(result, Tensor):
            views.append(None)
            sizes.append(0.0)
            continue
        storage = result.untyped_storage()
        views.append(places.get(storage._cdata))
        fresh = views[-1] is None and storage._cdata not in known
        known.add(storage._cdata)
        sizes.append(float(storage.nbytes()) if fresh else 0.0)
    return views, sizes
