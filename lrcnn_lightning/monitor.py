r"""Activation memory, measured to the byte, on any device and on none.

Asking an allocator how much it holds mixes in parameters, its own rounding, whatever it caches, and on a CPU the whole
process.  :class:`MemoryMeter` instead watches each operation: a storage that comes out of one is live from then until
it is released, and counts its bytes once, however many tensors view it.  The same run gives the same number every
time, so a test can assert it exactly, and because a fake tensor has a storage with a size but no bytes, the same meter
tells what an image of any size would take (:func:`measure_fake`).

*Activation memory* is the peak of all live tensor bytes during one training step, less parameters, buffers, parameter
gradients, optimizer state and the input batch::

    bytes
      |            ____                  peak_bytes
      |        ___/    \\__                              counted: born in an operation inside the meter
      |    ___/           \\___
      |___/                   \\__       end_bytes        not counted: all that existed before, and every
      +---------------------------> operations                       storage that is ever a .grad
        forward  |  backward

Which storage becomes a parameter's gradient is known only when autograd has put it there, and it may keep the tensor it
was given or copy it.  So the meter records each birth and each release as an event and adds them up at the end, leaving
out the storages that turned out to be gradients over their whole life.

Not seen: workspaces inside one operation, bytes that never belong to a tensor, and the rounding of the allocator.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lrcnn_lightning.config import format_size
from lrcnn_lightning.errors import ConfigError, InputError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    ActivationMemory: type[Any]

__all__ = [
    "ActivationMemory",
    "MemoryMeter",
    "StepMemory",
    "measure_fake",
    "measure_module",
    "measure_step",
]


@dataclass(frozen=True)
class StepMemory:
    """The activation memory of one step.

    Attributes:
        peak_bytes: Highest number of live bytes at any time of the step.
        end_bytes: Bytes still live when the step was over; anything but 0 was left behind or is held by the caller.
        timeline: Live bytes after each operation, in the order of their execution, if recorded, else empty.
        operations: Name of each operation of ``timeline``, such as ``"aten.convolution.default"``.
    """

    peak_bytes: int
    end_bytes: int
    timeline: tuple[int, ...] = ()
    operations: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"activation memory: peak {format_size(self.peak_bytes)}, at the end {format_size(self.end_bytes)}"


@dataclass
class _Live:
    """A storage that is being counted; ``reference`` calls back when it is released."""

    serial: int
    nbytes: int
    reference: weakref.ref[torch.UntypedStorage] | None


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts the bytes of every storage born in an operation while it is active.

    Storages that existed before (parameters, buffers, inputs) are never counted, nor are views of them.  A storage
    counts from the operation that returns it until its last tensor, saved-tensor or Python reference is gone.  Nothing
    an operation allocates and frees inside is seen.

    Under ``FakeTensorMode`` (entered before the meter) fake tensors are counted, by the bytes that they stand for.
    Otherwise fake and meta tensors, which hold no memory, are not; and nothing is counted while ``torch.export`` or
    ``torch.compile`` traces.

    While it is active, backward passes run in the calling thread, so that the order of events is the same in each run.

    Args:
        module: Module (or its parameters) whose gradients are not counted: a storage that is ever found as the
            ``.grad`` of a parameter is left out over its whole life.  Parameters and buffers that are replaced inside
            the meter are left out, too.
        exclude: Further tensors that existed before, and that an operation may return without having been given.
        record: Also keep ``timeline`` and ``operations``; costs an int and a name for each operation.

    After the meter has been left, its figures stay as they were at that moment.  It may be entered again, which starts
    from nothing.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        module: nn.Module | Iterable[Tensor] | None = None,
        *,
        exclude: Iterable[Tensor] = (),
        record: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module if isinstance(module, nn.Module) else None
        self._tensors = () if module is None or isinstance(module, nn.Module) else tuple(module)
        self._foreign = tuple(exclude)
        self._record = record
        self._active = False
        self._forget()

    def _forget(self) -> None:
        self._live: dict[int, _Live] = {}  # by address, which is free again once the storage is released
        self._events: list[tuple[int, int]] = []  # (serial of the storage, bytes gained or lost), in order
        self._excluded: set[int] = set()  # serials
        self._marks: list[int] = []  # number of events after each operation
        self._operations: list[str] = []
        self._serial = 0

    # Entering and leaving

    def __enter__(self) -> Self:
        if self._active:
            raise ConfigError("this memory meter is active already; make another one to nest them")
        self._forget()
        fake_modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]
        self._fake_mode = fake_modes[-1] if fake_modes else None
        self._foreign_keys = {storage._cdata for storage in _storages(self._foreign)}
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._exclude_gradient)  # type: ignore[no-untyped-call]
            for parameter in self._parameters()
            if parameter.requires_grad and parameter.is_leaf
        ]
        self._threading = torch.autograd.set_multithreading_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        # The first operation under any mode makes torch import a good deal of itself, and errors that are caught
        # meanwhile keep the frames of their callers, with all tensors in them, until the next garbage collection.
        torch.empty(0)
        self._forget()
        self._active = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        self._settle()
        self._active = False
        self._threading.__exit__(exc_type, exc_value, traceback)
        for hook in self._hooks:
            hook.remove()
        for live in self._live.values():
            live.reference = None

    # Figures

    @property
    def live_bytes(self) -> int:
        """Bytes live now, without the gradients known so far."""
        self._settle()
        return sum(live.nbytes for live in self._live.values() if live.serial not in self._excluded)

    @property
    def peak_bytes(self) -> int:
        """Most bytes live at any time since the meter was entered, or since :meth:`reset_peak`."""
        self._settle()
        return max(self._history(), default=0)

    @property
    def timeline(self) -> list[int]:
        """Live bytes after each operation; empty unless the meter was made with ``record=True``."""
        self._settle()
        history = [0, *self._history()]
        return [history[mark] for mark in self._marks]

    @property
    def operations(self) -> list[str]:
        """Name of each operation of :attr:`timeline`."""
        return list(self._operations)

    def reset_peak(self) -> None:
        """Forget the past: the peak starts again from the bytes that are live now, and the timeline from its start."""
        self._settle()
        self._events = [(live.serial, live.nbytes) for live in self._live.values()]
        self._excluded &= {live.serial for live in self._live.values()}
        self._marks.clear()
        self._operations.clear()

    def exclude(self, *tensors: Tensor) -> None:
        """Leave the storages of these tensors out over their whole life, for example an optimizer's state."""
        for storage in _storages(tensors):
            live = self._live.get(storage._cdata)
            if live is not None:
                self._excluded.add(live.serial)

    # Counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        given: set[int] | None = None
        for tensor in _tensors(result):
            if not self._counts(tensor):
                continue
            for storage in _storages_of(tensor):
                key = storage._cdata
                live = self._live.get(key)
                if live is not None:
                    self._resize(live, storage.nbytes())
                    continue
                if given is None:
                    # ``torch.tensor`` fills a tensor outside of every operation and hands it over with this one.
                    fresh = func is torch.ops.aten.lift_fresh.default
                    given = set() if fresh else {storage._cdata for storage in _storages((args, kwargs))}
                if key not in given and key not in self._foreign_keys:
                    self._track(key, storage)
        if self._record and func.namespace != "prim":  # ``prim`` operations ask a fake tensor where it is
            self._marks.append(len(self._events))
            self._operations.append(str(func))
        return result

    def _counts(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for memory in this run: the tensors of its fake mode, or those that are real."""
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self._fake_mode
        return self._fake_mode is None and not tensor.is_meta

    def _track(self, key: int, storage: torch.UntypedStorage) -> None:
        self._serial += 1
        self._live[key] = _Live(self._serial, storage.nbytes(), weakref.ref(storage, partial(self._released, key)))
        self._events.append((self._serial, storage.nbytes()))

    def _released(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        live = self._live.get(key)
        if self._active and live is not None and live.reference is reference:
            del self._live[key]
            self._events.append((live.serial, -live.nbytes))

    def _resize(self, live: _Live, nbytes: int) -> None:
        if nbytes != live.nbytes:
            self._events.append((live.serial, nbytes - live.nbytes))
            live.nbytes = nbytes

    def _history(self) -> Iterator[int]:
        """Live bytes after each event, as if the excluded storages had never been."""
        total = 0
        for serial, change in self._events:
            if serial not in self._excluded:
                total += change
            yield total

    def _parameters(self) -> Iterable[Tensor]:
        return self._module.parameters() if self._module is not None else self._tensors

    def _exclude_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.exclude(parameter.grad)

    def _settle(self) -> None:
        """Bring up to date what no operation has told: resized storages, and tensors that now belong to the module."""
        if not self._active:
            return
        for live in self._live.values():
            storage = live.reference() if live.reference is not None else None
            if storage is not None:
                self._resize(live, storage.nbytes())
        buffers = self._module.buffers() if self._module is not None else ()
        for tensor in chain(self._parameters(), buffers):
            self.exclude(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                self.exclude(tensor.grad)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation; far cheaper than a general tree traversal."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)


def _storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that hold a tensor: one, or those of the tensors it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages_of(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield from _storages_of(tensor._indices())
        yield from _storages_of(tensor._values())


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in _tensors(tree):
        yield from _storages_of(tensor)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Release what is unreachable now, and nothing later.

    The cycle collector runs when enough objects have been made, by anybody; with it, the moment at which a map caught
    in a reference cycle is released, and so the peak, would change from run to run.
    """
    was_enabled = gc.isenabled()
    gc.collect()
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
    with _without_collector(), MemoryMeter(module, record=record) as meter:
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
    for tensor in tree_leaves((inputs, kwargs)):
        if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad:
            tensor.grad = None
    module.zero_grad(set_to_none=True)

    with _without_collector(), MemoryMeter(module, record=record) as meter:
        if grad:
            sums, seeds = _summed(meter, module(*inputs, **kwargs))
            if sums:
                torch.autograd.backward(sums, seeds)
            del sums, seeds
        else:
            with torch.no_grad():
                module(*inputs, **kwargs)
    return StepMemory(meter.peak_bytes, meter.live_bytes, tuple(meter.timeline), tuple(meter.operations))


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
    modes = {id(tensor.fake_mode): tensor.fake_mode for tensor in given if isinstance(tensor, FakeTensor)}
    if len(modes) > 1:
        raise InputError(f"inputs come from {len(modes)} fake modes (allowed: one); make all of them under one mode")
    mode = next(iter(modes.values()), None) or FakeTensorMode(allow_non_fake_inputs=True)
    held = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if held is None else held.device

    fakes: dict[int, Tensor] = {}  # one tensor given twice stays one: attention, for one, looks whether it is

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
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
    with _faked(module, mode), mode:
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
                    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                        table[name] = fake(value)
                        exchanged.append((table, name, value))
        yield
    finally:
        for table, name, value in exchanged:
            table[name] = value


class _ActivationMemoryHooks:
    """Lightning callback: measure and log the activation memory of the first training steps.

    From the start of a training batch to its end, backward pass and optimizer step included, the step runs under a
    :class:`MemoryMeter`.  Afterwards these are logged, in bytes, to the Trainer's loggers; the first is shown in the
    progress bar, too (where Lightning rounds it to a float; :attr:`peaks` is exact):

    - ``activation_memory_peak``: the activation memory of the step;
    - ``process_memory_peak``: the highest resident memory of the process so far (not on Windows);
    - ``cuda_memory_peak``: the highest memory that the allocator has given out during the step, on a CUDA device.

    The meter slows a step, which is why only the first ones are measured.

    Args:
        steps: Number of training batches to measure, at least 0.

    Attributes:
        peaks: ``activation_memory_peak`` of each measured step, in bytes.

    Raises:
        ConfigError: ``steps`` is not an int of at least 0.
    """

    def __init__(self, steps: int = 1) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ConfigError(f"steps must be an int of at least 0 (given: {steps!r}); 1 measures the first batch")
        super().__init__()
        self.steps = steps
        self.peaks: list[int] = []
        self._meter: MemoryMeter | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._abandon()
        if len(self.peaks) >= self.steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._meter = MemoryMeter(pl_module)
        self._meter.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        meter = self._meter
        if meter is not None:
            for optimizer in trainer.optimizers:
                meter.exclude(
                    *(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
                )
            self._abandon()
            self.peaks.append(meter.peak_bytes)
            metrics = {"activation_memory_peak": float(meter.peak_bytes), **_backend_peaks(pl_module.device)}
            for logger in trainer.loggers:
                # Not left to ``log``, which hands only every ``log_every_n_steps``-th step to the loggers.
                logger.log_metrics(metrics, step=trainer.global_step)
        if self.peaks:
            pl_module.log(
                "activation_memory_peak",
                float(max(self.peaks)),
                prog_bar=True,
                logger=False,
                on_step=True,
                on_epoch=False,
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._abandon()  # a batch that was skipped has a start and no end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._abandon()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._abandon()

    def _abandon(self) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.__exit__(None, None, None)


def _backend_peaks(device: torch.device) -> dict[str, float]:
    """Peaks that the system reports, in bytes: of the process (since its start) and of a CUDA device."""
    peaks: dict[str, float] = {}
    if importlib.util.find_spec("resource") is not None:  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["process_memory_peak"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if device.type == "cuda":
        peaks["cuda_memory_peak"] = float(torch.cuda.max_memory_allocated(device))
    return peaks


def _activation_memory_class() -> type[Any]:
    """The callback as a subclass of the ``Callback`` of each Lightning that is installed, so that any Trainer takes it.

    ``lightning.pytorch`` and ``pytorch_lightning`` each have a base class; neither holds more than empty hooks.
    """
    bases: list[type] = []
    for namespace in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(namespace.partition(".")[0]) is not None:
            base = importlib.import_module(namespace).Callback
            if base not in bases:
                bases.append(base)
    if not bases:
        raise ImportError("ActivationMemory needs Lightning; install lightning or pytorch-lightning")
    body = {"__doc__": _ActivationMemoryHooks.__doc__, "__module__": __name__, "__qualname__": "ActivationMemory"}
    return type("ActivationMemory", (_ActivationMemoryHooks, *bases), body)


def __getattr__(name: str) -> Any:
    """Build ``ActivationMemory`` when it is first asked for; importing this file must not import Lightning."""
    if name == "ActivationMemory":
        globals()[name] = _activation_memory_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
