"""Residual networks of lean convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.lean.convolution import LeanConv2d
from lrcnn_lightning.models.lean.option import Stencil, check_choice
from lrcnn_lightning.models.option import is_whole, positive, whole
from lrcnn_lightning.models.resnet import RESNETS, BasicBlock, Bottleneck, ResNet

__all__ = ["LeanResNet", "lean_resnet"]


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
        owner = "LeanResNet"
        check_choice(owner, "stencil", stencil, Stencil)
        channels = max(1, round(64 * positive(owner, "width", width)))
        if channels % whole(owner, "group_size", group_size):
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
            convolution=partial(LeanConv2d, stencil=stencil, group_size=group_size),
        )

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
    if is_whole(depth, 1) and depth in RESNETS:
        block, depths = RESNETS[depth]
    elif isinstance(depth, Sequence) and not isinstance(depth, str):
        depths = tuple(depth)
    if len(depths) != 4 or not all(is_whole(blocks, 1) for blocks in depths):
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
