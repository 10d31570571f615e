"""Inputs that a module changes in place: the caller's tensors, outputs and gradients are those of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcnn_lightning.graph import capture
from tests.twins import twins, walk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
        )
        self.scale = nn.Parameter(torch.full((3, 1, 1), 1.5))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.25, dtype=torch.float64))

    def prepare(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.prepare(x))


class Numbers(Net):
    """An autoencoder that normalises its input: the loss against it was off, and so was every gradient."""

    def prepare(self, x: Tensor) -> Any:
        x -= 0.5
        x /= 2
        return x


class Buffers(Net):
    def prepare(self, x: Tensor) -> Any:
        return x.sub_(self.mean).div_(self.mean + 1)


class OwnMean(Net):
    def prepare(self, x: Tensor) -> Any:
        mean = x.mean((2, 3), keepdim=True)
        x -= mean
        return x * mean.abs()


class Channel(Net):
    """Through views."""

    def prepare(self, x: Tensor) -> Any:
        x[:, 0] *= 2
        x.select(1, 1).clamp_(-1, 1)
        first = x[:, :1]
        x[:, 2:] += first
        return x + first


class Learned(Net):
    """The input has a gradient afterwards."""

    def prepare(self, x: Tensor) -> Any:
        return x.mul_(self.scale)


class Late(Net):
    """After a layer has read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x * 1, self.c[0].weight, padding=1)
        x.add_(y.detach().mean())
        return self.c(x) + y.mean()


class Zeroed(Net):
    def prepare(self, x: Tensor) -> Any:
        before = x.clone()
        x.zero_()
        x[:, :, ::2] = before[:, :, ::2]
        return x


KINDS = [Numbers, Buffers, OwnMean, Channel, Learned, Late, Zeroed]


def step(net: nn.Module, x: Tensor) -> Any:
    output = net(x)
    F.mse_loss(output, x).backward()
    return output


def behind(net: nn.Module, x: Tensor) -> Any:
    """The input is a result of something else, which has a gradient, too."""
    source = x.clone().requires_grad_()
    given = source * 1.5
    output = net(given)
    F.mse_loss(output, given).backward()
    return output, given, source.grad


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_inputs(kind: type[Net], mode: str) -> None:
    walk(*twins(kind, mode=mode), step=step)
    walk(*twins(kind, mode=mode), step=behind)


def test_a_leaf_that_requires_a_gradient_is_refused_by_pytorch() -> None:
    for net in twins(Numbers):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            net(torch.randn(1, 3, 16, 12, dtype=torch.float64, requires_grad=True))


def test_only_what_must_is_in_the_prefix() -> None:
    graph = capture(Numbers().double(), (torch.randn(1, 3, 16, 12, dtype=torch.float64),))
    assert [str(node.op) for node in graph.prefix.nodes] == ["aten.sub_.Tensor", "aten.div_.Tensor"]
    assert graph.prefix.results == () and len(graph.inputs) == 1
    assert capture(Net().double(), (torch.randn(1, 3, 16, 12, dtype=torch.float64),)).prefix.nodes == ()


def test_without_gradients() -> None:
    plain, ours = twins(OwnMean)
    x, y = (torch.ones(1, 3, 16, 12, dtype=torch.float64).cumsum(3) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(y))
    torch.testing.assert_close(x, y)
