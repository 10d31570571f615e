"""Maps with so few rows that there is nothing to divide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import InputError
from tests.oracle import assert_exact


def rotated(y: Tensor) -> Tensor:
    return torch.cat([y[:, :, 1:], y[:, :, :1]], 2)


def beside(y: Tensor) -> tuple[Tensor, ...]:
    return y[:, :, 1:].tanh(), y[:, :, 1:].sum((2, 3)), y * 2


def split(y: Tensor) -> tuple[Tensor, ...]:
    first, rest = y.split([1, y.shape[2] - 1], 2)
    return first, rest.relu()


class Sliced(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.before, self.function = nn.Conv2d(2, 2, 3, stride=(4, 1), padding=1), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.before(x))


@pytest.mark.parametrize("height", [4, 9])
@pytest.mark.parametrize("function", [rotated, beside, split])
def test_slices_without_rows(function: Callable[[Tensor], object], height: int) -> None:
    """A map of one row, less its first row: it was given a loop over no rows."""
    assert_exact(Sliced(function), torch.randn(2, 2, height, 9, dtype=torch.float64), axis=2)


@pytest.mark.parametrize("options", [{}, {"rows": 1}, {"memory_budget": None}])
def test_an_axis_of_size_one(options: dict[str, object]) -> None:
    """It was an ``IndexError``, or more rows than the 0 rows of the input."""
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with pytest.raises(
        InputError, match=r"axis=-1 has size 1 in an input of shape \[2, 3, 16, 1\]: allowed are 'auto', 2"
    ):
        lrcnn_lightning.plan(layer, torch.randn(2, 3, 16, 1), axis=-1, **options)
    with pytest.raises(InputError, match=r"axis=2 has size 1 in .*: allowed is 'auto'$"):
        lrcnn_lightning.plan(layer, torch.randn(2, 3, 1, 1), axis=2, **options)
    assert lrcnn_lightning.plan(layer, torch.randn(2, 3, 1, 1), **options).mode == "plain"


# --------------------------------------------------------------------------------------------- nothing to gain


class NonLocal(nn.Module):
    """Every position is weighed with every other one (a non-local network), which takes the most by far."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(4, 8, 1)
        self.projections = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        query, key, value = (project(x) for project in self.projections)
        weights = query.flatten(2).transpose(1, 2) @ F.max_pool2d(key, 2).flatten(2)
        seen = torch.softmax(weights, -1) @ F.max_pool2d(value, 2).flatten(2).transpose(1, 2)
        return x + self.last(seen.transpose(1, 2).reshape(x.shape[0], 4, *x.shape[2:]))


class Haar(nn.Module):
    """A convolution of wavelets, which are put together by writes to every second row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (x[:, :, i::2, j::2] / 2 for j in (0, 1) for i in (0, 1))
        maps = torch.cat([a + b + c + d, b + d - a - c, c + d - a - b, a + d - b - c], 1)
        p, q, r, t = self.convolution(maps).chunk(4, 1)
        out = torch.zeros_like(x)
        out[:, :, 0::2, 0::2], out[:, :, 1::2, 0::2] = p - q - r + t, p - q + r - t
        out[:, :, 0::2, 1::2], out[:, :, 1::2, 1::2] = p + q - r - t, p + q + r + t
        return out


@pytest.mark.parametrize(("kind", "size"), [(NonLocal, 128), (Haar, 512)])
def test_plain_where_rows_take_more_memory_and_more_time(kind: type[nn.Module], size: int) -> None:
    """The plan of least extra work took 129 MiB where plain PyTorch takes 97, in half as much time again."""
    x = torch.empty(2, 3, size, size, device="meta")
    plan = lrcnn_lightning.plan(kind(), x, memory_budget=None)
    assert plan.mode == "plain"
    assert plan.peak_bytes == plan.plain_peak_bytes and plan.overhead == 0
    chosen = lrcnn_lightning.plan(kind(), x, mode="two_phase")
    assert chosen.mode == "two_phase", "whoever asks for rows gets them"
    assert chosen.peak_bytes >= plan.peak_bytes and chosen.overhead > 0
    assert chosen.notes
