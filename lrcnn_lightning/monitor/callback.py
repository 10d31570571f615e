"""The Lightning callback: the activation memory of a run, beside what was predicted and what plain PyTorch takes.

The user's step runs once and only as the user wrote it. Plain PyTorch is measured on the modules that ran row-wise,
called again on tensors without data as they were called in the step: that changes no parameter, buffer, gradient or
random number, takes no memory, and works where the plain step would not fit. The loss and other layers are not in it,
so it is the least that plain PyTorch takes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.monitor.measure import measure_fake
from lrcnn_lightning.monitor.meter import MemoryMeter, StepMemory
from lrcnn_lightning.monitor.picture import draw

__all__ = ["activation_memory_class"]

_CALLS = 64
"""Calls of row-wise modules in a step that are remembered at most; a recurrent network may make thousands."""


@dataclass
class _Call:
    """A call of a row-wise module: its arguments, the tensors as ones of the same kind without data."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Step:
    """A step that is being measured, or was."""

    meter: MemoryMeter
    number: int
    calls: list[_Call] = field(default_factory=list)
    predicted: dict[int, int] = field(default_factory=dict)
    backward: tuple[int, int] | None = None
    """The first and the last operation of the backward pass, as numbers of operations before them."""
    memory: StepMemory = field(default_factory=lambda: StepMemory(0, 0))


class _Hooks:
    """Lightning callback: measure, log and draw the activation memory of training steps.

    From the start of a training batch to its end, backward pass and optimizer step included, a measured step runs
    under a :class:`MemoryMeter`.  Afterwards these are logged, in bytes, to the Trainer's loggers:

    - ``activation_memory_peak``: the activation memory of the step;
    - ``activation_memory_predicted``: what the plans of the row-wise modules that the step called predict for them,
      added up, which for several is the most that they may take together; not logged where no module runs row-wise;
    - ``process_memory_peak``: the highest resident memory of the process so far (not on Windows);
    - ``cuda_memory_peak``: the highest memory that the allocator has given out during the step, on a CUDA device.

    The progress bar shows them in MiB (1048576 bytes), as ``activation_MiB``, ``predicted_MiB``, ``process_MiB`` and
    ``cuda_MiB``.

    When training ends, a picture of the last measured step is written: live activation memory over the operations of
    the step, and beside it that of plain PyTorch, measured on tensors without data (see the module's text on what that
    leaves out).  Nothing of the training changes: no parameter, buffer, gradient or random number.

    The meter slows a step, which is why only the first one is measured unless told otherwise.

    Args:
        steps: Number of training batches to measure, at least 0.
        every_n_steps: Measure each such batch, from the first on, until there are ``steps``; at least 1.
        picture: File of the picture (PNG, PDF or SVG by its ending), absolute or under the folder of the Trainer's
            logger (without a logger: ``default_root_dir``); ``None`` draws nothing.

    Attributes:
        peaks: ``activation_memory_peak`` of each measured step, in bytes.
        predictions: ``activation_memory_predicted`` of each measured step, in bytes, or ``None``.
        picture_path: Where the picture was written; ``None`` before.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self, steps: int = 1, every_n_steps: int = 1, picture: str | Path | None = "activation_memory.png"
    ) -> None:
        for name, value, least in (("steps", steps, 0), ("every_n_steps", every_n_steps, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{name} must be an int of at least {least} (given: {value!r}); {name}=1 is the default of "
                    "ActivationMemory, which measures the first batch"
                )
        if picture is not None and (
            not isinstance(picture, (str, Path)) or Path(picture).suffix not in (".png", ".pdf", ".svg")
        ):
            raise ConfigError(
                f"picture must be None or a file that ends in .png, .pdf or .svg (given: {picture!r}); write for "
                'example picture="activation_memory.png"'
            )
        super().__init__()
        self.steps = steps
        self.every_n_steps = every_n_steps
        self.picture = picture
        self.peaks: list[int] = []
        self.predictions: list[int | None] = []
        self.picture_path: Path | None = None
        self._batches = 0
        self._running: _Step | None = None
        self._last: _Step | None = None
        self._shown: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._abandon(trainer)
        self._batches += 1
        if len(self.peaks) >= self.steps or (self._batches - 1) % self.every_n_steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._running = _Step(MemoryMeter(pl_module, record=self.picture is not None), self._batches)
        session = _session(trainer)
        if session is not None:
            session.observer = self._running_call
        self._running.meter.__enter__()

    def _running_call(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a call of a row-wise module, of which the plan is known by now."""
        step = self._running
        if step is None or not torch.is_grad_enabled() or forward.training_plan is None:
            return
        step.predicted[id(forward)] = forward.training_plan.peak_bytes
        if self.picture is not None and len(step.calls) < _CALLS:
            args, kwargs = tree_map(_without_data, (args, kwargs))
            step.calls.append(_Call(forward.module, args, kwargs))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        step = self._running
        if step is not None and step.backward is None:
            step.backward = len(step.meter.operations), 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        step = self._running
        if step is not None and step.backward is not None:
            step.backward = step.backward[0], len(step.meter.operations)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self._running
        if step is not None:
            meter = step.meter
            for optimizer in trainer.optimizers:
                meter.exclude(
                    *(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
                )
            self._abandon(trainer)
            begin, end = step.backward or (0, 0)
            # The optimizer's many small operations, on single weights, would fill half of the picture.
            operations = meter.operations[: end or None]
            step.memory = StepMemory(
                meter.peak_bytes, meter.live_bytes, tuple(meter.timeline[: end or None]), tuple(operations), begin
            )
            self._last = step
            self.peaks.append(meter.peak_bytes)
            self.predictions.append(sum(step.predicted.values()) if step.predicted else None)
            metrics = {"activation_memory_peak": float(self.peaks[-1])}
            if step.predicted:
                metrics["activation_memory_predicted"] = float(sum(step.predicted.values()))
            metrics |= _backend_peaks(pl_module.device)
            self._shown = {_SHOWN[name]: value / 2**20 for name, value in metrics.items()}
            for logger in trainer.loggers:
                # Not left to ``log``, which hands only every ``log_every_n_steps``-th step to the loggers.
                logger.log_metrics(metrics, step=trainer.global_step)
        for name, value in self._shown.items():  # at every step, or the progress bar would forget them
            pl_module.log(name, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._abandon(trainer)  # a batch that was skipped has a start and no end

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        step, self._last = self._last, None
        if self.picture is None or step is None or trainer.fast_dev_run:
            return
        folder = trainer.log_dir or trainer.default_root_dir  # asked for in every process: it is broadcast
        if not trainer.is_global_zero:
            return
        path = Path(folder) / self.picture
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = _plain(step.calls, trainer.precision_plugin.forward_context) if step.calls else None
        draw(path, step.memory, plain, self.predictions[-1], step.number)
        self.picture_path = path

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._abandon(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._abandon(trainer)
        self._last = None

    def _abandon(self, trainer: Any) -> None:
        step, self._running = self._running, None
        session = _session(trainer)
        if step is not None:
            if session is not None:
                session.observer = None
            step.meter.__exit__(None, None, None)


_SHOWN = {
    "activation_memory_peak": "activation_MiB",
    "activation_memory_predicted": "predicted_MiB",
    "process_memory_peak": "process_MiB",
    "cuda_memory_peak": "cuda_MiB",
}
"""Name in the loggers -> name in the progress bar, which has little room."""


def _session(trainer: Any) -> Any:
    """The row-wise modules of the run, or None."""
    return getattr(trainer.strategy, "session", None)


def _without_data(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    like = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return like.requires_grad_(leaf.requires_grad)


class _Absorb(torch.autograd.Function):
    """Where the gradient of an argument ends: in the real step it goes on, and is gone when it has been used."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        return None


class _Calls(nn.Module):
    """The calls of a step, one after the other; each argument that has a gradient is as if computed before."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(call.module for call in calls)

    def forward(self, arguments: list[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        results = []
        for part, given in zip(self.parts, arguments, strict=True):
            args, kwargs = tree_map(_absorbing, given)
            results.append(part(*args, **kwargs))
        return results


def _absorbing(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.requires_grad:
        return leaf
    return _Absorb.apply(leaf)  # type: ignore[no-untyped-call]


def _plain(calls: list[_Call], context: Callable[[], Any]) -> StepMemory | None:
    """The calls run plainly on tensors without data, in the precision of the run; None where that cannot be."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), context():
            return measure_fake(_Calls(calls), [(call.args, call.kwargs) for call in calls], record=True)
    except Exception as error:
        warnings.warn(
            f"ActivationMemory draws no plain PyTorch: its modules cannot run on tensors without data "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); the measured "
            "figures are not touched",
            stacklevel=2,
        )
        return None


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


def activation_memory_class() -> type[Any]:
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
    body = {"__doc__": _Hooks.__doc__, "__module__": "lrcnn_lightning.monitor", "__qualname__": "ActivationMemory"}
    return type("ActivationMemory", (_Hooks, *bases), body)
