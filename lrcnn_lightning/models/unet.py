"""A 2-D U-Net with BatchNorm (Ronneberger et al., 2015), with padded convolutions.

Drawn for ``depth=2``; every arrow to the right is a skip connection::

    stem   ------------------------>  up[1]  ->  head      H x W
      |                                 ^
    down[0]  ------------->  up[0]  ----'                  H/2 x W/2
      |                        ^
      '------->  down[1]  -----'                           H/4 x W/4
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.option import positive, whole

__all__ = ["UNet", "unet"]


class DoubleConv(nn.Sequential):
    """Twice: a 3 x 3 convolution, BatchNorm and ReLU; ``N in_channels H W`` to ``N out_channels H W``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UpBlock(nn.Module):
    """Double the map, join it with the skip connection and convolve twice.

    Args:
        in_channels: channels of the lower map.
        skip_channels: channels of the skip connection, and of the result.
        upsampling: ``"transposed"`` is a 2 x 2 transposed convolution; ``"bilinear"`` a resize and a 1 x 1
            convolution.
    """

    def __init__(self, in_channels: int, skip_channels: int, upsampling: Literal["transposed", "bilinear"]) -> None:
        super().__init__()
        self.upsample: nn.Module
        if upsampling == "transposed":
            self.upsample = nn.ConvTranspose2d(in_channels, skip_channels, kernel_size=2, stride=2)
        else:
            self.upsample = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(in_channels, skip_channels, kernel_size=1),
            )
        self.convolutions = DoubleConv(2 * skip_channels, skip_channels)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Map ``N in_channels h w`` and ``N skip_channels H W``, ``H`` in ``2h, 2h+1``, to ``N skip_channels H W``."""
        features = self.upsample(features)
        missing_rows = skip.shape[-2] - features.shape[-2]
        missing_columns = skip.shape[-1] - features.shape[-1]
        if missing_rows or missing_columns:  # an odd size lost its last row or column to the pooling
            features = functional.pad(features, (0, missing_columns, 0, missing_rows))
        result: Tensor = self.convolutions(torch.cat((skip, features), dim=1))
        return result


class UNet(nn.Module):
    """An encoder, a decoder, and skip connections between maps of one size.

    Args:
        num_classes: channels of the result.
        in_channels: channels of the input image.
        depth: number of max poolings.
        base_channels: channels at full resolution; they double with every pooling.
        width: factor on every convolution's channels.
        upsampling: ``"transposed"`` (convolutions) or ``"bilinear"``.

    Raises:
        ConfigError: for an unknown ``upsampling``, a ``depth`` below one or a ``width`` that is not positive.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        depth: int = 4,
        base_channels: int = 64,
        width: float = 1.0,
        upsampling: Literal["transposed", "bilinear"] = "transposed",
    ) -> None:
        super().__init__()
        depth = whole("UNet", "depth", depth)
        width = positive("UNet", "width", width)
        if upsampling not in ("transposed", "bilinear"):
            raise ConfigError(f"upsampling of UNet must be 'transposed' or 'bilinear' (given: {upsampling!r})")
        channels = [max(1, round(base_channels * width * 2**level)) for level in range(depth + 1)]
        self.stem = DoubleConv(in_channels, channels[0])
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(kernel_size=2), DoubleConv(upper, lower)) for upper, lower in pairwise(channels)
        )
        self.up = nn.ModuleList(
            UpBlock(lower, upper, upsampling)
            for upper, lower in zip(reversed(channels[:-1]), reversed(channels[1:]), strict=True)
        )
        self.head = nn.Conv2d(channels[0], num_classes, kernel_size=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise convolutions by He's rule and every BatchNorm as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score every pixel.

        Args:
            images: ``N C H W``; ``H`` and ``W`` need not divide by ``2**depth``, but must be at least that.

        Returns:
            Scores, ``N num_classes H W``.
        """
        features = self.stem(images)
        skips = []
        for block in self.down:
            skips.append(features)
            features = block(features)
        for block in self.up:
            features = block(features, skips.pop())
        scores: Tensor = self.head(features)
        return scores


def unet(
    *,
    num_classes: int = 2,
    in_channels: int = 3,
    depth: int = 4,
    base_channels: int = 64,
    width: float = 1.0,
    upsampling: Literal["transposed", "bilinear"] = "transposed",
) -> UNet:
    """U-Net; see `UNet` for the options."""
    return UNet(
        num_classes=num_classes,
        in_channels=in_channels,
        depth=depth,
        base_channels=base_channels,
        width=width,
        upsampling=upsampling,
    )
