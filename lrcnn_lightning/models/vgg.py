"""VGG-16, with and without BatchNorm (Simonyan and Zisserman, 2015, configuration D).

The parameter names are torchvision's, so with ``head="classic"`` its checkpoints load.  The default head is another
one: global average pooling and a single linear layer, because the classic head resizes the last map to 7 x 7 and
holds nine tenths of all weights, neither of which suits large images.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.option import positive

__all__ = ["VGG", "vgg16", "vgg16_bn"]

VGG16_STAGES: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
"""Channels of every 3 x 3 convolution; a 2 x 2 max pooling closes each group."""


class VGG(nn.Module):
    """Stacked 3 x 3 convolutions and max poolings, then a classification head.

    Args:
        stages: channels of every convolution, one tuple for each stretch that a max pooling closes.
        num_classes: number of scores.
        in_channels: channels of the input image.
        width: factor on every convolution's channels (and, with the classic head, on its two hidden layers).
        head: ``"global"`` is global average pooling and one linear layer; ``"classic"`` resizes the map to 7 x 7
            and has the three linear layers with dropout of the original.
        batch_norm: whether a BatchNorm follows every convolution.
        dropout: probability of the classic head's dropout.

    Raises:
        ConfigError: for an unknown ``head`` or a ``width`` that is not positive.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...] = VGG16_STAGES,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        head: Literal["global", "classic"] = "global",
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        width = positive("VGG", "width", width)
        if head not in ("global", "classic"):
            raise ConfigError(f"head of VGG must be 'global' or 'classic' (given: {head!r})")

        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for stage_channels in stage:
                out_channels = max(1, round(stage_channels * width))
                layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU(inplace=True))
                channels = out_channels
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)

        if head == "classic":
            hidden = max(1, round(4096 * width))
            self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
            self.classifier = nn.Sequential(
                nn.Linear(channels * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(hidden, num_classes),
            )
        else:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.classifier = nn.Sequential(nn.Linear(channels, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that the signal keeps its size on the way forward, and so that the network starts to learn.

        With BatchNorm that is He's rule.  Without, He's rule keeps the size of the activations but not of their
        differences: all are positive, each layer's sums are dominated by their mean, and after thirteen layers one
        image looks like another.  So every filter is centred, which removes the mean, and scaled by the gain for what
        is left: the variance of a rectified standard normal is (1 - 1/pi) / 2 (Brock et al., 2021, section 4).
        """
        normalised = any(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if normalised:
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                else:
                    _centred_normal_(module.weight, gain=math.sqrt(2 / (1 - 1 / math.pi)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Args:
            images: ``N C H W``, any ``H`` and ``W`` of at least 32.

        Returns:
            Scores, ``N num_classes``.
        """
        features = self.avgpool(self.features(images))
        scores: Tensor = self.classifier(torch.flatten(features, 1))
        return scores


@torch.no_grad()
def _centred_normal_(weight: Tensor, *, gain: float) -> None:
    """Fill ``out in/groups kH kW`` with normal numbers of which each filter has mean zero."""
    nn.init.normal_(weight)
    weight -= weight.mean(dim=(1, 2, 3), keepdim=True)
    weight *= gain / math.sqrt(weight[0].numel())


def vgg16(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    head: Literal["global", "classic"] = "global",
    dropout: float = 0.5,
) -> VGG:
    """VGG-16 without BatchNorm; see `VGG` for the options."""
    return VGG(num_classes=num_classes, in_channels=in_channels, width=width, head=head, dropout=dropout)


def vgg16_bn(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    head: Literal["global", "classic"] = "global",
    dropout: float = 0.5,
) -> VGG:
    """VGG-16 with a BatchNorm after every convolution; see `VGG` for the options."""
    return VGG(
        num_classes=num_classes, in_channels=in_channels, width=width, head=head, batch_norm=True, dropout=dropout
    )
