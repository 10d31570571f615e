"""Maps that a module has returned, changed in place by whoever got them, while they are kept for the backward pass."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcnn_lightning
from tests.oracle import difference

IMAGES = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, dict[str, Any]] = {
    "two_phase": {"mode": "two_phase", "rows": 3, "segments": 1},
    "segments": {"mode": "two_phase", "rows": 3, "segments": 3},
    "overlap": {"mode": "overlap", "rows": 4, "segments": 2, "batch_chunks": 2},
    "one row": {"mode": "overlap", "rows": 1, "segments": 2},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*no plan was found", "ignore:.*rows save no", "ignore:.*is more than")


class Backbone(nn.Module):
    """Returns three maps, of which the deeper ones are computed from the others; none is saved by plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.norms[0](self.a(x)) + 1
        b = self.norms[1](self.b(self.dropout(torch.relu(a + 1)))) * 2
        return [a, b, self.c(torch.relu(b - 1)) - 1]


def pyramid(maps: list[Tensor]) -> Tensor:
    """FPN, from the top."""
    for lower, upper in reversed(list(itertools.pairwise(maps))):
        lower += F.interpolate(upper, size=lower.shape[2:])
    return sum((m.square().mean() for m in maps), torch.zeros(()))


def one_map(number: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], Tensor]:
    def loss(maps: list[Tensor]) -> Tensor:
        change(maps[number])
        return sum((m.square().mean() for m in maps), torch.zeros(()))

    return loss


def _at_places(m: Tensor) -> None:
    m[m > 1] = 0.5


CHANGES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "pyramid": pyramid,
    "first": one_map(0, lambda m: m.mul_(3)),
    "middle": one_map(1, lambda m: m.add_(3)),
    "last": one_map(2, lambda m: m.mul_(3).sub_(1)),
    "relu": one_map(0, lambda m: F.relu(m, inplace=True)),
    "view": one_map(0, lambda m: m[:, :2].mul_(3)),
    "view of a view": one_map(1, lambda m: m.permute(0, 2, 3, 1)[..., 0].zero_()),
    "places": one_map(0, _at_places),
    "without history": one_map(0, lambda m: m.detach().add_(1)),
    "under no_grad": one_map(1, torch.no_grad()(lambda m: m.add_(1))),
}


def observed(net: nn.Module, change: Callable[[list[Tensor]], Tensor], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    net.zero_grad()
    x = IMAGES.clone().requires_grad_()
    maps = net(x)
    change(maps).backward()
    seen = {f"map {i}": m.detach().clone() for i, m in enumerate(maps)} | {"input": x.grad}
    seen.update({f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters()})
    return seen | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


@pytest.mark.filterwarnings("ignore:.*changed in place")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_changes_that_plain_pytorch_allows(options: dict[str, Any]) -> None:
    """Autograd refused them, since a returned map is also a kept one."""
    torch.manual_seed(0)
    net = Backbone().double()
    plan = lrcnn_lightning.plan(net, IMAGES, **options).to_dict()
    for name, change in CHANGES.items():
        plain, ours = copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), plan=plan)
        for seed in (1, 2):
            want, got = observed(plain, change, seed), observed(ours, change, seed)
            for key, expected in want.items():
                assert difference(got[key], expected) < 1e-9, f"{name}, step {seed}: {key}"


def test_it_is_said_once_and_costs_a_copy_from_then_on() -> None:
    net = lrcnn_lightning.rowwise(Backbone().double(), **OPTIONS["segments"])
    with pytest.warns(UserWarning, match="changed in place.*from now on what it returns and keeps is copied"):
        observed(net, pyramid, 0)
    ((_, execution),) = net.forward._plans.values()
    execution._tell = pytest.fail  # nothing is computed once more
    for seed in (1, 2):
        observed(net, pyramid, seed)


def test_without_changes_nothing_is_copied() -> None:
    net = lrcnn_lightning.rowwise(Backbone().double(), **OPTIONS["segments"])
    for seed in range(2):
        observed(net, one_map(0, lambda m: m * 2), seed)
    maps = net(IMAGES)
    assert {type(m.grad_fn).__name__ for m in maps} == {"_SegmentBackward"}


class AfterWhole(nn.Module):
    """Returns a map that no row has made: it comes from an operation that runs before all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = torch.fft.fft2(x).real
        return [a, self.c(torch.relu(a + 1))]


@pytest.mark.filterwarnings("ignore:.*changed in place")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_returned_map_that_was_made_before_all_rows(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = AfterWhole().double()
    plain, ours = copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), **options)
    for seed in (1, 2):
        want, got = (observed(module, one_map(0, lambda m: m.mul_(3)), seed) for module in (plain, ours))
        for key, expected in want.items():
            assert difference(got[key], expected) < 1e-9, f"step {seed}: {key}"


class Around(nn.Module):
    """Runs by its parts, and changes in place what it has given to one of them. Plain PyTorch saves a padded copy."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU())
        self.part.extend([nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()] if deep else [])

    def forward(self, x: Tensor) -> list[Tensor]:
        y = torch.tanh(self.stem(x)) + 1
        z = self.part(y)
        y.mul_(2)
        return [y, z if z.mean() > -100 else -z]


@pytest.mark.filterwarnings("ignore:.*cannot run row by row", "ignore:.*changed in place")
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_argument_of_a_part_that_is_changed_after_its_call(options: dict[str, Any], deep: bool) -> None:
    """The first backward pass ended with an error."""
    torch.manual_seed(0)
    net = Around(deep).double()
    plain = copy.deepcopy(net)
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **options, on_unsupported="warn")
    for seed in (1, 2, 3):
        want, got = (observed(module, one_map(0, lambda m: m * 3), seed) for module in (plain, ours))
        for key, expected in want.items():
            assert difference(got[key], expected) < 1e-9, f"step {seed}: {key}"
    assert ours.part.forward.plan.mode != "plain"


def test_arguments_of_parts_are_copied_until_a_backward_pass_finds_them_as_they_were() -> None:
    ours = lrcnn_lightning.rowwise(Around(False).double(), **OPTIONS["two_phase"], on_unsupported="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observed(ours, one_map(0, lambda m: m * 3), 1)
    ((_, stem),), ((_, part),) = ours.stem.forward._plans.values(), ours.part.forward._plans.values()
    assert not stem._keeps_arguments and part._keeps_arguments


class Feeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        return a, self.b(a)


@pytest.mark.filterwarnings("ignore:.*changed in place", "ignore:.*differentiated")
def test_what_plain_pytorch_refuses_is_right_too() -> None:
    net = Feeds().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **OPTIONS["two_phase"])
    a, b = net(IMAGES)
    a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (a.sum() + b.square().sum()).backward()
    results = []
    for module in (net, ours):
        x = IMAGES.clone().requires_grad_()
        a, b = module(x)
        a = a.clone().mul_(2) if module is net else a.mul_(2)
        (g,) = torch.autograd.grad(a.square().sum() + b.square().sum(), x, create_graph=True)
        g.square().sum().backward()
        results.append([g.detach(), x.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    for want, got in zip(*results, strict=True):
        assert difference(got, want) < 1e-9


def test_an_input_that_is_changed_after_the_call_is_refused_as_in_plain_pytorch() -> None:
    for net in (Feeds().double(), lrcnn_lightning.rowwise(Feeds().double(), **OPTIONS["two_phase"])):
        x = IMAGES.clone()
        _, b = net(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            b.sum().backward()


class Views(nn.Module):
    """Returns parts of maps, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = torch.tanh(self.a(x))
        return [a[:, :2], a.permute(0, 2, 3, 1), a[:, 2:] + 1, x]


@pytest.mark.filterwarnings("ignore:.*changed in place")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parts_of_maps(options: dict[str, Any]) -> None:
    """With one row, a slab may be a view of a map, which autograd lets nobody change."""
    torch.manual_seed(0)
    net = Views().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **options)
    results = []
    for module in (net, ours):
        x = (2 * IMAGES).requires_grad_()
        first, second, third, same = module(1 * x)
        third.mul_(2)
        (first.square().sum() + second.sum() + third.square().sum() + same.square().sum()).backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for want, got in zip(*results, strict=True):
        assert difference(got, want) < 1e-9
    first = ours(IMAGES)[0]
    first.mul_(2)
    first.sum().backward()


# ------------------------------------------------------------------------------------------- views of one another


class ViewsOfOne(nn.Module):
    """Returns a map, views of it, and keeps one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(torch.relu(self.a(x)))
        self.state = y.detach()
        return y, y[:, :2], y.permute(0, 2, 3, 1)[..., 3:]


class PartOfSpectrum(nn.Module):
    """Returns a part of a map that nobody else has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(self.a(x)).real[:, 1:, :, :3]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_views_of_one_another_share_their_memory(options: dict[str, Any]) -> None:
    """Each had memory of its own: who changed one did not change the others, nor what the module had kept."""
    torch.manual_seed(0)
    net = ViewsOfOne().double()
    changes: list[Callable[..., Any]] = [
        lambda y, first, last: y.mul_(3),
        lambda y, first, last: first.add_(1),
        lambda y, first, last: last.mul_(2).add_(first.mean()),
        lambda y, first, last: y.detach().zero_(),
    ]
    for change in changes:
        seen = []
        for each in (copy.deepcopy(net), lrcnn_lightning.rowwise(copy.deepcopy(net), **options)):
            maps = each(IMAGES)
            change(*maps)
            sum((m.square().sum() * (k + 1) for k, m in enumerate(maps)), torch.zeros(())).backward()
            assert each.state is not None
            seen.append([*(m.detach() for m in maps), each.state, *(p.grad for p in each.parameters())])
        for want, got in zip(*seen, strict=True):
            assert difference(got, want) < 1e-9


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_returned_part_of_a_map_may_be_changed(options: dict[str, Any]) -> None:
    """Autograd forbade it, since the view was made inside of a function of its own."""
    torch.manual_seed(0)
    net = PartOfSpectrum().double()
    seen = []
    for each in (net, lrcnn_lightning.rowwise(copy.deepcopy(net), **options)):
        y = each(IMAGES)
        y.mul_(2)
        y.square().sum().backward()
        seen.append([y.detach(), *(p.grad for p in each.parameters())])
    for want, got in zip(*seen, strict=True):
        assert difference(got, want) < 1e-9
