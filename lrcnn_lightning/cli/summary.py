"""The end of a run: the plan in force, memory and time side by side with plain PyTorch, and the metric."""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import lrcnn_lightning
from lrcnn_lightning.config import format_size
from lrcnn_lightning.monitor import measure_step

__all__ = ["Measurement", "StepTimer", "Summary", "measure", "summarise"]


class StepTimer(Callback):
    """Take the seconds of every training step, optimizer included, without the time that the data took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        self.seconds.append(_now(pl_module.device) - self._start)

    @property
    def median(self) -> float | None:
        """Median seconds a step, without the first, which plans; ``None`` before the first step is over."""
        steps = self.seconds[1:] or self.seconds
        return statistics.median(steps) if steps else None


@dataclass(frozen=True)
class Measurement:
    """What one training step takes, forward and backward.

    Attributes:
        peak_bytes: activation memory; ``None`` if the step ran out of memory.
        seconds: median seconds a step; ``None`` if no step was run.
        predicted: whether the memory is the planner's prediction, because the step would hardly fit.
    """

    peak_bytes: int | None
    seconds: float | None
    predicted: bool = False

    @property
    def memory_text(self) -> str:
        """Activation memory, for the table."""
        if self.peak_bytes is None:
            return "out of memory"
        return format_size(self.peak_bytes) + (" (predicted)" if self.predicted else "")

    @property
    def seconds_text(self) -> str:
        """Seconds a step, for the table."""
        return "not run" if self.seconds is None else f"{self.seconds:.3f} s"


@dataclass(frozen=True)
class Summary:
    """The figures of a run, as written to ``summary.json``.

    Attributes:
        strategy: the value of option ``mode``, or ``"plain"``.
        metric: name of the metric that the run returns.
        value: its value; ``None`` if it was not logged.
        steps: optimizer steps.
        fit_seconds: wall-clock seconds of the whole training, validation included.
        step_seconds: median seconds of a training step as the user's run had it, optimizer included.
        plain: a step of plain PyTorch; ``None`` if not measured.
        rowwise: a row-wise step; ``None`` if not measured or if the strategy is plain.
    """

    strategy: str
    metric: str
    value: float | None
    steps: int
    fit_seconds: float
    step_seconds: float | None
    plain: Measurement | None
    rowwise: Measurement | None

    def save(self, folder: Path) -> None:
        """Write ``summary.json`` into an existing folder."""
        (folder / "summary.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    def show(self, plans: Mapping[str, Any], console: Console | None = None) -> None:
        """Print the plans in force, by module name, and the table of figures."""
        console = console or Console()
        for name, plan in plans.items():
            console.print(Rule(f"plan in force: {name or 'the whole module'}"))
            console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
        console.print(Rule("summary"))
        if self.plain is not None:
            console.print(self._comparison(self.plain))
        per_step = "" if self.step_seconds is None else f", {self.step_seconds:.3f} s a step (median, with optimizer)"
        console.print(f"strategy {self.strategy}: {self.steps} steps in {self.fit_seconds:.1f} s{per_step}")
        console.print(f"{self.metric}: " + ("not logged" if self.value is None else f"{self.value:.4f}"))

    def _comparison(self, plain: Measurement) -> Table:
        table = Table(caption="one training step, forward and backward")
        table.add_column("")
        table.add_column("plain PyTorch", justify="right")
        memory, seconds = [plain.memory_text], [plain.seconds_text]
        if self.rowwise is not None:
            table.add_column("row-wise", justify="right")
            table.add_column("ratio", justify="right")
            rowwise = self.rowwise
            memory += [rowwise.memory_text, _less(plain.peak_bytes, rowwise.peak_bytes)]
            seconds += [rowwise.seconds_text, _times(rowwise.seconds, plain.seconds)]
        table.add_row("activation memory", *memory)
        table.add_row("seconds a step", *seconds)
        return table


def summarise(
    trainer: Trainer,
    task: LightningModule,
    batch: Any,
    *,
    metric: str,
    value: float | None,
    fit_seconds: float,
    step_seconds: float | None,
    options: dict[str, Any] | None,
    measure_steps: int,
) -> Summary:
    """Gather a run's figures, measuring steps on copies so that the trained module stays as it is.

    Args:
        trainer: the trainer, after ``fit``.
        task: the trained module.  Steps are measured if it has a method ``loss`` that maps a batch to the loss
            and anything else, for it can be called outside a trainer's loop.
        batch: a training batch.
        metric: name of the metric that the run returns.
        value: its value.
        fit_seconds: wall-clock seconds of ``fit``.
        step_seconds: median seconds of a training step.
        options: options of ``rowwise``; ``None`` if the strategy is plain.
        measure_steps: steps that are timed; 0 measures nothing.
    """
    plans: Mapping[str, Any] = {} if options is None else trainer.strategy.plans  # type: ignore[attr-defined]
    plain: Measurement | None = None
    rowwise: Measurement | None = None
    if measure_steps > 0 and hasattr(task, "loss"):
        device = trainer.strategy.root_device
        batch = trainer.precision_plugin.convert_input(move_data_to_device(batch, device))
        context = trainer.precision_plugin.forward_context
        if options is not None and plans:
            module = _training_copy(task, device)
            for name in plans:
                lrcnn_lightning.rowwise(module.get_submodule(name), **options)
            rowwise = measure(module, batch, measure_steps, context)
            del module
        estimate = sum(plan.plain_peak_bytes for plan in plans.values())
        if options is not None and estimate > _free_bytes(device) // 2:
            plain = Measurement(estimate, None, predicted=True)
        else:
            plain = measure(_training_copy(task, device), batch, measure_steps, context)
    return Summary(
        strategy="plain" if options is None else str(options["mode"]),
        metric=metric,
        value=value,
        steps=trainer.global_step,
        fit_seconds=fit_seconds,
        step_seconds=step_seconds,
        plain=plain,
        rowwise=rowwise,
    )


def measure(
    module: Any, batch: Any, steps: int, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Measurement:
    """Measure a training step: once to warm up and plan, once for memory, then ``steps`` times for time.

    Args:
        module: has a method ``loss``, which maps ``batch`` to a tuple whose first item is the loss.
        batch: on the module's device.
        steps: steps that are timed, at least 1.
        context: makes what is entered for each forward pass; sets the precision.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def step() -> None:
        with context():
            loss = module.loss(batch)[0]
        loss.backward()

    try:
        step()
        peak_bytes = measure_step(step, module).peak_bytes
        seconds = []
        for _ in range(steps):
            module.zero_grad(set_to_none=True)
            start = _now(device)
            step()
            seconds.append(_now(device) - start)
    except Exception as error:
        if not (is_oom_error(error) or isinstance(error, MemoryError)):
            raise
        return Measurement(None, None)
    return Measurement(peak_bytes, statistics.median(seconds))


def _training_copy(task: LightningModule, device: torch.device) -> LightningModule:
    return copy.deepcopy(task).to(device).train()


def _now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free_bytes(device: torch.device) -> int:
    """Memory that the device has free; 4 GiB where nothing tells."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


def _less(plain: int | None, rowwise: int | None) -> str:
    """How much less a row-wise step takes, or how much more; nothing where one of them is not known."""
    if not plain or not rowwise:
        return ""
    less, more = (f"{ratio:.1f} x" for ratio in (plain / rowwise, rowwise / plain))
    if less == more:
        return "about the same"
    return f"{less} less" if plain > rowwise else f"{more} more"


def _times(rowwise: float | None, plain: float | None) -> str:
    return "" if not rowwise or not plain else f"{rowwise / plain:.2f} x the time"
