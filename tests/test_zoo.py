"""Networks that people use: every output, gradient and buffer of each, in both modes, 2-D and 3-D."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lrcnn_lightning.planning.choices import Choices
from tests.oracle import assert_exact, roles

nets = pytest.importorskip("monai.networks.nets")

QUICK = [Choices("two_phase", 3, 1, 1, "lean"), Choices("overlap", 4, 3, 1, "narrow")]
THOROUGH = [
    *QUICK,
    Choices("two_phase", 2, 3, 2, "borders"),
    Choices("overlap", 1, 1, 2, "borders"),
    Choices("two_phase", 8, 2, 1, "narrow"),
]

Maker = Callable[[], nn.Module]


def plane(size: int = 32, channels: int = 1, samples: int = 2) -> tuple[int, ...]:
    return samples, channels, size + 8, size


def volume(size: int = 16, channels: int = 1) -> tuple[int, ...]:
    return 1, channels, size, size, size


def net(name: str, shape: tuple[int, ...], make: Maker, slow: bool = False, whole: int = 0) -> Any:
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(make, shape, whole, id=name, marks=marks)


LAYERS = (
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
    {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
    {"name": "conv_1", "n_features": 8, "kernel_size": 1},
    {"name": "conv_2", "kernel_size": 1},
)
EFFICIENT = "efficientnet-b0"

ZOO = [
    net("UNet", plane(), lambda: nets.UNet(2, 1, 2, (4, 8, 12), (2, 2), num_res_units=1)),
    net("UNet-3d", volume(), lambda: nets.UNet(3, 1, 2, (4, 8), (2,), num_res_units=2, norm="BATCH")),
    net("BasicUNet", plane(34), lambda: nets.BasicUNet(2, 1, 2, (4, 4, 8, 8, 16, 4))),
    net("BasicUNet-3d", volume(32), lambda: nets.BasicUNet(3, 1, 2, (2, 2, 2, 4, 4, 2)), slow=True),
    net("BasicUNetPlusPlus", plane(samples=1), lambda: nets.BasicUNetPlusPlus(2, 1, 2, (4, 4, 4, 4, 4, 4))),
    net("DynUNet", plane(), lambda: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [4, 8, 8], res_block=True)),
    net("DynUNet-3d", volume(), lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [2, 4, 4])),
    net("SegResNet", plane(), lambda: nets.SegResNet(2, 8, 1, 2), slow=True),
    net("SegResNet-3d", volume(), lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 2), blocks_up=(1,))),
    net("SegResNetDS", plane(), lambda: nets.SegResNetDS(2, 8, 1, 2, blocks_down=(1, 2, 2), dsdepth=2)),
    net(
        "SegResNetVAE-3d",
        volume(),
        lambda: nets.SegResNetVAE(
            (16, 16, 16), 8, spatial_dims=3, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)
        ),
        whole=4,
        slow=True,
    ),
    net("VNet", (2, 1, 64, 48), lambda: nets.VNet(2, 1, 2, dropout_prob_up=(0.5, 0.5)), slow=True),
    net("VNet-3d", volume(32), lambda: nets.VNet(3, 1, 2), slow=True),
    net("AttentionUnet", plane(), lambda: nets.AttentionUnet(2, 1, 2, (4, 8, 8), (2, 2))),
    net("AttentionUnet-3d", volume(), lambda: nets.AttentionUnet(3, 1, 2, (4, 8), (2,))),
    net("DenseNet", plane(33), lambda: nets.DenseNet(2, 1, 2, 8, 4, (2, 3), 2, dropout_prob=0.1)),
    net("DenseNet-3d", volume(), lambda: nets.DenseNet(3, 1, 2, 8, 4, (2, 2), 2)),
    net("SENet", plane(), lambda: nets.SENet(2, 1, "se_bottleneck", (1, 1, 1, 1), 2, 4, inplanes=8), slow=True),
    net("SEResNet50", plane(56), lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=3), slow=True),
    net(
        "EfficientNet",
        plane(56),
        lambda: nets.EfficientNetBN(EFFICIENT, pretrained=False, spatial_dims=2, in_channels=1, num_classes=3),
        slow=True,
    ),
    net(
        "ResNet",
        plane(56),
        lambda: nets.ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3),
    ),
    net(
        "ResNet-3d",
        volume(32),
        lambda: nets.ResNet(
            "bottleneck", [1, 1, 1, 1], [2, 4, 4, 4], spatial_dims=3, n_input_channels=1, num_classes=3
        ),
    ),
    net("HighResNet", plane(24), lambda: nets.HighResNet(2, 1, 2, layer_params=LAYERS)),
    net("FlexibleUNet", plane(56), lambda: nets.FlexibleUNet(1, 2, EFFICIENT, False, spatial_dims=2), slow=True),
    net("RegUNet", plane(24), lambda: nets.RegUNet(2, 1, 4, 1, extract_levels=(0, 1))),
    net("LocalNet", plane(24), lambda: nets.LocalNet(2, 1, 4, extract_levels=(0, 1))),
    net(
        "AHNet",
        (2, 1, 96, 64),
        lambda: nets.AHNet((1, 1, 1, 1), 2, 1, 2, psp_block_num=2, upsample_mode="bilinear"),
        slow=True,
    ),
    net("AutoEncoder", plane(), lambda: nets.AutoEncoder(2, 1, 1, (4, 8), (2, 2), num_res_units=1)),
    net("VarAutoEncoder", (2, 1, 32, 32), lambda: nets.VarAutoEncoder(2, (1, 32, 32), 1, 4, (4, 8), (2, 2)), whole=2),
    net("PatchDiscriminator", plane(), lambda: nets.PatchDiscriminator(2, 4, 1, 1, num_layers_d=2)),
    net("PatchDiscriminator-3d", volume(), lambda: nets.PatchDiscriminator(3, 4, 1, 1, num_layers_d=2)),
    net(
        "AutoencoderKL",
        plane(24),
        lambda: nets.AutoencoderKL(
            2,
            1,
            1,
            (1, 1),
            (4, 4),
            (False, False),
            2,
            4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ),
    ),
    net(
        "MedNeXt",
        plane(24),
        lambda: nets.MedNeXt(2, 4, 1, 2, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1)),
    ),
    net("VoxelMorphUNet", plane(24, 2), lambda: nets.VoxelMorphUNet(2, 2, 2, (4, 4, 4, 4, 4, 4), (4,))),
]


def torchvision_net(name: str, size: tuple[int, ...] = (2, 3, 72, 56), whole: int = 0, **options: Any) -> Any:
    def make() -> nn.Module:
        models = library("torchvision.models")
        result: nn.Module = models.get_model(name, weights=None, **options)
        return result

    return net(f"torchvision {name}", size, make, slow=True, whole=whole)


def timm_net(name: str, size: tuple[int, ...] = (2, 3, 72, 56), whole: int = 0) -> Any:
    def make() -> nn.Module:
        result: nn.Module = library("timm").create_model(name, pretrained=False, num_classes=5)
        return result

    return net(f"timm {name}", size, make, slow=True, whole=whole)


def smp_net(name: str, encoder: str = "resnet18", whole: int = 0, **options: Any) -> Any:
    def make() -> nn.Module:
        result: nn.Module = getattr(library("segmentation_models_pytorch"), name)(
            encoder, encoder_weights=None, in_channels=3, classes=2, **options
        )
        return result

    return net(f"segmentation_models_pytorch {name} {encoder}", (2, 3, 96, 64), make, slow=True, whole=whole)


def library(name: str) -> Any:
    """A library that is not required; torchvision's compiled part does not load beside every build of PyTorch."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    except Exception as error:
        pytest.skip(f"{name} does not load: {type(error).__name__}: {error}")


HEAD = {"weights_backbone": None, "num_classes": 3}

OTHER_LIBRARIES = [
    *map(
        torchvision_net,
        [
            "densenet121",
            "efficientnet_b0",
            "convnext_tiny",
            "mnasnet0_5",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "regnet_y_400mf",
            "resnet18",
            "resnext50_32x4d",
            "shufflenet_v2_x0_5",
            "squeezenet1_1",
            "googlenet",
        ],
        [(2, 3, 72, 56)] * 12,
        [0] * 11 + [2],
    ),
    torchvision_net("fcn_resnet50", **HEAD),
    torchvision_net("lraspp_mobilenet_v3_large", **HEAD),
    torchvision_net("deeplabv3_mobilenet_v3_large", whole=1, **HEAD),
    torchvision_net("r3d_18", (1, 3, 8, 40, 32)),
    *map(
        timm_net,
        [
            "resnet26d",
            "resnetv2_50",
            "nfnet_l0",
            "seresnext26d_32x4d",
            "skresnet18",
            "ecaresnet26t",
            "res2net50_26w_4s",
            "dpn48b",
            "ghostnet_100",
            "lcnet_050",
            "mixnet_s",
            "rexnet_100",
            "cspresnet50",
            "darknet53",
            "ese_vovnet19b_dw",
            "selecsls42",
            "convnextv2_atto",
            "convnext_atto",
            "repvgg_a0",
            "mobileone_s0",
            "poolformer_s12",
            "fastvit_t8",
            "starnet_s1",
            "gernet_s",
            "mobilenetv4_conv_small",
            "resnetblur50",
        ],
    ),
    timm_net("dla34", (2, 3, 96, 64)),  # halves its map so often that each side must be a multiple of 32
    timm_net("hrnet_w18_small", (2, 3, 96, 64)),
    smp_net("Unet"),
    smp_net("Unet", "mobilenet_v2", decoder_attention_type="scse"),
    smp_net("Unet", "efficientnet-b0"),
    smp_net("UnetPlusPlus"),
    smp_net("FPN"),
    smp_net("PSPNet", whole=1),
    smp_net("DeepLabV3Plus", whole=1),
    smp_net("Linknet"),
]


@pytest.mark.parametrize(("make", "shape", "whole"), [*ZOO, *OTHER_LIBRARIES])
def test_zoo(make: Maker, shape: tuple[int, ...], whole: int, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make()
    slow = request.node.get_closest_marker("slow") is not None
    graph = assert_exact(network, torch.randn(shape, dtype=torch.float64), choices=QUICK if slow else THOROUGH)
    assert len(roles(graph)["whole"]) == whole, roles(graph)["whole"]
