"""Buffers that a forward reads and writes: what it sees of them, and what they hold afterwards, is as in plain PyTorch.

Moving averages are kept in this way, by codebooks, centred features, and normalisations written by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning.planning.choices import Choices
from tests.oracle import assert_exact

pytestmark = pytest.mark.filterwarnings("ignore:.*no plan was found", "ignore:.*more than there are places to cut")

CHOICES = [Choices("two_phase", 4, 1, 1, "lean"), Choices("overlap", 3, 2, 2, "narrow")]

Write = Callable[["Averaging", Tensor], object]


class Averaging(nn.Module):
    """Convolution, something that reads a moving average of its result, convolution."""

    def __init__(self, write: Write, order: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.register_buffer("ema", torch.tensor([0.5, -0.25, 1.0, 2.0]))
        self.register_buffer("count", torch.ones((), dtype=torch.long))
        self.write, self.order = write, order

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        if self.order == "write, read":
            self.update(y)
        centred = y - self.ema[None, :, None, None]
        if self.order == "read, write, read":
            self.update(y)
            centred = centred * self.ema[:, None, None].exp()
        result: Tensor = self.last(centred)
        if self.order == "read, write":
            self.update(y)
        return result

    def update(self, y: Tensor) -> None:
        with torch.no_grad():
            self.write(self, y)


def multiplied_and_added(self: Averaging, y: Tensor) -> object:
    """Once the second of two writes was lost: the average decayed and never took the data."""
    return self.ema.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)


def in_two_statements(self: Averaging, y: Tensor) -> object:
    self.ema.mul_(0.9)
    return self.ema.add_(y.mean((0, 2, 3)), alpha=0.1)


def copied(self: Averaging, y: Tensor) -> object:
    return self.ema.copy_(0.9 * self.ema + 0.1 * y.mean((0, 2, 3)))


def interpolated(self: Averaging, y: Tensor) -> object:
    return self.ema.lerp_(y.mean((0, 2, 3)), 0.1)


def without_data(self: Averaging, y: Tensor) -> object:
    """Once all of these were written before the rows read the first."""
    return self.ema.mul_(0.9).add_(1.0)


def counted(self: Averaging, y: Tensor) -> object:
    self.count += 1
    return self.ema.div_(self.count)


def in_part(self: Averaging, y: Tensor) -> object:
    self.ema[0:2] = y.mean((0, 2, 3))[:2]
    return None


def first_without_data(self: Averaging, y: Tensor) -> object:
    self.ema[1:].mul_(0.5)
    self.ema[:2] += y.amax((0, 2, 3))[2:]
    return self.ema.neg_()


def through_detach(self: Averaging, y: Tensor) -> object:
    return self.ema.detach().mul_(0.5).add_(y.mean((0, 2, 3)))


WRITES = [
    multiplied_and_added,
    in_two_statements,
    copied,
    interpolated,
    without_data,
    counted,
    in_part,
    first_without_data,
    through_detach,
]


@pytest.mark.parametrize("order", ["write, read", "read, write", "read, write, read"])
@pytest.mark.parametrize("write", WRITES, ids=[write.__name__ for write in WRITES])
def test_moving_averages(write: Write, order: str) -> None:
    torch.manual_seed(0)
    assert_exact(Averaging(write, order), torch.randn(2, 3, 14, 9, dtype=torch.float64), choices=CHOICES)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        offsets = torch.ones(4, 1, 1, dtype=y.dtype)
        first = y + offsets
        offsets[1:].mul_(0.5)
        return first.tanh() + (y + offsets).sigmoid()


def test_memory_that_is_no_buffer() -> None:
    torch.manual_seed(0)
    assert_exact(Shifted(), torch.randn(2, 3, 14, 9, dtype=torch.float64), choices=CHOICES)


@pytest.mark.parametrize("order", ["write, read", "read, write"])
def test_step_after_step(order: str) -> None:
    """What one call writes, the next one reads."""
    torch.manual_seed(0)
    plain = Averaging(multiplied_and_added, order).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(plain), mode="two_phase", rows=4)
    for _ in range(3):
        images = torch.randn(2, 3, 14, 9, dtype=torch.float64)
        want, got = plain(images), ours(images)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        for net, result in ((plain, want), (ours, got)):
            net.zero_grad()
            result.square().mean().backward()
        for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
        for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_statistics_that_another_pass_moves_on() -> None:
    """An evaluation pass with gradient, then a training pass, and one backward pass over both.

    The training pass moves the running statistics that the evaluation pass has read; it raised that they were changed
    in place. The gradient is that of what was computed: plain PyTorch, which differentiates with the statistics of
    later, agrees where a copy of the network does the training pass.
    """
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    other, images = copy.deepcopy(plain), torch.randn(2, 3, 14, 9, dtype=torch.float64)
    for options in ({"mode": "two_phase", "rows": 4}, {"mode": "overlap", "rows": 3, "segments": 2, "batch_chunks": 2}):
        ours = lrcnn_lightning.rowwise(copy.deepcopy(plain), **options)
        evaluated = ours.eval()(images)
        trained = ours.train()(images + 1)
        (evaluated.square().sum() + trained.exp().sum()).backward()
        for net in (plain, other):
            net.zero_grad()
            net.load_state_dict(lrcnn_lightning.restore(ours).state_dict())
            net[1].reset_running_stats()
        plain.eval()(images).square().sum().backward()
        other.train()(images + 1).exp().sum().backward()
        for mine, first, second in zip(ours.parameters(), plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, first.grad + second.grad, rtol=1e-9, atol=1e-11)
        for mine, theirs in zip(ours.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


class SharedHead(nn.Module):
    """One head for several levels of a pyramid, as detectors have it; the finest level comes first and is made last."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(4, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.merge = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        merged = self.merge(fine + nn.functional.interpolate(coarse, scale_factor=2))
        return self.head(merged), self.head(coarse)


def test_statistics_are_updated_in_the_order_of_the_calls() -> None:
    """The second call of a layer, whose input is there sooner than that of the first, updated the statistics first."""
    assert_exact(SharedHead(), torch.randn(2, 3, 16, 16, dtype=torch.float64), choices=CHOICES)
    assert_exact(SharedHead(), torch.randn(2, 3, 16, 16, dtype=torch.float64), rows=(1, 4), segments=(1, 3))
