"""Dropout and stochastic depth: one mask a step, the same for every row and for what is computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from tests.oracle import differences, observe


class Masked(nn.Module):
    """Dropout with the draws that rows make: bits for the whole map, before anything is computed of it."""

    def __init__(self, p: float, whole_channels: bool) -> None:
        super().__init__()
        self.p, self.whole_channels = p, whole_channels

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], *([1] * (x.dim() - 2))) if self.whole_channels else x.shape
        mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p)
        return x * mask / (1 - self.p)


class StochasticDepth(nn.Module):
    def __init__(self, body: nn.Module, p: float) -> None:
        super().__init__()
        self.body, self.p = body, p

    def forward(self, x: Tensor) -> Tensor:
        survives = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x + self.body(x) * survives / (1 - self.p)


def network(dropout: Callable[[float, bool], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        dropout(0.3, False),
        StochasticDepth(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()), 0.4),
        dropout(0.5, True),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
    ).double()


def of_torch(p: float, whole_channels: bool) -> nn.Module:
    return nn.Dropout2d(p) if whole_channels else nn.Dropout(p)


@pytest.mark.parametrize("options", [{"mode": "two_phase"}, {"mode": "overlap", "segments": 2}], ids=str)
def test_one_mask_a_step(options: dict[str, object], device: torch.device) -> None:
    x = torch.randn(4, 3, 40, 24, dtype=torch.float64, device=device, requires_grad=True)
    reference = network(Masked).to(device)
    module = lrcnn_lightning.rowwise(network(of_torch).to(device), rows=5, **options)
    for seed in (1, 2):
        want = observe(reference, reference, [x], seed)
        got = observe(module, module, [x], seed)
        assert not differences(got, want), differences(got, want)
        for trained in (reference, module):
            trained.zero_grad()
    other = observe(module, module, [x], 3)
    assert differences(other, want), "another seed has other masks"


def test_randomness_goes_on_from_step_to_step(device: torch.device) -> None:
    """Recomputation takes no random numbers: whatever is drawn after a step is what plain training would draw."""
    x = torch.randn(2, 3, 40, 24, dtype=torch.float64, device=device)
    after = []
    for make in (Masked, of_torch):
        module = network(make).to(device)
        if make is of_torch:
            lrcnn_lightning.rowwise(module, mode="overlap", rows=4)
            copy.deepcopy(module)(x)  # the capture draws nothing either
        torch.manual_seed(5)
        module(x).sum().backward()
        after.append(torch.rand(4, device=device))
    assert torch.equal(*after)
