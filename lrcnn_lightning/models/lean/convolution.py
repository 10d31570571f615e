"""The lean convolution: one stencil for each channel, plus a 1 x 1 convolution over all channels."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.lean.option import PaddingMode, Stencil, check_choice, pair
from lrcnn_lightning.models.option import whole

__all__ = ["LeanConv2d"]


class LeanConv2d(nn.Module):
    """The sum of a convolution with one stencil for each channel and a 1 x 1 convolution over all channels.

    The options are those of `torch.nn.Conv2d` and mean the same, with three differences: ``kernel_size`` is 3 and
    ``padding`` is half a kernel unless given, and ``groups`` follow from the channels and ``group_size``.  The 1 x 1
    part reads the pixel at the centre of the kernel, whatever stride, padding and dilation are, so that the sum is one
    linear operator.

    ``in_channels`` and ``out_channels`` need not be equal.  The spatial part then has ``g = gcd(in_channels,
    out_channels)`` groups: with 64 and 128 channels each input channel has two stencils, with 128 and 64 each output
    channel adds the stencils of two inputs, and with 48 and 64 every 3 inputs are coupled with 4 outputs.  Where ``g``
    is 1, as for the 3 channels of an image, the spatial part couples all channels: right, but not lean.  From 64 to 65
    channels it has two thirds of the weights of a 3 x 3 kernel, from 64 to 64 a ninth.

    ``torch.compile``, ``torch.export``, ``torch.fx`` and ``torch.jit.trace`` take it; ``torch.jit.script`` does not.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: odd number of pixels, or height and width.
        stride: in pixels, or along height and width.
        padding: pixels on every side, or along height and width, or ``"same"`` (stride 1 only) or ``"valid"``;
            ``None`` is half a kernel, which keeps the size at stride 1.
        dilation: pixels between neighbours in the kernel, or along height and width.
        stencil: ``"4-point"``, ``"5-point"`` (both for 3 x 3 kernels) or ``"full"``.
        group_size: neighbouring channels that the spatial part couples, counted on the side with fewer channels; a
            divisor of ``g``.  1 is depthwise.
        bias: add a number to each channel.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        spatial_weight: ``out_channels in_channels/groups points``; the points in reading order, 4, 5 or kH*kW.
        pointwise_weight: ``out_channels in_channels 1 1``.
        bias: ``out_channels``, or ``None``.
        groups: groups of the spatial part, ``g / group_size``.
        centre: rows and columns between the first pixel of the kernel and its centre.

    Raises:
        ConfigError: for an option that is not allowed.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same", "valid"] | None = None,
        dilation: int | tuple[int, int] = 1,
        *,
        stencil: Stencil = "5-point",
        group_size: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "LeanConv2d"
        self.in_channels = whole(owner, "in_channels", in_channels)
        self.out_channels = whole(owner, "out_channels", out_channels)
        self.kernel_size = pair(owner, "kernel_size", kernel_size, 1)
        self.stride = pair(owner, "stride", stride, 1)
        self.dilation = pair(owner, "dilation", dilation, 1)
        if not all(length % 2 for length in self.kernel_size):
            raise ConfigError(
                f"kernel_size of LeanConv2d must be odd (given: {kernel_size}), because the 1 x 1 part reads the "
                "pixel at the centre; use torch.nn.Conv2d"
            )
        check_choice(owner, "stencil", stencil, Stencil)
        if stencil != "full" and self.kernel_size != (3, 3):
            raise ConfigError(
                f"stencil={stencil!r} of LeanConv2d is for kernel_size=3 (given: {kernel_size}); use stencil='full'"
            )
        check_choice(owner, "padding_mode", padding_mode, PaddingMode)
        reach = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        self.centre = (reach[0], reach[1])
        self.padding = self._padding(padding)
        self.stencil: Stencil = stencil
        self.group_size = whole(owner, "group_size", group_size)
        self.padding_mode: PaddingMode = padding_mode
        common = math.gcd(self.in_channels, self.out_channels)
        if common % self.group_size:
            raise ConfigError(
                f"group_size of LeanConv2d must divide the greatest common divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}, which is {common} (given: {group_size}); allowed are "
                f"{', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}"
            )
        self.groups = common // self.group_size
        points = {"4-point": 4, "5-point": 5}.get(stencil, self.kernel_size[0] * self.kernel_size[1])
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spatial_weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, points, **placed)
        )
        self.pointwise_weight = nn.Parameter(torch.empty(self.out_channels, self.in_channels, 1, 1, **placed))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **placed))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _padding(self, padding: int | tuple[int, int] | str | None) -> tuple[int, int]:
        """Pixels on each side, along height and width."""
        if padding is None:
            return self.centre
        if isinstance(padding, str):
            if padding == "valid":
                return (0, 0)
            if padding == "same" and self.stride == (1, 1):
                return self.centre
            raise ConfigError(
                "padding of LeanConv2d must be a number of pixels, two of them, 'valid', or 'same' with stride=1 "
                f"(given: {padding!r} with stride={self.stride})"
            )
        return pair("LeanConv2d", "padding", padding, 0)

    def reset_parameters(self) -> None:
        """Draw new weights by He's rule for the sum, and set the bias to zero.

        Each of the two parts contributes half of the result's variance, however many weights it has.  One common
        variance would leave the stencils 5 of every ``in_channels + 5`` parts, and the network next to blind for shape.
        """
        for weight in (self.spatial_weight, self.pointwise_weight):
            fan_in = weight[0].numel()
            nn.init.normal_(weight, std=1 / math.sqrt(fan_in))  # He's 2 / fan_in, half of it for each part
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def spatial_kernel(self) -> Tensor:
        """The spatial part as the weight of a convolution, ``out_channels in_channels/groups kH kW``."""
        weight: Tensor = self.spatial_weight
        if self.stencil != "full":
            none = torch.zeros_like(weight[..., :1])
            # Slices, not an unpacked ``split``: what traces this code symbolically cannot go through a result.
            centre = weight[..., 2:3] if self.stencil == "5-point" else none
            up, left, right, down = weight[..., 0:1], weight[..., 1:2], weight[..., -2:-1], weight[..., -1:]
            weight = torch.cat([none, up, none, left, centre, right, none, down, none], dim=2)
        return torch.unflatten(weight, 2, self.kernel_size)

    def dense_kernel(self) -> Tensor:
        """The whole operator as the weight of `torch.nn.Conv2d`, ``out_channels in_channels kH kW``."""
        spatial = self.spatial_kernel()
        if self.groups > 1:
            # Group g couples its own channels only: it fills block g of the diagonal of a matrix of blocks.
            blocks = torch.unflatten(spatial, 0, (self.groups, -1))
            diagonal = torch.eye(self.groups, dtype=spatial.dtype, device=spatial.device)
            spatial = torch.einsum("goikl,gh->gohikl", blocks, diagonal).flatten(2, 3).flatten(0, 1)
        height, width = self.kernel_size
        return spatial + functional.pad(self.pointwise_weight, (width // 2, width // 2, height // 2, height // 2))

    def forward(self, features: Tensor) -> Tensor:
        """Apply both parts and add them.

        Args:
            features: ``N in_channels H W``.

        Returns:
            ``N out_channels H' W'``, where ``H' = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1``.
        """
        padding = self.padding
        if self.padding_mode != "zeros" and any(padding):
            rows, columns = padding
            features = functional.pad(features, (columns, columns, rows, rows), mode=self.padding_mode)
            padding = (0, 0)
        if self.groups == 1:  # all channels are coupled anyway, so the 1 x 1 part fits into the kernel
            return functional.conv2d(features, self.dense_kernel(), self.bias, self.stride, padding, self.dilation)
        result = functional.conv2d(
            features, self.spatial_kernel(), self.bias, self.stride, padding, self.dilation, self.groups
        )
        # Output pixel i has its centre at i * stride - padding + centre: what the padding lacks is cropped.
        rows, columns = (max(0, c - p) for c, p in zip(self.centre, padding, strict=True))
        if rows or columns:
            features = features[..., rows : features.shape[-2] - rows, columns : features.shape[-1] - columns]
        outside = [max(0, p - c) for c, p in zip(self.centre, padding, strict=True)]
        result += functional.conv2d(features, self.pointwise_weight, None, self.stride, outside)
        return result

    def extra_repr(self) -> str:
        """Options that are not those of the default, after the channels."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding}"] if self.padding != self.centre else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        parts += [f"stencil={self.stencil!r}", f"groups={self.groups}"]
        parts += ["bias=False"] if self.bias is None else []
        parts += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        return ", ".join(parts)
