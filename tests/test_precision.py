"""Half precision and autocast: row-wise results have the dtypes of plain ones, and are no further from exact ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcnn_lightning
from lrcnn_lightning.rules import precision

OPTIONS: list[dict[str, Any]] = [
    {"mode": "two_phase", "rows": 3, "max_overhead": float("inf")},
    {"mode": "overlap", "rows": 2, "segments": 2, "max_overhead": float("inf")},
]


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, maps: Tensor) -> Tensor:
        return self.function(maps)


ENDS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(6),
    "BatchNorm without weights": lambda: nn.BatchNorm2d(6, affine=False),
    "BatchNorm over all batches": lambda: nn.BatchNorm2d(6, momentum=None),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "LayerNorm over space": lambda: nn.LayerNorm([6, 16, 12]),
    "LayerNorm of channels": lambda: Apply(lambda x: functional.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)),
    "sum": lambda: Apply(lambda x: x.sum((2, 3))),
    "mean": lambda: Apply(lambda x: x.mean((2, 3))),
    "norm": lambda: Apply(lambda x: torch.linalg.vector_norm(x, dim=(2, 3))),
    "global pooling": lambda: nn.AdaptiveAvgPool2d(1),
    "transposed convolution": lambda: nn.ConvTranspose2d(6, 4, 2, stride=2),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "softmax": lambda: nn.Softmax(1),
}


def network(end: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), ENDS[end]())


def observed(module: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(x)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weight.to(output.dtype)).sum().backward()
    found = {"output": output.detach(), "input gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    found |= {f"buffer {name}": b for name, b in module.named_buffers()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_no_further(exact: dict[str, Tensor], plain: dict[str, Tensor], ours: dict[str, Tensor], eps: float) -> None:
    """Of the same dtype and about as far from the exact ones, tensor by tensor.

    The gradient of a normalisation is rounded twice by rows: what comes from the map, and from the statistics.
    """
    assert list(exact) == list(plain) == list(ours)
    for name, want in exact.items():
        assert plain[name].dtype == ours[name].dtype, f"{name}: {ours[name].dtype}, plainly {plain[name].dtype}"
        theirs, mine = (float((made[name].double() - want.double()).abs().max()) for made in (plain, ours))
        scale = float(want.double().abs().max())
        assert mine <= 4 * (theirs + eps * scale), f"{name}: off by {mine} of {scale}, plainly by {theirs}"


@pytest.mark.parametrize("options", OPTIONS, ids=["two_phase", "overlap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("end", ENDS)
def test_half_precision(end: str, dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2))
    exact = observed(network(end).double(), x.double(), False)
    plain, ours = (network(end).to(dtype or torch.float32) for _ in range(2))
    lrcnn_lightning.rowwise(ours, **options)
    results = [observed(module, x.to(dtype or torch.float32), dtype is None) for module in (plain, ours)]
    assert vars(ours)["forward"].plan.mode == options["mode"]
    assert_no_further(exact, *results, torch.finfo(dtype or torch.bfloat16).eps)


@pytest.mark.parametrize("end", ["GroupNorm", "LayerNorm over space", "sum", "norm"])
def test_what_autocast_widens(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA autocast has these read float32 and return it; here its table is that of CUDA, on the CPU."""
    on_cuda = precision._is_widened
    monkeypatch.setattr(precision, "_is_widened", lambda operation, kind: on_cuda(operation, "cuda"))
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(2))
    exact = observed(network(end).double(), x.double(), False)
    plain, ours = network(end), network(end)
    widened = nn.Sequential(plain[0], plain[1], Apply(Tensor.float), plain[2])
    results = [observed(widened, x, True), observed(lrcnn_lightning.rowwise(ours, **OPTIONS[0]), x, True)]
    assert results[1]["output"].dtype == torch.float32
    renamed = {name.replace(" 3.", " 2."): tensor for name, tensor in results[0].items()}  # one module more
    assert_no_further(exact, renamed, results[1], torch.finfo(torch.bfloat16).eps)


def test_autocast_widens_what_its_tables_say() -> None:
    aten = torch.ops.aten
    assert precision._is_widened(aten.group_norm.default, "cuda")
    assert precision._is_widened(aten.sum.dim_IntList, "cuda")
    assert not precision._is_widened(aten.group_norm.default, "cpu")
    assert not precision._is_widened(aten.batch_norm.default, "cuda")
    assert not precision._is_widened(aten.mean.dim, "cuda")
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert precision.as_read_by(aten.group_norm.default, x) is x, "without autocast"
