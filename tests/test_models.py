"""The networks are the well-known ones: parameter counts, parameter names, shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lrcnn_lightning.models import resnet18, resnet34, resnet50, resnet101, resnet152, unet, vgg16, vgg16_bn


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: vgg16(head="classic"), 138_357_544),
        (lambda: vgg16_bn(head="classic"), 138_365_992),
        (resnet18, 11_689_512),
        (resnet34, 21_797_672),
        (resnet50, 25_557_032),
        (resnet101, 44_549_160),
        (resnet152, 60_192_808),
    ],
    ids=["vgg16", "vgg16_bn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"],
)
def test_parameter_counts_are_the_published_ones(build: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        model = build()
    assert parameter_count(model) == count


def test_global_head_has_the_convolutions_and_one_linear_layer() -> None:
    with torch.device("meta"):
        model = vgg16(num_classes=10)
    assert parameter_count(model) == 14_714_688 + 512 * 10 + 10


@pytest.mark.parametrize(
    ("build", "keys"),
    [
        (
            lambda: vgg16(head="classic"),
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.28.bias": (512,),
                "classifier.0.weight": (4096, 25088),
                "classifier.6.weight": (1000, 4096),
            },
        ),
        (
            lambda: vgg16_bn(head="classic"),
            {"features.1.running_mean": (64,), "features.41.num_batches_tracked": (), "classifier.3.bias": (4096,)},
        ),
        (
            resnet50,
            {
                "conv1.weight": (64, 3, 7, 7),
                "bn1.running_var": (64,),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.0.downsample.1.bias": (256,),
                "layer3.5.conv3.weight": (1024, 256, 1, 1),
                "layer4.2.bn2.num_batches_tracked": (),
                "fc.weight": (1000, 2048),
            },
        ),
    ],
    ids=["vgg16", "vgg16_bn", "resnet50"],
)
def test_parameter_names_are_those_of_published_checkpoints(
    build: Callable[[], nn.Module], keys: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    assert {key: tuple(state[key].shape) for key in keys} == keys


def test_resnet50_strides_in_the_3_x_3_convolution() -> None:
    with torch.device("meta"):
        block = resnet50().layer2[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: vgg16(num_classes=7, in_channels=1, width=0.125),
        lambda: vgg16(num_classes=7, in_channels=1, width=0.0625, head="classic"),
        lambda: vgg16_bn(num_classes=7, in_channels=1, width=0.125),
        lambda: resnet18(num_classes=7, in_channels=1, width=0.125),
        lambda: resnet50(num_classes=7, in_channels=1, width=0.125),
    ],
    ids=["vgg16", "vgg16-classic", "vgg16_bn", "resnet18", "resnet50"],
)
@pytest.mark.parametrize("size", [(64, 64), (97, 71)], ids=str)
def test_classifiers_score_images_of_any_size(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model = build()
    scores = model(torch.randn(2, 1, *size))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
@pytest.mark.parametrize("size", [(64, 48), (37, 51)], ids=str)
def test_unet_scores_every_pixel(upsampling: str, size: tuple[int, int]) -> None:
    model = unet(num_classes=3, in_channels=1, depth=3, base_channels=8, upsampling=upsampling)  # type: ignore[arg-type]
    scores = model(torch.randn(1, 1, *size))
    assert scores.shape == (1, 3, *size)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_zero_init_makes_every_block_its_shortcut() -> None:
    model = resnet50(width=0.125, zero_init_residual=True).eval()
    block = model.layer1[1]
    features = torch.randn(1, 32, 8, 8).relu()
    assert torch.equal(block(features), features)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: vgg16(width=0), "width of VGG must be positive"),
        (lambda: vgg16(head="linear"), "'global' or 'classic'"),  # type: ignore[arg-type]
        (lambda: resnet50(width=-1), "width of ResNet must be positive"),
        (lambda: unet(width=0), "width of UNet must be positive"),
        (lambda: unet(depth=0), "depth of UNet must be a whole number of at least 1"),
        (lambda: unet(upsampling="nearest"), "'transposed' or 'bilinear'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_named(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
