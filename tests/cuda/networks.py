"""Small networks of each kind; on a GPU larger ones, some of them torchvision's own where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrcnn_lightning.models import UNet, resnet18, vgg16


class LayerNorm(nn.LayerNorm):
    """Over the channels of ``N C H W``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(nn.functional.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * growth, 1, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class InvertedBlock(nn.Module):
    """An inverted bottleneck with squeeze and excitation, of EfficientNet."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, channels, 1), nn.SiLU(), nn.Conv2d(channels, wide, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return x + y if self.adds else y


class Volume(nn.Module):
    """A U-Net of one level in three dimensions."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.BatchNorm3d(channels), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(channels, 2 * channels, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(2 * channels, channels, 2, stride=2)
        self.last = nn.Conv3d(2 * channels, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.last(torch.cat([x, self.up(self.down(x))], 1))
        return result


def _convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 6, 4, stride=4), LayerNorm(6)]
    return nn.Sequential(*stem, ConvNeXtBlock(6), LayerNorm(6), nn.Conv2d(6, 8, 2, stride=2), ConvNeXtBlock(8))


def _densenet() -> nn.Module:
    first = [nn.Conv2d(3, 6, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*first, DenseLayer(6, 4), DenseLayer(10, 4), nn.Conv2d(14, 8, 1), nn.AvgPool2d(2))


def _efficientnet() -> nn.Module:
    first = [nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU()]
    return nn.Sequential(*first, InvertedBlock(6, 1), InvertedBlock(6, 2))


def frozen(module: nn.Module) -> nn.Module:
    """With statistics of BatchNorm as they are."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            child.running_mean.normal_(0, 0.1)
            child.running_var.uniform_(0.8, 1.2)
    return module


class Net(NamedTuple):
    """How to make a network, on the CPU and on a GPU, and the shape of its input on both."""

    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    small_shape: tuple[int, ...] = (2, 3, 64, 56)
    large_shape: tuple[int, ...] = (2, 3, 160, 128)

    def made(self, device: torch.device) -> tuple[nn.Module, Tensor]:
        """In training mode, in float64, without dropout: the module, and an input."""
        torch.manual_seed(0)
        on_gpu = device.type == "cuda"
        module = (self.large if on_gpu else self.small)()
        for child in module.modules():
            if hasattr(child, "p") and type(child).__name__ in ("Dropout", "StochasticDepth"):
                child.p = 0.0
        x = torch.randn(self.large_shape if on_gpu else self.small_shape, dtype=torch.float64)
        return module.double().to(device), x.to(device)


def _of_torchvision(name: str, layers: int, small: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The first layers of a network of torchvision, or the small one: each kind of layer is there."""
    if importlib.util.find_spec("torchvision") is None:
        return small

    def make() -> nn.Module:
        import torchvision

        network: nn.Module = getattr(torchvision.models, name)(weights=None)
        return nn.Sequential(*list(network.get_submodule("features"))[:layers])

    return make


def _vgg() -> nn.Module:
    return vgg16(width=0.0625, num_classes=3)


def _resnet() -> nn.Module:
    return resnet18(width=0.125, num_classes=3)


def _large_resnet() -> nn.Module:
    return resnet18(width=0.5, num_classes=5)


_unet = partial(UNet, base_channels=4, depth=2)
_large_unet = partial(UNet, base_channels=16, depth=3)

NETWORKS: Mapping[str, Net] = {
    "VGG": Net(_vgg, lambda: vgg16(width=0.25).get_submodule("features")),
    "ResNet": Net(_resnet, _large_resnet),
    "ResNet, frozen": Net(lambda: frozen(_resnet()), lambda: frozen(_large_resnet())),
    "U-Net": Net(_unet, _large_unet),
    "U-Net, bilinear": Net(partial(_unet, upsampling="bilinear"), partial(_large_unet, upsampling="bilinear")),
    "ConvNeXt": Net(_convnext, _of_torchvision("convnext_tiny", 4, _convnext)),
    "DenseNet": Net(_densenet, _of_torchvision("densenet121", 6, _densenet)),
    "EfficientNet": Net(_efficientnet, _of_torchvision("efficientnet_b0", 4, _efficientnet)),
    "volume": Net(Volume, partial(Volume, 8), (1, 1, 16, 12, 10), (1, 1, 48, 40, 32)),
}
