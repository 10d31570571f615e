"""float32 and half precision on the device: rows are about as near to the float64 step as plain training is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from tests.cuda.networks import NETWORKS
from tests.oracle import observe

TIMES = 4
"""A row-wise error is at most so many times plain training's, and that of one rounding: what a row hands on is rounded
where plain training keeps more digits inside of an operation, and sums are taken in another order."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [{"mode": "two_phase", "segments": 1}, {"mode": "overlap", "segments": 2}]


def errors(module: nn.Module, x: Tensor, dtype: torch.dtype, exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor of a step: the norm of what it is off by, over the norm of what it should be.

    A gradient that is zero, as that of a bias before a live BatchNorm, is a sum whose terms cancel. What is left of it
    is rounding, of terms that are as large as those of other gradients; it is compared with the largest of these.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        found = tensors(module, x)
    scales = {name: float(want.norm()) for name, want in exact.items()}
    result = {}
    for name, want in exact.items():
        largest = max(scale for other, scale in scales.items() if other.split()[0] == name.split()[0])
        scale = scales[name] if scales[name] > 1e-9 * largest else max(largest, 1e-9)
        result[name] = float((found[name].double() - want).norm()) / scale
    return result


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In float64: outputs, gradients and buffers."""
    double = copy.deepcopy(module).double()
    return {name: t for name, t in tensors(double, x.double().requires_grad_()).items() if t.is_floating_point()}


def tensors(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a step shows, by name."""
    return {" ".join(key): value for key, value in observe(module, module, [x], 0).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["VGG", "ResNet, frozen", "U-Net", "ConvNeXt", "volume"])
def test_no_further_from_the_exact_step(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu" and dtype is torch.float16:
        pytest.skip("no kernels worth testing on the CPU")
    # Kernels choose for themselves where they round to TF32, and other slabs may have other kernels.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    module, x = NETWORKS[name].made(device)
    module, x = smooth(module).float(), x.float().requires_grad_()
    exact = step(module, x)
    theirs, rounding = errors(copy.deepcopy(module), x, dtype, exact), torch.finfo(dtype).eps
    for options in OPTIONS if device.type == "cuda" else OPTIONS[:1]:
        ours = lrcnn_lightning.rowwise(copy.deepcopy(module), rows=4, max_overhead=float("inf"), **options)
        for entry, error in errors(ours, x, dtype, exact).items():
            allowed = TIMES * (theirs[entry] + rounding)
            assert error <= allowed, f"{options}, {entry}: off by {error:.1e}, plain training by {theirs[entry]:.1e}"


def smooth(module: nn.Module) -> nn.Module:
    """Without kinks, at which rounding decides which way a gradient goes, plainly or by rows."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        elif isinstance(child, (nn.MaxPool2d, nn.MaxPool3d)):
            kind = nn.AvgPool2d if isinstance(child, nn.MaxPool2d) else nn.AvgPool3d
            setattr(module, name, kind(child.kernel_size, child.stride, child.padding))
        else:
            smooth(child)
    return module
