"""Lean convolutions against the sum written out, the networks made of them, and both row by row."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import lrcnn_lightning
from lrcnn_lightning.cli.build import CommandError, build, user_errors
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models import (
    LeanConv2d,
    LeanResNet,
    lean_resnet,
    leanify,
    resnet18,
    resnet50,
    unet,
    vgg16,
    vgg16_bn,
)
from lrcnn_lightning.models.resnet import Bottleneck
from tests.exact import assert_same_step
from tests.oracle import difference

REPOSITORY = Path(__file__).resolve().parents[1]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --------------------------------------------------------------------------------------------- the convolution


def points(module: LeanConv2d) -> list[tuple[int, int]]:
    """Row and column in the kernel of every weight of a stencil."""
    if module.stencil == "full":
        return list(itertools.product(range(module.kernel_size[0]), range(module.kernel_size[1])))
    return {"4-point": [(0, 1), (1, 0), (1, 2), (2, 1)], "5-point": [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]}[
        module.stencil
    ]


def written_out(module: LeanConv2d) -> nn.Conv2d:
    """The same operator as a dense convolution, whose weights are set one by one."""
    dense = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
    ).double()
    wide, high = module.in_channels // module.groups, module.out_channels // module.groups
    with torch.no_grad():
        dense.weight.zero_()
        for output in range(module.out_channels):
            group = output // high
            for near, (point, (row, column)) in itertools.product(range(wide), enumerate(points(module))):
                dense.weight[output, group * wide + near, row, column] = module.spatial_weight[output, near, point]
        dense.weight[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2] += module.pointwise_weight[..., 0, 0]
        if module.bias is not None:
            assert dense.bias is not None
            dense.bias.copy_(module.bias)
    return dense


OPTIONS: dict[str, dict[str, Any]] = {
    "5-point": {},
    "4-point": {"stencil": "4-point"},
    "3 x 3": {"stencil": "full"},
    "5 x 3": {"stencil": "full", "kernel_size": (5, 3)},
    "stride": {"stride": 2},
    "two strides": {"stride": (1, 3), "stencil": "full"},
    "no padding": {"padding": 0},
    "valid": {"padding": "valid", "stride": 2},
    "wide padding": {"padding": (3, 2), "stride": 2},
    "same": {"padding": "same", "dilation": (1, 2)},
    "dilation, padding of one": {"dilation": 2, "padding": 1},
    "reflect": {"padding_mode": "reflect", "stride": 2},
    "circular": {"padding_mode": "circular", "dilation": 2},
    "replicate, wide": {"padding_mode": "replicate", "padding": (2, 0)},
    "groups of two": {"group_size": 2, "stencil": "full", "stride": 2},
    "groups of four": {"group_size": 4},
    "no bias": {"bias": False},
}
CHANNELS = [(8, 8), (8, 16), (16, 8), (12, 8), (4, 12)]


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_sum_of_its_parts(options: dict[str, Any], channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = LeanConv2d(*channels, **options).double()
    nn.init.normal_(module.bias) if module.bias is not None else None
    dense = written_out(module)
    features = torch.randn(2, channels[0], 13, 10, dtype=torch.float64)
    got, want = module(features), dense(features)
    assert difference(got, want) < 1e-13
    assert difference(module.dense_kernel(), dense.weight) < 1e-15
    # The gradients are those of the dense weights, where the lean operator has weights.
    gradient = torch.randn(want.shape, dtype=torch.float64)
    got.backward(gradient)
    want.backward(gradient)
    assert dense.weight.grad is not None and module.pointwise_weight.grad is not None
    centre = dense.weight.grad[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2]
    assert difference(module.pointwise_weight.grad[..., 0, 0], centre) < 1e-12
    wide, high = channels[0] // module.groups, channels[1] // module.groups
    rows, columns = torch.tensor(points(module)).T
    assert module.spatial_weight.grad is not None
    for output, found in enumerate(module.spatial_weight.grad):
        first = output // high * wide
        assert difference(found, dense.weight.grad[output, first : first + wide, rows, columns]) < 1e-12


def test_channels_of_an_image_are_all_coupled() -> None:
    module = LeanConv2d(3, 8, stencil="5-point").double()
    assert module.groups == 1
    features = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    assert difference(module(features), written_out(module)(features)) < 1e-13


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"stencil": "4-point"}, 4 * 64 + 64 * 64),
        ({"stencil": "5-point"}, 5 * 64 + 64 * 64),
        ({"stencil": "full"}, 9 * 64 + 64 * 64),
        ({"stencil": "5-point", "group_size": 4}, 5 * 64 * 4 + 64 * 64),
        ({"stencil": "full", "group_size": 64}, 9 * 64 * 64 + 64 * 64),
        ({"stencil": "full", "kernel_size": (7, 5)}, 35 * 64 + 64 * 64),
        ({"bias": True}, 5 * 64 + 64 * 64 + 64),
    ],
    ids=str,
)
def test_number_of_weights(options: dict[str, Any], count: int) -> None:
    assert parameter_count(LeanConv2d(64, 64, **{"bias": False, **options})) == count


@pytest.mark.parametrize(
    ("options", "weights"),
    [({}, 64 * 9 + 64 * 64), ({"group_size": 8}, 64 * 8 * 9 + 64 * 64), ({"group_size": 64}, 64 * 64 * 9)],
    ids=["two convolutions", "two convolutions, groups of 8", "one convolution"],
)
def test_operations_that_are_run(options: dict[str, Any], weights: int) -> None:
    """The zeros of a 5-point kernel are multiplied; a spatial part that couples everything takes the 1 x 1 part in."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        LeanConv2d(64, 64, **options)(torch.empty(1, 64, 16, 12))
    assert counter.get_total_flops() == 2 * weights * 16 * 12


@pytest.mark.parametrize("options", [{}, {"stencil": "full"}, {"group_size": 4}], ids=str)
def test_initial_result_has_the_variance_of_hes_rule_half_from_each_part(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LeanConv2d(256, 256, padding="valid", **options)
    features = torch.randn(1, 256, 32, 32)
    with torch.no_grad():
        assert module(features).var().item() == pytest.approx(2, rel=0.15)
        module.pointwise_weight.zero_()
        assert module(features).var().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("stencil", ["4-point", "5-point", "full"])
def test_symbolic_trace(stencil: Any) -> None:
    model = lean_resnet(SHORT, width=0.125, num_classes=3, stencil=stencil).eval()
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


def test_pickle() -> None:
    model = lean_resnet(SHORT, width=0.125, num_classes=3, group_size=2).eval()
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))


def test_numbers_of_numpy_are_numbers() -> None:
    module = LeanConv2d(np.int64(8), np.int32(4), (np.int64(3), 3), group_size=np.int64(2))
    assert (module.in_channels, module.groups, type(module.kernel_size[0])) == (8, 2, int)
    assert lean_resnet(width=np.float32(0.125)).conv1.out_channels == 8


def test_half_precision_and_autocast() -> None:
    features = torch.randn(1, 8, 8, 8)
    assert LeanConv2d(8, 8, dtype=torch.bfloat16)(features.bfloat16()).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        result = LeanConv2d(8, 8)(features)
    result.float().sum().backward()
    assert result.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LeanConv2d(8, 8, stencil="6-point"), "must be one of '4-point', '5-point', 'full' .given: '6-point'"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, 4), "kernel_size of LeanConv2d must be odd .given: 4.*use torch.nn.Conv2d"),
        (lambda: LeanConv2d(8, 8, 5), "'5-point' of LeanConv2d is for kernel_size=3 .given: 5.*stencil='full'"),
        (lambda: LeanConv2d(0, 8), "in_channels of LeanConv2d must be a whole number of at least 1 .given: 0"),
        (lambda: LeanConv2d(8, 2.0), "out_channels .* at least 1 .given: 2.0"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, stride=(1, 2, 3)), "stride .* two of them.* .given: .1, 2, 3"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, stride=0), "stride of LeanConv2d must be a whole number of at least 1"),
        (lambda: LeanConv2d(8, 8, padding=-1), "padding .* at least 0"),
        (lambda: LeanConv2d(8, 8, padding="same", stride=2), "'same' with stride=1 .given: 'same' with stride=.2, 2"),
        (lambda: LeanConv2d(8, 8, padding="full"), "padding of LeanConv2d .* 'valid'"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, padding_mode="zero"), "one of 'zeros', 'reflect'.*given: 'zero'"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 12, group_size=3), "=8 and out_channels=12, which is 4 .given: 3.; allowed are 1, 2, 4"),
        (lambda: lean_resnet(20), "18, 34, 50, 101, 152, or four positive numbers .* .given: 20"),
        (lambda: lean_resnet([1, 1]), "four positive numbers of blocks.* .given: .1, 1"),
        (lambda: LeanConv2d(8, 8, 3.0), "kernel_size .* at least 1, or two of them.* .given: 3.0"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, stride="2"), "stride .* .given: '2'"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, dilation=None), "dilation .* .given: None"),  # type: ignore[arg-type]
        (lambda: LeanConv2d(8, 8, stride=True), "stride .* .given: True"),
        (lambda: LeanConv2d(8, 8, group_size=True), "group_size .* at least 1 .given: True"),
        (lambda: lean_resnet([True] * 4), "four positive numbers of blocks.* .given: .True"),
        (lambda: lean_resnet(18.0), "one of 18, .* .given: 18.0"),  # type: ignore[arg-type]
        (
            lambda: lean_resnet(in_channels=0),
            "in_channels of LeanResNet must be a whole number of at least 1 .given: 0",
        ),
        (lambda: lean_resnet(num_classes=2.5), "num_classes of LeanResNet .* at least 1 .given: 2.5"),  # type: ignore[arg-type]
        (lambda: lean_resnet(width=0), "width of LeanResNet must be positive, .* .given: 0"),
        (lambda: lean_resnet(width=math.nan), "width of LeanResNet .* finite number .* .given: nan"),
        (lambda: lean_resnet(width=math.inf), "width of LeanResNet .* finite number .* .given: inf"),
        (lambda: lean_resnet(width="1"), "width of LeanResNet .* .given: '1'"),  # type: ignore[arg-type]
        (lambda: lean_resnet(stencil="3-point"), "stencil of LeanResNet must be one of"),  # type: ignore[arg-type]
        (lambda: lean_resnet(width=0.25, group_size=3), "divide the 16 channels of its first stage.*given: 3"),
        (lambda: lean_resnet(group_size=0), "group_size of LeanResNet .* at least 1"),
        (lambda: leanify(resnet18(width=0.125), stencil="x"), "stencil of leanify must be one of"),  # type: ignore[arg-type]
        (lambda: leanify(nn.Linear(2, 2)), "nothing to replace in Linear"),
        (lambda: leanify(resnet18(width=0.125), keep=["layer5"]), "submodules of ResNet .given: 'layer5'.*'conv1'"),
        (lambda: leanify(resnet18(width=0.125), keep="layer1"), "must be a list of names"),
        (lambda: leanify(resnet18(width=0.125), group_size=0), "group_size of leanify .* at least 1 .given: 0"),
    ],
)
def test_wrong_options_are_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


# ------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(
    ("depth", "stencil", "count"),
    # ResNet's own number, less 9 of every 3 x 3 convolution's weights a pair of channels, and the stencils and 1 more.
    [(18, "5-point", 1_943_848), (18, "full", 1_959_208), (18, "4-point", 1_940_008), (50, "5-point", 15_516_136)],
)
def test_parameter_counts(depth: int, stencil: Any, count: int) -> None:
    with torch.device("meta"):
        lean, plain = lean_resnet(depth, stencil=stencil), {18: resnet18, 50: resnet50}[depth]()
    assert parameter_count(lean) == count
    points_of = {"4-point": 4, "5-point": 5, "full": 9}[stencil]
    for name, convolution in plain.named_modules():
        if isinstance(convolution, nn.Conv2d) and convolution.kernel_size == (3, 3):
            count += 8 * convolution.in_channels * convolution.out_channels - points_of * convolution.out_channels
            assert isinstance(lean.get_submodule(name), LeanConv2d)
    assert count == parameter_count(plain)


@pytest.mark.parametrize("width", [0.1, 0.3, 1 / 3])
def test_odd_widths_stay_depthwise(width: float) -> None:
    model = lean_resnet(width=width)
    lean = [module for module in model.modules() if isinstance(module, LeanConv2d)]
    assert len(lean) == 16
    assert all(module.groups == module.in_channels for module in lean)


@pytest.mark.parametrize("depth", [18, 50, [1, 2, 1, 1]], ids=str)
@pytest.mark.parametrize("options", [{}, {"stencil": "full", "group_size": 2}], ids=str)
def test_every_parameter_learns(depth: Any, options: dict[str, Any]) -> None:
    model = lean_resnet(depth, width=0.125, num_classes=7, in_channels=1, **options)
    scores = model(torch.randn(2, 1, 65, 71))
    assert scores.shape == (2, 7)
    functional.cross_entropy(scores, torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_zero_init_makes_every_block_its_shortcut() -> None:
    model = lean_resnet(50, width=0.125, zero_init_residual=True).eval()
    features = torch.randn(1, 32, 8, 8).relu()
    assert torch.equal(model.layer1[1](features), features)


def test_it_learns() -> None:
    """A handful of pictures that differ in shape alone: a 1 x 1 convolution after the stem could not tell them."""
    torch.manual_seed(0)
    model = lean_resnet([1, 1, 1, 1], width=0.125, num_classes=2, in_channels=1)
    images = torch.zeros(8, 1, 64, 64)
    for index in range(8):
        (images[index, 0, :, 8 * index :: 32] if index % 2 else images[index, 0, 8 * index :: 32]).fill_(1)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ---------------------------------------------------------------------------------------------------- leanify


def lean_names(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, LeanConv2d)}


@pytest.mark.parametrize(
    ("build_network", "options", "kept"),
    [
        (lambda: resnet18(width=0.125), {}, {"conv1"}),
        (lambda: resnet50(width=0.125), {}, {"conv1"}),
        (lambda: resnet18(width=0.1875), {"strided_stem": True}, set()),  # 3 and 12 channels: depthwise
        (lambda: resnet18(width=0.125), {"strided_stem": True}, {"conv1"}),  # 3 and 8: would not be smaller
        (lambda: resnet18(width=0.125), {"keep": ["layer1", "layer2.0.conv2"]}, {"conv1", "layer1", "layer2.0.conv2"}),
        (lambda: vgg16(width=0.125), {"stencil": "4-point"}, set()),
        (lambda: vgg16(width=0.125), {"stencil": "full"}, {"features.0"}),  # 9 weights and one more are not fewer
        (lambda: unet(base_channels=8, depth=2), {"keep": ["stem"]}, {"stem"}),
    ],
    ids=["resnet18", "resnet50", "stem", "stem of 8", "names", "vgg16", "vgg16, 3 x 3", "unet"],
)
def test_what_is_replaced(build_network: Callable[[], nn.Module], options: dict[str, Any], kept: set[str]) -> None:
    module = build_network()
    before = copy.deepcopy(module)
    lean = leanify(module, **options)
    spatial = {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1)
        if not any(name == other or name.startswith(f"{other}.") for other in kept)
    }
    assert spatial and lean_names(lean) == spatial
    # The given one is as it was, and all else was copied.
    assert not lean_names(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))
    state = lean.state_dict()
    for name, tensor in module.state_dict().items():
        if name.rpartition(".")[0] not in spatial:
            assert torch.equal(state[name], tensor)
            assert state[name].data_ptr() != tensor.data_ptr()
    image = torch.randn(2, 3, 64, 64)
    assert lean(image).shape == module(image).shape


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(8, 16, 3, stride=(2, 1), padding=(1, 0), bias=False),
        nn.Conv2d(16, 8, (1, 7), padding="same", padding_mode="reflect"),
        nn.Conv2d(8, 8, 5, padding=6, dilation=3, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding="valid", dtype=torch.float64),
    ],
    ids=str,
)
def test_options_of_a_convolution_stay(convolution: nn.Conv2d) -> None:
    lean = leanify(convolution.eval(), strided_stem=True)
    assert isinstance(lean, LeanConv2d)
    assert not lean.training
    assert (lean.bias is None) == (convolution.bias is None)
    features = torch.randn(2, convolution.in_channels, 23, 19, dtype=convolution.weight.dtype)
    got = lean(features)
    assert (got.shape, got.dtype) == (convolution(features).shape, features.dtype)
    # With the dense kernel in its place, the convolution does the same: padding and all the rest are as they were.
    with torch.no_grad():
        convolution.weight.copy_(lean.dense_kernel())
        if convolution.bias is not None and lean.bias is not None:
            convolution.bias.copy_(lean.bias)
    assert difference(got, convolution(features)) < (1e-13 if got.dtype is torch.float64 else 1e-5)


def test_what_is_left_alone() -> None:
    class Special(nn.Conv2d):
        pass

    module = nn.Sequential(
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 2),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3),
        Special(8, 8, 3),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        nn.Conv2d(8, 8, 3),
        nn.LazyConv2d(8, 3),
    )
    assert lean_names(leanify(module)) == {"6"}


def test_a_stem_reads_an_image() -> None:
    """Neither the first convolution of a part of a network, nor one alone, nor one behind another stem is a stem."""
    stage = resnet18(width=0.125).layer2
    assert "0.conv1" in lean_names(leanify(stage))
    assert isinstance(leanify(nn.Conv2d(8, 8, 3, stride=2)), LeanConv2d)
    assert isinstance(leanify(nn.Conv2d(3, 6, 3, stride=2)), LeanConv2d)
    patches = nn.Sequential(nn.Conv2d(3, 64, 4, stride=4), nn.Conv2d(64, 128, 3, stride=2))
    assert lean_names(leanify(patches)) == {"1"}
    colours = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 6, 3))
    assert lean_names(leanify(colours)) == {"1"}
    assert lean_names(leanify(colours, strided_stem=True)) == {"0", "1"}


@pytest.mark.parametrize("size", [2, 3, 4, 64])
def test_groups_are_as_large_as_suits_a_convolution(size: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 32, 3), nn.Conv2d(32, 32, 3))
    lean = leanify(module, group_size=size)
    assert isinstance(lean, nn.Sequential)
    want = {2: (1, 2, 2, 2), 3: (1, 2, 2, 2), 4: (1, 4, 4, 4), 64: (1, 4, 4, 32)}[size]
    assert tuple(part.group_size for part in lean) == want
    assert lean(torch.randn(1, 3, 12, 12)).shape == module(torch.randn(1, 3, 12, 12)).shape


@pytest.mark.parametrize("build_network", [vgg16, vgg16_bn, unet], ids=["vgg16", "vgg16_bn", "unet"])
def test_groups_on_networks_that_read_an_image_at_stride_1(build_network: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        lean = leanify(build_network(), group_size=4)
    sizes = [part.group_size for part in lean.modules() if isinstance(part, LeanConv2d)]
    assert sizes[0] == 1 and set(sizes[1:]) == {4}


def tied(first: nn.Module, second: nn.Module, name: str) -> nn.Sequential:
    setattr(second, name, getattr(first, name))
    return nn.Sequential(first, nn.ReLU(), second)


def test_convolutions_that_share_a_parameter() -> None:
    def convolution() -> nn.Conv2d:
        return nn.Conv2d(8, 8, 3, padding=1)

    module = tied(convolution(), convolution(), "weight")
    with pytest.raises(ConfigError, match=r"0.weight and 2.weight are one parameter of Sequential.*`keep`"):
        leanify(module)
    with pytest.raises(ConfigError, match=r"0.weight and 2.weight"):
        leanify(module, keep=["0"])
    with pytest.raises(ConfigError, match=r"0.bias and 2.bias"):
        leanify(tied(convolution(), nn.BatchNorm2d(8), "bias"))
    lean = leanify(nn.Sequential(module, convolution()), keep=["0"])
    assert lean_names(lean) == {"1"}
    assert lean.get_parameter("0.0.weight") is lean.get_parameter("0.2.weight")


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": lambda module: torch.nn.utils.weight_norm(module),  # type: ignore[arg-type]
    "spectral norm": lambda module: torch.nn.utils.spectral_norm(module),
    "pruned weight": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned bias": lambda module: prune.l1_unstructured(module, "bias", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_convolutions_with_computed_weights_are_left(change: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3), change(nn.Conv2d(8, 8, 3)))
    features = torch.randn(1, 8, 9, 9)
    module.eval()(features)
    lean = leanify(module)
    assert lean_names(lean) == {"0"}
    assert isinstance(lean, nn.Sequential)
    assert torch.equal(lean[1](features), module[1](features))
    lean(features).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_frozen_convolutions_are_named() -> None:
    module = resnet18(width=0.125)
    module.layer1.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen.*layer1.0.conv1, layer1.0.conv2, layer1.1.conv1 and 1 more"):
        lean = leanify(module)
    assert not lean.get_parameter("layer1.0.bn1.weight").requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leanify(module, keep=["layer1"])


def test_a_shared_convolution_stays_shared() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    lean = leanify(nn.Sequential(shared, nn.ReLU(), shared))
    assert isinstance(lean, nn.Sequential)
    assert isinstance(lean[0], LeanConv2d) and lean[0] is lean[2]


def test_leanify_takes_a_device() -> None:
    with torch.device("meta"):
        module = resnet18()
    lean = leanify(module)
    assert all(tensor.is_meta for tensor in lean.parameters())
    assert parameter_count(lean) == 1_943_848


# --------------------------------------------------------------------------------------------------- row by row

CHOICES = [
    {"mode": "two_phase", "rows": 1, "segments": 1},
    {"mode": "two_phase", "rows": 3, "segments": 1},
    {"mode": "two_phase", "rows": 7, "segments": 4, "batch_chunks": 2},
    {"mode": "overlap", "rows": 2, "segments": 1},
    {"mode": "overlap", "rows": 5, "segments": 3, "batch_chunks": 2},
]
SHORT = (1, 1, 1, 1)
ROWWISE: dict[str, Callable[[], nn.Module]] = {
    "5-point": lambda: lean_resnet(SHORT, width=0.0625, num_classes=3),
    "5-point, eval": lambda: lean_resnet(SHORT, width=0.0625, num_classes=3).eval(),
    "4-point, bottleneck": lambda: LeanResNet(Bottleneck, SHORT, width=0.0625, num_classes=3, stencil="4-point"),
    "3 x 3, groups of 2": lambda: lean_resnet(SHORT, width=0.0625, num_classes=3, stencil="full", group_size=2),
    "vgg16_bn": lambda: leanify(vgg16_bn(width=0.0625, num_classes=3)),
}


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("network", ROWWISE)
def test_networks_are_exact(network: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = ROWWISE[network]().double()
    images = torch.randn(2, 3, 71, 50, dtype=torch.float64)
    assert_same_step(module, images, **options)


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_wide_image_along_its_width(mode: str) -> None:
    torch.manual_seed(1)
    module = lean_resnet(SHORT, width=0.0625, num_classes=3).double()
    assert_same_step(module, torch.randn(1, 3, 40, 99, dtype=torch.float64), mode=mode, rows=6, axis=3)


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_convolution_is_exact(options: dict[str, Any], mode: str) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(
        LeanConv2d(8, 16, **options), nn.BatchNorm2d(16), nn.ReLU(), LeanConv2d(16, 8, **options)
    ).double()
    features = torch.randn(2, 8, 29, 31, dtype=torch.float64)
    assert_same_step(module, features, mode=mode, rows=4, axis=2)


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_float32(mode: str) -> None:
    torch.manual_seed(3)
    module = lean_resnet(SHORT, width=0.0625, num_classes=3)
    assert_same_step(module, torch.randn(2, 3, 64, 48), mode=mode, rows=4, segments=2, tolerance="float32")


def test_every_operation_runs_on_rows() -> None:
    with torch.device("meta"):
        module = lean_resnet(num_classes=10)
        plan = lrcnn_lightning.plan(module, torch.empty(1, 3, 1024, 1024), mode="two_phase")
    assert "runs whole" not in str(plan)
    assert plan.peak_bytes < 0.7 * plan.plain_peak_bytes


# --------------------------------------------------------------------------------- command line and benchmark


def configured(*overrides: str) -> Any:
    with initialize_config_module("lrcnn_lightning.conf", version_base="1.3"):
        return compose("train", overrides=["model=lean_resnet", *overrides])


def test_configuration() -> None:
    config = configured("model.width=0.125", "model.depth=[1,1,1,1]", "model.stencil=full", "data.channels=1")
    model = build(config.model)
    assert isinstance(model, LeanResNet)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 10)
    assert sum(isinstance(module, LeanConv2d) for module in model.modules()) == 8


@pytest.mark.parametrize("made", [LeanConv2d, LeanResNet, lean_resnet, leanify])
def test_names_for_configurations(made: Any) -> None:
    for package in ("lrcnn_lightning.models", "lrcnn_lightning.models.lean"):
        assert get_object(f"{package}.{made.__name__}") is made


def test_a_wrong_option_gets_one_message() -> None:
    config = configured("model.stencil=3-point")
    with pytest.raises(CommandError, match=r"^error: stencil of LeanResNet must be one of .*3-point"), user_errors():
        build(config.model)


@pytest.mark.parametrize("model", ["lean_resnet", "resnet18", "vgg16", "unet"])
def test_a_width_that_is_no_number(model: str) -> None:
    with initialize_config_module("lrcnn_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=[f"model={model}", "model.width=foo"])
    with pytest.raises(CommandError, match=r"^error: width of \w+ must be positive, .*'foo'"), user_errors():
        build(config.model)


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("lean_benchmark", REPOSITORY / "benchmarks" / "lean.py")
    assert specification is not None and specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "lean_benchmark", benchmark)
    specification.loader.exec_module(benchmark)
    tiny = {"pages": 10, "epochs": 1, "width": 0.125, "memory_widths": (0.125,), "memory_size": 128, "seeds": 1}
    monkeypatch.setitem(benchmark.NETWORKS, "short", ["model=lean_resnet", "model.depth=[1,1,1,1]"])
    monkeypatch.setattr(benchmark, "SMALL", benchmark.Settings(networks=("short",), **tiny))
    output = tmp_path / "folder" / "lean.json"
    monkeypatch.setattr("sys.argv", ["lean.py", "--small", "--output", str(output)])
    benchmark.main()
    report = json.loads(output.read_text())
    (row,), (trained,) = report["memory"], report["training"]
    assert row["parameters"] == parameter_count(lean_resnet(SHORT, width=0.125, num_classes=10))
    low, high = row["rowwise"]
    assert (low["max_overhead"], high["max_overhead"]) == (0.35, 1.0)
    assert 0 < high["peak_bytes"] <= low["peak_bytes"] < row["plain_bytes"]
    assert "4 rows" in trained["plan"]  # the rows are really cut
    assert trained["rowwise"]["loss"] == pytest.approx(trained["plain"]["loss"], rel=1e-2)
    printed = capsys.readouterr().out
    assert f"| {row['network']} | 0.125 | {row['parameters']:,} |" in printed
    assert trained["plan"] in printed
