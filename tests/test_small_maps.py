"""Maps with so few rows that there is nothing to divide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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
