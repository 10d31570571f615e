r"""Lean convolutions, and residual networks made of them.

A convolution with a k x k kernel couples every output channel with every input channel at every one of its k*k
positions.  The lean operator of Ephrath, Ruthotto, Haber and Treister ("LeanResNet: A Low-cost yet Effective
Convolutional Residual Networks", ICML workshop 2019, `arXiv 1904.06952 <https://arxiv.org/abs/1904.06952>`_) keeps the
coupling at the centre, and lets each channel see its neighbourhood alone.  It is a sum, applied to one input::

    y = S x + P x            S: a small stencil for each channel            P: 1 x 1, couples all channels

    stencil       "full"         "5-point"      "4-point"
                  o o o             o              o
                  o o o           o o o          o   o
                  o o o             o              o

    weights for C channels: 9 C, 5 C or 4 C of the stencils and C*C of the 1 x 1 part, instead of 9*C*C

The centre of a stencil lies where the 1 x 1 part already has a weight (its diagonal), so "4-point" describes the same
operators as "5-point" with C parameters less.  It is the stencil of that paper.

Ephrath, Eliasof, Ruthotto, Haber and Treister ("LeanConvNets: Low-cost Yet Effective Convolutional Neural Networks",
IEEE JSTSP 14(4), 2020, `arXiv 1910.13157 <https://arxiv.org/abs/1910.13157>`_) let S couple groups of channels, which
trades cost for accuracy; here that is ``group_size``.  Where all channels are one group, both parts are run as one
convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["LeanConv2d", "LeanResNet", "Stencil", "lean_resnet", "leanify"]

Stencil = Literal["4-point", "5-point", "full"]
"""Positions at which the spatial part has weights: the four neighbours, these and the centre, or the whole kernel."""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Block, and blocks in each stage, of the residual networks that have a number (He et al., 2016, table 1)."""


class LeanConv2d(nn.Module):
    """The sum of a convolution with one stencil for each channel and a 1 x 1 convolution over all channels.

    The result has the shape that `torch.nn.Conv2d` gives for the same options.  The 1 x 1 part reads the pixel at the
    centre of the kernel, whatever stride, padding and dilation are, so that the sum is one linear operator.

    ``in_channels`` and ``out_channels`` need not be equal.  The spatial part then has ``g = gcd(in_channels,
    out_channels)`` groups: with 64 and 128 channels each input channel has two stencils, with 128 and 64 each output
    channel adds the stencils of two inputs, and with 48 and 64 every 3 inputs are coupled with 4 outputs.  Where ``g``
    is 1, as for the 3 channels of an image, the spatial part couples all channels: right, but not lean.

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
        self.in_channels = _at_least("in_channels", in_channels, 1)
        self.out_channels = _at_least("out_channels", out_channels, 1)
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        if not all(length % 2 for length in self.kernel_size):
            raise ConfigError(
                f"kernel_size of LeanConv2d must be odd (given: {kernel_size}), because the 1 x 1 part reads the "
                "pixel at the centre; use torch.nn.Conv2d"
            )
        _check_stencil("LeanConv2d", stencil)
        if stencil != "full" and self.kernel_size != (3, 3):
            raise ConfigError(
                f"stencil={stencil!r} of LeanConv2d is for kernel_size=3 (given: {kernel_size}); use stencil='full'"
            )
        if padding_mode not in get_args(PaddingMode):
            raise ConfigError(
                f"padding_mode of LeanConv2d must be one of {_listed(get_args(PaddingMode))} (given: {padding_mode!r})"
            )
        reach = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        self.centre = (reach[0], reach[1])
        self.padding = self._padding(padding)
        self.stencil: Stencil = stencil
        self.group_size = _at_least("group_size", group_size, 1)
        self.padding_mode: PaddingMode = padding_mode
        common = math.gcd(in_channels, out_channels)
        if common % group_size:
            raise ConfigError(
                f"group_size of LeanConv2d must divide the greatest common divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}, which is {common} (given: {group_size}); allowed are "
                f"{', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}"
            )
        self.groups = common // group_size
        points = {"4-point": 4, "5-point": 5}.get(stencil, self.kernel_size[0] * self.kernel_size[1])
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spatial_weight = nn.Parameter(torch.empty(out_channels, in_channels // self.groups, points, **placed))
        self.pointwise_weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1, **placed))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **placed))
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
        return _pair("padding", padding, 0)

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
            up, left, *centre, right, down = torch.split(weight, 1, dim=2)
            weight = torch.cat([none, up, none, left, *(centre or [none]), right, none, down, none], dim=2)
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


def leanify(
    module: nn.Module,
    *,
    stencil: Stencil = "5-point",
    group_size: int = 1,
    strided_stem: bool = False,
    keep: Collection[str] = (),
) -> nn.Module:
    """Copy a network with lean convolutions in place of its fully coupled spatial ones; the given one is not changed.

    A `torch.nn.Conv2d` is replaced if it has one group and a kernel of odd height and width, larger than 1 x 1, and
    if the lean one has fewer weights.  Stride, padding, padding mode, dilation, device, dtype, train or eval state, and
    whether there is a bias stay.  A kernel that is not 3 x 3 gets the stencil ``"full"``.  A convolution that is used
    in several places is replaced by one that is used in all of them.

    Left as they are: 1 x 1 and grouped convolutions, even kernels, subclasses of ``Conv2d`` (parametrised and lazy ones
    among them), transposed convolutions, 1-D and 3-D ones, and the stem, see ``strided_stem``.

    The weights of the new convolutions are drawn anew, and require gradients: a trained network has to be trained
    again.  All other parameters and buffers keep their names and values.  Hooks on a replaced convolution are lost.

    Args:
        module: any network, or a single convolution.
        stencil: ``"4-point"``, ``"5-point"`` or ``"full"``, see `LeanConv2d`.
        group_size: neighbouring channels that the spatial part couples; 1 is depthwise.
        strided_stem: replace the stem, too, if that saves weights.  The stem is the first replaceable convolution in
            the order of ``named_modules()``, if it strides.  The 7 x 7 stem of a ResNet gets smaller only if its 3 and
            64 channels have a common divisor, as 3 and 48 do.
        keep: names of submodules that stay as they are, with all that is in them.

    Returns:
        The copy.

    Raises:
        ConfigError: for an unknown name in ``keep``, if nothing can be replaced, or if ``group_size`` suits a
            convolution not.
    """
    _check_stencil("leanify", stencil)
    names = dict(module.named_modules(remove_duplicate=False))
    if isinstance(keep, str) or any(name not in names for name in keep):
        given = [keep] if isinstance(keep, str) else [name for name in keep if name not in names]
        raise ConfigError(
            f"keep of leanify must be a list of names of submodules of {type(module).__name__} (given: "
            f"{_listed(given)}); see named_modules(), the first are {_listed(list(names)[1:6]) or 'none: it has none'}"
        )
    kept = {id(part) for name in keep for part in names[name].modules()}
    convolutions = {name: part for name, part in module.named_modules() if _is_replaceable(part)}
    first = next(iter(convolutions.values()), None)
    if first is not None and not strided_stem and first.stride != (1, 1):
        kept.add(id(first))
    lean: dict[int, Any] = {}  # by identity, as ``deepcopy`` looks up what it has copied already
    for name, convolution in convolutions.items():
        if id(convolution) in kept:
            continue
        try:
            replacement = _lean_version(convolution, stencil, group_size, meta=True)
            if _weights(replacement) < _weights(convolution):
                lean[id(convolution)] = _lean_version(convolution, stencil, group_size)
        except ConfigError as error:
            raise ConfigError(f"{name or 'the module itself'}: {error}; or name it in `keep` of leanify") from error
    if not lean:
        raise ConfigError(
            f"leanify found nothing to replace in {type(module).__name__}: it takes torch.nn.Conv2d with an odd kernel "
            "larger than 1 x 1 and one group, where that saves weights, but not the strided stem (unless "
            "strided_stem=True) and nothing that is named in `keep`"
        )
    result: nn.Module = copy.deepcopy(module, lean)
    return result


def _is_replaceable(module: nn.Module) -> bool:
    """Whether a module is a fully coupled spatial convolution that can be made lean."""
    return (
        type(module) is nn.Conv2d
        and "weight" in module._parameters  # else ``torch.nn.utils`` computes it
        and module.groups == 1
        and max(module.kernel_size) > 1
        and all(length % 2 for length in module.kernel_size)
    )


def _lean_version(convolution: nn.Module, stencil: Stencil, group_size: int, *, meta: bool = False) -> LeanConv2d:
    """A lean convolution, with new weights, that fits where ``convolution`` is; ``meta``: one without data."""
    assert isinstance(convolution, nn.Conv2d)
    lean = LeanConv2d(
        convolution.in_channels,
        convolution.out_channels,
        cast("tuple[int, int]", convolution.kernel_size),
        cast("tuple[int, int]", convolution.stride),
        cast("tuple[int, int] | Literal['same', 'valid']", convolution.padding),
        cast("tuple[int, int]", convolution.dilation),
        stencil=stencil if convolution.kernel_size == (3, 3) else "full",
        group_size=group_size,
        bias=convolution.bias is not None,
        padding_mode=convolution.padding_mode,
        device="meta" if meta else convolution.weight.device,
        dtype=convolution.weight.dtype,
    )
    return lean.train(convolution.training)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class LeanResNet(ResNet):
    """A residual network with lean convolutions in place of the 3 x 3 ones; all else is as in `ResNet`.

    The stem, the 1 x 1 convolutions of bottlenecks and shortcuts, and BatchNorm are those of `ResNet`.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: number of scores.
        in_channels: channels of the input image.
        width: factor on every convolution's channels.  It is rounded so that the first stage has a whole number of
            channels; each further stage has exactly twice as many, so that every group is as small as can be.
        stencil: ``"4-point"``, ``"5-point"`` or ``"full"``, see `LeanConv2d`.
        group_size: neighbouring channels that the spatial part of a lean convolution couples; 1 is depthwise.
        zero_init_residual: start every block as its shortcut, by a zero weight in its last BatchNorm.

    Raises:
        ConfigError: for an option that is not allowed.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stencil: Stencil = "5-point",
        group_size: int = 1,
        zero_init_residual: bool = False,
    ) -> None:
        if width <= 0:
            raise ConfigError(f"width of LeanResNet must be positive (given: {width})")
        _check_stencil("LeanResNet", stencil)
        channels = max(1, round(64 * width))
        if channels % _at_least("group_size", group_size, 1, "LeanResNet"):
            raise ConfigError(
                f"group_size of LeanResNet must divide the {channels} channels of its first stage, which has "
                f"64 * width of them (given: {group_size}); change group_size or width={width}"
            )
        super().__init__(
            block,
            depths,
            num_classes=num_classes,
            in_channels=in_channels,
            width=channels / 64,
            zero_init_residual=zero_init_residual,
        )
        for part in [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]:
            for name, child in list(part.named_children()):
                if _is_replaceable(child):
                    setattr(part, name, _lean_version(child, stencil, group_size))

    def reset_parameters(self, *, zero_init_residual: bool = False) -> None:
        """Initialise convolutions by He's rule and every BatchNorm as the identity."""
        super().reset_parameters(zero_init_residual=zero_init_residual)
        for module in self.modules():
            if isinstance(module, LeanConv2d):
                module.reset_parameters()


def lean_resnet(
    depth: int | Sequence[int] = 18,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    stencil: Stencil = "5-point",
    group_size: int = 1,
    zero_init_residual: bool = False,
) -> LeanResNet:
    """Make a lean residual network; it maps images ``N C H W`` to scores ``N num_classes``.

    Args:
        depth: 18, 34, 50, 101 or 152, for the layout of that ResNet; or the number of basic blocks in each of the four
            stages, such as ``[1, 1, 1, 1]``.
        num_classes: number of scores.
        in_channels: channels of the input image.
        width: factor on every convolution's channels.
        stencil: ``"4-point"``, ``"5-point"`` or ``"full"``, see `LeanConv2d`.
        group_size: neighbouring channels that the spatial part of a lean convolution couples; 1 is depthwise.
        zero_init_residual: start every block as its shortcut, by a zero weight in its last BatchNorm.

    Raises:
        ConfigError: for an option that is not allowed.
    """
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    depths: tuple[int, ...] = ()
    if isinstance(depth, int) and depth in RESNETS:
        block, depths = RESNETS[depth]
    elif isinstance(depth, Sequence) and not isinstance(depth, str):
        depths = tuple(depth)
    if len(depths) != 4 or not all(isinstance(blocks, int) and blocks >= 1 for blocks in depths):
        raise ConfigError(
            f"depth of lean_resnet must be one of {', '.join(map(str, RESNETS))}, or four positive numbers of blocks, "
            f"such as [1, 1, 1, 1] (given: {depth!r})"
        )
    return LeanResNet(
        block,
        (depths[0], depths[1], depths[2], depths[3]),
        num_classes=num_classes,
        in_channels=in_channels,
        width=width,
        stencil=stencil,
        group_size=group_size,
        zero_init_residual=zero_init_residual,
    )


def _check_stencil(owner: str, stencil: str) -> None:
    if stencil not in get_args(Stencil):
        raise ConfigError(f"stencil of {owner} must be one of {_listed(get_args(Stencil))} (given: {stencil!r})")


def _at_least(name: str, value: int, least: int, owner: str = "LeanConv2d") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} of {owner} must be a whole number of at least {least} (given: {value!r})")
    return value


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """Height and width of an option that may be one number for both."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= least for number in numbers)
    if len(numbers) != 2 or not whole:
        raise ConfigError(
            f"{name} of LeanConv2d must be a whole number of at least {least}, or two of them, for height and width "
            f"(given: {value!r})"
        )
    return numbers[0], numbers[1]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
