"""Mean and variance by the kernel of a GPU, which the CPU has as well, against ``torch.var_mean``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrcnn_lightning.rules import moments
from tests.oracle import RELATIVE, difference

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "nchw": lambda: torch.randn(2, 6, 5, 4),
    "channels last": lambda: torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last),
    "one sample, channels last": lambda: torch.randn(1, 6, 5, 4).to(memory_format=torch.channels_last),
    "rows": lambda: torch.randn(2, 6, 9, 4)[:, :, 2:7],
    "rows, channels last": lambda: torch.randn(2, 6, 9, 4).to(memory_format=torch.channels_last)[:, :, 2:7],
    "one channel": lambda: torch.randn(2, 1, 5, 4),
    "one line": lambda: torch.randn(2, 6, 1, 4).to(memory_format=torch.channels_last),
    "volume": lambda: torch.randn(2, 6, 3, 4, 5),
    "volume, channels last": lambda: torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "rows of a volume": lambda: torch.randn(2, 6, 8, 4, 5).to(memory_format=torch.channels_last_3d)[:, :, 1:4],
    "sequence": lambda: torch.randn(3, 6, 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_of_a_gpu(layout: str, device: torch.device) -> None:
    torch.manual_seed(0)
    x = (10 + LAYOUTS[layout]()).double().to(device)
    dims = [0, *range(2, x.dim())]
    for mine, theirs in zip(moments._by_kernel(x), torch.var_mean(x, dims, correction=0), strict=True):
        assert mine.dtype == theirs.dtype and difference(mine, theirs) < RELATIVE


@pytest.mark.parametrize("layout", ["nchw", "rows, channels last", "volume, channels last"])
def test_its_derivatives(layout: str) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout]().double()[:, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(moments._Kernel.apply, x)
    assert torch.autograd.gradgradcheck(moments._Kernel.apply, x)
    only_variance, _ = moments._Kernel.apply(x)
    (mine,) = torch.autograd.grad(only_variance.square().sum(), x)
    dims = [0, *range(2, x.dim())]
    (theirs,) = torch.autograd.grad(torch.var(x, dims, correction=0).square().sum(), x)
    assert difference(mine, theirs) < RELATIVE


@pytest.mark.parametrize("groups", [None, 1, 3, 6])
def test_groups(groups: int | None) -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 6, 5, 4)).double()
    mean, variance = moments.moments(x, groups)
    flat = x.transpose(0, 1).reshape(6, -1) if groups is None else x.reshape(2, groups, -1)
    want_variance, want_mean = torch.var_mean(flat, -1, correction=0)
    assert difference(mean, want_mean) < RELATIVE and difference(variance, want_variance) < RELATIVE
