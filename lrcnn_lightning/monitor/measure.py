"""Measuring one step: of a closure, of a module, and of a module on tensors without data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrcnn_lightning.errors import InputError
from lrcnn_lightning.fake import FakeTensorMode, OnlyFakes, is_fake, mode_of, new_mode
from lrcnn_lightning.monitor.meter import MemoryMeter, StepMemory

__all__ = ["measure_fake", "measure_module", "measure_step", "measured_by", "without_collector"]


@contextmanager
def without_collector() -> Iterator[None]:
    """Nothing that is caught in a reference cycle is released.

    The cycle collector runs when enough objects have been made, by anybody; with it, the moment at which a map in a
    cycle is released, and so the peak, would change from run to run. What was unreachable before is not counted, so
    nothing is collected first: in a large process that takes as long as planning a small network. Where very many
    objects are made that all stay, the collector takes a quarter of the time and finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure_step(step: Callable[[], Any], module: nn.Module | Iterable[Tensor], *, record: bool = False) -> StepMemory:
    """Run one training step, forward and backward, and measure its activation memory.

    Every ``.grad`` is set to ``None`` before, so that gradients are made as in a first step, and left as the step
    leaves it.  What the step returns is dropped.  A module that plans or compiles on its first call is better run once
    before, or that work is part of the step.

    Args:
        step: Runs the step; what it needs is closed over, so that it existed before and is not counted.
        module: The module, or the parameters, whose gradients are not activation memory.
        record: Fill ``timeline`` and ``operations`` of the result.
    """
    if not isinstance(module, nn.Module):
        module = tuple(module)
    for parameter in module.parameters() if isinstance(module, nn.Module) else module:
        parameter.grad = None
    with without_collector(), MemoryMeter(module, record=record) as meter:
        step()
    return StepMemory(meter.peak_bytes, meter.live_bytes, tuple(meter.timeline), tuple(meter.operations))


def measure_module(
    module: nn.Module, *inputs: Any, grad: bool = True, record: bool = False, **kwargs: Any
) -> StepMemory:
    """Measure the activation memory of a module: one call, and the backward pass of the sum of its outputs.

    The sums are scalars, their gradient is one scalar spread over the map without copying it, and both are left out:
    the figure is that of the module alone.  As in a training step that returns only its loss, the outputs are dropped
    before the backward pass, unless autograd has saved them.

    The call is real: buffers such as running statistics move on, and the parameters hold gradients afterwards.

    Args:
        module: Any module, plain or row-wise, in the train or eval state that is to be measured.
        inputs: Positional arguments of the module, not counted.  The ``.grad`` of those that require one is dropped
            before the run; the new one is counted.
        grad: Run the backward pass; otherwise the call runs under ``no_grad``, as in validation.
        record: Fill ``timeline`` and ``operations`` of the result.
        kwargs: Keyword arguments of the module.
    """
    return measured_by(MemoryMeter(module, record=record), module, inputs, kwargs, grad)


def measured_by(
    meter: MemoryMeter, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool
) -> StepMemory:
    """As `measure_module` does, by a meter for the module."""
    for tensor in tree_leaves((inputs, kwargs)):
        if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad:
            tensor.grad = None
    module.zero_grad(set_to_none=True)

    backward_start = 0
    with without_collector(), meter:
        if grad:
            sums, seeds = _summed(meter, module(*inputs, **kwargs))
            backward_start = len(meter.operations)
            if sums:
                torch.autograd.backward(sums, seeds)
            del sums, seeds
        else:
            with torch.no_grad():
                module(*inputs, **kwargs)
    timeline, operations = tuple(meter.timeline), tuple(meter.operations)
    return StepMemory(meter.peak_bytes, meter.live_bytes, timeline, operations, backward_start)


def _summed(meter: MemoryMeter, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """A sum for each output that has a gradient, and the gradient (one) of each sum; none of them is counted."""
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    sums = [output.sum() for output in found if output.is_floating_point() and output.requires_grad]
    seeds = [torch.ones_like(total) for total in sums]
    meter.exclude(*sums, *seeds)
    return sums, seeds


def measure_fake(module: nn.Module, *inputs: Any, grad: bool = True, record: bool = False, **kwargs: Any) -> StepMemory:
    """Measure as :func:`measure_module` does, without computing anything and without the memory that is measured.

    Parameters and buffers of the module are replaced by fake ones for the duration of the call and put back; no value,
    gradient or running statistic changes.  The module is not copied, so one whose ``forward`` is patched is measured
    with its patch.  It must not be used by another thread meanwhile.

    The figure equals that of a real run where both run the same operations, as convolutional networks do.  It differs
    where a real tensor takes a fused kernel that a fake one does not (recurrent layers on a CPU), and by some bytes
    where batch normalisation in half precision keeps its statistics in another dtype than its shape rule says.

    Args:
        module: Any module whose Python code makes no decision that depends on the values of a tensor.
        inputs: Positional arguments of the module.  Of a tensor only shape, strides, dtype and device are used, so a
            map too large for the machine may be given as ``torch.empty(shape, device="meta")``; it is taken to be on
            the device of the module.
        grad: As in :func:`measure_module`.
        record: As in :func:`measure_module`.
        kwargs: Keyword arguments of the module.

    Raises:
        InputError: the inputs come from different fake modes.
    """
    given = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    modes = {id(mode): mode for mode in map(mode_of, given) if mode is not None}
    if len(modes) > 1:
        raise InputError(f"inputs come from {len(modes)} fake modes (allowed: one); make all of them under one mode")
    mode = next(iter(modes.values()), None) or new_mode()
    held = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if held is None else held.device

    fakes: dict[int, Tensor] = {}  # one tensor given twice stays one: attention, for one, looks whether it is

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_fake(leaf):
            return leaf
        if id(leaf) not in fakes:
            if leaf.is_meta:
                with mode:
                    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
            else:
                made = mode.from_tensor(leaf.detach(), static_shapes=True)
            fakes[id(leaf)] = made.requires_grad_(leaf.requires_grad)
        return fakes[id(leaf)]

    fake_inputs, fake_kwargs = tree_map(fake, (inputs, kwargs))
    with _faked(module, mode), mode, OnlyFakes(mode):
        return measure_module(module, *fake_inputs, grad=grad, record=record, **fake_kwargs)


@contextmanager
def _faked(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Exchange every tensor that a module holds for a fake one, tied ones for the same, and put them back after."""
    fakes: dict[int, Tensor] = {}
    exchanged: list[tuple[dict[str, Any], str, Tensor]] = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
            if isinstance(tensor, nn.Parameter):
                with mode:
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = made
        return fakes[id(tensor)]

    try:
        for submodule in module.modules():
            tables: tuple[dict[str, Any], ...] = (submodule._parameters, submodule._buffers, vars(submodule))
            for table in tables:
                for name, value in list(table.items()):
                    if isinstance(value, Tensor) and not is_fake(value):
                        table[name] = fake(value)
                        exchanged.append((table, name, value))
        yield
    finally:
        for table, name, value in exchanged:
            table[name] = value
