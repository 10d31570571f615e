"""Budgets and predictions against what the device counts: ``max_memory_allocated`` on a GPU, the meter on the CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcnn_lightning
from lrcnn_lightning.models import UNet, resnet18, vgg16
from lrcnn_lightning.monitor import measure_module
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.workspace import kernel_call
from tests.cuda.conftest import NO_GPU
from tests.cuda.networks import NETWORKS

MIB = 2**20


def _networks() -> dict[str, nn.Module]:
    """So narrow that the gradients of weights, which are no activation memory, are nothing beside the maps."""
    return {
        "VGG": vgg16(width=0.25).get_submodule("features"),
        "ResNet": resnet18(width=0.25),
        "U-Net": UNet(base_channels=16, depth=3),
    }


def _measured(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> int:
    """The peak of a step, less what was there before it, in bytes."""
    if not x.is_cuda:
        measure_module(module, x)
        return measure_module(module, x).peak_bytes
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            output = module(x)
        total = output.sum()
        del output
        total.backward()
        del total
        peak = torch.cuda.max_memory_allocated(x.device) - before
    return peak


NCHW, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [
        pytest.param("VGG", None, NCHW, id="VGG-float32-nchw"),
        pytest.param("VGG", torch.bfloat16, NCHW, id="VGG-bfloat16-nchw"),
        pytest.param("VGG", torch.bfloat16, LAST, id="VGG-bfloat16-channels_last"),
        pytest.param("U-Net", torch.bfloat16, NCHW, id="U-Net-bfloat16-nchw"),
        pytest.param("ResNet", torch.bfloat16, NCHW, id="ResNet-bfloat16-nchw"),
        pytest.param("ResNet", torch.bfloat16, LAST, id="ResNet-bfloat16-channels_last"),
    ],
)
def test_budgets_hold(name: str, dtype: torch.dtype | None, layout: torch.memory_format, device: torch.device) -> None:
    """A peak is never more than 2 % above the budget, and within 10 % of what was predicted."""
    if device.type == "cpu" and dtype is not None:
        pytest.skip("workspaces are a GPU's")
    module = _networks()[name].to(device).to(memory_format=layout)
    side, share = (2048, 3) if device.type == "cuda" else (192, 2)
    x = torch.randn(1, 3, side, side, device=device).to(memory_format=layout)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        plain = lrcnn_lightning.plan(module, x, memory_budget="1000GiB")
    assert plain.mode == "plain"
    plain_peak = _measured(module, x, dtype)
    assert plain.peak_bytes == pytest.approx(plain_peak, rel=0.10), f"plain: {plain_peak / MIB:.0f} MiB"
    budget = plain.peak_bytes // share
    lrcnn_lightning.rowwise(module, memory_budget=budget)
    peak = _measured(module, x, dtype)
    found: Any = vars(module)["forward"].training_plan
    assert isinstance(found, Plan)
    shown = f"{peak / MIB:.0f} MiB, predicted {found.peak_bytes / MIB:.0f}, budget {budget / MIB:.0f}"
    assert found.peak_bytes <= budget and peak <= 1.02 * budget, shown
    assert found.peak_bytes == pytest.approx(peak, rel=0.10), shown


class Unseen(TorchDispatchMode):
    """What operations take of a GPU for themselves, in bytes by name: the most of each, unless it is predicted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.most = device, defaultdict[str, int](int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = func(*args, **(kwargs or {}))
        held = max(before, torch.cuda.memory_allocated(self.device))
        if kernel_call(func, args, kwargs or {}) is None:
            taken = torch.cuda.max_memory_allocated(self.device) - held
            self.most[str(func)] = max(self.most[str(func)], taken)
        return result


@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt", "U-Net, bilinear", "EfficientNet", "volume"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_no_kernel_takes_more_than_is_predicted(name: str, last: bool, gpu: torch.device) -> None:
    """``torch.var_mean`` took 256 MiB for the moments of a slab of 32, channels last."""
    module, x = NETWORKS[name].made(gpu)
    x = torch.nn.functional.interpolate(x.float(), scale_factor=2.0)
    layout = torch.preserve_format
    if last:
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    module, x = module.float().to(memory_format=layout), x.to(memory_format=layout)
    lrcnn_lightning.rowwise(module, mode="two_phase", rows=2, segments=2, max_overhead=float("inf"))
    with torch.autocast("cuda", torch.bfloat16):
        module(x).sum().backward()
    largest = x.numel() * 4
    with torch.autograd.set_multithreading_enabled(False), Unseen(gpu) as unseen:
        with torch.autocast("cuda", torch.bfloat16):
            output = module(x)
        output.sum().backward()
    assert {name: taken for name, taken in unseen.most.items() if taken > max(largest, 2 * MIB)} == {}


@pytest.mark.cuda
@NO_GPU
def test_planning_leaves_the_statistics_of_the_allocator_alone(gpu: torch.device) -> None:
    module = vgg16(width=0.25).to(gpu)
    x = torch.randn(1, 3, 256, 256, device=gpu)
    module(x).sum().backward()
    before = torch.cuda.max_memory_allocated(gpu)
    lrcnn_lightning.plan(module, x, mode="overlap", rows=4)
    after = torch.cuda.max_memory_allocated(gpu)
    assert after >= before, "the peak so far was not forgotten"
