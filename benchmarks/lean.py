"""LeanResNet against ResNet on pages of handwriting: weights, work, activation memory and accuracy.

    python benchmarks/lean.py                  # five networks, some minutes on two cores
    python benchmarks/lean.py --small          # two networks on small pages, about a minute
    python benchmarks/lean.py --seeds 3        # accuracy as the mean of three runs

Every network is trained twice from the same weights on the same pages, plainly and row-wise, with the parts that
`lrcnn-train` is made of and its configuration. Memory is the deterministic measure of `lrcnn_lightning.monitor`, and
FLOPs are counted, so both are the same on every machine. Seconds are medians of alternating steps, and the time of
row-wise training is their ratio; run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lrcnn_lightning
from lrcnn_lightning.cli.build import build
from lrcnn_lightning.config import format_size
from lrcnn_lightning.monitor import measure_fake

NETWORKS = {
    "ResNet-18": ["model=resnet18"],
    "LeanResNet-18, 5-point": ["model=lean_resnet"],
    "LeanResNet-18, 3 x 3": ["model=lean_resnet", "model.stencil=full"],
    "LeanResNet-18, 5-point, groups of 4": ["model=lean_resnet", "model.group_size=4"],
    "ResNet-18, narrow": ["model=resnet18"],
}
"""Names, and what `lrcnn-train` is given for each."""

NARROW = "ResNet-18, narrow"
"""Has three eighths of the width, which gives it as many weights as the lean network has."""


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    Attributes:
        networks: names in `NETWORKS`.
        width: factor on every network's channels.
        size: height and width of the pages, in pixels.
        scale: enlargement of the digits on a page.
        pages: training pages.
        epochs: passes over them.
        batch_size: pages in a batch.
        learning_rate: the highest of the schedule.
        memory_size: height and width, in pixels, of the one page whose step is measured for memory.
        seeds: training runs of each kind.
        repeats: timed steps of each kind.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    width: float = 0.25
    size: int = 256
    scale: int = 4
    pages: int = 200
    epochs: int = 6
    batch_size: int = 5
    learning_rate: float = 0.003
    memory_size: int = 1024
    seeds: int = 1
    repeats: int = 7


SMALL = Settings(networks=tuple(NETWORKS)[:2], size=128, scale=2, pages=300, batch_size=10)


@dataclass(frozen=True)
class Training:
    """What the runs of one network under one strategy gave.

    Attributes:
        accuracy: validation accuracy at the end, one for each seed.
        loss: validation loss at the end, one for each seed.
    """

    accuracy: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        network: its name.
        parameters: number of trained weights.
        flops: floating-point operations of the forward pass of one page; a zero in a kernel counts as any weight.
        plain_bytes: activation memory of a plain step on one page of ``memory_size``.
        rowwise_bytes: the same, row-wise, under the plan that `strategy=two_phase` chooses.
        plan: the choices of that plan.
        plain_seconds: median seconds of a plain step, forward and backward, on a batch of the training pages' size.
        rowwise_seconds: the same, row-wise; the two kinds of step alternate.
        plain: plain training.
        rowwise: row-wise training.
    """

    network: str
    parameters: int
    flops: int
    plain_bytes: int
    rowwise_bytes: int
    plan: str
    plain_seconds: float
    rowwise_seconds: float
    plain: Training
    rowwise: Training


def configuration(settings: Settings, network: str, strategy: str, seed: int) -> DictConfig:
    """What `lrcnn-train` would be given, for one run."""
    width = settings.width * (0.375 if network == NARROW else 1)
    overrides = [
        *NETWORKS[network],
        f"model.width={width}",
        f"strategy={strategy}",
        f"seed={seed}",
        f"data.size={settings.size}",
        f"data.scale={settings.scale}",
        f"data.train_pages={settings.pages}",
        f"data.batch_size={settings.batch_size}",
        f"optimizer.lr={settings.learning_rate}",
        f"trainer.max_epochs={settings.epochs}",
        f"trainer.check_val_every_n_epoch={settings.epochs}",
        "trainer.accelerator=cpu",
        "trainer.default_root_dir=null",
        "trainer.enable_progress_bar=false",
        "+trainer.enable_checkpointing=false",
        "callbacks=none",
        "logger=none",
    ]
    with initialize_config_module("lrcnn_lightning.conf", version_base="1.3"):
        return compose("train", overrides=overrides)


def training(settings: Settings, network: str, strategy: str) -> Training:
    """Train once for each seed."""
    accuracy, loss = [], []
    for seed in range(settings.seeds):
        config = configuration(settings, network, strategy, seed)
        seed_everything(seed, verbose=False)
        task = build(
            config.task,
            model=build(config.model),
            optimizer=build(config.optimizer),
            scheduler=build(config.scheduler),
        )
        trainer = build(config.trainer, strategy=build(config.strategy) or "auto", callbacks=[], logger=False)
        trainer.fit(task, datamodule=build(config.data))
        accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
        loss.append(float(trainer.callback_metrics["val/loss"]))
    return Training(accuracy, loss)


def step_seconds(settings: Settings, config: DictConfig) -> tuple[float, float]:
    """Median seconds of a plain and of a row-wise step."""
    modules: list[nn.Module] = [build(config.model), build(config.model)]
    lrcnn_lightning.rowwise(modules[1], mode="two_phase")
    images = torch.randn(settings.batch_size, config.data.channels, settings.size, settings.size)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(settings.repeats + 1):
        for module, found in zip(modules, seconds, strict=True):
            module.zero_grad(set_to_none=True)
            start = time.perf_counter()
            module(images).sum().backward()
            if repeat:  # the first step plans and warms up
                found.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def result(settings: Settings, network: str) -> Result:
    """Measure and train one network."""
    config = configuration(settings, network, "two_phase", 0)
    with torch.device("meta"):
        meta: nn.Module = build(config.model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta.eval()(torch.empty(1, config.data.channels, settings.size, settings.size))
    module: nn.Module = build(config.model)
    page = torch.empty(1, config.data.channels, settings.memory_size, settings.memory_size, device="meta")
    plain_bytes = measure_fake(module, page).peak_bytes
    lrcnn_lightning.rowwise(module, mode="two_phase")
    rowwise_bytes = measure_fake(module, page).peak_bytes
    plain_seconds, rowwise_seconds = step_seconds(settings, config)
    choices = module.forward.training_plan.choices  # type: ignore[union-attr]
    return Result(
        network=network,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=counter.get_total_flops(),
        plain_bytes=plain_bytes,
        rowwise_bytes=rowwise_bytes,
        plan=f"{choices.mode}, {choices.rows} rows, {choices.segments} segments",
        plain_seconds=plain_seconds,
        rowwise_seconds=rowwise_seconds,
        plain=training(settings, network, "plain"),
        rowwise=training(settings, network, "two_phase"),
    )


HEADINGS = (
    "network",
    "weights",
    "MFLOPs",
    "memory, plain",
    "memory, row-wise",
    "accuracy, plain",
    "accuracy, row-wise",
    "s a step, plain",
    "time, row-wise",
)


def line(cells: tuple[str, ...]) -> str:
    """A line of the table, in Markdown."""
    return "| " + " | ".join(cells) + " |"


def cells(row: Result) -> tuple[str, ...]:
    """What the table shows of a result."""
    return (
        row.network,
        f"{row.parameters:,}",
        f"{row.flops / 1e6:.0f}",
        format_size(row.plain_bytes),
        format_size(row.rowwise_bytes),
        accuracies(row.plain),
        accuracies(row.rowwise),
        f"{row.plain_seconds:.3f}",
        f"{row.rowwise_seconds / row.plain_seconds:.2f}",
    )


def accuracies(trained: Training) -> str:
    """Mean accuracy, and its standard deviation where there are several seeds."""
    mean = statistics.mean(trained.accuracy)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(trained.accuracy):.2f}" if len(trained.accuracy) > 1 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware and data loaders."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def positive(text: str) -> int:
    """A positive whole number from the command line."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number (given: {text})")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two networks on small pages")
    parser.add_argument("--seeds", type=positive, default=1, help="training runs of each kind (default: 1)")
    parser.add_argument("--epochs", type=positive, help="passes over the pages, instead of 6")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="of PyTorch (default: all cores)")
    parser.add_argument("--output", type=Path, default=Path("outputs/lean.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    settings = replace(SMALL if arguments.small else Settings(), seeds=arguments.seeds)
    if arguments.epochs:
        settings = replace(settings, epochs=arguments.epochs)
    torch.set_num_threads(arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    steps = settings.epochs * math.ceil(settings.pages / settings.batch_size)
    print(f"pages of {settings.size} x {settings.size}, batches of {settings.batch_size}, {steps} steps; FLOPs of the")
    print(f"forward pass of one page; activation memory of a step on one page of {settings.memory_size} pixels squared")
    print()
    print(line(HEADINGS))
    print(line(("---",) + ("---:",) * (len(HEADINGS) - 1)), flush=True)
    results = []
    with quiet():
        for network in settings.networks:
            results.append(result(settings, network))
            print(line(cells(results[-1])), flush=True)
    report = {"settings": asdict(settings), "results": [asdict(row) for row in results]}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {arguments.output}")


if __name__ == "__main__":
    main()
