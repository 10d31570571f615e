"""Every operation with a row rule: the rule alone on every interval, and a small network around it against the oracle.

Each family is one table. A line says how many operations of the network stream (are computed by rows), how many reduce
rows, and which run whole, so that a rule that silently stops applying is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from lrcnn_lightning.planning.choices import Choices
from tests.oracle import MODES, assert_exact, check_rules, no_gradient, roles

N, C, H, W = 2, 4, 9, 7
MAP = (N, C, H, W)
LINE = (N, C, 11)
VOLUME = (N, C, 6, 5, 4)


CHOICES = [
    *[Choices(mode, rows, 1) for mode in MODES for rows in (1, 2, 5)],
    *[Choices(mode, 3, 2, 2, "borders") for mode in MODES],
    *[Choices(mode, 100, 2, 2, "narrow") for mode in MODES],
]


@dataclass
class Case:
    """A function or module of one map, and what is expected of it."""

    name: str
    make: Callable[[], Callable[..., Any]]
    shape: tuple[int, ...] = MAP
    reduce: int = 0
    whole: Sequence[str] = ()
    train: bool = True
    axis: int | str = 2
    post: bool = True


class Around(nn.Module):
    """A convolution, the operation, and a pointwise function of its results."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        dimensions, channels = len(case.shape) - 2, case.shape[1]
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.before = convolution(channels, channels, 3, padding=1)
        self.operation = case.make()
        self.after = case.post

    def forward(self, x: Tensor) -> Any:
        result = self.operation(self.before(x))
        if isinstance(result, (tuple, list)):
            return tuple(torch.tanh(r) if r.is_floating_point() and self.after else r for r in result)
        return torch.tanh(result) if self.after else result


def verify(case: Case) -> None:
    torch.manual_seed(1)
    module = Around(case).double()
    for parameter in module.parameters():  # no parameter at a special value
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0.1, 0.7)
    module.train(case.train)
    x = torch.randn(case.shape, dtype=torch.float64)
    graph = check_rules(module, x, axis=case.axis)
    found = roles(graph)
    whole = [name.removeprefix("aten.") for name in found["whole"]]
    assert whole == list(case.whole), found
    assert len(found["reduce"]) == case.reduce, found
    assert_exact(module, x, train=case.train, axis=case.axis, seed=3, choices=CHOICES, graph=graph)


def table(*cases: Case) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])


def of(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: function


# ------------------------------------------------------------------------------------------------- convolution


def convolution(name: str, *args: Any, shape: tuple[int, ...] = MAP, axis: int | str = 2, **options: Any) -> Case:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    reduce = options.pop("reduce", 0)
    return Case(name, lambda: kind(C, *args, **options), shape, reduce, axis=axis)


@table(
    convolution("1", 3, 1),
    convolution("3", 3, 3),
    convolution("3 padded", 3, 3, padding=1),
    convolution("3 along columns", 3, (3, 5), padding=(1, 2), axis=3),
    convolution("3 without bias", 3, 3, padding=1, bias=False),
    convolution("2 even", 3, 2, padding=1),
    convolution("4 even, stride 2", 3, 4, stride=2, padding=1),
    convolution("5 on 9 rows, padding 4", 3, 5, padding=4),
    convolution("kernel as high as the map", 3, (9, 3)),
    convolution("kernel higher than the map", 3, (11, 3), padding=(5, 1)),
    convolution("stride 2", 3, 3, stride=2, padding=1),
    convolution("stride 2 leaves a row over", 3, 2, stride=2),
    convolution("stride 3 above kernel 1", 3, 1, stride=3),
    convolution("stride 4 above kernel 3", 3, 3, stride=4, padding=1),
    convolution("stride 5 above kernel 2, padding 2", 3, 2, stride=5, padding=2),
    convolution("kernel 1 with padding", 3, 1, padding=2),
    convolution("kernel 1 with padding and stride", 3, 1, padding=3, stride=2),
    convolution("padding beyond the kernel", 3, 3, padding=5),
    convolution("padding beyond the kernel, stride 2", 3, 3, padding=6, stride=2),
    convolution("padding beyond the kernel, stride 3", 3, 2, padding=7, stride=3),
    convolution("dilation 2", 3, 3, dilation=2, padding=2),
    convolution("dilation 3, stride 2", 3, 3, dilation=3, padding=3, stride=2),
    convolution("dilation differs by axis", 3, (3, 2), dilation=(2, 3), padding=(1, 2), stride=(3, 1)),
    convolution("groups 2", 6, 3, groups=2, padding=1),
    convolution("depthwise", 4, 3, groups=4, padding=1),
    convolution("depthwise with multiplier", 8, 3, groups=4, padding=1, stride=2),
    convolution("asymmetric 7 x 1", 3, (7, 1), padding=(3, 0)),
    convolution("asymmetric 1 x 7", 3, (1, 7), padding=(0, 3)),
    convolution("asymmetric stride", 3, 3, stride=(2, 1), padding=(0, 1)),
    convolution("valid", 3, 3, padding="valid"),
    convolution("same", 3, 3, padding="same"),
    convolution("same, even kernel", 3, 4, padding="same"),
    convolution("same, even kernel in columns", 3, (3, 4), padding="same"),
    convolution("same, dilated", 3, (2, 3), padding="same", dilation=(3, 2)),
    convolution("zeros", 3, 3, padding=1, padding_mode="zeros"),
    convolution("reflect", 3, 5, padding=2, padding_mode="reflect"),
    convolution("replicate", 3, 5, padding=(3, 2), padding_mode="replicate", stride=2),
    convolution("reflect same", 3, 4, padding="same", padding_mode="reflect"),
    convolution("circular", 3, 3, padding=1, padding_mode="circular", reduce=1),
    convolution("circular, uneven and even kernel", 3, (4, 3), padding="same", padding_mode="circular", reduce=1),
    convolution("circular, far", 3, (7, 1), stride=2, padding=(9, 0), padding_mode="circular", reduce=1),
    convolution("circular along columns", 3, 5, padding=(3, 2), padding_mode="circular", reduce=1, axis=3),
    convolution("circular 1d", 3, 5, padding=2, padding_mode="circular", reduce=1, shape=LINE),
    convolution("circular 3d", 3, 3, padding=1, padding_mode="circular", reduce=1, shape=VOLUME),
    convolution("circular in columns", 3, 3, padding=(0, 1), padding_mode="circular"),
    convolution("1d", 3, 3, padding=1, shape=LINE),
    convolution("1d stride dilation", 3, 3, padding=4, stride=3, dilation=2, shape=LINE),
    convolution("1d same", 3, 4, padding="same", shape=LINE),
    convolution("1d reflect", 3, 3, padding=1, padding_mode="reflect", shape=LINE),
    convolution("3d", 3, 3, padding=1, shape=VOLUME),
    convolution("3d stride", 3, (3, 2, 1), padding=(1, 0, 1), stride=(2, 1, 3), shape=VOLUME),
    convolution("3d along the second axis", 3, 3, padding=1, stride=2, shape=VOLUME, axis=3),
    convolution("3d along the third axis", 3, 3, padding=1, dilation=(1, 1, 2), shape=VOLUME, axis=4),
    convolution("3d replicate", 3, 3, padding=1, padding_mode="replicate", shape=VOLUME),
    convolution("3d same even", 3, 2, padding="same", shape=VOLUME),
)
def test_convolution(case: Case) -> None:
    verify(case)


def transposed(name: str, *args: Any, shape: tuple[int, ...] = MAP, axis: int | str = 2, **options: Any) -> Case:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape) - 3]
    return Case(name, lambda: kind(C, *args, **options), shape, axis=axis)


@table(
    transposed("1", 3, 1),
    transposed("2 stride 2", 3, 2, stride=2),
    transposed("3", 3, 3, padding=1),
    transposed("3 stride 2", 3, 3, stride=2, padding=1),
    transposed("3 stride 2, output padding", 3, 3, stride=2, padding=1, output_padding=1),
    transposed("4 stride 2", 3, 4, stride=2, padding=1),
    transposed("stride 3 above kernel 2", 3, 2, stride=3),
    transposed("stride 4 above kernel 1, output padding 3", 3, 1, stride=4, output_padding=3),
    transposed("stride 3 above kernel 2, padding 1, output padding 2", 3, 2, stride=3, padding=1, output_padding=2),
    transposed("dilation 2", 3, 3, dilation=2, padding=1),
    transposed("dilation 3, stride 2, output padding", 3, 3, dilation=3, stride=2, padding=3, output_padding=2),
    transposed("kernel 5, padding 4", 3, 5, padding=4),
    transposed("groups 2", 6, 3, groups=2, stride=2),
    transposed("without bias", 3, 3, stride=2, bias=False),
    transposed("asymmetric", 3, (5, 2), stride=(3, 1), padding=(2, 0), output_padding=(1, 0)),
    transposed("along columns", 3, (2, 5), stride=(1, 3), padding=(0, 2), output_padding=(0, 1), axis=3),
    transposed("1d", 3, 4, stride=3, padding=1, output_padding=2, shape=LINE),
    transposed("3d", 3, 3, stride=2, padding=1, output_padding=1, shape=VOLUME),
    transposed("3d along the third axis", 3, 2, stride=2, shape=VOLUME, axis=4),
)
def test_transposed_convolution(case: Case) -> None:
    verify(case)


# ----------------------------------------------------------------------------------------------------- pooling


def pool(name: str, kind: Callable[..., Callable[..., Any]], *args: Any, **options: Any) -> Case:
    shape, axis = options.pop("shape", MAP), options.pop("axis", 2)
    whole, reduce = options.pop("whole", ()), options.pop("reduce", 0)
    return Case(name, lambda: kind(*args, **options), shape, axis=axis, whole=whole, reduce=reduce)


@table(
    pool("2", nn.MaxPool2d, 2),
    pool("3 stride 2", nn.MaxPool2d, 3, stride=2, padding=1),
    pool("3 stride 1", nn.MaxPool2d, 3, stride=1, padding=1),
    pool("2 ceil", nn.MaxPool2d, 2, ceil_mode=True),
    pool("3 stride 2 ceil", nn.MaxPool2d, 3, stride=2, ceil_mode=True),
    pool("3 stride 2 padded ceil", nn.MaxPool2d, 3, stride=2, padding=1, ceil_mode=True),
    pool("2 stride 4 ceil", nn.MaxPool2d, 2, stride=4, ceil_mode=True),
    pool("dilation 2", nn.MaxPool2d, 3, stride=1, padding=1, dilation=2),
    pool("dilation 3 stride 2 ceil", nn.MaxPool2d, 2, stride=2, padding=1, dilation=3, ceil_mode=True),
    pool("asymmetric", nn.MaxPool2d, (3, 2), stride=(2, 1), padding=(1, 1)),
    pool("stride above kernel", nn.MaxPool2d, 2, stride=3),
    pool("along columns", nn.MaxPool2d, 3, stride=2, padding=1, axis=3),
    pool("indices", nn.MaxPool2d, 2, return_indices=True),
    pool("indices padded", nn.MaxPool2d, 3, stride=2, padding=1, return_indices=True),
    pool("indices padded ceil", nn.MaxPool2d, 3, stride=2, padding=1, return_indices=True, ceil_mode=True),
    pool("indices dilated", nn.MaxPool2d, 2, stride=1, padding=1, dilation=2, return_indices=True),
    pool("indices along columns", nn.MaxPool2d, 3, stride=2, padding=1, return_indices=True, axis=3),
    pool("1d", nn.MaxPool1d, 3, stride=2, padding=1, shape=LINE),
    pool("1d ceil", nn.MaxPool1d, 2, stride=3, ceil_mode=True, shape=LINE),
    pool("1d indices", nn.MaxPool1d, 3, stride=2, padding=1, return_indices=True, shape=LINE),
    pool("3d", nn.MaxPool3d, 3, stride=2, padding=1, shape=VOLUME),
    pool("3d ceil", nn.MaxPool3d, 2, ceil_mode=True, shape=VOLUME, axis=3),
    pool("3d indices", nn.MaxPool3d, 2, padding=1, return_indices=True, shape=VOLUME),
    pool("3d indices along the second axis", nn.MaxPool3d, 2, padding=1, return_indices=True, shape=VOLUME, axis=3),
)
def test_max_pool(case: Case) -> None:
    verify(case)


@table(
    pool("2", nn.AvgPool2d, 2),
    pool("3 stride 2 padded", nn.AvgPool2d, 3, stride=2, padding=1),
    pool("3 padded, not counted", nn.AvgPool2d, 3, stride=1, padding=1, count_include_pad=False),
    pool("3 stride 2 ceil", nn.AvgPool2d, 3, stride=2, ceil_mode=True),
    pool("2 ceil", nn.AvgPool2d, 2, ceil_mode=True),
    pool("3 stride 2 padded ceil", nn.AvgPool2d, 3, stride=2, padding=1, ceil_mode=True),
    pool("4 padded 2 ceil", nn.AvgPool2d, 4, stride=3, padding=2, ceil_mode=True),
    pool("4 padded 2 ceil, not counted", nn.AvgPool2d, 4, stride=3, padding=2, ceil_mode=True, count_include_pad=False),
    pool("divisor", nn.AvgPool2d, 3, stride=2, padding=1, divisor_override=5),
    pool("divisor ceil", nn.AvgPool2d, 3, stride=2, padding=1, divisor_override=5, ceil_mode=True),
    pool("asymmetric", nn.AvgPool2d, (3, 2), stride=(1, 2), padding=(1, 0)),
    pool("asymmetric padding in columns", nn.AvgPool2d, (2, 3), padding=(0, 1), count_include_pad=False),
    pool("stride above kernel", nn.AvgPool2d, 2, stride=3),
    pool("stride above kernel, ceil", nn.AvgPool2d, 2, stride=5, ceil_mode=True, padding=1),
    pool("along columns", nn.AvgPool2d, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, axis=3),
    pool("1d", nn.AvgPool1d, 3, stride=2, padding=1, shape=LINE),
    pool("1d ceil not counted", nn.AvgPool1d, 3, 2, padding=1, ceil_mode=True, count_include_pad=False, shape=LINE),
    pool("3d", nn.AvgPool3d, 3, stride=2, padding=1, shape=VOLUME),
    pool("3d ceil divisor", nn.AvgPool3d, 2, stride=2, ceil_mode=True, divisor_override=3, shape=VOLUME, axis=3),
    pool("3d not counted", nn.AvgPool3d, 3, stride=1, padding=1, count_include_pad=False, shape=VOLUME),
    pool("blur", nn.LPPool2d, 2, 2, whole=()),
)
def test_average_pool(case: Case) -> None:
    verify(case)


@table(
    pool("average to 1", nn.AdaptiveAvgPool2d, 1, reduce=1),
    pool("average to 1 x 3", nn.AdaptiveAvgPool2d, (1, 3), reduce=1),
    pool("average to 3", nn.AdaptiveAvgPool2d, 3),
    pool("average to 4 x 1", nn.AdaptiveAvgPool2d, (4, 1)),
    pool("average to the same", nn.AdaptiveAvgPool2d, (None, 2)),
    pool("average to more", nn.AdaptiveAvgPool2d, (13, 8)),
    pool("average along columns", nn.AdaptiveAvgPool2d, (2, 3), axis=3),
    pool("average 1d", nn.AdaptiveAvgPool1d, 4, shape=LINE),
    pool("average 1d to 1", nn.AdaptiveAvgPool1d, 1, shape=LINE, reduce=1),
    pool("average 3d", nn.AdaptiveAvgPool3d, (4, 2, 3), shape=VOLUME),
    pool("average 3d to 1", nn.AdaptiveAvgPool3d, 1, shape=VOLUME, reduce=1),
    pool("maximum to 3", nn.AdaptiveMaxPool2d, 3),
    pool("maximum to 13", nn.AdaptiveMaxPool2d, (13, 2)),
    pool("maximum to 4 x 1", nn.AdaptiveMaxPool2d, (4, 1)),
    pool("maximum indices", nn.AdaptiveMaxPool2d, (4, 3), return_indices=True),
    pool("maximum indices along columns", nn.AdaptiveMaxPool2d, (4, 3), return_indices=True, axis=3),
    pool("maximum 1d", nn.AdaptiveMaxPool1d, 4, shape=LINE),
    pool("maximum 3d", nn.AdaptiveMaxPool3d, (4, 2, 3), shape=VOLUME),
    pool("maximum 3d indices", nn.AdaptiveMaxPool3d, (4, 2, 3), return_indices=True, shape=VOLUME),
    pool("maximum to 1", nn.AdaptiveMaxPool2d, 1, whole=["rowwise.pick_maximum"]),
    pool("maximum to 1, indices", nn.AdaptiveMaxPool2d, 1, return_indices=True, whole=["rowwise.pick_maximum"]),
    pool("maximum to 1 along columns", nn.AdaptiveMaxPool2d, 1, whole=["rowwise.pick_maximum"], axis=3),
    pool("maximum 1d to 1", nn.AdaptiveMaxPool1d, 1, whole=["rowwise.pick_maximum"], shape=LINE),
    pool("maximum 3d to 1", nn.AdaptiveMaxPool3d, 1, whole=["rowwise.pick_maximum"], shape=VOLUME, axis=3),
)
def test_adaptive_pool(case: Case) -> None:
    verify(case)


# ---------------------------------------------------------------------------------------------------- resizing


def resize(name: str, mode: str, shape: tuple[int, ...] = MAP, axis: int | str = 2, **options: Any) -> Case:
    whole = options.pop("whole", ())
    return Case(name, of(lambda x: functional.interpolate(x, mode=mode, **options)), shape, axis=axis, whole=whole)


_SIZES = {
    "double": {"scale_factor": 2},
    "half": {"scale_factor": 0.5},
    "by 1.7": {"scale_factor": 1.7},
    "by 1.7, recomputed": {"scale_factor": 1.7, "recompute_scale_factor": True},
    "to 13 x 11": {"size": (13, 11)},
    "to 4 x 5": {"size": (4, 5)},
    "to 9 x 7": {"size": (9, 7)},
    "to 23 x 7": {"size": (23, 7)},
    "to 1 x 1": {"size": (1, 1)},
}


def _resizes() -> list[Case]:
    cases = []
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
        for aligned in (False, True) if mode.startswith("bi") else (None,):
            for name, options in _SIZES.items():
                extra: dict[str, Any] = {} if aligned is None else {"align_corners": aligned}
                suffix = " aligned" if aligned else ""
                cases.append(resize(f"{mode} {name}{suffix}", mode, **options, **extra))
    for mode in ("nearest", "bilinear", "bicubic"):
        cases.append(resize(f"{mode} along columns", mode, axis=3, scale_factor=(1.7, 2)))
    for mode, shape, size in (
        ("nearest", LINE, 17),
        ("nearest-exact", LINE, 17),
        ("linear", LINE, 17),
        ("nearest", VOLUME, (9, 5, 7)),
        ("nearest-exact", VOLUME, (9, 5, 7)),
        ("trilinear", VOLUME, (9, 5, 7)),
    ):
        cases.append(resize(f"{mode} {len(shape) - 2}d", mode, shape, size=size))
        cases.append(resize(f"{mode} {len(shape) - 2}d by 1.5", mode, shape, scale_factor=1.5))
    cases.append(resize("linear aligned 1d", "linear", LINE, size=17, align_corners=True))
    cases.append(resize("trilinear aligned 3d", "trilinear", VOLUME, scale_factor=2, align_corners=True))
    cases.append(resize("trilinear 3d second axis", "trilinear", VOLUME, axis=3, scale_factor=2))
    return cases


@table(*_resizes())
def test_resize(case: Case) -> None:
    verify(case)


# ------------------------------------------------------------------------------------------------------- shape


def shuffle(x: Tensor) -> Tensor:
    samples, channels, rows, columns = x.shape
    return x.view(samples, 2, channels // 2, rows, columns).transpose(1, 2).reshape(samples, channels, rows, columns)


def fire(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :-1] * x[:, :, 1:], x[:, :, 1:]], 1)


@table(
    Case("pixel shuffle", lambda: nn.PixelShuffle(2)),
    Case("pixel shuffle along columns", lambda: nn.PixelShuffle(2), axis=3),
    Case("pixel unshuffle", lambda: nn.PixelUnshuffle(3), (N, C, 9, 6)),
    Case("pixel unshuffle along columns", lambda: nn.PixelUnshuffle(3), (N, C, 6, 9), axis=3),
    Case("channel shuffle", of(shuffle)),
    Case("channel shuffle operation", lambda: nn.ChannelShuffle(2)),
    Case("cat", of(lambda x: torch.cat([x, x.sin(), x[:, :1]], 1))),
    Case("cat columns", of(lambda x: torch.cat([x, x[..., :2]], -1))),
    Case("cat with itself", of(lambda x: torch.cat([x, x], 1))),
    Case("cat with a constant", of(lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1))),
    Case("cat rows", of(lambda x: torch.cat([x, x], 2)), whole=["cat.default"]),
    Case("stack", of(lambda x: torch.stack([x, x.cos()], 1).sum(1))),
    Case("stack behind", of(lambda x: torch.stack([x, x.cos()], -1).mean(-1))),
    Case("split", of(lambda x: tuple(t * (i + 1) for i, t in enumerate(torch.split(x, [1, 2, 1], 1))))),
    Case("split equal", of(lambda x: torch.split(x, 2, 1)[1])),
    Case("split columns", of(lambda x: torch.split(x, 3, 3)[1])),
    Case("chunk", of(lambda x: torch.mul(*torch.chunk(x, 2, 1)))),
    Case("chunk rows", of(lambda x: torch.chunk(x, 3, 2)[1])),
    Case("split rows", of(lambda x: x.split([2, 4, 3], 2)[1])),
    Case("hstack", of(lambda x: torch.hstack([x, x.sin()]))),
    Case("dstack", of(lambda x: torch.dstack([x, x.sin()])), whole=["cat.default"]),
    Case("tensor split", of(lambda x: torch.tensor_split(x, 3, 1)[0])),
    Case("unbind", of(lambda x: x.unbind(1)[2].unsqueeze(1))),
    Case("select a channel", of(lambda x: x[:, 1].unsqueeze(1))),
    Case("slice channels", of(lambda x: x[:, 1:3])),
    Case("slice channels with a step", of(lambda x: x[:, ::2])),
    Case("slice rows", of(lambda x: x[:, :, 2:-1])),
    Case("slice rows from the end", of(lambda x: x[:, :, -4:])),
    Case("slice rows with a step", of(lambda x: x[:, :, 1::3])),
    Case("slice columns", of(lambda x: x[..., 1:-2])),
    Case("slice everything", of(lambda x: x[:, :, :, 2:5] + x[:, :, :, 1:4])),
    Case("reordered channels", of(lambda x: x[:, [2, 0, 3, 1]])),
    Case("index select", of(lambda x: torch.index_select(x, 1, torch.tensor([3, 1])))),
    Case("repeated channels", of(lambda x: x.repeat_interleave(2, 1))),
    Case("matrix transpose", of(lambda x: x.mT * 2)),
    Case("sorted channels", of(lambda x: torch.sort(x, 1)[0])),
    Case("differences", of(lambda x: (x[..., 1:] - x[..., :-1], x[:, :, 1:] - x[:, :, :-1]))),
    Case("slice samples", of(lambda x: x[:1])),
    Case("crops of one map", of(fire)),
    Case("narrow rows", of(lambda x: x.narrow(2, 3, 4))),
    Case("narrow channels", of(lambda x: x.narrow(1, 1, 2))),
    Case("roll channels", of(lambda x: torch.roll(x, 1, 1))),
    Case("roll columns", of(lambda x: torch.roll(x, (2,), (3,)))),
    Case("roll rows", of(lambda x: torch.roll(x, 1, 2)), whole=["roll.default"]),
    Case("flip channels", of(lambda x: torch.flip(x, (1, 3)))),
    Case("flip rows", of(lambda x: torch.flip(x, (2,))), whole=["flip.default"]),
    Case("repeat", of(lambda x: x.repeat(1, 2, 1, 1))),
    Case("expand", of(lambda x: x[:, :1].expand(-1, 3, -1, -1))),
    Case("permute", of(lambda x: x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2))),
    Case("transpose", of(lambda x: x.transpose(2, 3) * 2)),
    Case("flatten columns into channels", of(lambda x: x.permute(0, 2, 1, 3).flatten(2))),
    Case("flatten all", of(lambda x: x.flatten(1)), whole=["flatten.using_ints"]),
    Case("view merges rows", of(lambda x: x.flatten(2)), whole=["flatten.using_ints"]),
    Case("unsqueeze squeeze", of(lambda x: x.unsqueeze(1).squeeze(1))),
    Case("unflatten", of(lambda x: x.unflatten(1, (2, 2)).sum(2))),
    Case("movedim", of(lambda x: x.movedim(1, -1).contiguous())),
    Case("einops-like patches in columns", of(lambda x: x[..., :6].reshape(2, 4, 9, 3, 2).mean(-1))),
)
def test_shape(case: Case) -> None:
    verify(case)


def padding(name: str, widths: Sequence[int], mode: str, shape: tuple[int, ...] = MAP, **options: Any) -> Case:
    reduce, axis = options.pop("reduce", 0), options.pop("axis", 2)
    return Case(name, of(lambda x: functional.pad(x, tuple(widths), mode, **options)), shape, reduce, axis=axis)


@table(
    padding("constant", (1, 2, 3, 4), "constant"),
    padding("constant value", (1, 0, 2, 1), "constant", value=1.5),
    padding("constant columns only", (1, 2), "constant"),
    padding("constant channels", (0, 0, 0, 0, 1, 2), "constant"),
    padding("constant rows and channels", (0, 1, 2, 0, 1, 0), "constant"),
    padding("constant negative", (-1, -1, -2, -3), "constant"),
    padding("constant above, cut below", (0, 0, 2, -3), "constant"),
    padding("constant cut above, below", (0, 0, -3, 2), "constant"),
    padding("constant very far above", (0, 0, 25, 0), "constant"),
    padding("constant far", (0, 0, 12, 11), "constant"),
    padding("constant samples", (0, 0, 0, 0, 0, 0, 0, 1), "constant"),
    padding("reflect", (1, 2, 3, 4), "reflect"),
    padding("reflect rows only", (0, 0, 8, 8), "reflect"),
    padding("reflect columns only", (3, 2, 0, 0), "reflect"),
    padding("replicate", (1, 2, 3, 4), "replicate"),
    padding("replicate far", (0, 0, 12, 11), "replicate"),
    padding("circular", (1, 1, 1, 1), "circular", reduce=1),
    padding("circular columns", (1, 1, 0, 0), "circular"),
    padding("reflect along columns", (3, 2, 1, 2), "reflect", axis=3),
    padding("reflect 1d", (3, 2), "reflect", LINE),
    padding("replicate 1d", (3, 2), "replicate", LINE),
    padding("reflect 3d", (1, 2, 2, 1, 3, 2), "reflect", VOLUME),
    padding("replicate 3d", (1, 2, 2, 1, 3, 2), "replicate", VOLUME, axis=3),
    Case("reflection module", lambda: nn.ReflectionPad2d(2)),
    Case("replication module", lambda: nn.ReplicationPad2d((1, 2, 0, 3))),
    Case("constant module", lambda: nn.ConstantPad2d((1, 0, 2, 3), -0.5)),
    Case("zero module", lambda: nn.ZeroPad2d((0, 1, 0, 1))),
)
def test_pad(case: Case) -> None:
    verify(case)


# ----------------------------------------------------------------------------------------------- normalisation


def channels_last(norm: nn.Module) -> nn.Module:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return result

    return ChannelsLast()


def frozen(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


@table(
    Case("batch", lambda: nn.BatchNorm2d(C), reduce=1),
    Case("batch, eval", lambda: nn.BatchNorm2d(C), train=False),
    Case("batch, no affine", lambda: nn.BatchNorm2d(C, affine=False), reduce=1),
    Case("batch, no statistics", lambda: nn.BatchNorm2d(C, track_running_stats=False), reduce=1),
    Case("batch, no statistics, eval", lambda: nn.BatchNorm2d(C, track_running_stats=False), reduce=1, train=False),
    Case("batch, momentum", lambda: nn.BatchNorm2d(C, momentum=0.7, eps=0.1), reduce=1),
    Case("batch, cumulative", lambda: nn.BatchNorm2d(C, momentum=None), reduce=1),
    Case("batch, frozen parameters", lambda: frozen(nn.BatchNorm2d(C)), reduce=1),
    Case("batch, frozen module", lambda: nn.BatchNorm2d(C).requires_grad_(False), reduce=1),
    Case("batch 1d", lambda: nn.BatchNorm1d(C), LINE, reduce=1),
    Case("batch 3d", lambda: nn.BatchNorm3d(C), VOLUME, reduce=1),
    Case("batch along columns", lambda: nn.BatchNorm2d(C), reduce=1, axis=3),
    Case("instance", lambda: nn.InstanceNorm2d(C), reduce=1),
    Case("instance affine", lambda: nn.InstanceNorm2d(C, affine=True), reduce=1),
    Case("instance statistics", lambda: nn.InstanceNorm2d(C, track_running_stats=True), reduce=1),
    Case("instance all", lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), reduce=1),
    Case("instance all, eval", lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), train=False),
    Case("instance, eval", lambda: nn.InstanceNorm2d(C), train=False, reduce=1),
    Case("instance 1d", lambda: nn.InstanceNorm1d(C, affine=True), LINE, reduce=1),
    Case("instance 3d", lambda: nn.InstanceNorm3d(C, affine=True), VOLUME, reduce=1),
    Case("group", lambda: nn.GroupNorm(2, C), reduce=1),
    Case("group no affine", lambda: nn.GroupNorm(2, C, affine=False), reduce=1),
    Case("group of all", lambda: nn.GroupNorm(1, C), reduce=1),
    Case("group of one", lambda: nn.GroupNorm(C, C), VOLUME, reduce=1),
    Case("layer over channels", lambda: channels_last(nn.LayerNorm(C))),
    Case("layer over columns", lambda: nn.LayerNorm(W)),
    Case("layer over columns and channels", lambda: channels_last(nn.LayerNorm((W, C)))),
    Case("layer no affine", lambda: channels_last(nn.LayerNorm(C, elementwise_affine=False))),
    Case("layer over rows", lambda: nn.LayerNorm((H, W)), reduce=1),
    Case("layer over space and channels", lambda: nn.LayerNorm((C, H, W)), reduce=1),
    Case("layer over space, weight alone", lambda: nn.LayerNorm((C, H, W), bias=False), reduce=1),
    Case("layer over space, no affine", lambda: nn.LayerNorm((C, H, W), elementwise_affine=False), reduce=1),
    Case("layer over the volume", lambda: nn.LayerNorm(VOLUME[2:]), VOLUME, reduce=1),
    Case(
        "layer over space, channels last",
        lambda: channels_last(nn.LayerNorm((H, W, C))),
        whole=["rowwise.moments", "rowwise.normalise"],
    ),
    Case("root mean square over space", lambda: nn.RMSNorm((C, H, W)), reduce=1),
    Case("root mean square over rows", lambda: nn.RMSNorm((H, W), eps=1e-3, elementwise_affine=False), reduce=1),
    Case("root mean square", lambda: channels_last(nn.RMSNorm(C))),
    Case("local response", lambda: nn.LocalResponseNorm(3)),
    Case("l2 of channels", of(lambda x: functional.normalize(x, dim=1))),
)
def test_normalisation(case: Case) -> None:
    verify(case)


# -------------------------------------------------------------------------------------------------- reductions


@table(
    Case("mean", of(lambda x: x.mean((2, 3))), reduce=1),
    Case("mean kept", of(lambda x: x * x.mean((2, 3), keepdim=True)), reduce=1),
    Case("mean of rows", of(lambda x: x.mean(2)), reduce=1),
    Case("mean of columns", of(lambda x: x.mean(3))),
    Case("mean of channels", of(lambda x: x.mean(1, keepdim=True))),
    Case("mean of samples", of(lambda x: x.mean(0, keepdim=True))),
    Case("mean of all", of(lambda x: x.mean()), reduce=1),
    Case("mean of everything by name", of(lambda x: x.mean((0, 1, 2, 3))), reduce=1),
    Case("sum", of(lambda x: x.sum((-1, -2))), reduce=1),
    Case("sum of all", of(lambda x: x.sum()), reduce=1),
    Case("sum of channels", of(lambda x: x.sum(1, keepdim=True))),
    Case("norm", of(lambda x: torch.linalg.vector_norm(x, dim=(2, 3))), reduce=1),
    Case("norm kept", of(lambda x: x / torch.norm(x, p=2, dim=(2, 3), keepdim=True)), reduce=1),
    Case("norm 1", of(lambda x: torch.linalg.vector_norm(x, 1, dim=(2, 3))), reduce=1),
    Case("norm 3", of(lambda x: torch.linalg.vector_norm(x, 3, dim=(2, 3))), reduce=1),
    Case("norm of all", of(lambda x: torch.linalg.vector_norm(x)), reduce=1),
    Case("norm of channels", of(lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True))),
    Case("norm of zeros", of(lambda x: torch.linalg.vector_norm(x * 0, dim=(2, 3))), reduce=1),
    Case("largest", of(lambda x: x.amax((2, 3))), whole=["rowwise.join_extremes"]),
    Case("largest kept", of(lambda x: x * x.amax((2, 3), keepdim=True)), whole=["rowwise.join_extremes"]),
    Case("largest, ties", of(lambda x: functional.relu(x - 1).round().amax((2, 3))), whole=["rowwise.join_extremes"]),
    Case("largest of rows", of(lambda x: x.round().amax(2)), whole=["rowwise.join_extremes"]),
    Case("largest of columns", of(lambda x: x.round().amax(3))),
    Case("largest of channels", of(lambda x: x.amax(1, keepdim=True))),
    Case("largest of all", of(lambda x: x.round().max()), whole=["rowwise.join_extremes"]),
    Case("smallest", of(lambda x: x.amin((2, 3))), whole=["rowwise.join_extremes"]),
    Case("smallest of all, ties", of(lambda x: functional.relu(x).min()), whole=["rowwise.join_extremes"]),
    Case("maximum of channels", of(lambda x: x.max(1, keepdim=True)[0])),
    Case("maximum of channels, where", of(lambda x: x.max(1, keepdim=True))),
    Case("maximum of rows", of(lambda x: x.max(2)[0]), whole=["max.dim"]),
    Case("variance", of(lambda x: x.var((2, 3), correction=0)), reduce=1),
    Case("variance kept", of(lambda x: x * x.var((2, 3), keepdim=True)), reduce=1),
    Case("variance of channels", of(lambda x: x.var(1, keepdim=True))),
    Case("deviation", of(lambda x: x.std((2, 3))), reduce=1),
    Case("variance and mean", of(lambda x: torch.var_mean(x, (2, 3))), reduce=1),
    Case("argmax of channels", of(lambda x: x.argmax(1)), post=False),
    Case("top channels", of(lambda x: torch.topk(x, 2, 1)[0])),
    Case("log sum exp of channels", of(lambda x: torch.logsumexp(x, 1, keepdim=True))),
)
def test_reduction(case: Case) -> None:
    verify(case)


class SqueezeExcitation(nn.Module):
    def __init__(self, pool: str) -> None:
        super().__init__()
        self.down, self.up, self.pool = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            gate = x.mean((2, 3), keepdim=True)
        elif self.pool == "average":
            gate = functional.adaptive_avg_pool2d(x, 1)
        else:
            gate = functional.adaptive_max_pool2d(x, 1) + functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(functional.silu(self.down(gate))))


class GlobalResponse(nn.Module):
    """ConvNeXt V2's global response normalisation, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, C)), nn.Parameter(torch.zeros(1, 1, 1, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        scaled = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, self.gamma, x * scaled).add(x).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, response: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 7, padding=3, groups=C)
        self.norm = nn.LayerNorm(C)
        self.up, self.down = nn.Linear(C, 8), nn.Linear(8, C)
        self.scale = nn.Parameter(torch.ones(C, 1, 1))
        self.response = GlobalResponse() if response else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * self.response(y)


class Attention(nn.Module):
    """CBAM: channels are weighed by two pools, then places by two reductions over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = SqueezeExcitation("both")
        self.places = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(x)
        summary = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.places(summary))


@table(
    Case("squeeze and excitation by mean", lambda: SqueezeExcitation("mean"), reduce=1),
    Case("squeeze and excitation by pool", lambda: SqueezeExcitation("average"), reduce=1),
    Case("squeeze and excitation by both", lambda: SqueezeExcitation("both"), reduce=1, whole=["rowwise.pick_maximum"]),
    Case("global response", GlobalResponse, reduce=1),
    Case("ConvNeXt", ConvNeXtBlock),
    Case("ConvNeXt V2", lambda: ConvNeXtBlock(True), reduce=1),
    Case("CBAM", Attention, reduce=1, whole=["rowwise.pick_maximum"]),
)
def test_block(case: Case) -> None:
    verify(case)


# ---------------------------------------------------------------------------------------------------- pointwise


class Learned(nn.Module):
    """A map and a parameter of some shape."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@table(
    *[
        Case(kind.__name__, kind)
        for kind in (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
            *(nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Tanh),
            *(nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.PReLU, nn.Identity),
        )
    ],
    *[
        Case(f"{kind.__name__} in place", lambda kind=kind: kind(inplace=True))  # type: ignore[misc]
        for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid)
    ],
    Case("GELU tanh", lambda: nn.GELU("tanh")),
    Case("RReLU, eval", nn.RReLU, train=False),
    Case("RReLU, train", nn.RReLU, whole=["rrelu.default"]),
    Case("PReLU per channel", lambda: nn.PReLU(C)),
    Case("Threshold", lambda: nn.Threshold(0.1, -2.0)),
    Case("GLU", lambda: nn.GLU(1)),
    Case("Softmax", lambda: nn.Softmax(1)),
    Case("Softmax2d", nn.Softmax2d),
    Case("LogSoftmax", lambda: nn.LogSoftmax(1)),
    Case("Softmax over columns", lambda: nn.Softmax(3)),
    Case("Softmax over rows", lambda: nn.Softmax(2), whole=["softmax.int"]),
    Case("where", of(lambda x: torch.where(x > 0, x, x * 0.1))),
    Case("where a number", of(lambda x: torch.where(x > 0, x, 0.5))),
    Case("where a number otherwise", of(lambda x: torch.where(x > 0, 0.5, x))),
    Case("where two numbers", of(lambda x: x * torch.where(x > 0, 0.5, 2.0))),
    Case("masked fill", of(lambda x: x.masked_fill(x > 0.5, 1.0))),
    Case("masked fill by a tensor", lambda: Learned(lambda x, w: x.masked_fill(x > 0.5, w))),
    Case("clamp", of(lambda x: x.clamp(-0.5, 0.5))),
    Case("clamp min", of(lambda x: x.clamp_min(0.1))),
    Case("powers", of(lambda x: x.pow(3) + (x * x + 1).sqrt() + x.exp().log1p())),
    Case("numbers", of(lambda x: (1 - x) / 2 + 3 * x - 1)),
    Case("reverse division", of(lambda x: 1 / (x * x + 1))),
    Case("add scaled", of(lambda x: torch.add(x, x.sin(), alpha=0.3))),
    Case("add in place", of(lambda x: x.mul(2).add_(x))),
    Case("lerp", of(lambda x: torch.lerp(x, x.sin(), 0.3))),
    Case("addcmul", of(lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.5))),
    Case("detached", of(lambda x: x * x.detach())),
    Case("to and fro", of(lambda x: x.float().double())),
    Case("comparison", of(lambda x: x * (x > x.flip(1)).to(x.dtype))),
    Case("maximum of two", of(lambda x: torch.maximum(x, x.flip(1)))),
    Case("channel weight", lambda: Learned(torch.mul, C, 1, 1)),
    Case("channel weight, four dimensions", lambda: Learned(torch.mul, 1, C, 1, 1)),
    Case("number weight", lambda: Learned(torch.mul)),
    Case("column weight", lambda: Learned(torch.mul, W)),
    Case("row weight", lambda: Learned(torch.add, H, 1)),
    Case("position embedding", lambda: Learned(torch.add, 1, C, H, W)),
    Case("weight first", lambda: Learned(lambda x, w: w - x, 1, C, H, 1)),
    Case("per sample", lambda: Learned(torch.mul, N, 1, 1, 1)),
    Case("broadcast of a map", lambda: Learned(lambda x, w: x[:, :1] * w, C, 1, 1)),
    Case("linear", lambda: nn.Linear(W, 5)),
    Case("linear without bias", lambda: nn.Linear(W, 5, bias=False)),
    Case("linear over rows", lambda: nn.Linear(H, 5), axis=3, shape=(N, C, W, H), whole=["linear.default"]),
    Case("matmul", lambda: Learned(lambda x, w: x.permute(0, 2, 3, 1) @ w, C, 3)),
    Case("einsum", lambda: Learned(lambda x, w: torch.einsum("nchw,oc->nohw", x, w), 3, C)),
    Case("einsum per row", lambda: Learned(lambda x, w: torch.einsum("nchw,hc->nhw", x, w), H, C)),
    Case("einsum of two maps", of(lambda x: torch.einsum("nchw,ndhw->ncdhw", x, x.sin()).sum(2))),
    Case(
        "einsum over rows",
        lambda: Learned(lambda x, w: torch.einsum("nchw,oh->ncow", x, w), 3, H),
        whole=["einsum.default"],
    ),
)
def test_pointwise(case: Case) -> None:
    verify(case)


# ------------------------------------------------------------------------------------------------------ random


class StochasticDepth(nn.Module):
    def __init__(self, batch_mode: bool = False) -> None:
        super().__init__()
        self.body, self.batch_mode = nn.Conv2d(C, C, 3, padding=1), batch_mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        shape = [1] * 4 if self.batch_mode else [x.shape[0], 1, 1, 1]
        noise = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(0.6).div_(0.6)
        return x + y * noise


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@table(
    Case("dropout", lambda: nn.Dropout(0.3)),
    Case("dropout in place", lambda: nn.Dropout(0.3, inplace=True)),
    Case("dropout, eval", lambda: nn.Dropout(0.3), train=False),
    Case("dropout of nothing", lambda: nn.Dropout(0.0)),
    Case("dropout of everything", lambda: nn.Dropout(1.0)),
    Case("dropout 1d", lambda: nn.Dropout1d(0.3), LINE),
    Case("dropout 2d", lambda: nn.Dropout2d(0.3)),
    Case("dropout 2d along columns", lambda: nn.Dropout2d(0.3), axis=3),
    Case("dropout 3d", lambda: nn.Dropout3d(0.3), VOLUME),
    Case("alpha dropout", lambda: nn.AlphaDropout(0.3)),
    Case("feature alpha dropout", lambda: nn.FeatureAlphaDropout(0.3)),
    Case("two dropouts", lambda: nn.Sequential(nn.Dropout(0.3), nn.Conv2d(C, C, 3, padding=1), nn.Dropout2d(0.5))),
    Case("stochastic depth", StochasticDepth),
    Case("stochastic depth of the batch", lambda: StochasticDepth(True)),
    Case("noise", Noise),
)
def test_random(case: Case) -> None:
    verify(case)


# ---------------------------------------------------------------------------------- values that no input touches


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.std((1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(x, (weight - mean) / deviation, self.bias)


class StandardisedByNorm(nn.Conv2d):
    """Weight standardisation as timm does it: by batch_norm of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


def pruned() -> nn.Module:
    module = nn.Conv2d(C, C, 3, padding=1)
    prune.random_unstructured(module, "weight", 0.4)
    return module


def shared() -> nn.Module:
    module = nn.Conv2d(C, C, 3, padding=1)
    return nn.Sequential(module, nn.Tanh(), module)


@table(
    Case("weight norm", lambda: parametrizations.weight_norm(nn.Conv2d(C, C, 3, padding=1))),
    Case("spectral norm", lambda: parametrizations.spectral_norm(nn.Conv2d(C, C, 3, padding=1))),
    Case("old weight norm", lambda: nn.utils.weight_norm(nn.Conv2d(C, C, 3, padding=1))),
    Case("old spectral norm", lambda: nn.utils.spectral_norm(nn.Conv2d(C, C, 3, padding=1))),
    Case("orthogonal", lambda: parametrizations.orthogonal(nn.Conv2d(C, C, 3, padding=1), orthogonal_map="cayley")),
    Case("pruning", pruned),
    Case("weight standardisation", lambda: Standardised(C, C, 3, padding=1)),
    Case("weight standardisation by norm", lambda: StandardisedByNorm(C, C, 3, padding=1)),
    Case("shared convolution", shared),
)
def test_prologue(case: Case) -> None:
    torch.manual_seed(0)
    verify(case)


# ------------------------------------------------------------------------------------- operations without a rule


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(C, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, indices = functional.max_pool2d(x, 2, return_indices=True)
        result: Tensor = self.after(functional.max_unpool2d(torch.tanh(y), indices, 2, output_size=x.shape[2:]))
        return result


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(C, C, 1) for _ in range(3))
        self.after = nn.Conv2d(C, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        result: Tensor = self.after(x + y.reshape(x.shape))
        return result


class Warped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field, self.after = nn.Conv2d(C, 2, 3, padding=1), nn.Conv2d(C, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.tanh(self.field(x)).permute(0, 2, 3, 1)
        result: Tensor = self.after(functional.grid_sample(x, grid, align_corners=False))
        return result


class Recurrent(nn.Module):
    """One convolution, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Conv2d(2 * C, 2 * C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(3):
            gate, value = self.cell(torch.cat([x, state], 1)).chunk(2, 1)
            state = state + torch.sigmoid(gate) * torch.tanh(value)
        return state


_FLAT = "flatten.using_ints"


@table(
    Case("maximum unpooling", Unpooled, whole=["max_unpool2d.default"]),
    Case("self attention", SelfAttention, whole=[_FLAT, _FLAT, _FLAT, "reshape.default"]),
    Case("warp", Warped, whole=["grid_sampler.default"]),
    Case("recurrence", Recurrent),
    Case("classifier", lambda: nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 3)), whole=[_FLAT]),
    Case(
        "whole, then by rows again",
        of(lambda x: torch.flip(torch.cumsum(x, 2), (2,)).sin()),
        whole=["cumsum.default", "flip.default"],
    ),
)
def test_whole(case: Case) -> None:
    verify(case)


# ------------------------------------------------------------------------------------------- inputs and outputs


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1, stride=2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Any]:
        a = self.first(x) + y
        b = self.second(a.tanh())
        return {"full": a, "half": b, "pooled": b.mean((2, 3)), "pair": (a.sin(), 3), "scale": scale}


def test_several_inputs_and_outputs() -> None:
    x, y = torch.randn(MAP, dtype=torch.float64), torch.randn(MAP, dtype=torch.float64)
    graph = assert_exact(Several(), x, y, 3.0, batch_chunks=(1, 2))
    assert roles(graph)["whole"] == []


def test_an_input_that_needs_no_gradient() -> None:
    x, y = torch.randn(MAP, dtype=torch.float64), torch.randn(MAP, dtype=torch.float64)
    assert_exact(Several(), no_gradient(x), y, batch_chunks=(1, 2))
    assert_exact(Several(), no_gradient(x), no_gradient(y))


def test_inference_without_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 2, 3, stride=2))
    assert_exact(model, torch.randn(MAP, dtype=torch.float64), differentiate=False, train=False, batch_chunks=(1, 2))
