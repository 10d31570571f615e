"""``lrcnn-train``: train a network row-wise, or plainly, from a Hydra configuration.

lrcnn-train strategy=two_phase strategy.rows=8 model=resnet50 data.size=1024
lrcnn-train -m strategy=two_phase,overlap strategy.rows=2,4,8
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from omegaconf import DictConfig
from rich.console import Console

from lrcnn_lightning.cli.build import application, build, build_all, causes, strategy_options, user_errors
from lrcnn_lightning.cli.summary import StepTimer, summarise

__all__ = ["main", "train"]


@application("train")
def main(config: DictConfig) -> float | None:
    """Run one job, or one job of a sweep.

    Returns:
        The metric that ``metric`` names; nan for a job of a sweep that ran out of memory, because an error would
        stop the whole sweep.
    """
    try:
        with user_errors():
            return train(config)
    except Exception as error:
        out_of_memory = any(is_oom_error(cause) or isinstance(cause, MemoryError) for cause in causes(error))
        if not out_of_memory or HydraConfig.get().mode != RunMode.MULTIRUN:
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
    # outside of the handler, where the error no longer keeps the job's tensors alive
    garbage_collection_cuda()
    Console(stderr=True).print(f"out of memory, the job's metric is nan: {message}", markup=False, soft_wrap=True)
    return math.nan


def train(config: DictConfig) -> float | None:
    """Train, print the summary and return the metric that ``config.metric`` names; ``None`` if it was not logged.

    Raises:
        ConfigError: for an option that is not allowed.
    """
    # What is quick to refuse comes first: no network is made for a mistyped option.
    strategy: Any = build(config.strategy) or "auto"
    by_rows = not isinstance(strategy, str)  # strategy=plain gives Lightning a name to choose by
    data: LightningDataModule = build(config.data)
    seed_everything(config.seed, workers=True, verbose=False)
    task: LightningModule = build(
        config.task,
        model=build(config.model),
        optimizer=build(config.optimizer),
        scheduler=build(config.scheduler),
    )
    timer = StepTimer()
    trainer = _trainer(config, strategy, timer)
    # The summary's table sets both side by side.
    warnings.filterwarnings("ignore", message="this batch fits without rows")

    start = time.perf_counter()
    trainer.fit(task, datamodule=data, ckpt_path=config.checkpoint)
    fit_seconds = time.perf_counter() - start
    logged = trainer.callback_metrics.get(config.metric)
    value = None if logged is None else float(logged)
    if config.test:
        trainer.test(task, datamodule=data)

    if trainer.is_global_zero:
        summary = summarise(
            trainer,
            task,
            next(iter(data.train_dataloader())),
            metric=config.metric,
            value=value,
            fit_seconds=fit_seconds,
            step_seconds=timer.median,
            options=strategy_options(config) if by_rows else None,
            measure_steps=config.measure_steps,
        )
        summary.show(strategy.plans if by_rows else {})
        folder = Path(HydraConfig.get().runtime.output_dir)
        summary.save(folder)
        print(f"output: {folder}")
    return value


def _trainer(config: DictConfig, strategy: Any, timer: StepTimer) -> Trainer:
    """The Trainer, with the callbacks that go with the loggers: the groups are chosen independently."""
    loggers, callbacks = build_all(config.logger), build_all(config.callbacks)
    if not loggers:  # it refuses to run where there is nothing to log to
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    options: dict[str, Any] = {}
    if "enable_checkpointing" not in config.trainer and not any(isinstance(c, Checkpoint) for c in callbacks):
        options["enable_checkpointing"] = False  # by default Lightning adds a callback that writes them
    made: Trainer = build(
        config.trainer, strategy=strategy, callbacks=[*callbacks, timer], logger=loggers or False, **options
    )
    return made


if __name__ == "__main__":
    main()
