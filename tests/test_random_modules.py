"""Random modules that do what networks do beside convolutions, and callers that do what training steps do.

Each is exact, or it runs plainly and says so. It is never silently wrong, and never raises what plain PyTorch does not.

    pytest tests/test_random_modules.py                              # every ingredient alone, and a few dozen networks
    RANDOM_MODULES=5000 pytest -m slow tests/test_random_modules.py  # many
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning.checking.chance import unchanged_generators
from lrcnn_lightning.checking.check import compared
from lrcnn_lightning.checking.comparison import Distance, Key, distance
from lrcnn_lightning.checking.example import Example
from lrcnn_lightning.checking.steps import Shown, show, weighted
from tests.ingredients import CHANNELS, INGREDIENTS, conv

STEPS = 2
SIZE = (10, 8)

# ------------------------------------------------------------------------------------------------ beginnings


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class ChangedImage(Image):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 2
        return self.first(x)


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(5, CHANNELS)

    def forward(self, labels: Tensor) -> Tensor:
        return self.first(labels).permute(0, 3, 1, 2)


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, CHANNELS * SIZE[0] * SIZE[1])

    def forward(self, z: Tensor) -> Tensor:
        return self.first(z).view(-1, CHANNELS, *SIZE)


class Wave(nn.Module):
    """Samples of a sound, ``N T``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, CHANNELS, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, None])[:, :, : SIZE[0] * SIZE[1]].unflatten(2, SIZE)


class Condition(Image):
    """An image, and a vector for each."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(6, CHANNELS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.first(x) * self.second(z)[:, :, None, None]


BEGINNINGS: dict[str, tuple[type[nn.Module], Callable[[torch.Generator], tuple[Tensor, ...]]]] = {
    "image": (Image, lambda g: (torch.randn(2, 3, *SIZE, generator=g),)),
    "changed image": (ChangedImage, lambda g: (torch.randn(2, 3, *SIZE, generator=g),)),
    "labels": (Labels, lambda g: (torch.randint(0, 5, (2, *SIZE), generator=g),)),
    "vector": (Vector, lambda g: (torch.randn(2, 6, generator=g),)),
    "wave": (Wave, lambda g: (torch.randn(2, 4 * SIZE[0] * SIZE[1] + 3, generator=g),)),
    "condition": (Condition, lambda g: (torch.randn(2, 3, *SIZE, generator=g), torch.randn(2, 6, generator=g))),
}

# ------------------------------------------------------------------------------------------------ endings and callers

ENDINGS: dict[str, Callable[[list[Tensor]], Any]] = {
    "map": lambda maps: maps[-1],
    "maps": lambda maps: [maps[0], F.avg_pool2d(maps[-1], 2)],
    "dict": lambda maps: {"out": maps[-1], "pooled": maps[-1].mean((2, 3)), "height": maps[-1].shape[2]},
    "view": lambda maps: maps[-1][:, 1:, :, :3],
    "twice": lambda maps: (maps[-1], maps[-1]),
    "vector": lambda maps: maps[-1].mean((2, 3)),
}


def _maps(result: Any) -> list[Tensor]:
    items = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else [result]
    return [item for item in items if isinstance(item, Tensor)]


class Impossible(Exception):
    """What plain PyTorch does not do is no matter of rows."""


def _differentiable(args: tuple[Tensor, ...]) -> Tensor:
    if not args[0].requires_grad:
        raise Impossible("the penalty is of a gradient that nobody computes")
    return args[0]


def called(module: nn.Module, *args: Tensor) -> Any:
    return module(*args)


def called_twice(module: nn.Module, *args: Tensor) -> Any:
    first = module(*(arg.clone() for arg in args))
    return first, module(*(arg.flip(0) for arg in args))


def result_scaled_in_place(module: nn.Module, *args: Tensor) -> Any:
    result = module(*args)
    _maps(result)[0].mul_(2)
    return result


def result_added_in_place(module: nn.Module, *args: Tensor) -> Any:
    """As feature pyramids do."""
    result = module(*args)
    first, last = _maps(result)[0], _maps(result)[-1]
    if first is last or first.dim() != 4 or last.dim() != 4:
        return result
    first += F.interpolate(last.mean(1, keepdim=True), size=first.shape[2:])
    return result


def linear_penalty(module: nn.Module, *args: Tensor) -> Any:
    """WGAN-GP: the norm of the gradient of a sum."""
    x = _differentiable(args)
    result = module(*args)
    (gradient,) = torch.autograd.grad(sum(m.sum() for m in _maps(result)), x, create_graph=True)
    return result, (gradient.flatten(1).norm(2, 1) - 1).square().mean()


def penalty_alone(module: nn.Module, *args: Tensor) -> Any:
    x = _differentiable(args)
    (gradient,) = torch.autograd.grad(sum(m.square().sum() for m in _maps(module(*args))), x, create_graph=True)
    return gradient.square().mean()


def differentiated_by_input(module: nn.Module, *args: Tensor) -> Any:
    """Saliency: a gradient that is not differentiated again."""
    x = _differentiable(args)
    result = module(*args)
    (gradient,) = torch.autograd.grad(sum(m.square().sum() for m in _maps(result)), x, retain_graph=True)
    return result, gradient


def differentiated_twice(module: nn.Module, *args: Tensor) -> Any:
    """Two losses, one after the other."""
    result = module(*args)
    sum(m.square().sum() for m in _maps(result)).backward(retain_graph=True)
    return result


def evaluated_before(module: nn.Module, *args: Tensor) -> Any:
    training = module.training
    module.eval()
    with torch.no_grad():
        before = module(*(arg.clone() for arg in args))
    module.train(training)
    return before, module(*args)


def parameters_changed_before(module: nn.Module, *args: Tensor) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
    return module(*args)


CALLERS: dict[str, Callable[..., Any]] = {
    function.__name__.replace("_", " "): function
    for function in (
        called,
        called_twice,
        result_scaled_in_place,
        result_added_in_place,
        linear_penalty,
        penalty_alone,
        differentiated_by_input,
        differentiated_twice,
        evaluated_before,
        parameters_changed_before,
    )
}

# ------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class Recipe:
    """A module, its input, how it is called, and how it runs by rows."""

    parts: tuple[str, ...]
    beginning: str = "image"
    ending: str = "map"
    caller: str = "called"
    input_gradient: bool = False
    training: bool = True
    mode: str = "two_phase"
    rows: int = 3
    segments: int | str = "auto"


class Network(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.beginning = BEGINNINGS[recipe.beginning][0]()
        self.parts = nn.ModuleList([INGREDIENTS[name]() for name in recipe.parts])
        self.last = conv()
        self.ending = ENDINGS[recipe.ending]

    def forward(self, *args: Tensor) -> Any:
        maps = [self.beginning(*args)]
        for part in self.parts:
            maps.append(part(maps[-1]))
        return self.ending([*maps, self.last(maps[-1])])


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Modules and constants are float64 from the start: a conversion would part tensors that share memory."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with unchanged_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)


def steps(recipe: Recipe, rounded: int | None = None, notices: list[str] | None = None) -> tuple[list[Shown], Any]:
    """What the steps of a recipe show, by rows if there is a list for its notices; and the plan."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    module = Network(recipe).train(recipe.training)
    inputs = BEGINNINGS[recipe.beginning][1](generator)
    if rounded is not None:
        noise = torch.Generator().manual_seed(rounded)
        for tensor in (*module.parameters(), *inputs):
            if not isinstance(tensor, nn.parameter.UninitializedParameter) and tensor.is_floating_point():
                tensor.data.mul_(1 + 2e-16 * torch.randint(-1, 2, tensor.shape, generator=noise))
    inputs = tuple(x.requires_grad_(recipe.input_gradient and x.is_floating_point()) for x in inputs)
    if recipe.input_gradient and recipe.beginning == "changed image":
        inputs = tuple(x * 1 for x in inputs)  # a leaf cannot be changed in place
    example = Example.of(module, inputs)
    forward = None
    if notices is not None:
        options = {"mode": recipe.mode, "rows": recipe.rows, "segments": recipe.segments}
        lrcnn_lightning.rowwise(module, **options, max_overhead=float("inf"), on_unsupported="warn")
        forward = vars(module)["forward"]
        forward.notify = notices.append
    shown = []
    for step in range(STEPS):
        leaves, given = example.fresh(wide=False, move=lambda tensor: None)
        call = functools.partial(CALLERS[recipe.caller], module)
        shown.append(show(call, module, leaves, given, weighted(step), step))
    return shown, None if forward is None else forward.training_plan or forward.plan


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """A transform of ``torch.func`` that is left open breaks whatever comes after it in the process."""
    try:
        yield
    finally:
        opened = 0
        while torch._C._functorch.peek_interpreter_stack() is not None:
            torch._C._functorch.pop_dynamic_layer_stack()
            opened += 1
    assert not opened, "a transform of torch.func was left open"


def verify(recipe: Recipe) -> None:
    with _nothing_left_behind(), _in_float64():
        try:
            want, _ = steps(recipe)
            samples = [steps(recipe, seed)[0] for seed in (1, 2)]
        except (RuntimeError, TypeError, ValueError) as error:
            raise Impossible(str(recipe)) from error
        noise: list[dict[Key, Distance]] = []
        for step, plain in enumerate(want):
            gaps = {key: [distance(sample[step].get(key), value) for sample in samples] for key, value in plain.items()}
            noise.append({key: Distance(*map(max, zip(*several, strict=True))) for key, several in gaps.items()})
        notices: list[str] = []
        got, plan = steps(recipe, notices=notices)
    wrong = [
        str(replace(item, step=step + 1))
        for step, (mine, plain) in enumerate(zip(got, want, strict=True))
        for item in compared(mine, plain, noise[step])
        if not item.exact
    ]
    assert not wrong, f"{recipe}:\n  " + "\n  ".join([*wrong, *(f"notice: {text}" for text in notices)])
    if plan is None or plan.mode == "plain":
        assert notices, f"{recipe}: ran plainly, and nothing was said"


# ------------------------------------------------------------------------------------------------ one thing at a time


@pytest.mark.parametrize("name", INGREDIENTS)
def test_ingredient(name: str) -> None:
    verify(Recipe((name,), input_gradient=True))


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("gradient", [False, True])
def test_beginning(name: str, gradient: bool) -> None:
    verify(Recipe(("ordinary: BatchNorm", "ordinary: tanh"), beginning=name, input_gradient=gradient))


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("caller", CALLERS)
def test_caller(caller: str, name: str) -> None:
    verify(Recipe(("ordinary: tanh",), ending=name, caller=caller, input_gradient=True))


STORIES = {
    # Every second channel of a map in channels last: what was written row by row came in another order of dimensions,
    # and dropout behind it, which draws in the order of memory, had other masks.
    "layouts of parts": Recipe(
        ("complex: Rotates", "random: dropout"), "labels", "dict", mode="overlap", rows=2, segments=2
    ),
    "layouts of parts, twice": Recipe(
        ("complex: Rotates", "control: Checkpoints", "random: Bernoulli"), "labels", "vector", "called twice", rows=2
    ),
    # The first call runs plainly, and autograd refused its backward pass: `weight.data` had been written since.
    "weight.data after a plain call": Recipe(
        ("weights: SetsData", "weights: ClampsData", "weights: lazy"), caller="called twice", input_gradient=True
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_stories(story: str) -> None:
    verify(STORIES[story])


# ------------------------------------------------------------------------------------------------ everything at once

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
recipes = st.builds(
    Recipe,
    st.lists(st.sampled_from(sorted(INGREDIENTS)), min_size=1, max_size=4).map(tuple),
    st.sampled_from(sorted(BEGINNINGS)),
    st.sampled_from(sorted(ENDINGS)),
    st.sampled_from(["called"] * 6 + sorted(CALLERS)),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
    st.sampled_from(["two_phase", "overlap"]),
    st.integers(1, 5),
    st.sampled_from(["auto", "auto", 1, 2]),
)


def verify_if_possible(recipe: Recipe) -> None:
    try:
        verify(recipe)
    except Impossible:
        assume(False)


@settings(COMMON, max_examples=36)
@given(recipes)
def test_random_modules(recipe: Recipe) -> None:
    verify_if_possible(recipe)


@pytest.mark.slow
@settings(COMMON, max_examples=int(os.environ.get("RANDOM_MODULES", "1000")))
@given(recipes)
def test_many_random_modules(recipe: Recipe) -> None:
    verify_if_possible(recipe)
