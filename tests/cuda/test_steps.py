"""What a step on a GPU must not do (wait), and what it must let others do (capture it as a CUDA graph)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from tests.cuda.conftest import NO_GPU
from tests.cuda.networks import NETWORKS
from tests.oracle import RELATIVE, difference, twin

OPTIONS = [
    {"mode": "two_phase", "rows": 4, "segments": 1, "max_overhead": float("inf")},
    {"mode": "overlap", "rows": 3, "segments": 2, "max_overhead": float("inf")},
]
NAMES = ("VGG", "ResNet", "ResNet, frozen", "U-Net", "U-Net, bilinear", "EfficientNet", "volume")


def _step(module: nn.Module, x: Tensor) -> None:
    module(x).square().mean().backward()


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Captured:
    """A step as one CUDA graph, from an input that stays where it is."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.x = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module.zero_grad(set_to_none=True)
                _step(module, self.x)
        torch.cuda.current_stream().wait_stream(side)
        module.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            _step(module, self.x)

    def replay(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.graph.replay()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["mode"]))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cuda
@NO_GPU
def test_a_step_waits_for_nothing_and_can_be_one_cuda_graph(
    name: str, options: dict[str, object], gpu: torch.device
) -> None:
    """Device and Python wait for each other in the first step alone, which plans and copies constants. A replay on
    another image has the gradients of a plain step on it, and moves running statistics on.
    """
    module, x = NETWORKS[name].made(gpu)
    plain = twin(module)
    _step(lrcnn_lightning.rowwise(module, **options), x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured = Captured(module, x)
    statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name_, buffer in plain.named_buffers():
        buffer.copy_(statistics[name_])
    other = torch.randn_like(x)
    captured.replay(other)
    _step(plain, other)
    want, got = _gradients(plain), _gradients(module)
    assert want.keys() == got.keys()
    for entry, gradient in want.items():
        assert difference(got[entry], gradient) < RELATIVE, entry
    for (entry, buffer), moved in zip(module.named_buffers(), plain.buffers(), strict=True):
        assert difference(buffer, moved) < RELATIVE, entry


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.cuda
@NO_GPU
def test_a_step_under_autocast_as_one_cuda_graph(dtype: torch.dtype, gpu: torch.device) -> None:
    """With the cache of autocast off, as PyTorch asks for in a capture."""
    module, x = NETWORKS["ResNet"].made(gpu)
    module = lrcnn_lightning.rowwise(module.float(), **OPTIONS[0])
    with torch.autocast("cuda", dtype, cache_enabled=False):
        captured = Captured(module, x.float())
    other = torch.randn_like(captured.x)
    module.zero_grad(set_to_none=False)
    captured.replay(other)
    replayed = _gradients(module)
    module.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, cache_enabled=False):
        _step(module, other)
    for entry, gradient in _gradients(module).items():
        # The same kernels, of which some add in any order.
        assert difference(replayed[entry], gradient) < 64 * torch.finfo(dtype).eps, entry
