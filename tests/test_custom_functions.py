"""``torch.autograd.Function`` of the user's own: each call is one operation with its own backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionMeta
from torch.utils.checkpoint import CheckpointFunction

import lrcnn_lightning
from lrcnn_lightning import ConfigError, elementwise
from lrcnn_lightning.graph import CustomFunction, capture
from tests.twins import image, squares, twins, walk


class Spike(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + x.abs()) ** 2


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradient, None


class Both(Function):
    """New style, several results, tensors without and with a gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
        return (x * weight).sum((2, 3)), x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        wide = gradient[:, :, None, None]
        return (3 * wide * weight).expand_as(x), (wide * x).sum().reshape(weight.shape), None


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.factor = factor
        return x.mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 5 * gradient * ctx.factor, None


class Noise(Function):
    """Draws random numbers, and switches gradients on inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            mask = torch.rand_like(x)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Nested(Function):
    """Calls another function inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return Spike.apply(x) * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x


spike = Spike.apply
"""As it is often written: looked up once, before any trace."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.full((1,), 0.3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.norm(self.b(self.between(self.a(x))))))


class Spikes(Net):
    def between(self, y: Tensor) -> Tensor:
        return spike(y)


class Reverses(Net):
    """The domain's head and the classifier's."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return {"class": self.c(self.b(y)), "domain": self.c(Reverse.apply(y, 0.7))}


class Boths(Net):
    def between(self, y: Tensor) -> Tensor:
        pooled, sign = Both.apply(y, self.scale, 2)
        return y * sign + pooled[:, :, None, None]


class InPlaces(Net):
    def between(self, y: Tensor) -> Tensor:
        y = y * 1.5
        InPlace.apply(y, 0.5)
        return y + 1


class Noises(Net):
    def between(self, y: Tensor) -> Tensor:
        return F.dropout(Noise.apply(F.dropout(y, 0.2)), 0.3)


class Nests(Net):
    def between(self, y: Tensor) -> Tensor:
        return Nested.apply(y)


KINDS = [Spikes, Reverses, Boths, InPlaces, Noises, Nests]


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_ones_own(kind: type[Net], mode: str) -> None:
    """They were refused, and on PyTorch 2.14 their backward was forgotten."""
    walk(*twins(kind, mode=mode))


def test_one_operation_and_whole() -> None:
    graph = capture(Spikes(), (torch.randn(1, 3, 16, 12),))
    (node,) = [node for node in graph.nodes if isinstance(node.op, CustomFunction)]
    assert node.op.function is Spike
    plan = lrcnn_lightning.plan(Spikes(), torch.empty(1, 3, 64, 64, device="meta"), mode="two_phase", rows=4)
    assert any(node.op.function is Spike for node in plan.graph.whole_nodes() if isinstance(node.op, CustomFunction))


def test_elementwise_ones_run_on_rows() -> None:
    @elementwise
    class Soft(Spike):
        pass

    class Softs(Net):
        def between(self, y: Tensor) -> Tensor:
            return Soft.apply(y)

    plain, ours = twins(Softs)
    walk(plain, ours)
    assert not any(isinstance(node.op, CustomFunction) for node in ours.forward.plan.graph.whole_nodes())


@elementwise
class Gated(Function):
    """Two maps, a scale for every channel and a number; two results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, power: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, scale)
        return x * y.sigmoid() * scale, x + y

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, y, scale = ctx.saved_tensors
        gate = y.sigmoid()
        for_scale = (first * x * gate).sum((0, 2, 3)).reshape(scale.shape)
        return first * gate * scale + second, first * x * gate * (1 - gate) * scale + second, for_scale, None


def test_elementwise_with_several_arguments_and_results() -> None:
    class Gates(Net):
        def __init__(self) -> None:
            super().__init__()
            self.channels = nn.Parameter(torch.rand(4, 1, 1))

        def between(self, y: Tensor) -> Tensor:
            first, second = Gated.apply(y, self.b(y), self.channels, 2)
            return first + 0.1 * second

    plain, ours = twins(Gates)
    walk(plain, ours)
    assert not any(isinstance(node.op, CustomFunction) for node in ours.forward.plan.graph.whole_nodes())


def test_only_functions_are_declared() -> None:
    for wrong in (F.relu, nn.ReLU, Spike()):
        with pytest.raises(ConfigError, match=r"takes a class derived from torch\.autograd\.Function"):
            elementwise(wrong)  # type: ignore[type-var]


def test_classes_of_pytorch_are_as_they_were() -> None:
    """A trace changes two of PyTorch's classes: this test notices when they move."""
    before = dict(vars(CheckpointFunction)), dict(vars(FunctionMeta))
    seen: list[bool] = []

    class Looks(Net):
        def between(self, y: Tensor) -> Tensor:
            seen.append("__getattribute__" in vars(FunctionMeta) and "apply" in vars(CheckpointFunction))
            return spike(y)

    capture(Looks(), (torch.randn(1, 3, 16, 12),))
    assert seen == [True]
    assert (dict(vars(CheckpointFunction)), dict(vars(FunctionMeta))) == before
    assert spike(torch.ones(1)) == 1


def test_without_gradients() -> None:
    plain, ours = twins(Spikes)
    with torch.no_grad():
        torch.testing.assert_close(ours(image()), plain(image()))
    squares(ours, image())
