"""Small networks as plain data, to be drawn at random, printed, and typed into a regression test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 0.1
"""Of every normalisation. What comes before one has a gradient that is zero but for it, and zero has no digits."""


@dataclass(frozen=True)
class Step:
    """One step: its kind, the maps it reads (0 is the input, i the result of step i), and its numbers."""

    kind: str
    sources: tuple[int, ...]
    numbers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A network: input shape ``N C *``, steps, the maps that are returned, and what is frozen.

    ``frozen`` are steps (by number from 1) whose parameters need no gradient, ``evaluated`` those in eval mode.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    frozen: frozenset[int] = field(default_factory=frozenset)
    evaluated: frozenset[int] = field(default_factory=frozenset)
    input_gradient: bool = True


class Call(nn.Module):
    """A function as a module, with modules that it may use."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function, self.used = function, nn.ModuleDict(modules)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.function(*maps, **dict(self.used.items()))


def _resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    if x.shape[2:] == torch.Size(size):
        return x
    if mode == "linear":
        mode = ("linear", "bilinear", "trilinear")[x.dim() - 3]
    return functional.interpolate(x, size=tuple(size), mode=mode)


def _gate(x: Tensor, pool: str) -> Tensor:
    dims = tuple(range(2, x.dim()))
    if pool == "mean":
        return x.mean(dims, keepdim=True)
    if pool == "amax":
        return x.amax(dims, keepdim=True)
    if pool == "norm":
        return torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    if pool == "std":
        return x.std(dims, keepdim=True)
    kind = "max" if pool == "pool max" else "avg"
    result: Tensor = getattr(functional, f"adaptive_{kind}_pool{x.dim() - 2}d")(x, 1)
    return result


class ChannelsLast(nn.Module):
    """``layer_norm`` and a linear layer over channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels, EPS), nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.movedim(1, -1))).movedim(-1, 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "silu": functional.silu,
    "relu": functional.relu,
    "relu_": lambda x: functional.relu_(x * 1.5),
    "hardswish": functional.hardswish,
    "softmax": lambda x: functional.softmax(x, 1),
}


def make(step: Step, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """The module of a step, given the shapes of the maps so far (``N C *``)."""
    shape = shapes[step.sources[0]]
    dimensions, channels, numbers = len(shape) - 2, shape[1], step.numbers

    def of(*kinds: Any) -> Any:
        return kinds[dimensions - 1]

    if step.kind == "conv":
        out, kernel, stride, padding, dilation, groups, bias = numbers
        kind = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return kind(channels, out, kernel, stride, padding, dilation, groups, bias)  # type: ignore[no-any-return]
    if step.kind == "same":
        out, kernel, mode = numbers
        kind = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return kind(channels, out, kernel, padding="same", padding_mode=mode)  # type: ignore[no-any-return]
    if step.kind == "transposed":
        out, kernel, stride, padding, extra = numbers
        kind = of(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        return kind(channels, out, kernel, stride, padding, extra)  # type: ignore[no-any-return]
    if step.kind == "max":
        kernel, stride, padding, ceil = numbers
        kind = of(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        return kind(kernel, stride, padding, ceil_mode=ceil)  # type: ignore[no-any-return]
    if step.kind == "average":
        kernel, stride, padding, ceil, include = numbers
        kind = of(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
        return kind(kernel, stride, padding, ceil_mode=ceil, count_include_pad=include)  # type: ignore[no-any-return]
    if step.kind == "batch":
        return of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)(channels, eps=EPS)  # type: ignore[no-any-return]
    if step.kind == "instance":
        kind = of(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        return kind(channels, EPS, affine=numbers[0], track_running_stats=numbers[1])  # type: ignore[no-any-return]
    if step.kind == "group":
        return nn.GroupNorm(numbers[0], channels, EPS)
    if step.kind == "activation":
        return Call(ACTIVATIONS[numbers[0]])
    if step.kind == "last":
        return ChannelsLast(channels, numbers[0])
    if step.kind == "gate":
        pool, hidden = numbers
        kind = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return Call(
            lambda x, down, up: x * torch.sigmoid(up(torch.tanh(down(_gate(x, pool))))),
            down=kind(channels, hidden, 1),
            up=kind(hidden, channels, 1),
        )
    if step.kind == "places":
        kind = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return Call(
            lambda x, conv: x * torch.sigmoid(conv(torch.cat([x.amax(1, True), x.mean(1, True)], 1))),
            conv=kind(2, 1, numbers[0], padding=numbers[0] // 2),
        )
    if step.kind == "resize":
        size, mode = numbers
        return Call(lambda x: _resized(x, size, mode))
    if step.kind == "scale":
        factor, mode = numbers
        mode = of("linear", "bilinear", "trilinear") if mode == "linear" else mode
        return Call(lambda x: functional.interpolate(x, scale_factor=factor, mode=mode))
    if step.kind == "cat":
        return Call(lambda x, y: torch.cat([x, _resized(y, x.shape[2:], numbers[0])], 1))
    if step.kind == "add":
        kind = of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if shapes[step.sources[1]] == shape:
            return Call(lambda x, y: x + y)
        return Call(
            lambda x, y, project: x + _resized(project(y), x.shape[2:], numbers[0]),
            project=kind(shapes[step.sources[1]][1], channels, 1),
        )
    if step.kind == "multiply":
        return Call(lambda x, y: x * torch.sigmoid(_resized(y.mean(1, keepdim=True), x.shape[2:], numbers[0])))
    if step.kind == "crop":
        above, below = numbers
        return Call(lambda x: x[:, :, above : x.shape[2] - below])
    if step.kind == "pad":
        above, below, mode = numbers
        widths = [0, 0] * (dimensions - 1) + [above, below]
        return Call(lambda x: functional.pad(x, widths, mode))
    if step.kind == "shuffle":
        return Call(lambda x: functional.pixel_unshuffle(functional.pixel_shuffle(x, 2), 2) if numbers[0] else x)
    if step.kind == "adaptive":
        name = f"adaptive_{numbers[0]}_pool{dimensions}d"
        return Call(lambda x: getattr(functional, name)(x, numbers[1]))
    if step.kind == "split":
        return Call(lambda x: torch.mul(*torch.chunk(x, 2, 1)))
    if step.kind == "flip":
        return Call(lambda x: torch.flip(x, (2,)))
    if step.kind == "detach":
        return Call(lambda x: x * x.detach())
    if step.kind == "dropout":
        return (nn.Dropout(numbers[0]), nn.Dropout2d(numbers[0]))[numbers[1]]
    if step.kind == "pool":
        return Call(lambda x: x.mean(tuple(range(2, x.dim()))))
    raise ValueError(f"no step of kind {step.kind!r}")


class Network(nn.Module):
    """The module of a recipe. ``again`` calls the module of an earlier step once more."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        modules: list[nn.Module] = []
        shapes = [recipe.shape]
        for step in recipe.steps:
            module = modules[step.numbers[0] - 1] if step.kind == "again" else make(step, shapes)
            modules.append(module)
            shapes.append(result_shape(module, step, shapes))
        self.steps = nn.ModuleList(modules)
        self.shapes = shapes
        for number in recipe.frozen:
            modules[number - 1].requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for step, module in zip(self.recipe.steps, self.steps, strict=True):
            maps.append(module(*(maps[source] for source in step.sources)))
        return [maps[output] for output in self.recipe.outputs]

    def prepared(self) -> Network:
        """In float64, each step in its state, no parameter and no statistic at a special value."""
        self.double().train()
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.05, 0.6)
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0))
        for number in self.recipe.evaluated:
            self.steps[number - 1].eval()
        return self


def result_shape(module: nn.Module, step: Step, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what a step returns, without computing it."""
    stand_in = module
    parameters = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in module.named_buffers()}
    maps = [torch.empty(shapes[source], device="meta") for source in step.sources]
    with torch.no_grad():
        result = torch.func.functional_call(stand_in, {**parameters, **buffers}, tuple(maps))
    return tuple(result.shape)
