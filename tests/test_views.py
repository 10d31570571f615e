"""In-place operations on feature maps and on views of them: what later readers see is what PyTorch shows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrcnn_lightning.planning.choices import Choices
from tests.oracle import assert_exact, roles

CHOICES = [Choices("two_phase", 3, 1, 1, "lean"), Choices("overlap", 4, 2, 2, "narrow"), Choices("overlap", 2)]


class Around(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.function(self.before(x)))
        return result


def assign_channels(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0:2] = y[:, 2:] * 2
    return y


def assign_into_zeros(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def assign_rows(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


def assign_a_number(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 0.5
    return y


def one_channel(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = x[:, 0].sigmoid()
    y[:, 3].mul_(2)
    return y


def narrowed(x: Tensor) -> Tensor:
    y = x.narrow(1, -2, 2)
    y.tanh_()
    return torch.cat([x, y], 1)[:, 2:]


def view_of_a_view(x: Tensor) -> Tensor:
    view = x.view(2, 2, 2, 11, 9)
    view[:, 0].mul_(3)
    second = view[:, 1]
    x.add_(1)
    return torch.cat([second, x[:, :2]], 1)


def permuted(x: Tensor) -> Tensor:
    view = x.permute(0, 2, 3, 1)
    view[..., 1].exp_()
    return x * view.permute(0, 3, 1, 2)


def transposed(x: Tensor) -> Tensor:
    x.transpose(1, 3)[..., 2].sin_()
    return x


def written_through_the_base(x: Tensor) -> Tensor:
    view = x[:, :2]
    x.mul_(2)
    between = view + 1
    x.add_(1)
    return torch.cat([between, view], 1)


def unsqueezed(x: Tensor) -> Tensor:
    view = x.unsqueeze(1)
    view.add_(1).exp_()
    return x


def flattened(x: Tensor) -> Tensor:
    view = x.flatten(2)
    x = torch.relu_(x)
    return view.view_as(x) + x


def temporal_shift(x: Tensor) -> Tensor:
    """The shift of TSM (Lin, Gan, Han 2019): some channels come from the frame before or after."""
    out = torch.zeros_like(x)
    out[:-1, :1] = x[1:, :1]
    out[1:, 1:2] = x[:-1, 1:2]
    out[:, 2:] = x[:, 2:]
    return out


def partial_convolution(x: Tensor) -> Tensor:
    """FasterNet (Chen et al. 2023) works on the first channels in place."""
    x = x.clone()
    x[:, :2] = nn.functional.avg_pool2d(x[:, :2].clone(), 3, 1, 1)
    return x


CASES: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (assign_channels, []),
    (assign_into_zeros, []),
    (assign_rows, ["aten.slice_scatter.default"]),
    (assign_a_number, []),
    (one_channel, []),
    (narrowed, []),
    (view_of_a_view, []),
    (permuted, []),
    (transposed, []),
    (written_through_the_base, []),
    (unsqueezed, []),
    (flattened, ["aten.flatten.using_ints", "aten.view_as.default"]),
    (temporal_shift, []),
    (partial_convolution, []),
]


@pytest.mark.parametrize(("function", "whole"), CASES, ids=[function.__name__ for function, _ in CASES])
def test_views(function: Callable[[Tensor], Tensor], whole: list[str]) -> None:
    torch.manual_seed(0)
    graph = assert_exact(Around(function), torch.randn(2, 4, 11, 9, dtype=torch.float64), choices=CHOICES)
    assert roles(graph)["whole"] == whole
