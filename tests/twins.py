"""A module and its copy that runs row by row, led through the same steps in float64: all that shows must agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lrcnn_lightning

__all__ = ["image", "squares", "twins", "walk"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)

Step = Callable[[Any, Tensor], Any]
"""Runs a module on an image, with a backward pass; returns whatever is to be compared."""

_SMALL = 1e-9
"""Of the largest gradient: those that are zero but for rounding have no scale of their own."""


def image(seed: int = 0, shape: tuple[int, ...] = (2, 3, 16, 12)) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(module: nn.Module, x: Tensor) -> Any:
    """The plainest step."""
    output = module(x)
    sum(t.abs().square().sum() for t in _tensors(output)).backward()
    return output


def twins(make: Callable[[], ModuleType], **options: Any) -> tuple[ModuleType, ModuleType]:
    torch.manual_seed(0)
    plain = make().double()
    ours = copy.deepcopy(plain)
    options = {"mode": "two_phase", "rows": 4, **options}
    return plain, lrcnn_lightning.rowwise(ours, **options)


def walk(plain: nn.Module, ours: nn.Module, step: Step = squares, steps: int = 3, by_rows: bool = True) -> None:
    """Lead both through ``steps`` steps; results, gradients, buffers, attributes and random states must agree."""
    for number in range(steps):
        shown = []
        for module in (plain, ours):
            module.zero_grad(set_to_none=True)
            torch.manual_seed(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = image(number)
                result = step(module, x)
            shown.append(
                {**dict(_named("result", result)), **dict(_shown(module)), "image": x.detach(), "random": torch.rand(3)}
            )
        _compare(*shown, f"step {number}")
        if by_rows:
            assert ours.forward.plan is not None and ours.forward.plan.mode != "plain"


def _shown(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"parameter {name}", parameter.detach().clone()
        if parameter.grad is not None:
            yield f"gradient of {name}", parameter.grad
    for name, buffer in module.named_buffers():
        yield f"buffer {name}", buffer.detach().clone()
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if not name.startswith("_") and name != "forward":
                yield from _named(f"attribute {path}.{name}", value)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach().clone()
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(float(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}[{key}]", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _named(f"{name}[{number}]", item)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return [tensor for item in items for tensor in _tensors(item)]


def _compare(want: Mapping[str, Tensor], have: Mapping[str, Tensor], when: str) -> None:
    assert have.keys() == want.keys(), f"{when}: {sorted(have.keys() ^ want.keys())}"
    scale = max((t.abs().max().item() for n, t in want.items() if n.startswith("gradient") and t.numel()), default=0.0)
    for name, tensor in want.items():
        atol = _SMALL * (1 + scale)
        torch.testing.assert_close(
            have[name], tensor, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{when}, {name}: {text}"
        )
