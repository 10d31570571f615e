"""What the CPU forgives and a GPU does not, checked on the CPU: what kernels are given, and formulas of a GPU's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.rules import Interval, maximum, normalisation, resize
from lrcnn_lightning.rules.constant import Constant
from lrcnn_lightning.rules.sampling import Sampling
from tests.oracle import assert_exact, difference

aten = torch.ops.aten


class Demanding(TorchDispatchMode):
    """Refuses calls of ``native_batch_norm_backward`` that a kernel of a GPU refuses, whatever is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten.native_batch_norm_backward.default and not args[7]:  # training mode is plain PyTorch's
            self.seen += 1
            gradient, x, weight, mean, variance, saved_mean, saved_scale, _, _, wanted = args
            statistics = torch.promote_types(x.dtype, torch.float32)
            assert gradient.dtype is x.dtype, "both are read through one type"
            for vector in (mean, variance, saved_mean, saved_scale):
                assert vector.shape == (x.shape[1],) and vector.dtype is statistics and vector.is_contiguous()
            assert not wanted[0]
            assert weight.dtype is statistics, "sums are of the type of the weight, which there must be"
        return func(*args, **(kwargs or {}))


def _layouts(x: Tensor) -> Iterator[Tensor]:
    yield x.clone()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    yield x.to(memory_format=last)
    yield torch.cat([x, x], 2).narrow(2, 1, x.shape[2])  # a part of a map


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 1, 4), (2, 3, 3, 2, 4)])
def test_gradients_of_a_normalisation_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """By the GPU's way on the CPU: whatever is wanted, it equals the formula, and no kernel is given too little."""
    torch.manual_seed(0)
    statistics = torch.promote_types(dtype, torch.float32)
    centre, scale = torch.randn(3, dtype=statistics), torch.rand(3, dtype=statistics) + 0.5
    tolerance = 1e-12 if dtype is torch.float64 else 8 * torch.finfo(dtype).eps
    axes, view = [0, *range(2, len(shape))], [1, 3] + [1] * (len(shape) - 2)
    for x, gradient in itertools.product(*(_layouts(torch.randn(shape).to(dtype)) for _ in range(2))):
        exact_x, g = x.double(), gradient.double()
        want = (
            g * scale.double().view(view),
            (g * (exact_x - centre.double().view(view))).sum(axes),
            g.sum(axes),
        )
        for wanted in itertools.product([False, True], repeat=3):
            ones = torch.ones_like(scale)
            with Demanding() as demanding:
                got = normalisation.gradients_on_gpu(gradient, x, centre, ones, scale, wanted)
            assert demanding.seen == (wanted[1] or wanted[2])
            for mine, theirs, asked in zip(got, want, wanted, strict=True):
                if asked:
                    assert mine is not None and difference(mine.double(), theirs) < tolerance
                else:
                    assert mine is None
            if wanted[0]:
                assert got[0] is not None and got[0].dtype is dtype


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, frozen weight": lambda: nn.BatchNorm2d(4).requires_grad_(False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 9, 7]),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", NORMS)
def test_live_normalisations_by_the_way_of_a_gpu(
    name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of its input, of its statistics and of its weights are asked for in one combination or another."""
    monkeypatch.setattr(normalisation, "_gradients_on_cpu", normalisation.gradients_on_gpu)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), NORMS[name](), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(2, 2, 9, 7, dtype=torch.float64).to(memory_format=layout)
    with Demanding() as demanding:
        chosen = [Choices(mode, 3, segments, 1, keeping) for mode, segments, keeping in KINDS]
        assert_exact(module.to(memory_format=layout), x, choices=chosen)
    assert demanding.seen


KINDS: list[Any] = [("two_phase", 1, "lean"), ("overlap", 1, "borders"), ("overlap", 2, "narrow")]


# --------------------------------------------------------------------------------------------------- nearest


def _float32(number: float) -> np.float32:
    return np.float32(number)


def _kernel_forward(exact: bool, size: int, out: int, scale: float | None) -> list[int]:
    """As the kernel of a GPU finds the source of each place, in float32."""
    step = _float32(1 / scale) if scale else _float32(size) / _float32(out)
    half = _float32(0.5 if exact else 0.0)
    return [min(int(np.floor((_float32(place) + half) * step)), size - 1) for place in range(out)]


def _kernel_backward(exact: bool, size: int, out: int, scale: float | None, gradient: Tensor) -> Tensor:
    """As the kernel of a GPU sums the gradient of each source."""
    step = _float32(scale) if scale else _float32(out) / _float32(size)

    def edge(source: int) -> int:
        place = _float32(float(_float32(source)) * float(step) - (0.5 if exact else 0.0))  # fused: rounded once
        return min(int(np.ceil(place)), out)

    return torch.stack([gradient[edge(s) : edge(s + 1)].sum() for s in range(size)])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("size", "out", "scale"),
    [
        (26, 46, None),
        (13, 27, None),
        (9, 18, None),
        (18, 9, None),
        (10, 17, 1.7),
        (5, 7, 1.5),
        (7, 3, 0.5),
        (3, 1, None),
    ]
    + [(size, out, None) for size in (41, 47, 55) for out in (29, 61, 83, 110)],
)
def test_nearest_by_the_way_of_a_gpu(
    exact: bool, size: int, out: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward by the two formulas of a GPU's kernels, whole and by rows."""
    line = Sampling("nearest-exact" if exact else "nearest", False, 2, size, out, scale, False)
    assert list(line.copies_on_gpu) == _kernel_forward(exact, size, out, scale)
    gradient = torch.randn(out, dtype=torch.float64)
    want = _kernel_backward(exact, size, out, scale, gradient)
    found = resize._Resized._found
    monkeypatch.setattr(resize._Resized, "_found", lambda self, gpu, dtype, quick: found(self, True, dtype, quick))
    for rows in {1, min(3, out)}:
        total, values = torch.zeros(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
        made = []
        for r in range(rows):
            tile = Interval(out * r // rows, out * (r + 1) // rows)
            needed = line.needed(tile)
            slab = values[needed.lo : needed.hi].view(1, 1, -1, 1).clone().requires_grad_()
            result = resize._Resized(line, 2, tile, needed.lo)(slab, False)
            made.append(result.flatten())
            (part,) = torch.autograd.grad(result.flatten(), slab, gradient[tile.lo : tile.hi])
            total[needed.lo : needed.hi] += part.flatten()
        assert torch.cat(made).tolist() == _kernel_forward(exact, size, out, scale)
        assert difference(total, want) < 1e-12


# ------------------------------------------------------------------------------------------------- constants


def test_a_constant_is_made_once_for_a_device() -> None:
    constant = Constant([3, 1, 2])
    cpu = torch.zeros(2)
    assert constant.on(cpu).tolist() == [3, 1, 2] and constant.on(cpu) is not constant.on(cpu)
    meta = torch.zeros(2, device="meta")
    with torch.inference_mode():
        held = constant.on(meta)
    assert constant.on(meta) is held and held.is_meta and held.dtype is torch.int64
    assert not held.is_inference(), "autograd may save it"
    for _ in range(2):  # tensors of two modes do not go together
        with FakeTensorMode() as mode:
            fake = torch.empty(2, device="meta")
            assert constant.on(fake).fake_mode is mode  # type: ignore[attr-defined]
            assert constant.on(fake) is constant.on(fake)
    assert type(constant.on(meta)) is Tensor


@pytest.mark.parametrize("count_include_pad", [False, True])
def test_average_pooling_makes_its_counts_on_the_device(count_include_pad: bool) -> None:
    """They were made on the CPU and copied, for which a GPU waits: on ``meta`` there is nothing to copy from."""
    module = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(3, 2, padding=1, count_include_pad=count_include_pad)
    )
    assert_exact(module, torch.randn(1, 2, 9, 7, dtype=torch.float64))
    with torch.device("meta"):  # what is made without a device would be there
        assert_exact(
            module, torch.randn(1, 2, 9, 7, dtype=torch.float64, device="cpu"), choices=[Choices("overlap", 3)]
        )


# ---------------------------------------------------------------------------------------------------- ties


def test_three_equal_maxima_share_the_gradient_in_float64() -> None:
    """Quotients of integers are in the default type, float32: thirds were off by 1e-8."""
    values = torch.tensor([[2.0, 2.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    ties = torch.ones(1, 4, dtype=torch.int64)
    maximum.join_extremes(values, ties, 1, True, [1]).sum().backward()
    assert values.grad is not None
    assert difference(values.grad, torch.tensor([[1, 1, 0, 1]], dtype=torch.float64) / 3) < 1e-15


def test_extremes_with_ties_across_rows() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(self.before(x)).clamp(max=0.5).amax((2, 3))

    assert_exact(Capped(), torch.randn(2, 2, 9, 7, dtype=torch.float64), rows=(1, 3, 4))
