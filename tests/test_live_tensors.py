"""Whatever tensor a module's code reads is live: each step reads it as it is then, its gradient arrives, and what is
written to it is kept, wherever the code has it from.
"""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import CaptureError
from tests.twins import image, squares, twins, walk


class Net(nn.Module):
    """Two convolutions; what differs is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.prepare()

    def prepare(self) -> None:
        """What a network has beside its layers."""

    def between(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.tanh(self.a(x)))) + self.scale.mean()


class InList(Net):
    """It once had no gradient."""

    def prepare(self) -> None:
        self.all = [self.scale]

    def between(self, y: Tensor) -> Tensor:
        return y * self.all[0]


class InDict(Net):
    def prepare(self) -> None:
        self.table = {"b": (self.a.weight, self.a.bias)}

    def between(self, y: Tensor) -> Tensor:
        return y * self.table["b"][0].mean() + self.table["b"][1].view(-1, 1, 1)


class InObject(Net):
    def prepare(self) -> None:
        self.holder = SimpleNamespace(scale=self.scale)

    def between(self, y: Tensor) -> Tensor:
        return y * self.holder.scale


class InPartial(Net):
    def prepare(self) -> None:
        self.function = partial(torch.mul, self.scale)

    def between(self, y: Tensor) -> Tensor:
        return self.function(y)


class InClosure(Net):
    def prepare(self) -> None:
        scale = self.scale
        self.function = lambda y: y * scale

    def __deepcopy__(self, memo: Any) -> Any:
        other = type(self)()
        other.load_state_dict(self.state_dict())
        return other.double()

    def between(self, y: Tensor) -> Tensor:
        return self.function(y)


class Unregistered(Net):
    """A parameter that nobody has registered, in a list: an optimizer that is given it trains it."""

    def prepare(self) -> None:
        self.extra = [torch.full((4, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)]

    def between(self, y: Tensor) -> Tensor:
        return y * self.extra[0]


class BufferInList(Net):
    """What was written was once lost."""

    def prepare(self) -> None:
        self.moving = [self.mean]

    def between(self, y: Tensor) -> Tensor:
        self.moving[0].mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return y - self.moving[0].view(1, -1, 1, 1)


class Counter(Net):
    """The capture itself once counted."""

    def prepare(self) -> None:
        self.count = torch.zeros((), dtype=torch.float64)

    def between(self, y: Tensor) -> Tensor:
        self.count += 1
        return y * self.count


class MovingAverage(Net):
    def prepare(self) -> None:
        self.moving = torch.zeros(4, dtype=torch.float64)

    def between(self, y: Tensor) -> Tensor:
        self.moving.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y - self.moving.view(1, -1, 1, 1)


class MovingInDict(Net):
    def prepare(self) -> None:
        self.state = {"moving": torch.zeros(4, dtype=torch.float64), "count": [torch.zeros((), dtype=torch.float64)]}

    def between(self, y: Tensor) -> Tensor:
        self.state["count"][0] += 1
        self.state["moving"].lerp_(y.detach().mean((0, 2, 3)), 0.1)
        return y - self.state["moving"].view(1, -1, 1, 1) / self.state["count"][0]


class Recurrent(Net):
    """A state from call to call, set anew."""

    def prepare(self) -> None:
        self.state: Tensor | None = None

    def between(self, y: Tensor) -> Tensor:
        if self.state is not None:
            y = y + 0.5 * self.state
        self.state = y.detach()
        return y


class SetsBuffer(Net):
    def between(self, y: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3))
        return y - self.mean.view(1, -1, 1, 1)


class RegistersBuffer(Net):
    def between(self, y: Tensor) -> Tensor:
        self.register_buffer("largest", y.detach().amax((0, 2, 3)), persistent=False)
        return y / (1 + self.largest.view(1, -1, 1, 1))


class Grid(Net):
    """Made anew where the size is another."""

    def prepare(self) -> None:
        self.grid = torch.zeros(1, 1, dtype=torch.float64)

    def between(self, y: Tensor) -> Tensor:
        if self.grid.shape != y.shape[2:]:
            self.grid = torch.linspace(0, 1, y.shape[2] * y.shape[3], dtype=y.dtype).view(y.shape[2:])
        return y + self.grid


class Data(Net):
    """Weights that are read, set and changed behind autograd's back."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.a.weight.data.clone()
        self.a.weight.data = self.a.weight.data.clamp(-0.1, 0.1)
        self.a.weight.data.mul_(0.9)
        return super().forward(x) * before.mean() + self.a.weight.data.mean()


class SetAnew(Net):
    """A list that was there before was once refused as a list that is changed."""

    def prepare(self) -> None:
        self.features: Any = []
        self.sizes: Any = {}

    def between(self, y: Tensor) -> Tensor:
        self.features = [y.mean((2, 3)), y.shape[2]]
        self.sizes = {"size": y.shape[2:], "map": y}
        return y


KINDS = [
    *(InList, InDict, InObject, InPartial, InClosure, BufferInList, Counter, MovingAverage, MovingInDict, Recurrent),
    *(SetsBuffer, RegistersBuffer, Grid, Data, SetAnew),
]


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("kind", KINDS)
def test_live_tensors(kind: type[Net], mode: str) -> None:
    walk(*twins(kind, mode=mode), steps=4)


def test_the_gradient_of_one_that_is_not_registered() -> None:
    plain, ours = twins(Unregistered)
    walk(plain, ours)
    torch.testing.assert_close(ours.extra[0].grad, plain.extra[0].grad, rtol=1e-9, atol=0)


def test_a_state_keeps_the_number_of_graphs_small() -> None:
    """It is read by its name: a new tensor at every call is no new graph."""
    plain, ours = twins(Recurrent)
    walk(plain, ours, steps=5)
    assert len(ours.forward._graphs) == 2  # with None and with a tensor before


def test_sizes_that_alternate() -> None:
    plain, ours = twins(Grid)
    for number in range(6):
        x = image(number, (1, 3, 16 + 4 * (number % 2), 12))
        torch.testing.assert_close(ours(x), plain(x))
        torch.testing.assert_close(ours.grid, plain.grid)
    assert len(ours.forward._graphs) <= 5


def test_another_tensor_in_the_same_place() -> None:
    for kind, change in (
        (InList, lambda net: net.all.__setitem__(0, torch.full((4, 1, 1), 2.0, dtype=torch.float64))),
        (MovingAverage, lambda net: setattr(net, "moving", torch.ones(4, dtype=torch.float64))),
        (InObject, lambda net: setattr(net.holder, "scale", torch.full((4, 1, 1), 3.0, dtype=torch.float64))),
    ):
        plain, ours = twins(kind)
        walk(plain, ours)
        change(plain)
        change(ours)
        walk(plain, ours)


def test_planning_changes_nothing() -> None:
    for kind in (Counter, MovingAverage, SetsBuffer, Recurrent, Data, RegistersBuffer):
        net = kind().double()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        attributes = dict(vars(net))
        lrcnn_lightning.plan(net, image())
        assert vars(net).keys() == attributes.keys()
        assert all(vars(net)[name] is value for name, value in attributes.items())
        torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


OUTSIDE = torch.zeros((), dtype=torch.float64)


class WritesOutside(Net):
    def between(self, y: Tensor) -> Tensor:
        OUTSIDE.add_(1)
        return y


class KeepsHistory(Net):
    """What is kept has a gradient: a later step would go back into this one."""

    def prepare(self) -> None:
        self.total = torch.zeros(4, dtype=torch.float64)

    def between(self, y: Tensor) -> Tensor:
        self.total += y.mean((0, 2, 3))
        return y


class SetsParameter(Net):
    def between(self, y: Tensor) -> Tensor:
        self.scale = nn.Parameter(self.scale.detach() * 2)
        return y


class SetsLayer(Net):
    def between(self, y: Tensor) -> Tensor:
        self.act = nn.Tanh()
        return self.act(y)


class SetsFlag(Net):
    def between(self, y: Tensor) -> Tensor:
        self.scale.requires_grad_(False)
        return y


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (WritesOutside, "changes a tensor of shape .* not part of the module"),
        (KeepsHistory, "writes a value with a gradient into 'total'"),
        (SetsParameter, r"calls requires_grad_\(\)"),
        (SetsLayer, "sets 'act', one of its modules"),
        (SetsFlag, r"calls requires_grad_\(\)"),
    ],
)
def test_what_is_refused_runs_plainly(kind: type[Net], text: str) -> None:
    plain, ours = twins(kind)
    with pytest.raises(CaptureError, match=text):
        ours(image())
    plain, ours = twins(kind, on_unsupported="warn")
    with pytest.warns(UserWarning, match=text):
        want, have = squares(plain, image()), squares(ours, image())
    torch.testing.assert_close(have, want)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad)


def test_layers_with_weights_in_lists() -> None:
    """Recurrent layers keep flat lists of their weights."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):

        class Sequence(nn.Module):
            def __init__(self, kind: Any = kind) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), kind(4, 5, num_layers=2, dropout=0.3, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x).mean(2).transpose(1, 2))[0]

        walk(*twins(Sequence))


class Spectral(nn.Module):
    """Writes into parts of a complex tensor, which ATen's own scatter cannot differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x))
        spectrum, weight = torch.fft.rfft2(y), torch.view_as_complex(self.weight)
        out = torch.zeros_like(spectrum)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :3, :3], weight)
        out[:, :, -3:, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -3:, :3], weight)
        return torch.fft.irfft2(out, s=y.shape[-2:]) + y


def test_writes_into_complex_tensors() -> None:
    walk(*twins(Spectral))


def test_half_a_step_without_gradients() -> None:
    """Evaluation reads and writes what training does."""
    plain, ours = twins(MovingAverage)
    walk(plain, ours)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours(image(5)), plain(image(5)))
    torch.testing.assert_close(ours.moving, plain.moving)
    walk(plain, ours)


class Masked(Net):
    """As the convolutions of a PixelCNN: what must not be seen is set to zero in each call."""

    def prepare(self) -> None:
        mask = torch.ones(4, 3, 3, 3, dtype=torch.float64)
        mask[:, :, 1, 2:] = mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data *= self.mask
        return super().forward(x)


class MaskedAnew(Masked):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = self.a.weight.data * self.mask
        return Net.forward(self, x)


class Shrinking(Net):
    """Its weights are others in each call, and plain autograd does not notice: it multiplies gradients by what they are
    at the time of the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = self.a.weight.data * 0.9
        self.b.weight.data.mul_(0.8)
        return super().forward(x)


class ShrinkingByCount(Shrinking):
    """Each call is captured anew, since a number is another one."""

    def prepare(self) -> None:
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("kind", [Masked, MaskedAnew, Shrinking, ShrinkingByCount])
def test_weights_that_are_written_and_two_calls_before_the_backward_pass(kind: type[Net], mode: str) -> None:
    """The second call writes into what the first one's backward pass reads, which ended with an error."""

    def step(module: nn.Module, x: Tensor) -> Any:
        (module(x) + module(2 * x) + module(x + 1)).square().sum().backward()

    walk(*twins(kind, mode=mode), step)


def test_a_weight_that_somebody_else_changes() -> None:
    """Is noticed, as in plain PyTorch."""
    _, ours = twins(Net)
    result = ours(image())
    with torch.no_grad():
        ours.a.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
