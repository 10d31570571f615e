"""What nothing is differentiated of: inference, and the frozen first layers of a network that is trained.

It was one segment, however deep, whose carries and maps between barriers were all there at once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning.models.resnet import resnet18
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.keeping import FORWARD_KEEPINGS
from lrcnn_lightning.planning.plan import Plan
from tests.oracle import assert_exact


class Inverted(nn.Module):
    """A wide inside between narrow ends, as in MobileNetV2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        wide = 4 * before
        self.adds = stride == 1 and before == after
        self.body = nn.Sequential(
            *(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def inverted(width: int = 4) -> nn.Sequential:
    """Maps that become smaller, and a head."""
    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
    blocks = [Inverted(width, width, 1), Inverted(width, width, 2), Inverted(width, 2 * width, 2)]
    blocks += [Inverted(2 * width, 2 * width, 1), Inverted(2 * width, 2 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


CHOICES = [
    Choices(mode, rows, forward_segments=segments, forward_keeping=keeping)
    for (mode, rows), segments, keeping in itertools.product(
        (("two_phase", 3), ("overlap", 4)), (1, 3, 6), FORWARD_KEEPINGS
    )
]


@pytest.mark.parametrize("train", [True, False])
def test_inference_in_segments(train: bool) -> None:
    """With live statistics the running ones move on, once."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 41, 30, dtype=torch.float64)
    assert_exact(inverted(), images, train=train, differentiate=False, choices=CHOICES)


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_a_frozen_prefix_in_segments(state: str) -> None:
    torch.manual_seed(0)
    net = inverted()
    for number, layer in enumerate(net):
        layer.requires_grad_(number >= 6)
        layer.train(state == "live" or number >= 6)
    images = torch.randn(2, 3, 41, 30, dtype=torch.float64)
    assert_exact(net, images, train=None, choices=CHOICES)


def plan_and_peak(net: nn.Module, side: int, **options: object) -> tuple[Plan, int]:
    """The plan, and what is measured of it."""
    plan = lrcnn_lightning.plan(net, torch.empty(1, 3, side, side, device="meta"), **options)
    ours = lrcnn_lightning.rowwise(net, plan=plan)
    peak = measure_fake(ours, torch.empty(1, 3, side, side), grad=plan.training).peak_bytes
    lrcnn_lightning.restore(net)
    return plan, peak


def test_inference_takes_a_tenth() -> None:
    """In one segment it took a fourth: of the many rows of a deep network the carries are large."""
    net = inverted(32).eval().requires_grad_(False)
    plan, peak = plan_and_peak(net, 512, memory_budget=None)
    assert plan.peak_bytes == peak and not plan.training
    assert peak <= plan.plain_peak_bytes / 10 and plan.overhead <= 0.35


@pytest.mark.parametrize(("state", "ratio"), [("live", 1.9), ("frozen", 4.8)])
def test_a_frozen_prefix_takes_less(state: str, ratio: float) -> None:
    """With live statistics a map was there between its moments and its use; now it may be computed twice."""
    net = resnet18()
    for name, module in net.named_modules():
        if name and not name.startswith(("layer4", "fc")):
            module.requires_grad_(False).train(state == "live")
    plan, peak = plan_and_peak(net, 1024, memory_budget=None)
    assert abs(plan.peak_bytes / peak - 1) < 0.02
    assert plan.plain_peak_bytes / peak >= ratio and plan.overhead <= 0.35


def test_numbers_that_are_given_hold_for_inference() -> None:
    net = inverted().eval().requires_grad_(False)
    plan, _ = plan_and_peak(net, 128, mode="two_phase", rows=4, segments=3)
    assert plan.explicit.segments == 3 and plan.rows <= 4


def test_what_fits_a_budget_fits_a_larger_one() -> None:
    """Nothing was found for 25 MiB, and for 23 MiB a plan of 22: the search goes other ways when it aims lower."""
    net = resnet18()
    for name, module in net.named_modules():
        if name and not name.startswith(("layer4", "fc")):
            module.requires_grad_(False).eval()
    image = torch.empty(1, 3, 1024, 1024, device="meta")
    plan = lrcnn_lightning.plan(net, image, memory_budget="25MiB", max_overhead=float("inf"))
    assert plan.peak_bytes <= 25 * 2**20
