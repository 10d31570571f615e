"""Residual networks (He et al., 2016) in torchvision's layout.

It is the "v1.5" layout, where a bottleneck block strides in its 3 x 3 convolution and not in its first 1 x 1, and
parameter names are torchvision's, so its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lrcnn_lightning.models.option import positive, whole

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

Convolution = Callable[..., nn.Module]
"""Makes a convolution; it is called with the channels of both sides and options by name, as `torch.nn.Conv2d` is."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Args:
        in_channels: channels of the block's input.
        channels: channels of both convolutions.
        stride: stride of the first convolution, and of the shortcut.
        convolution: makes the 3 x 3 convolutions.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, convolution: Convolution = nn.Conv2d
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the addition."""
        return self.bn2

    def forward(self, features: Tensor) -> Tensor:
        """Map ``N C H W`` to ``N channels H/stride W/stride``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        residual += shortcut
        result: Tensor = self.relu(residual)
        return result


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a widening 1 x 1 convolution, and a shortcut.

    Args:
        in_channels: channels of the block's input.
        channels: channels of the first two convolutions; the third has four times as many.
        stride: stride of the 3 x 3 convolution, and of the shortcut.
        convolution: makes the 3 x 3 convolution.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, convolution: Convolution = nn.Conv2d
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, channels * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the addition."""
        return self.bn3

    def forward(self, features: Tensor) -> Tensor:
        """Map ``N C H W`` to ``N 4*channels H/stride W/stride``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        residual += shortcut
        result: Tensor = self.relu(residual)
        return result


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1 x 1 convolution, where the shape changes and only there."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Block, and blocks in each stage, of the residual networks that have a number (He et al., 2016, table 1)."""


class ResNet(nn.Module):
    """A strided stem, four stages of residual blocks, global average pooling and a linear layer.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: number of scores.
        in_channels: channels of the input image.
        width: factor on every convolution's channels.
        zero_init_residual: start every block as its shortcut, by a zero weight in its last BatchNorm
            (Goyal et al., 2017).
        convolution: makes the 3 x 3 convolutions of the blocks.

    Raises:
        ConfigError: for a ``width`` that is not a positive number, or numbers of classes or channels below 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        zero_init_residual: bool = False,
        convolution: Convolution = nn.Conv2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        width = positive(name, "width", width)
        in_channels, num_classes = whole(name, "in_channels", in_channels), whole(name, "num_classes", num_classes)
        stem, *stages = (max(1, round(channels * width)) for channels in (64, 64, 128, 256, 512))
        self.conv1 = nn.Conv2d(in_channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stage = partial(_stage, block, convolution)
        self.layer1 = stage(stem, stages[0], depths[0], stride=1)
        self.layer2 = stage(stages[0] * block.expansion, stages[1], depths[1], stride=2)
        self.layer3 = stage(stages[1] * block.expansion, stages[2], depths[2], stride=2)
        self.layer4 = stage(stages[2] * block.expansion, stages[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(stages[3] * block.expansion, num_classes)
        self.reset_parameters(zero_init_residual=zero_init_residual)

    def reset_parameters(self, *, zero_init_residual: bool = False) -> None:
        """Initialise convolutions by He's rule and every BatchNorm as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: ``N C H W``, any ``H`` and ``W``.

        Returns:
            Scores, ``N num_classes``.
        """
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return scores


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    convolution: Convolution,
    in_channels: int,
    channels: int,
    depth: int,
    *,
    stride: int,
) -> nn.Sequential:
    """``depth`` blocks, of which the first strides."""
    first = block(in_channels, channels, stride, convolution=convolution)
    others = (block(channels * block.expansion, channels, convolution=convolution) for _ in range(depth - 1))
    return nn.Sequential(first, *others)


def _numbered(depth: int, num_classes: int, in_channels: int, width: float, zero_init_residual: bool) -> ResNet:
    """The residual network of a number in `RESNETS`."""
    block, depths = RESNETS[depth]
    return ResNet(
        block,
        depths,
        num_classes=num_classes,
        in_channels=in_channels,
        width=width,
        zero_init_residual=zero_init_residual,
    )


def resnet18(
    *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-18; see `ResNet` for the options."""
    return _numbered(18, num_classes, in_channels, width, zero_init_residual)


def resnet34(
    *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-34; see `ResNet` for the options."""
    return _numbered(34, num_classes, in_channels, width, zero_init_residual)


def resnet50(
    *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-50; see `ResNet` for the options."""
    return _numbered(50, num_classes, in_channels, width, zero_init_residual)


def resnet101(
    *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-101; see `ResNet` for the options."""
    return _numbered(101, num_classes, in_channels, width, zero_init_residual)


def resnet152(
    *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-152; see `ResNet` for the options."""
    return _numbered(152, num_classes, in_channels, width, zero_init_residual)
