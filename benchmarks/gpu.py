"""Plain PyTorch, checkpointing and rows on a GPU: time, what the allocator counts, and what was predicted.

    python -m benchmarks.gpu                              # minutes on one GPU; says so and stops without one
    python -m benchmarks.gpu --networks vgg16 --side 4096 --channels-last
    python -m benchmarks.gpu --float32

One line for each network and way to train it: plainly, with activation checkpointing around each block, by rows without
a budget (``memory_budget=None``), and by rows in a quarter of plain PyTorch's predicted memory. Time is that of a step,
forward and backward, on the clock: the median of several, each waited for. Memory is the peak of
``max_memory_allocated`` in a step, less what was there before it. It holds the gradients of the weights as far as they
are there at that moment, which budgets and predictions leave out. ConvNeXt is torchvision's, and left out without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcnn_lightning
from lrcnn_lightning.models import UNet, resnet50, vgg16
from lrcnn_lightning.models.resnet import Bottleneck

MIB = 2**20


def frozen(module: nn.Module) -> nn.Module:
    """With BatchNorm as it is, statistics and weights."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.requires_grad_(False).eval()
    return module


def convnext() -> nn.Module:
    import torchvision

    module: nn.Module = torchvision.models.convnext_tiny(stochastic_depth_prob=0.0)
    return module


def stages(module: nn.Module) -> list[nn.Module]:
    """What is checkpointed: residual blocks, blocks of a U-Net, or of a plain stack of layers each layer with work."""
    names = ("CNBlock", "DoubleConv", "UpBlock")
    blocks = [child for child in module.modules() if isinstance(child, Bottleneck) or type(child).__name__ in names]
    return blocks or [child for child in module.modules() if isinstance(child, (nn.Conv2d, nn.MaxPool2d))]


@dataclass(frozen=True)
class Network:
    """How to make it, and its input: samples, and height and width in pixels (None: those of the run)."""

    make: Callable[[], nn.Module]
    samples: int = 1
    side: int | None = None


NETWORKS = {
    "vgg16": Network(vgg16),
    "resnet50": Network(resnet50),
    "resnet50-frozen": Network(lambda: frozen(resnet50())),
    "convnext": Network(convnext),
    "unet-1024": Network(UNet, side=1024),
    "resnet50-batch-128": Network(resnet50, 128, 224),
}


@dataclass(frozen=True)
class Settings:
    """One run: dtype of autocast or None, memory format, side of images in pixels, timed steps."""

    dtype: torch.dtype | None
    layout: torch.memory_format
    side: int
    steps: int


def step(module: nn.Module, x: Tensor, settings: Settings) -> None:
    """Forward and backward."""
    module.zero_grad(set_to_none=True)
    with torch.autocast("cuda", settings.dtype or torch.bfloat16, enabled=settings.dtype is not None):
        output = module(x)
    total = output.float().mean()
    del output
    total.backward()


def measured(module: nn.Module, x: Tensor, settings: Settings) -> tuple[float, float]:
    """Milliseconds and MiB of a step."""
    for _ in range(2):  # the first one plans, and warms up
        step(module, x, settings)
    module.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(settings.steps):
        start = time.perf_counter()
        step(module, x, settings)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), (torch.cuda.max_memory_allocated() - before) / MIB


def checkpointed(module: nn.Module) -> nn.Module:
    """With activation checkpointing around each block."""
    for block in stages(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return module


def ways(make: Callable[[], nn.Module], x: Tensor, settings: Settings) -> Iterator[tuple[str, nn.Module, int | None]]:
    """Name, module, and the peak that was predicted, in bytes."""
    with torch.autocast("cuda", settings.dtype or torch.bfloat16, enabled=settings.dtype is not None):
        plain = lrcnn_lightning.plan(make(), x, memory_budget="1000TiB")
    yield "plain", make(), plain.peak_bytes
    yield "checkpoint by block", checkpointed(make()), None
    for name, budget in (("rows, no budget", None), ("rows, a quarter", plain.peak_bytes // 4)):
        module = lrcnn_lightning.rowwise(make(), memory_budget=budget)
        try:
            step(module, x, settings)
        except lrcnn_lightning.PlanError:
            continue
        forward: Any = vars(module)["forward"]
        found = forward.training_plan
        yield f"{name}: {found.mode}, {found.rows} rows" if found else name, module, found.peak_bytes if found else None


def lines(name: str, settings: Settings) -> Iterator[tuple[str, ...]]:
    """The lines of a network, each as soon as it is there."""
    network = NETWORKS[name]
    side = network.side or settings.side
    x = torch.randn(network.samples, 3, side, side, device="cuda").to(memory_format=settings.layout)

    def make() -> nn.Module:
        torch.manual_seed(0)
        module = network.make().cuda()
        return module.to(memory_format=settings.layout)

    for way, module, predicted in ways(make, x, settings):
        try:
            milliseconds, mib = measured(module, x, settings)
        except torch.OutOfMemoryError:
            figures = ("out of memory", "", "")
        else:
            gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None) / MIB
            figures = (f"{milliseconds:.1f}", f"{mib:.0f}", f"{gradients:.0f}")
        yield name, way, *figures, "" if predicted is None else f"{predicted / MIB:.0f}"
        del module
        torch.cuda.empty_cache()


def positive(text: str) -> int:
    """A positive whole number from the command line."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number (given: {text})")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--side", type=positive, default=2048, help="height and width in pixels (default: 2048)")
    parser.add_argument("--steps", type=positive, default=7, help="timed steps of each (default: 7)")
    parser.add_argument("--float32", action="store_true", help="without autocast (default: bfloat16)")
    parser.add_argument("--channels-last", action="store_true", help="maps and weights channels last")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU that PyTorch can use: nothing is measured.")
        return
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    settings = Settings(None if arguments.float32 else torch.bfloat16, layout, arguments.side, arguments.steps)
    warnings.simplefilter("ignore", UserWarning)  # notes on plans
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print("| network | training | ms a step | peak MiB | of these gradients, at most | predicted MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in arguments.networks:
        if name == "convnext" and importlib.util.find_spec("torchvision") is None:
            continue
        for line in lines(name, settings):
            print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
