"""Hooks of submodules inside of a row-wise module: they see full maps, once a step, and work as in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import CaptureError
from tests.twins import image, squares, twins, walk

Shown = dict[str, Any]
Handles = list[Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.body(y))


def looks(net: Net, shown: Shown) -> Handles:
    """A feature for a loss, as distillation and perceptual losses take it."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shown["feature"] = output
        shown["calls"] = shown.get("calls", 0) + 1

    return [net.body.register_forward_hook(hook)]


def looks_at_arguments(net: Net, shown: Shown) -> Handles:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shown["feature"] = output + args[0].mean()

    return [net.body[2].register_forward_hook(hook)]


def changes(net: Net, shown: Shown) -> Handles:
    return [net.stem.register_forward_hook(lambda module, args, output: output * 2)]


def before(net: Net, shown: Shown) -> Handles:
    def hook(module: nn.Module, args: Any) -> Any:
        shown["feature"] = args[0]
        return (args[0] * 1.5,)

    return [net.body[2].register_forward_pre_hook(hook)]


def named(net: Net, shown: Shown) -> Handles:
    def first(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] + 1,), kwargs

    def last(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        return output - args[0].mean()

    return [
        net.stem[0].register_forward_pre_hook(first, with_kwargs=True),
        net.stem[0].register_forward_hook(last, with_kwargs=True),
    ]


def gradient_of_a_map(net: Net, shown: Shown) -> Handles:
    """Grad-CAM."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shown["map"] = output.detach()
        output.register_hook(lambda gradient: shown.update(gradient=gradient))

    return [net.stem.register_forward_hook(hook)]


def backward(net: Net, shown: Shown) -> Handles:
    def hook(module: nn.Module, of_inputs: Any, of_outputs: Any) -> Any:
        shown["of_inputs"], shown["of_outputs"] = of_inputs[0], of_outputs[0]
        return (of_inputs[0] * 3,)

    return [net.body.register_full_backward_hook(hook)]


def before_backward(net: Net, shown: Shown) -> Handles:
    return [net.body[0].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 2,))]


def everywhere(net: Net, shown: Shown) -> Handles:
    """As profilers do."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shown.setdefault("shapes", []).append(output.shape[1])

    return [module.register_forward_hook(hook) for name, module in net.named_modules() if name]


KINDS = [looks, looks_at_arguments, changes, before, named, gradient_of_a_map, backward, before_backward, everywhere]


def with_hooks(place: Callable[[Net, Shown], Handles]) -> Callable[[Any, Tensor], Any]:
    def step(net: Any, x: Tensor) -> Any:
        shown: Shown = {}
        handles = place(net, shown)
        output = net(x)
        loss = output.square().mean()
        if "feature" in shown:
            loss = loss + shown["feature"].abs().mean()
        loss.backward()
        for handle in handles:
            handle.remove()
        return [output, shown]

    return step


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("place", KINDS)
def test_hooks(place: Callable[[Net, Shown], Handles], mode: str) -> None:
    """They saw nothing row by row: code ran until memory was short, and then ended with a KeyError."""
    walk(*twins(Net, mode=mode), step=with_hooks(place))


def test_hooks_that_come_and_go() -> None:
    plain, ours = twins(Net)
    walk(plain, ours)
    walk(plain, ours, step=with_hooks(looks))
    walk(plain, ours)
    assert ours.body._forward_hooks == {} and len(ours.forward._graphs) >= 2


def test_without_gradients() -> None:
    plain, ours = twins(Net)
    with torch.no_grad():
        for net in (plain, ours):
            shown: Shown = {}
            (handle,) = looks(net, shown)
            output = net(image())
            handle.remove()
            torch.testing.assert_close(shown["feature"], plain.body(plain.stem(image())))
        assert shown["calls"] == 1 and output.shape == (2, 4, 16, 12)


def test_planning_runs_no_hook() -> None:
    net, shown = Net().double(), {}
    handles = looks(net, shown) + looks_at_arguments(net, shown)
    plan = lrcnn_lightning.plan(net, image(), mode="two_phase", rows=4)
    assert shown == {}
    assert any("hooks at the exit of body" in str(node.op) for node in plan.graph.nodes)
    for handle in handles:
        handle.remove()


def test_a_map_that_is_changed_in_place_afterwards_is_refused() -> None:
    """In plain PyTorch what a hook has kept changes, too."""

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(inplace=True)), nn.Conv2d(4, 4, 3))

    plain, ours = twins(make)
    for net in (plain, ours):
        net[0].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(CaptureError, match=r"a hook of '0' is shown a map that aten.relu_.default .* changes in place"):
        squares(ours, image())


def test_a_hook_that_returns_another_shape() -> None:
    _, ours = twins(Net)
    ours.stem.register_forward_hook(lambda module, args, output: output[:1])
    with pytest.raises(CaptureError, match="a hook of 'stem' returns something of another shape"):
        squares(ours, image())
