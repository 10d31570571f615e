"""Small modules that do what networks do beside convolutions, each mapping ``N 4 H W`` to the same shape.

To be drawn at random, put one behind the other, and run row by row: functions with a backward of their own, attributes,
parameters in containers, hooks, weights that are written, complex numbers, random numbers, control flow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

CHANNELS = 4
INGREDIENTS: dict[str, Callable[[], nn.Module]] = {}
"""By name, in groups: ``own function: spike``."""


def ingredient(group: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(kind: type[nn.Module]) -> type[nn.Module]:
        INGREDIENTS[f"{group}: {kind.__name__}"] = kind
        return kind

    return register


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, **{"padding": 1, **options})


class Part(nn.Module):
    """A convolution, and something done with its result."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv()
        self.prepare()

    def prepare(self) -> None:
        """What it has beside the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.c(x))

    def after(self, y: Tensor) -> Tensor:
        return y


# ------------------------------------------------------------------------------------------------ ordinary

INGREDIENTS.update(
    {
        "ordinary: conv": conv,
        "ordinary: dilated": partial(conv, dilation=2, padding=2),
        "ordinary: circular": partial(conv, padding_mode="circular"),
        "ordinary: BatchNorm": lambda: nn.BatchNorm2d(CHANNELS, eps=0.1),
        "ordinary: GroupNorm": lambda: nn.GroupNorm(2, CHANNELS, eps=0.1),
        "ordinary: SiLU": nn.SiLU,
        "ordinary: tanh": nn.Tanh,
        "ordinary: average": lambda: nn.AvgPool2d(3, 1, 1),
        "ordinary: down and up": lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, 6, 3, 2, 1), nn.Tanh(), nn.ConvTranspose2d(6, CHANNELS, 4, 2, 1)
        ),
        "ordinary: flatten rows": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2)),
    }
)


@ingredient("ordinary")
class Gate(Part):
    def after(self, y: Tensor) -> Tensor:
        return y * y.mean((2, 3), keepdim=True).sigmoid()


# ------------------------------------------------------------------------------------------------ own functions


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradient, None


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + x.abs()) ** 2


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, slope: float) -> Tensor:
        return x * torch.sigmoid(slope * x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.slope * x)
        return gradient * (s + 0.5 * ctx.slope * x * s * (1 - s)), None  # not quite the derivative


class _Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, flag: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, torch.tanh(x) if flag else x.clone()

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return 2 * first * weight + second, (first * x).sum((0, 2, 3)).view_as(weight), None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        first = torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=1)
        return 3 * first, torch.nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1)


class _Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x > 0
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        return x * mask, mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
        (mask,) = ctx.saved_tensors
        return gradient * mask + 0.1 * gradient


@ingredient("own function")
class Rounds(Part):
    def after(self, y: Tensor) -> Tensor:
        return _Round.apply(y)


@ingredient("own function")
class Reverses(Part):
    def after(self, y: Tensor) -> Tensor:
        return _Reverse.apply(y, 0.7)


@ingredient("own function")
class Spikes(Part):
    def after(self, y: Tensor) -> Tensor:
        return _Spike.apply(y)


@ingredient("own function")
class Swishes(Part):
    def after(self, y: Tensor) -> Tensor:
        return _Swish.apply(y, 1.5)


@ingredient("own function")
class TwoOutputs(Part):
    def prepare(self) -> None:
        self.w = nn.Parameter(torch.rand(CHANNELS, 1, 1))

    def after(self, y: Tensor) -> Tensor:
        first, second = _Two.apply(y, self.w, True)
        return first + second.abs()


@ingredient("own function")
class Convolves(Part):
    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self.c.weight)


@ingredient("own function")
class Centres(Part):
    def after(self, y: Tensor) -> Tensor:
        return _Centre.apply(y)


@ingredient("own function")
class Masks(Part):
    def after(self, y: Tensor) -> Tensor:
        positive, mask = _Mask.apply(y)
        return positive + mask * 0.5


# ------------------------------------------------------------------------------------------------ attributes


@ingredient("attribute")
class CountsInTensor(Part):
    def prepare(self) -> None:
        self.t = torch.zeros(())

    def after(self, y: Tensor) -> Tensor:
        self.t += 1
        return y * self.t


@ingredient("attribute")
class AveragesInTensor(Part):
    def prepare(self) -> None:
        self.t = torch.zeros(CHANNELS)

    def after(self, y: Tensor) -> Tensor:
        self.t.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y - self.t.view(1, -1, 1, 1)


@ingredient("attribute")
class AveragesAnew(Part):
    def prepare(self) -> None:
        self.t = torch.zeros(CHANNELS)

    def after(self, y: Tensor) -> Tensor:
        self.t = 0.9 * self.t + 0.1 * y.detach().mean((0, 2, 3))
        return y - self.t.view(1, -1, 1, 1)


@ingredient("attribute")
class CountsInNumber(Part):
    def prepare(self) -> None:
        self.calls = 0

    def after(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * self.calls


@ingredient("attribute")
class CountsInDict(Part):
    def prepare(self) -> None:
        self.state = {"calls": 0}

    def after(self, y: Tensor) -> Tensor:
        self.state["calls"] += 1
        return y * self.state["calls"]


@ingredient("attribute")
class CountsInObject(Part):
    def prepare(self) -> None:
        self.state = SimpleNamespace(calls=0)

    def after(self, y: Tensor) -> Tensor:
        self.state.calls += 1
        return y * self.state.calls


@ingredient("attribute")
class CountsInArray(Part):
    def prepare(self) -> None:
        self.calls = numpy.zeros(1)

    def after(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * float(self.calls[0])


@ingredient("attribute")
class SetsListAnew(Part):
    def prepare(self) -> None:
        self.aux: list[Tensor] = []

    def after(self, y: Tensor) -> Tensor:
        self.aux = [y.mean((2, 3)), y]
        return y


@ingredient("attribute")
class SetsDictAnew(Part):
    def prepare(self) -> None:
        self.aux: dict[str, Tensor] = {}

    def after(self, y: Tensor) -> Tensor:
        self.aux = {"h": y.tanh()}
        return y


@ingredient("attribute")
class SetsSizesAnew(Part):
    def prepare(self) -> None:
        self.hw: list[Any] = []

    def after(self, y: Tensor) -> Tensor:
        self.hw = [y.shape[-2:]]
        return y / self.hw[0][0]


@ingredient("attribute")
class SetsWhereNoneWas(Part):
    def prepare(self) -> None:
        self.feature: Tensor | None = None

    def after(self, y: Tensor) -> Tensor:
        self.feature = y
        return y.sigmoid()


@ingredient("attribute")
class Recurs(Part):
    def prepare(self) -> None:
        self.state: Tensor | None = None

    def after(self, y: Tensor) -> Tensor:
        if self.state is not None:
            y = y + self.state
        self.state = y.detach()
        return y


@ingredient("attribute")
class Appends(Part):
    def prepare(self) -> None:
        self.log: list[Tensor] = []

    def after(self, y: Tensor) -> Tensor:
        self.log.append(y.detach().mean())
        return y


@ingredient("attribute")
class WritesInDict(Part):
    def prepare(self) -> None:
        self.table: dict[str, Tensor] = {"mean": torch.zeros(CHANNELS)}

    def after(self, y: Tensor) -> Tensor:
        self.table["mean"] = y.detach().mean((0, 2, 3))
        return y - self.table["mean"].view(-1, 1, 1)


# ------------------------------------------------------------------------------------------------ containers


@ingredient("container")
class InList(Part):
    def prepare(self) -> None:
        self.p = nn.Parameter(torch.rand(CHANNELS, 1, 1))
        self.ps = [self.p]

    def after(self, y: Tensor) -> Tensor:
        return y * self.ps[0]


@ingredient("container")
class InDict(Part):
    def prepare(self) -> None:
        self.table = {"w": (self.c.weight, self.c.bias)}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.table["w"], padding=1) * self.c.weight.mean()


@ingredient("container")
class InObject(Part):
    def prepare(self) -> None:
        self.p = nn.Parameter(torch.rand(CHANNELS, 1, 1))
        self.o = SimpleNamespace(p=self.p)

    def after(self, y: Tensor) -> Tensor:
        return y * self.o.p


@ingredient("container")
class InPartial(Part):
    def prepare(self) -> None:
        self.f = partial(F.conv2d, bias=self.c.bias, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.c.weight)


@ingredient("container")
class InClosure(Part):
    def prepare(self) -> None:
        weight = self.c.weight
        self.f = lambda x: F.conv2d(x, weight, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@ingredient("container")
class InClosureOfItself(Part):
    def prepare(self) -> None:
        self.f = lambda x: F.conv2d(x, self.c.weight, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@ingredient("container")
class InBoundMethod(Part):
    def prepare(self) -> None:
        self.f = self.c.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@ingredient("container")
class HiddenNetwork(Part):
    def prepare(self) -> None:
        self.hidden = [conv()]

    def after(self, y: Tensor) -> Tensor:
        return y + self.hidden[0](y)


@ingredient("container")
class BufferInList(Part):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.buffers_ = [self.mean]

    def after(self, y: Tensor) -> Tensor:
        self.buffers_[0].mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return y - self.buffers_[0].view(1, -1, 1, 1)


@ingredient("container")
class LeafAttribute(Part):
    def prepare(self) -> None:
        self.w = torch.rand(CHANNELS, 1, 1, requires_grad=True)

    def after(self, y: Tensor) -> Tensor:
        return y * self.w


@ingredient("container")
class InParameterList(Part):
    def prepare(self) -> None:
        self.ps = nn.ParameterList([nn.Parameter(torch.rand(CHANNELS, 1, 1)) for _ in range(2)])

    def after(self, y: Tensor) -> Tensor:
        for p in self.ps:
            y = y * p
        return y


@ingredient("container")
class Tied(Part):
    def prepare(self) -> None:
        self.d = conv()
        self.d.weight = self.c.weight

    def after(self, y: Tensor) -> Tensor:
        return self.d(y.tanh())


# ------------------------------------------------------------------------------------------------ hooks


@ingredient("hook")
class Observed(Part):
    def prepare(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.c.register_forward_hook(lambda _m, _a, y: self.seen.update(c=y))


@ingredient("hook")
class ObservedAndRead(Part):
    def prepare(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.c.register_forward_hook(lambda _m, _a, y: self.seen.update(c=y))

    def after(self, y: Tensor) -> Tensor:
        return y + self.seen.pop("c").tanh()


@ingredient("hook")
class HookChangesResult(Part):
    def prepare(self) -> None:
        self.c.register_forward_hook(lambda _m, _a, y: y * 2)


@ingredient("hook")
class HookChangesInput(Part):
    def prepare(self) -> None:
        self.c.register_forward_pre_hook(lambda _m, a: (a[0] - 1,))


@ingredient("hook")
class HookChangesGradient(Part):
    def prepare(self) -> None:
        self.c.register_full_backward_hook(lambda _m, given, _taken: (None if given[0] is None else given[0] * 2,))


@ingredient("hook")
class HookOnTensor(Part):
    def after(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(lambda gradient: -3 * gradient)
        return y


@ingredient("hook")
class HookOnParameter(Part):
    def prepare(self) -> None:
        self.c.weight.register_hook(lambda gradient: gradient / 2)


# ------------------------------------------------------------------------------------------------ weights


@ingredient("weights")
class ClampsData(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.c.weight.data.clamp_(-0.1, 0.1)
        return self.c(x)


@ingredient("weights")
class ReadsData(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) + F.conv2d(x, self.c.weight.data, padding=1)


@ingredient("weights")
class SetsData(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.c.weight.data = self.c.weight.data * 0.9
        return self.c(x)


@ingredient("weights")
class DividesWithoutGradient(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c.weight.div_(self.c.weight.norm() + 1)
        return self.c(x)


@ingredient("weights")
class Follows(Part):
    """A copy of the weights that follows them."""

    def prepare(self) -> None:
        self.average = conv().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.c.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        return self.c(x) + self.average(x)


@ingredient("weights")
class WritesPartOfWeight(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c.weight[0] *= 0.5
        return self.c(x)


INGREDIENTS.update(
    {
        "weights: weight_norm": lambda: parametrizations.weight_norm(conv()),
        "weights: spectral_norm": lambda: parametrizations.spectral_norm(conv()),
        "weights: pruned": lambda: prune.random_unstructured(conv(), "weight", 0.3),
        "weights: lazy": lambda: nn.LazyConv2d(CHANNELS, 3, padding=1),
    }
)


# ------------------------------------------------------------------------------------------------ complex numbers


@ingredient("complex")
class Amplitudes(Part):
    def after(self, y: Tensor) -> Tensor:
        return torch.fft.fft2(y, norm="ortho").abs()


@ingredient("complex")
class Spectral(Part):
    """A layer of a Fourier neural operator."""

    def prepare(self) -> None:
        self.w = nn.Parameter(torch.rand(CHANNELS, CHANNELS, 2, 2, dtype=torch.complex128))

    def after(self, y: Tensor) -> Tensor:
        modes = torch.fft.rfft2(y, norm="ortho")
        kept = torch.zeros_like(modes)
        kept[:, :, :2, :2] = torch.einsum("nihw,iohw->nohw", modes[:, :, :2, :2], self.w)
        return y + torch.fft.irfft2(kept, s=y.shape[-2:], norm="ortho")


@ingredient("complex")
class Rotates(Part):
    def prepare(self) -> None:
        self.w = nn.Parameter(torch.rand(CHANNELS // 2, 1, 1, dtype=torch.complex128))

    def after(self, y: Tensor) -> Tensor:
        pairs = torch.complex(y[:, ::2], y[:, 1::2]) * self.w
        return torch.cat([pairs.real, pairs.imag], 1)


@ingredient("complex")
class WritesComplexWeight(Part):
    def prepare(self) -> None:
        self.w = nn.Parameter(torch.rand(CHANNELS // 2, 1, 1, dtype=torch.complex128))

    def after(self, y: Tensor) -> Tensor:
        self.w.data.div_(self.w.data.abs())
        pairs = torch.view_as_complex(torch.stack([y[:, ::2], y[:, 1::2]], -1)) * self.w
        return torch.view_as_real(pairs).movedim(-1, 2).flatten(1, 2)


# ------------------------------------------------------------------------------------------------ random numbers


INGREDIENTS.update(
    {
        "random: dropout": lambda: nn.Dropout(0.3),
        "random: dropout of channels": lambda: nn.Dropout2d(0.3),
        "random: RReLU, then dropout": lambda: nn.Sequential(nn.RReLU(), nn.Dropout(0.3), conv()),
    }
)


@ingredient("random")
class Noise(Part):
    def after(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y) * 0.1


@ingredient("random")
class DropsPath(Part):
    def after(self, y: Tensor) -> Tensor:
        return y * torch.empty(y.shape[0], 1, 1, 1, dtype=y.dtype).bernoulli_(0.7)


@ingredient("random")
class Bernoulli(Part):
    def after(self, y: Tensor) -> Tensor:
        return y * torch.bernoulli(y.detach().sigmoid()) + F.dropout(y, 0.2)


@ingredient("random")
class Shuffles(Part):
    def after(self, y: Tensor) -> Tensor:
        return y[:, torch.randperm(CHANNELS)]


@ingredient("random")
class DrawsPython(Part):
    def after(self, y: Tensor) -> Tensor:
        return y if random.random() < 0.5 else y * 2


@ingredient("random")
class DrawsNumpy(Part):
    def after(self, y: Tensor) -> Tensor:
        return y * float(numpy.random.rand())


# ------------------------------------------------------------------------------------------------ control and memory


@ingredient("control")
class Branches(Part):
    def after(self, y: Tensor) -> Tensor:
        return y if y.mean() > 0 else -y


@ingredient("control")
class ReadsItem(Part):
    def after(self, y: Tensor) -> Tensor:
        return y / (1 + abs(y.detach().mean().item()))


@ingredient("control")
class SelectsByValue(Part):
    def after(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[y < 0] = 0.1
        return y


@ingredient("control")
class Checkpoints(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: F.gelu(self.c(x)), x, use_reentrant=False)


@ingredient("control")
class ReentrantCheckpoints(Part):
    def after(self, y: Tensor) -> Tensor:
        return checkpoint(F.gelu, y, use_reentrant=True)


@ingredient("control")
class Vmaps(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda image: self.c(image[None])[0])(x)


@ingredient("control")
class Differentiates(Part):
    """The gradient of an energy, taken inside of forward."""

    def after(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(y.tanh().sum(), y, create_graph=True)
        return y - gradient


@ingredient("control")
class StopsGradient(Part):
    def after(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            weight = y.sigmoid()
        return y * weight + y.detach()


@ingredient("in place")
class ChangesItsResult(Part):
    def after(self, y: Tensor) -> Tensor:
        y += 1
        y[:, :2] *= 2
        y[:, :, 1:] = y[:, :, :-1] * 0.5
        return y


@ingredient("in place")
class ChangesItsInput(Part):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).sub_(0.5)
        return self.c(x)


@ingredient("in place")
class ChangesViewOfItsInput(Part):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:].add_(1)
        return self.c(x)
