"""BatchNorm over the batches of several processes: what two of them compute equals one process with the whole batch."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from tests.launching import run_together
from tests.oracle import difference

OPTIONS: list[dict[str, Any]] = [
    {"mode": "two_phase", "rows": 3},
    {"mode": "overlap", "rows": 2, "segments": 2},
    {"mode": "two_phase", "rows": 2, "batch_chunks": 2},
    {"memory_budget": "1GiB"},
]


class Residual(nn.Module):
    """Two branches with BatchNorm each, and one that is called twice, so that the order of the merges matters."""

    def __init__(self, momentum: float | None, affine: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4, momentum=momentum))
        self.left = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=affine))
        self.right = nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem[1](self.stem(x).tanh())  # a norm that is called twice counts twice
        result: Tensor = torch.relu(self.left(x) + self.right(x)).mean((2, 3))
        return result


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Residual(0.1, True).double(), Residual(None, False).double()]


def inputs(sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 3, 13, 10, generator=generator, dtype=torch.float64)
    return x, torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)


def step(module: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one training step."""
    x = x.clone().requires_grad_()
    output = module(x)
    (output * weight).sum().backward()
    found = {"output": output.detach(), "input gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    found |= {f"buffer {name}": b for name, b in module.named_buffers()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def in_one_of_two_processes(rank: int, folder: Path) -> None:
    """Each process has a part of the batch; the parts may differ in size."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for network in networks():
        for sizes in ((2, 2), (3, 1)):
            x, weight = inputs(sizes)
            whole = step(copy.deepcopy(network), x, weight)
            mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
            for options in OPTIONS:
                ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
                found = step(lrcnn_lightning.rowwise(ours, **options), x[mine], weight[mine])
                assert ours.__dict__["forward"].plan.mode != "plain"
                for name, tensor in found.items():
                    want = whole[name]
                    if name in ("output", "input gradient"):
                        want = want[mine]
                    elif name.startswith("gradient"):
                        torch.distributed.all_reduce(tensor)
                    gap = difference(tensor, want)
                    assert gap < 1e-9, f"{options}, batches {sizes}: {name} differs by {gap:.2e}"
    torch.distributed.destroy_process_group()
    (folder / f"done{rank}").touch()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_synchronised_batch_norm_equals_the_whole_batch(tmp_path: Path) -> None:
    arguments = [[str(rank), str(tmp_path)] for rank in range(2)]
    run_together("tests.test_processes", arguments, [os.environ] * 2, tmp_path)


def test_one_process_is_plain_batch_norm() -> None:
    for network in networks():
        x, weight = inputs((2, 2))
        want = step(copy.deepcopy(network), x, weight)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        found = step(lrcnn_lightning.rowwise(ours, mode="two_phase", rows=3), x, weight)
        assert found.keys() == want.keys()
        for name, tensor in found.items():
            assert difference(tensor, want[name]) < 1e-9, name


if __name__ == "__main__":
    in_one_of_two_processes(int(sys.argv[1]), Path(sys.argv[2]))
