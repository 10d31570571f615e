"""Code whose results nobody reads: what it computes is left out, what it does beside that is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcnn_lightning
from tests.oracle import assert_exact


class Auxiliary(nn.Module):
    """A head that is not read, as in the evaluation of a network with deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.first(x))
        self.head(z).tanh()
        return z


def test_a_plan_with_unread_results_prints() -> None:
    """The head was a segment without rows, of which the report wanted to say how many it has."""
    for segments in (1, 2, 3):
        example = torch.empty(1, 3, 64, 64, device="meta")
        plan = lrcnn_lightning.plan(Auxiliary(), example, mode="two_phase", rows=4, segments=segments)
        assert "s0" in str(plan)
        assert all("head" not in node.module for node in plan.graph.nodes)
    assert_exact(Auxiliary(), torch.randn(2, 3, 12, 9, dtype=torch.float64))


class Effects(nn.Module):
    """Unread results of which running statistics and random numbers remain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.plain = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.norm(self.side(y))
        self.drop(self.plain(y))
        torch.rand(3)
        self.plain(y).mean((2, 3)).softmax(1)
        result: Tensor = self.drop(y)
        return result


def test_unread_results_with_effects() -> None:
    """The convolution before the norm is computed for the statistics, and has no gradient, as in plain PyTorch."""
    for segments in (1, 3):
        assert_exact(Effects(), torch.randn(2, 2, 12, 9, dtype=torch.float64), rows=(1, 3), segments=(segments,))


class Unread(nn.Module):
    """A norm and a resize that only an unread result has to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.InstanceNorm2d(2, affine=True).eval(), nn.PReLU()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y: Tensor = self.act(x)
        torch.cat([y, functional.interpolate(self.norm(other), size=y.shape[2:])], 1)
        return y


def test_weights_that_only_unread_results_need_have_no_gradient() -> None:
    """They had a gradient of zeros."""
    x, other = torch.randn(1, 3, 3, 14, dtype=torch.float64), torch.randn(1, 2, 23, 1, dtype=torch.float64)
    assert_exact(Unread(), x, other, train=None)
