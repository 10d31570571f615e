"""Resizing by a scale that is not the exact ratio of the sizes.

ATen does not do there what the scale says: it copies some axes of unchanged size and not others, in some modes and
kernels, forward or backward only (`rules/sampling.py`). Rows once followed the scale alone: a bilinear map whose height
stayed 16 under the scale 1.05 came out moved, a bicubic one whose width stayed 4 under 1.2 came out copied, and the
gradient of a nearest one doubled by 2.2 went to other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracle import assert_exact

SCALES = (0.7, 1.05, 1.2, 1.5, 2.01, 2.2, 2.7)
UNEVEN = {
    1: [(0.3,), (0.99,), (1.0,), (2.0,), (2.5,), (3.1,)],
    2: [(1.0, 1.2), (1.2, 1.0), (1.05, 2.0), (2.0, 1.05), (1.05, 1.3), (2.2, 2.01)],
    3: [(1.0, 1.2, 1.0), (1.2, 1.0, 1.05), (1.05, 2.0, 2.2)],
}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


class Resized(nn.Module):
    """A convolution, whose map is resized by each of some scales."""

    def __init__(self, channels: int, mode: str, scales: Sequence[Any], dimensions: int, last: bool) -> None:
        super().__init__()
        self.before = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](channels, channels, 3, padding=1)
        self.mode, self.scales, self.format = mode, scales, FORMATS[dimensions] if last else None

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x if self.format is None else x.contiguous(memory_format=self.format)
        y = self.before(x)
        return [functional.interpolate(y, scale_factor=scale, mode=self.mode) for scale in self.scales]


def _resized(size: tuple[int, ...], mode: str, channels: int, last: bool) -> None:
    torch.manual_seed(1)
    scales = [scale for scale in SCALES if int(min(size) * scale) > 0] + UNEVEN[len(size)]
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    for axis in range(2, 2 + len(size)):
        assert_exact(Resized(channels, mode, scales, len(size), last), x, rows=(3,), segments=(1,), axis=axis)


SIZES: list[tuple[int, ...]] = [(16,), (7,), (16, 9), (4, 3), (9, 4), (5, 4, 3)]
MODES = ("nearest", "nearest-exact", "linear", "bicubic")


@pytest.mark.parametrize(
    ("size", "mode"), [(size, mode) for size in SIZES for mode in MODES if mode != "bicubic" or len(size) == 2]
)
def test_scales(size: tuple[int, ...], mode: str) -> None:
    _resized(size, LINEAR[len(size)] if mode == "linear" else mode, 2, last=False)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(
    ("size", "last"), [((16, 70), False), ((16, 70), True), ((70, 16), False), ((7, 9), True), ((7, 4, 5), True)]
)
def test_kernels_of_nearest(size: tuple[int, ...], last: bool, mode: str) -> None:
    """ATen chooses one by the memory format and by the size of the whole result, of which rows are a part."""
    _resized(size, mode, 5, last)
