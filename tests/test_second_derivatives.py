"""Gradients of gradients: gradient penalties, Hessians, steps through a gradient step. The oracle is plain autograd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lrcnn_lightning
from lrcnn_lightning import DoubleBackwardError
from tests.oracle import difference

IMAGES = torch.randn(2, 3, 18, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "two_phase": {"mode": "two_phase", "rows": 3, "segments": 1},
    "overlap": {"mode": "overlap", "rows": 4, "segments": 3, "batch_chunks": 2},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no plan was found", "ignore:.*rows save no memory", "ignore:.*is more"
)


class Block(nn.Module):
    """Two normalised convolutions and a shortcut."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([norm(), norm()])

    def forward(self, x: Tensor) -> Tensor:
        y = F.softplus(self.norms[0](self.first(x)))
        return torch.tanh(self.norms[1](self.second(y)) + x)


class Extremes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.amax((2, 3)), x.mean((2, 3)), x.std((2, 3)), x.flatten(2).norm(dim=2)], 1)


class Averages(nn.Module):
    """Keeps a moving average of what it sees, and subtracts it."""

    average: Tensor

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.register_buffer("average", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.average.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return torch.sigmoid(y - self.average[:, None, None])


def stem() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "critic": lambda: nn.Sequential(stem(), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 2, 1), nn.SiLU(), nn.Conv2d(4, 1, 3)),
    "batch norm": lambda: nn.Sequential(stem(), Block(lambda: nn.BatchNorm2d(4)), Block(lambda: nn.BatchNorm2d(4))),
    "group norm": lambda: nn.Sequential(stem(), Block(lambda: nn.GroupNorm(2, 4)), nn.Conv2d(4, 2, 3)),
    "instance norm": lambda: nn.Sequential(stem(), Block(lambda: nn.InstanceNorm2d(4, affine=True))),
    "dropout": lambda: nn.Sequential(
        stem(), nn.Tanh(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3), nn.Dropout2d(0.4), nn.GELU()
    ),
    "weight norm": lambda: nn.Sequential(weight_norm(stem()), nn.ELU(), weight_norm(nn.Conv2d(4, 2, 3))),
    "sizes": lambda: nn.Sequential(
        stem(), nn.Tanh(), nn.AvgPool2d(2), nn.Upsample((13, 9)), nn.ConvTranspose2d(4, 2, 2, 2)
    ),
    "maxima": lambda: nn.Sequential(stem(), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Tanh(), Extremes()),
    "bilinear": lambda: nn.Sequential(stem(), nn.Softplus(), nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Tanh()),
    "whole": lambda: nn.Sequential(stem(), nn.Tanh(), nn.Softmax(2), nn.RReLU(), nn.Conv2d(4, 2, 3), nn.Tanh()),
    "average": Averages,
}


def penalty(net: nn.Module) -> list[Tensor]:
    """WGAN-GP: the loss that is differentiated first is linear in the output."""
    x = IMAGES.clone().requires_grad_()
    out = net(x)
    (g,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    (10 * ((g.flatten(1).norm(2, 1) - 1) ** 2).mean() - net(IMAGES.flip(0)).mean()).backward()
    return [g, x.grad]


def r1(net: nn.Module) -> list[Tensor]:
    x = IMAGES.clone().requires_grad_()
    out = net(x)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (F.softplus(-out).mean() + g.square().sum()).backward()
    return [g, x.grad]


def path_length(net: nn.Module) -> list[Tensor]:
    """StyleGAN2: of a generator, with a latent before it."""
    latent = torch.ones(2, 3, dtype=torch.float64).requires_grad_()
    out = net(IMAGES * latent[:, :, None, None])
    noise = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (g,) = torch.autograd.grad((out * noise).sum(), latent, create_graph=True)
    (g.square().sum(1).sqrt() - 3).square().mean().backward()
    return [g, latent.grad]


def through_parameters(net: nn.Module) -> list[Tensor]:
    """Hessian times vector, for a penalty on the gradient of the weights."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    loss = net(IMAGES).square().mean()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    sum(g.square().sum() for g in gradients if g is not None).backward()
    return [g for g in gradients if g is not None]


def through_a_step(net: nn.Module) -> list[Tensor]:
    """MAML: the loss after a step, as a function of the weights before it."""
    names = dict(net.named_parameters())
    loss = net(IMAGES).square().mean()
    gradients = torch.autograd.grad(loss, list(names.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(names.items(), gradients, strict=True)}
    after: Tensor = torch.func.functional_call(net, moved, (IMAGES.flip(3),))
    after.square().mean().backward()
    return [after]


def third(net: nn.Module) -> list[Tensor]:
    x = IMAGES.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    h.square().sum().backward()
    return [g, h, x.grad]


def unused(net: nn.Module) -> list[Tensor]:
    """The graph of the gradient is made, and not used."""
    x = IMAGES.clone().requires_grad_()
    net(x).square().mean().backward(create_graph=True)
    return [x.grad]


STEPS = [penalty, r1, path_length, through_parameters, through_a_step, unused, third]


def observed(net: nn.Module, step: Callable[[nn.Module], list[Tensor]]) -> dict[str, Tensor | None]:
    torch.manual_seed(3)
    net.zero_grad()
    seen: dict[str, Tensor | None] = {f"result {i}": t.detach() for i, t in enumerate(step(net))}
    seen.update(
        {f"gradient of {name}": None if p.grad is None else p.grad.detach() for name, p in net.named_parameters()}
    )
    return seen | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


def agree(net: nn.Module, step: Callable[[nn.Module], list[Tensor]], times: int = 1, **options: Any) -> nn.Module:
    """The same results, gradients and buffers, ``times`` times one after the other."""
    plain, ours = copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), **options)
    for _ in range(times):
        want, got = observed(plain, step), observed(ours, step)
        assert want.keys() == got.keys()
        for name, expected in want.items():
            found = got[name]
            if expected is None or found is None:
                assert found is expected, f"{name}: on one side only"
            else:
                assert difference(found, expected) < 1e-9, f"{name}: differs by {difference(found, expected):.1e}"
    assert ours.forward.plan.rows > 1
    return ours


@pytest.mark.filterwarnings("ignore:.*differentiated", "ignore:.*reference cycle")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_penalties_on_gradients(network: str, options: dict[str, Any]) -> None:
    """The gradient of a penalty on the gradient of a linear loss was dropped without a word."""
    torch.manual_seed(0)
    net = NETWORKS[network]().double()
    for step in STEPS[:-1] if network in ("critic", "batch norm") else (penalty, r1):
        agree(net, step, **options)


@pytest.mark.filterwarnings("ignore:.*differentiated", "ignore:.*reference cycle")
@pytest.mark.parametrize("step", STEPS)
def test_other_second_derivatives(step: Callable[[nn.Module], list[Tensor]]) -> None:
    torch.manual_seed(0)
    agree(NETWORKS["group norm"]().double(), step, times=2, **OPTIONS["overlap"])


class WrittenOut(nn.Module):
    """Batch normalisation in operations that PyTorch differentiates as often as one likes."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        deviation = x - x.mean((0, 2, 3), keepdim=True)
        variance = deviation.square().mean((0, 2, 3), keepdim=True)
        return deviation * torch.rsqrt(variance + 1e-5) * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.filterwarnings("ignore:.*differentiated")
def test_third_derivatives_of_batch_normalisation() -> None:
    """PyTorch's own are off by some percent: it takes the moments for constants in the third derivative."""
    ours = NETWORKS["batch norm"]().double()
    plain = copy.deepcopy(ours)
    for block in plain[1:]:
        block.norms = nn.ModuleList([WrittenOut(norm) for norm in block.norms])
    lrcnn_lightning.rowwise(ours, **OPTIONS["overlap"])
    for mine, theirs in zip(third(ours), third(plain), strict=True):
        assert difference(mine.detach(), theirs.detach()) < 1e-9


@pytest.mark.filterwarnings("ignore:.*differentiated")
def test_frozen_and_evaluated_networks() -> None:
    net = NETWORKS["batch norm"]().double().eval()
    net[0].requires_grad_(False)
    agree(net, r1, **OPTIONS["two_phase"])
    agree(net.requires_grad_(False), penalty, **OPTIONS["overlap"])
    agree(net.train(), penalty, **OPTIONS["two_phase"])


@pytest.mark.filterwarnings("ignore:.*differentiated")
def test_functions_of_autograd() -> None:
    net = NETWORKS["critic"]().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **OPTIONS["two_phase"])
    x, v = IMAGES[:1, :, :10, :6], torch.randn(1, 3, 10, 6, dtype=torch.float64)
    results = []
    for module in (net, ours):

        def loss(x: Tensor, module: nn.Module = module) -> Tensor:
            result: Tensor = module(x).square().sum()
            return result

        results.append(
            [
                torch.autograd.functional.hvp(loss, x, v)[1],
                torch.autograd.functional.hessian(loss, x, vectorize=True),
                torch.autograd.functional.jacobian(module, x, vectorize=True),
                torch.autograd.functional.jacobian(module, x, create_graph=True),
                torch.autograd.functional.vhp(loss, x, v)[1],
            ]
        )
    for want, got in zip(*results, strict=True):
        assert difference(got.detach(), want.detach()) < 1e-9
    one = IMAGES[:1, :, :8, :6].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(ours, one)


@pytest.mark.filterwarnings("ignore:.*differentiated")
def test_gradients_one_beside_the_other() -> None:
    """``is_grads_batched``: the backward pass of a transform, whose tensors are not for rows."""
    net = NETWORKS["batch norm"]().double()
    results = []
    for module in (copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), **OPTIONS["overlap"])):
        x = IMAGES.clone().requires_grad_()
        out = module(x)
        seeds = torch.stack([torch.ones_like(out), out.detach()])
        results.append(torch.autograd.grad(out, [x, *module.parameters()], seeds, is_grads_batched=True))
    for want, got in zip(*results, strict=True):
        assert difference(got, want) < 1e-9


def test_it_is_said_once() -> None:
    net = lrcnn_lightning.rowwise(NETWORKS["critic"]().double(), **OPTIONS["two_phase"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unused(net)
        assert not [w for w in caught if "differentiated" in str(w.message)]
        r1(net)
        r1(net)
    (warning,) = [w for w in caught if "differentiated" in str(w.message)]
    assert "its segments run plainly, one after the other" in str(warning.message)


@pytest.mark.parametrize("linear", [True, False])
def test_what_is_no_longer_there_is_an_error(linear: bool) -> None:
    """Also of a linear loss, for which the error never came. What the average was before is large and not kept."""
    net = lrcnn_lightning.rowwise(Averages(5000).double(), **OPTIONS["two_phase"])
    x = IMAGES[:1, :, :8, :6].clone().requires_grad_()
    out = net(x)
    (g,) = torch.autograd.grad(out.sum() if linear else (out**3).sum(), x, create_graph=True)
    with pytest.raises(DoubleBackwardError, match=r"no longer there.*Keep the input.*restore"):
        g.sum().backward()


@pytest.mark.filterwarnings("ignore:.*differentiated")
def test_statistics_move_once_and_the_graph_may_be_used_again() -> None:
    net = NETWORKS["batch norm"]().double()
    plain, ours = copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), **OPTIONS["two_phase"])
    results = []
    for module in (plain, ours):
        x = IMAGES.clone().requires_grad_()
        (g,) = torch.autograd.grad((module(x) ** 3).sum(), x, create_graph=True)
        for seed in (0, 1):
            v = torch.randn(g.shape, generator=torch.Generator().manual_seed(seed), dtype=g.dtype)
            results.append(torch.autograd.grad(g, [x, *module.parameters()], v, retain_graph=True))
        (h,) = torch.autograd.grad(g.sum(), x)
        results.append((h,))
    for want, got in zip(results[:3], results[3:], strict=True):
        for theirs, mine in zip(want, got, strict=True):
            assert difference(mine, theirs) < 1e-9
    assert ours[1].norms[0].num_batches_tracked == 1
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        assert difference(mine, theirs) < 1e-9
