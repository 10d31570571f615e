"""The networks of the package against plain autograd in float64: every output, gradient and buffer.

Narrow versions of the real architectures (the graphs are the same), at sizes that do not divide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lrcnn_lightning.models import resnet50, vgg16, vgg16_bn
from tests.exact import assert_same_step

Build = Callable[[], nn.Module]

NETWORKS: dict[str, Build] = {
    "vgg16": lambda: vgg16(width=0.0625, num_classes=3),
    "vgg16_bn": lambda: vgg16_bn(width=0.0625, num_classes=3),
    "resnet50": lambda: resnet50(width=0.0625, num_classes=3),
}

CHOICES = [
    {"mode": "two_phase", "rows": 1, "segments": 1},
    {"mode": "two_phase", "rows": 3, "segments": 1},
    {"mode": "two_phase", "rows": 7, "segments": 4, "batch_chunks": 2},
    {"mode": "overlap", "rows": 2, "segments": 1},
    {"mode": "overlap", "rows": 5, "segments": 3, "batch_chunks": 2},
]


def _frozen_statistics(module: nn.Module) -> nn.Module:
    """Training mode with every BatchNorm in eval mode, its affine parameters frozen."""
    module.train()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            child.requires_grad_(False)
    return module


STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda module: module.train(),
    "eval": lambda module: module.eval(),
    "frozen": _frozen_statistics,
}


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize(
    ("name", "state"),
    # Without BatchNorm the state changes nothing.
    [("vgg16", "train"), *itertools.product(("vgg16_bn", "resnet50"), STATES)],
)
def test_float64(name: str, state: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = STATES[state](NETWORKS[name]().double())
    images = torch.randn(2, 3, 71, 50, dtype=torch.float64)
    assert_same_step(module, images, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_of_one_and_a_wide_image(name: str) -> None:
    torch.manual_seed(1)
    module = NETWORKS[name]().double()
    images = torch.randn(1, 3, 40, 99, dtype=torch.float64)
    assert_same_step(module, images, mode="two_phase", rows=6, axis=3)
    assert_same_step(module, images, mode="overlap", rows=3, axis=2)


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32(name: str, mode: str) -> None:
    """To what rounding allows: the row-wise step is as near to the float64 step as the plain float32 step is."""
    torch.manual_seed(2)
    module = NETWORKS[name]()
    images = torch.randn(2, 3, 64, 48)
    assert_same_step(module, images, mode=mode, rows=4, segments=2, tolerance="float32")


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_classic_head_with_dropout_draws_as_plain_training(mode: str) -> None:
    torch.manual_seed(3)
    module = vgg16(width=0.0625, num_classes=3, head="classic").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same_step(module, images, mode=mode, rows=4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 16, 33])
@pytest.mark.parametrize("segments", [1, 2, 5, 9])
@pytest.mark.parametrize("name", NETWORKS)
def test_sweep(name: str, segments: int, rows: int, mode: str) -> None:
    torch.manual_seed(4)
    module = NETWORKS[name]().double()
    images = torch.randn(3, 3, 67, 45, dtype=torch.float64)
    assert_same_step(module, images, mode=mode, rows=rows, segments=segments, batch_chunks=2)


def test_batch_norm_that_averages_over_all_batches() -> None:
    """``momentum=None`` reads the count of batches in Python, which no trace can follow; it is exact all the same."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.ReLU()).double()
    for _ in range(2):  # a mean of several batches, not only of the first
        module(torch.randn(2, 2, 8, 8, dtype=torch.float64))
    images = torch.randn(2, 2, 13, 8, dtype=torch.float64)
    assert_same_step(module, images, mode="two_phase", rows=4)
    assert_same_step(module, images, mode="overlap", rows=3)
    assert_same_step(module.eval(), images, mode="two_phase", rows=4)
    assert module[1].momentum is None


def test_batch_norm_that_averages_over_its_calls_too() -> None:
    """A layer that is called twice counts twice before any rows run, and the mean of the first call was taken for one
    of two batches.
    """

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.before(x))
            result: torch.Tensor = self.norm(y.relu()) + y
            return result

    torch.manual_seed(5)
    module, images = Twice().double(), torch.randn(2, 2, 13, 8, dtype=torch.float64)
    assert_same_step(module, images, mode="two_phase", rows=4)
    assert_same_step(module, images, mode="overlap", rows=3, segments=2)
