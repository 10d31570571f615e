"""What operations hold is learned, not typed in: conv, operation, conv is predicted as it is measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcnn_lightning
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.rules import sampling


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def padded(mode: str) -> nn.Module:
    return Call(lambda x: functional.pad(x, (1, 1, 1, 1), mode=mode))


def resized(mode: str) -> nn.Module:
    return Call(lambda x: functional.interpolate(x, size=(100, 100), mode=mode))


def attention(x: Tensor) -> Tensor:
    low = functional.avg_pool2d(x, 4)
    tokens = low.flatten(2).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return functional.interpolate(mixed.transpose(1, 2).reshape(low.shape), scale_factor=4.0)


OPERATIONS: dict[str, nn.Module] = {
    "avg_pool2d": nn.AvgPool2d(2),  # was said to save nothing: a plan took 1.25 times its budget
    "max_pool2d": nn.MaxPool2d(2),
    "lp_pool2d": nn.LPPool2d(2, 2),
    "square": Call(lambda x: x**2),
    "reflect": padded("reflect"),
    "replicate": padded("replicate"),
    "zeros": padded("constant"),
    "softsign": Call(lambda x: x / (1 + x.abs())),
    "product": Call(lambda x: x * x),
    "abs": Call(torch.abs),
    "sqrt": Call(lambda x: torch.sqrt(x.abs() + 1)),
    "clamp": Call(lambda x: x.clamp(-1, 1)),
    "scaled": Call(lambda x: x * 0.5),
    "dropout": nn.Dropout(),
    "dropout2d": nn.Dropout2d(),
    "alpha_dropout": nn.AlphaDropout(),
    "layer_norm": Call(lambda x: functional.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)),
    "half": nn.Upsample(scale_factor=0.5, mode="bilinear"),
    "bilinear": resized("bilinear"),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "nearest": nn.Upsample(scale_factor=2),
    "area": resized("area"),
    "adaptive_avg": nn.AdaptiveAvgPool2d(
        64
    ),  # its rows were priced as if they were pooled at once: 1.7 times the budget
    "adaptive_max": nn.AdaptiveMaxPool2d(64),
    "relu": nn.ReLU(),
    "relu_": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "prelu": nn.PReLU(8),
    "softplus": nn.Softplus(),
    "tanh": nn.Tanh(),
    "softmax": nn.Softmax(1),
    "batch_norm": nn.BatchNorm2d(8),
    "instance_norm": nn.InstanceNorm2d(8),
    "group_norm": nn.GroupNorm(2, 8),
    "local_response": nn.LocalResponseNorm(3),
    "normalize": Call(lambda x: functional.normalize(x, dim=1)),
    "shuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),  # the outer Sequential holds what goes in
    "cat": Call(lambda x: torch.cat([x[:, :4], x[:, 4:].relu()], 1)),
    "residual": Call(lambda x: x + x.relu()),
    "gate": Call(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),
    "conv_transpose": nn.ConvTranspose2d(8, 8, 2, 2),
    "weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "attention": Call(attention),
}
IMAGES = torch.empty(1, 3, 160, 160, device="meta")


def around(operation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), operation, nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_and_rows_take_what_is_predicted(name: str) -> None:
    module = around(OPERATIONS[name])
    plain = measure_fake(module, IMAGES).peak_bytes
    for options in ({"mode": "two_phase", "rows": 4, "segments": 1}, {"mode": "overlap", "rows": 5, "segments": 2}):
        plan = lrcnn_lightning.plan(module, IMAGES, **options)
        assert plan.plain_peak_bytes == pytest.approx(plain, rel=0.02)
        lrcnn_lightning.rowwise(module, **options)
        assert plan.peak_bytes == pytest.approx(measure_fake(module, IMAGES).peak_bytes, rel=0.15), options
        lrcnn_lightning.restore(module)


def test_the_median_of_operations_is_near() -> None:
    errors = []
    for operation in list(OPERATIONS.values())[::4]:
        module = lrcnn_lightning.rowwise(around(operation), mode="two_phase", rows=6, segments=1)
        measured = measure_fake(module, IMAGES).peak_bytes
        errors.append(abs(module.__dict__["forward"].training_plan.peak_bytes / measured - 1))
        lrcnn_lightning.restore(module)
    assert statistics.median(errors) <= 0.05


def test_a_resize_is_planned_while_a_step_is_measured_without_data() -> None:
    """What places are copied is asked of ATen, by tensors with data; they were taken for the module's own."""
    sampling._nearest_forward.cache_clear()
    sampling._nearest_backward.cache_clear()
    module = lrcnn_lightning.rowwise(around(nn.Upsample(scale_factor=2)), mode="two_phase", rows=6, segments=1)
    assert measure_fake(module, IMAGES).peak_bytes > 0
    assert module.__dict__["forward"].training_plan.mode == "two_phase"


@pytest.mark.parametrize(("name", "share"), [("avg_pool2d", 0.8), ("adaptive_avg", 0.6)])
def test_a_budget_is_kept(name: str, share: float) -> None:
    module = around(OPERATIONS[name])
    budget = int(share * measure_fake(module, IMAGES).peak_bytes)
    lrcnn_lightning.rowwise(module, memory_budget=budget)
    measured = measure_fake(module, IMAGES).peak_bytes
    lrcnn_lightning.restore(module)
    assert measured <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_of_weight_gradients_are_counted(dtype: torch.dtype) -> None:
    """In half precision they are summed in float32, which is memory of its own: VGG-16 took 2.8 times its plan."""
    widths = [3, 64, 128, 256]
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, padding=1), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    module = nn.Sequential(*layers).to(dtype)
    images = torch.empty(1, 3, 96, 96, device="meta", dtype=dtype)
    for options in ({"mode": "two_phase", "rows": 3, "segments": 1}, {"mode": "overlap", "rows": 2, "segments": 3}):
        lrcnn_lightning.rowwise(module, **options)
        measured = measure_fake(module, images).peak_bytes
        assert module.forward.training_plan.peak_bytes == pytest.approx(measured, rel=0.03), options
        lrcnn_lightning.restore(module)


class Mixed(nn.Module):
    """The forward pass under autocast, as the mixed precisions of Lightning have it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.module(x)
        return result


def test_memory_under_autocast() -> None:
    """It was predicted as if every map were in float32, and without the copies of weights that autocast keeps."""
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 64), (64, 128))
    ]
    module = nn.Sequential(*layers, nn.Conv2d(128, 256, 3, padding=1))
    mixed = Mixed(module)
    plain = measure_fake(mixed, IMAGES).peak_bytes
    for options in ({"mode": "two_phase", "rows": 4, "segments": 1}, {"mode": "overlap", "rows": 4, "segments": 2}):
        lrcnn_lightning.rowwise(module, **options)
        measured = measure_fake(mixed, IMAGES).peak_bytes
        plan = module.forward.training_plan
        assert plan.peak_bytes == pytest.approx(measured, rel=0.05), options
        assert plan.plain_peak_bytes == pytest.approx(plain, rel=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            assert lrcnn_lightning.plan(module, IMAGES, **options).peak_bytes == plan.peak_bytes
        assert lrcnn_lightning.plan(module, IMAGES, **options).plain_peak_bytes > 1.5 * plan.plain_peak_bytes
        lrcnn_lightning.restore(module)
