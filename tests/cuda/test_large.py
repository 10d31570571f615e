"""Maps of more elements than kernels can count in 32 bits, on a GPU that has the memory for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning.planning.machine import MOST_ELEMENTS
from tests.cuda.conftest import NO_GPU

HEIGHT, WIDTH, CHANNELS = 20000, 16384, 8
STRIPS, HALO = 16, 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.SiLU(), nn.Conv2d(CHANNELS, 1, 3, padding=1))


def by_hand(module: nn.Module, x: Tensor) -> None:
    """The gradients of the mean square of the output, strip by strip with what each reads of its neighbours."""
    for strip in range(STRIPS):
        lo, hi = HEIGHT * strip // STRIPS, HEIGHT * (strip + 1) // STRIPS
        first, last = max(0, lo - HALO), min(HEIGHT, hi + HALO)
        output = module(x[:, :, first:last])[:, :, lo - first : hi - first]
        (output.double().square().sum() / (HEIGHT * WIDTH)).backward()


@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_slabs_stay_below_the_limit(mode: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHANNELS * HEIGHT * WIDTH > MOST_ELEMENTS
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free memory on the GPU, has {free / 2**30:.0f}")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, ours = network().to(gpu), network().to(gpu)
    x = torch.randn(1, 1, HEIGHT, WIDTH, device=gpu)
    by_hand(plain, x)
    lrcnn_lightning.rowwise(ours, mode=mode, memory_budget="30GiB")
    output = ours(x)
    found = vars(ours)["forward"].training_plan
    assert found.oversized is None and found.rows > 1
    output.backward(output.detach() * (2 / (HEIGHT * WIDTH)))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()
