"""LeanResNet against ResNet: weights, work and activation memory, and accuracy and time on pages of handwriting.

    python benchmarks/lean.py                  # five networks, some minutes on one core
    python benchmarks/lean.py --small          # two networks, a minute or two
    python benchmarks/lean.py --seeds 10       # accuracy as the mean of ten runs

Two tables are printed. Weights, operations and memory are the same on every machine: operations are counted, and memory
is the deterministic measure of `lrcnn_lightning.monitor` on plans that are chosen for the limits of extra work in the
table. Then every network is trained plainly and in a fixed number of rows, from the same weights on the same pages,
with the parts that `lrcnn-train` is made of and its configuration. Time is that of the processor and not of the clock,
with one thread, and the steps of all networks take turns, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.warnings import PossibleUserWarning
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
        memory_widths: factors on every network's channels, each of which gives a line of the first table.
        memory_size: height and width, in pixels, of the one page whose step is measured for memory.
        max_overheads: limits of predicted extra work, as fractions of plain work, for which plans are chosen there.
        width: factor on every network's channels in training.
        size: height and width of the pages, in pixels.
        scale: enlargement of the digits on a page.
        pages: training pages.
        epochs: passes over them.
        batch_size: pages in a batch.
        learning_rate: the highest of the schedule.
        rows: of row-wise training.
        seeds: training runs of each kind.
        repeats: timed steps of each kind.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    memory_widths: tuple[float, ...] = (0.25, 1.0)
    memory_size: int = 1024
    max_overheads: tuple[float, ...] = (0.35, 1.0)
    width: float = 0.25
    size: int = 128
    scale: int = 2
    pages: int = 300
    epochs: int = 6
    batch_size: int = 10
    learning_rate: float = 0.003
    rows: int = 4
    seeds: int = 3
    repeats: int = 9


SMALL = Settings(networks=tuple(NETWORKS)[:2], memory_widths=(0.25,), pages=150, seeds=2)


@dataclass(frozen=True)
class Planned:
    """A row-wise step under one plan.

    Attributes:
        max_overhead: the limit that the plan was chosen for.
        peak_bytes: activation memory of the step, measured.
        overhead: predicted extra work, as a fraction of the plain step's.
        plan: its rows and segments.
    """

    max_overhead: float
    peak_bytes: int
    overhead: float
    plan: str


@dataclass(frozen=True)
class Memory:
    """A line of the first table.

    Attributes:
        network: its name.
        width: factor on its channels (before the narrow one's own).
        parameters: number of trained weights.
        flops: floating-point operations of the forward pass of one page; a zero in a kernel counts as any weight.
        plain_bytes: activation memory of a plain step on one page.
        rowwise: the same, row-wise, for each limit of extra work.
    """

    network: str
    width: float
    parameters: int
    flops: int
    plain_bytes: int
    rowwise: list[Planned]


@dataclass(frozen=True)
class Trained:
    """What the runs of one network gave.

    Attributes:
        accuracy: validation accuracy at the end, one for each seed.
        loss: validation loss at the end, one for each seed.
    """

    accuracy: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Training:
    """A line of the second table.

    Attributes:
        network: its name.
        plan: rows and segments of its row-wise steps.
        plain_seconds: processor seconds of a plain step, forward and backward, on one batch; the median.
        rowwise_seconds: the same, row-wise.
        plain: plain training.
        rowwise: row-wise training.
    """

    network: str
    plan: str
    plain_seconds: float
    rowwise_seconds: float
    plain: Trained
    rowwise: Trained


def configuration(settings: Settings, network: str, *overrides: str, width: float | None = None) -> DictConfig:
    """What `lrcnn-train` would be given, for one run; ``width`` is that of the settings unless given."""
    width = (width or settings.width) * (0.375 if network == NARROW else 1)
    fixed = [
        *NETWORKS[network],
        f"model.width={width}",
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
        return compose("train", overrides=[*fixed, *overrides])


def described(module: nn.Module) -> str:
    """Rows and segments of the plan by which a row-wise module was trained last."""
    segments = [segment for segment in module.forward.training_plan.segments if not segment.plain]
    rows = sorted({len(loop.rows) for segment in segments for loop in segment.loops()})
    if not segments:
        return "plain"
    most, count = rows[-1], len(segments)
    span = f"{most}" if len(rows) == 1 else f"{rows[0]} to {most}"
    return f"{span} row{'s'[: most > 1]}, {count} segment{'s'[: count > 1]}"


def memory(settings: Settings, network: str, width: float) -> Memory:
    """Measure one network without computing anything."""
    config = configuration(settings, network, width=width)
    shape = (1, config.data.channels, settings.memory_size, settings.memory_size)
    page = torch.empty(shape, device="meta")
    with torch.device("meta"):
        meta: nn.Module = build(config.model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta.eval()(page)
    module: nn.Module = build(config.model)
    plain_bytes = measure_fake(module, page).peak_bytes
    rowwise = []
    for limit in settings.max_overheads:
        lrcnn_lightning.rowwise(module, mode="two_phase", max_overhead=limit)
        peak = measure_fake(module, page).peak_bytes
        rowwise.append(Planned(limit, peak, module.forward.training_plan.overhead, described(module)))
        lrcnn_lightning.restore(module)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Memory(network, width, parameters, counter.get_total_flops(), plain_bytes, rowwise)


def trained(settings: Settings, network: str, *strategy: str) -> Trained:
    """Train once for each seed."""
    accuracy, loss = [], []
    for seed in range(settings.seeds):
        config = configuration(settings, network, f"seed={seed}", *strategy)
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
    return Trained(accuracy, loss)


def step_seconds(settings: Settings) -> dict[str, tuple[float, float, str]]:
    """For each network, median processor seconds of a plain and of a row-wise step, and the plan of the latter."""
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for network in settings.networks:
        config = configuration(settings, network)
        pairs[network] = (build(config.model), build(config.model))
        lrcnn_lightning.rowwise(pairs[network][1], mode="two_phase", rows=settings.rows)
    images = torch.randn(settings.batch_size, config.data.channels, settings.size, settings.size)
    seconds: dict[tuple[str, int], list[float]] = {}
    for repeat in range(settings.repeats + 1):
        for network, pair in pairs.items():
            for kind, module in enumerate(pair):
                module.zero_grad(set_to_none=True)
                start = time.process_time()
                module(images).sum().backward()
                if repeat:  # the first step plans and warms up
                    seconds.setdefault((network, kind), []).append(time.process_time() - start)
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    return {name: (medians[name, 0], medians[name, 1], described(pair[1])) for name, pair in pairs.items()}


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table in Markdown, each row as soon as it is there."""
    print("| " + " | ".join(headings) + " |")
    print("| " + " | ".join(("---",) + ("---:",) * (len(headings) - 1)) + " |", flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def memory_cells(row: Memory) -> tuple[str, ...]:
    """What the first table shows of a network."""
    planned = [
        text
        for found in row.rowwise
        for text in (f"{format_size(found.peak_bytes)} ({100 * found.overhead:+.0f} %)", found.plan)
    ]
    work = f"{row.flops / 1e9:.1f}"
    return (row.network, f"{row.width:g}", f"{row.parameters:,}", work, format_size(row.plain_bytes), *planned)


def training_cells(row: Training) -> tuple[str, ...]:
    """What the second table shows of a network."""
    ratio = row.rowwise_seconds / row.plain_seconds
    times = (f"{row.plain_seconds:.3f}", f"{ratio:.2f}")
    return (row.network, accuracies(row.plain), accuracies(row.rowwise), *times, row.plan)


def accuracies(found: Trained) -> str:
    """Mean accuracy, and its standard deviation where there are several seeds."""
    mean = statistics.mean(found.accuracy)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(found.accuracy):.2f}" if len(found.accuracy) > 1 else "")


def measure(settings: Settings) -> tuple[list[Memory], list[Training]]:
    """Print both tables, and return what is in them."""
    first: list[Memory] = []
    second: list[Training] = []
    print(f"One page of {settings.memory_size} x {settings.memory_size}: GFLOPs of the forward pass, activation memory")
    print(
        "of a training step, and, for each limit of extra work, that of a row-wise step with its extra work and plan\n"
    )
    limits = [text for limit in settings.max_overheads for text in (f"max_overhead={limit:g}", "plan")]

    def memories() -> Iterable[tuple[str, ...]]:
        for width in settings.memory_widths:
            for network in settings.networks:
                first.append(memory(settings, network, width))
                yield memory_cells(first[-1])

    table(("network", "width", "weights", "GFLOPs", "memory, plain", *limits), memories())
    steps = settings.epochs * math.ceil(settings.pages / settings.batch_size)
    print(f"\nWidth {settings.width:g}, pages of {settings.size} x {settings.size}, batches of {settings.batch_size},")
    print(f"{steps} steps, {settings.seeds} seeds; row-wise in {settings.rows} rows\n")
    seconds = step_seconds(settings)

    def trainings() -> Iterable[tuple[str, ...]]:
        for network in settings.networks:
            plain, rowwise, plan = seconds[network]
            runs = (
                trained(settings, network, "strategy=plain"),
                trained(settings, network, "strategy=two_phase", f"strategy.rows={settings.rows}"),
            )
            second.append(Training(network, plan, plain, rowwise, *runs))
            yield training_cells(second[-1])

    headings = ("network", "accuracy, plain", "accuracy, row-wise", "s a step, plain", "time, row-wise", "plan")
    table(headings, trainings())
    return first, second


def positive(text: str) -> int:
    """A positive whole number from the command line."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number (given: {text})")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two networks, and one width")
    parser.add_argument("--seeds", type=positive, help="training runs of each kind (default: 3)")
    parser.add_argument("--epochs", type=positive, help="passes over the pages (default: 6)")
    parser.add_argument("--output", type=Path, default=Path("outputs/lean.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("seeds", "epochs") if getattr(arguments, name)}
    settings = replace(SMALL if arguments.small else Settings(), **given)
    torch.set_num_threads(1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # Lightning's remarks on hardware and data loaders are left out.  What plans have to say is not.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", PossibleUserWarning)
    first, second = measure(settings)
    report = {
        "settings": asdict(settings),
        "memory": [asdict(row) for row in first],
        "training": [asdict(row) for row in second],
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {arguments.output}")


if __name__ == "__main__":
    main()
