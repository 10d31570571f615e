"""Random small networks: branches, strides, resizes, gates, normalisations, whatever rows and segments.

`hypothesis` draws a `Recipe`, which prints as what it is; a recipe that once failed stands below with its story.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import lrcnn_lightning
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.residency import KEEP, LEAN, STREAM, TRANSIENT
from tests.networks import ACTIVATIONS, Network, Recipe, Step, make, result_shape
from tests.oracle import KEEPINGS, MODES, assert_exact, no_gradient

LARGEST = 26
"""Rows or columns at most, so that an example takes milliseconds."""


def _numbers(draw: Any, kind: str, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
    """Numbers for a step of a kind on a map; None where it cannot be."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    flag = lambda: draw(st.booleans())  # noqa: E731
    mode = lambda: draw(st.sampled_from(["nearest", "nearest-exact", "linear"]))  # noqa: E731
    channels = shape[1]
    if kind == "conv":
        kernel, stride, dilation = integer(1, 5), integer(1, 4), integer(1, 3)
        padding = integer(0, dilation * (kernel - 1) // 2 + 1)
        groups = channels if flag() and flag() else 1
        out = groups if groups > 1 else integer(1, 5)
        return out, kernel, stride, padding, dilation, groups, flag()
    if kind == "same":
        return integer(1, 4), integer(1, 4), draw(st.sampled_from(["zeros", "reflect", "replicate"]))
    if kind == "transposed":
        kernel, stride = integer(1, 4), integer(1, 3)
        return integer(1, 4), kernel, stride, integer(0, kernel - 1), integer(0, stride - 1)
    if kind in ("max", "average"):
        kernel = integer(1, 4)
        numbers = (kernel, integer(1, 4), integer(0, kernel // 2), flag())
        return numbers if kind == "max" else (*numbers, flag())
    if kind == "instance":
        return flag(), flag()
    if kind == "group":
        return (draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])),)
    if kind == "activation":
        return (draw(st.sampled_from(sorted(ACTIVATIONS))),)
    if kind == "last":
        return (integer(1, 5),)
    if kind == "gate":
        return draw(st.sampled_from(["mean", "amax", "norm", "std", "pool max", "pool average"])), integer(1, 3)
    if kind == "places":
        return (draw(st.sampled_from([1, 3, 5])),)
    if kind == "resize":
        return tuple(integer(1, 15) for _ in shape[2:]), mode()
    if kind == "scale":
        return draw(st.sampled_from([0.5, 1.5, 2.0, 1.7])), mode()
    if kind in ("cat", "add", "multiply"):
        return (mode(),)
    if kind == "crop":
        above = integer(0, shape[2] - 1)
        return above, integer(0, shape[2] - 1 - above)
    if kind == "pad":
        return integer(0, 3), integer(0, 3), draw(st.sampled_from(["constant", "reflect", "replicate"]))
    if kind == "adaptive":
        return draw(st.sampled_from(["avg", "max"])), integer(1, 6)
    if kind == "split" and channels % 2:
        return None
    if kind == "dropout":
        return draw(st.sampled_from([0.2, 0.5])), flag() and len(shape) == 4
    if kind == "pool":
        return None
    return ()


KINDS = (
    *("conv",) * 6,
    *("same", "transposed", "max", "average"),
    *("batch",) * 4,
    *("instance", "group", "last"),
    *("activation",) * 4,
    *("gate",) * 2,
    *("places", "resize", "scale", "multiply", "crop", "pad", "adaptive", "split", "detach", "dropout"),
    *("flip", "again", "again"),
    *("cat", "add") * 3,
)


@st.composite
def recipes(draw: Any, most: int = 9) -> Recipe:
    """A network of up to ``most`` steps."""
    dimensions = draw(st.sampled_from([2, 2, 2, 2, 1, 3]))
    high = (14, 12, 7)[dimensions - 1]
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *(draw(st.integers(1, high)) for _ in range(dimensions)))
    shape = (*shape[:2], max(shape[2], 2), *shape[3:])
    copied = False  # whether a map holds an element twice
    shapes: list[tuple[int, ...]] = [shape]
    steps: list[Step] = []
    modules: list[Any] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(KINDS))
        last = len(shapes) - 1
        source = last if draw(st.integers(0, 3)) else draw(st.integers(0, last))
        sources: tuple[int, ...] = (source,)
        if kind in ("cat", "add", "multiply"):
            sources = (source, draw(st.integers(0, last)))
        if kind == "again":
            fitting = [i for i, s in enumerate(steps, 1) if s.kind in ("conv", "same", "batch", "last")]
            numbers: tuple[Any, ...] | None = (draw(st.sampled_from(fitting)),) if fitting else None
        else:
            numbers = _numbers(draw, kind, shapes[source])
        if numbers is None:
            continue
        step = Step(kind, sources, numbers)
        try:
            module = modules[step.numbers[0] - 1] if kind == "again" else make(step, shapes)
            result = result_shape(module, step, shapes)
        except (RuntimeError, ValueError):
            continue
        rough = kind in ("batch", "instance", "group", "last") or (kind == "gate" and numbers[0] == "std")
        few = 1
        for size in shapes[source][2:]:
            few *= size
        # Normalising (nearly) nothing is an error, or a division by what rounding left.
        if min(result) < 1 or max(result[2:]) > LARGEST or result[1] > 8 or (rough and few < 4):
            continue
        if kind == "last" and shapes[source][1] < 2:
            continue
        # Plain PyTorch's gradients are wrong there, see `test_one_sample_before_channels_last`.
        if shape[0] == 1 and {"instance", "last"} <= {kind, *(s.kind for s in steps)}:
            continue
        # Of two equal elements rounding makes one the larger, plainly or by rows, and it takes the gradient.
        copied = copied or kind == "adaptive" or any(n in ("nearest", "nearest-exact") for n in numbers)
        copied = copied or any(n in ("reflect", "replicate") for n in numbers)
        if copied and (kind == "max" or (kind == "gate" and "max" in numbers[0])):
            continue
        steps.append(step)
        modules.append(module)
        shapes.append(result)
    outputs = [len(steps)]
    if draw(st.integers(0, 3)) == 0:
        outputs.append(draw(st.integers(1, len(steps))) if steps else 0)
    if draw(st.integers(0, 3)) == 0 and steps:
        steps.append(Step("pool", (len(steps),)))
        outputs = [*outputs[1:], len(steps)]
    numbered = range(1, len(steps) + 1)
    frozen = frozenset(i for i in numbered if draw(st.integers(0, 5)) == 0)
    if draw(st.integers(0, 7)) == 0:
        frozen = frozenset(range(1, draw(st.integers(0, len(steps))) + 1))
    evaluated = frozenset(
        i for i in numbered if steps[i - 1].kind in ("batch", "instance", "dropout") and draw(st.integers(0, 3)) == 0
    )
    return Recipe(shape, tuple(steps), tuple(outputs), frozen, evaluated, draw(st.integers(0, 3)) > 0)


@st.composite
def choices(draw: Any) -> list[Choices]:
    """Each mode once, with any rows, segments and chunks, and a few maps that live elsewhere than the rule says."""
    residencies = st.dictionaries(st.integers(0, 60), st.sampled_from([KEEP, TRANSIENT, STREAM, LEAN]), max_size=4)
    return [
        Choices(
            mode,
            draw(st.integers(1, 14)),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 3)),
            draw(st.sampled_from(KEEPINGS)),
            exceptions=tuple(sorted(draw(residencies).items())),
            heights=draw(st.sampled_from(["even", "balanced"])),
            rows_where_needed=draw(st.booleans()),
        )
        for mode in MODES
    ]


def verify(recipe: Recipe, chosen: list[Choices]) -> None:
    torch.manual_seed(0)
    network = Network(recipe).prepared()
    training = {name: module.training for name, module in network.named_modules()}
    x = torch.randn(recipe.shape, dtype=torch.float64)
    network.forward(x)  # that the network itself runs
    network = Network(recipe).prepared()
    assert training == {name: module.training for name, module in network.named_modules()}
    assert_exact(network, x if recipe.input_gradient else no_gradient(x), train=None, choices=chosen)


COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@settings(COMMON, max_examples=120)
@given(recipes(), choices())
def test_random_networks(recipe: Recipe, chosen: list[Choices]) -> None:
    verify(recipe, chosen)


@pytest.mark.slow
@settings(COMMON, max_examples=3000)
@given(recipes(16), choices())
def test_many_random_networks(recipe: Recipe, chosen: list[Choices]) -> None:
    verify(recipe, chosen)


# ---------------------------------------------------------------------------------- what once failed, and its story

CONVOLUTION = (2, 1, 1, 0, 1, 1, False)

STORIES = {
    # Nearest interpolation on the CPU finds rows in float32 in its backward pass, and in its forward pass mostly in
    # the map's own type. At these heights the two part, and so did we, from both.
    "nearest, rounded": Recipe(
        (1, 2, 26), (Step("resize", (0,), ((46,), "nearest")), Step("conv", (1,), (1, 3, 1, 1, 1, 1, True))), (2,)
    ),
    "nearest-exact, rounded": Recipe(
        (1, 1, 13),
        (
            Step("transposed", (0,), (1, 1, 2, 0, 1)),
            Step("conv", (1,), (1, 4, 1, 0, 1, 1, False)),
            Step("multiply", (2, 1), ("nearest-exact",)),
        ),
        (3,),
    ),
    # A view of one sample, channels last, has a batch stride of C. ATen's batch norm backward took it for the stride
    # of a memory format and mixed up the channels.
    "one sample, channels last, group norm": Recipe(
        (1, 2, 4, 3), (Step("last", (0,), (2,)), Step("group", (1,), (1,))), (2,)
    ),
    "one sample, channels last, instance norm": Recipe(
        (1, 2, 4, 3), (Step("last", (0,), (2,)), Step("instance", (1,), (True, True))), (2,)
    ),
    # The first rows of the interval were reached by no input row; the slab began below them.
    "transposed stride above kernel": Recipe(
        (1, 1, 9, 4), (Step("transposed", (0,), (1, 2, 3, 0, 0)), Step("conv", (1,), (1, 3, 1, 0, 1, 1, True))), (2,)
    ),
    # A segment that is not differentiated had an output that said it was, and saved nothing for its backward pass.
    "detached input first": Recipe((1, 1, 2), (Step("detach", (0,)),), (1,)),
    # The segment reads parameters, its output does not depend on them.
    "output of no parameter": Recipe(
        (1, 1, 2, 2),
        (Step("conv", (0,), CONVOLUTION), Step("batch", (1,)), Step("activation", (0,), ("hardswish",))),
        (3,),
        input_gradient=False,
    ),
    # A map made by a whole operation has no residency, and was looked up.
    "whole operation inside a segment": Recipe(
        (1, 2, 6, 5), (Step("conv", (0,), CONVOLUTION), Step("flip", (1,)), Step("activation", (2,), ("tanh",))), (3,)
    ),
}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_stories(story: str, rows: int) -> None:
    verify(STORIES[story], [Choices(mode, rows, 1, 1, keeping) for mode in MODES for keeping in KEEPINGS])


def test_one_sample_before_channels_last() -> None:
    """ATen's instance norm mixes up the channels of a gradient that is channels last, if there is one sample. Rows do
    not, so plain PyTorch cannot be the oracle here: finite differences are.
    """
    torch.manual_seed(0)
    step = Step("last", (0,), (2,))
    network = nn.Sequential(nn.InstanceNorm2d(3, affine=True), make(step, [(1, 3, 4, 4)])).double()
    lrcnn_lightning.rowwise(network, mode="two_phase", rows=2)
    assert torch.autograd.gradcheck(network, (torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True),))
