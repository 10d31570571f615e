"""Sampling along one axis: from which places of the source a resized place is made, and with which weights.

What ATen computes from a scale is not what the scale says. On the CPU:

    linear   copies an axis of unchanged size, whatever the scale; cubic and nearest do not
    cubic    in its backward pass copies a map of which no axis changes its size, whatever the scales
    nearest  in its backward pass also copies it, and takes place i // 2 where the size doubles, whatever the scale;
             in its forward pass some kernels do so and others do not, and they round differently

On a GPU, linear and cubic copy only where no axis changes its size, forward and backward. Nearest has one formula for
its forward and another for its backward pass, both in float32, and they may part, too:

    forward    place o is made of          floor(o * in/out), at most the last
    backward   source i gets the places    ceil(i * out/in) up to ceil((i + 1) * out/in), and those beyond go to none
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.fake import with_data
from lrcnn_lightning.rules.rule import Interval

__all__ = ["Sampling", "quick_nearest"]

Numbers = npt.NDArray[Any]

_PRECISIONS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sampling:
    """One axis, of ``size`` before and ``out_size`` after; ``dimensions`` is the number of resized axes.

    ``mode`` is nearest, nearest-exact, linear or bicubic. ``scale`` is None where the sizes alone decide. ``copied``:
    the axis stays as it is, whatever the scale.
    """

    mode: str
    align_corners: bool
    dimensions: int
    size: int
    out_size: int
    scale: float | None
    copied: bool

    @cached_property
    def step(self) -> float:
        """Places of the source from one resized place to the next."""
        if self.align_corners:
            return (self.size - 1) / (self.out_size - 1) if self.out_size > 1 else 0.0
        return 1.0 / self.scale if self.scale else self.size / self.out_size

    @property
    def nearest(self) -> bool:
        """Whether each place is a copy of one."""
        return self.mode.startswith("nearest")

    @property
    def unchanged(self) -> bool:
        """Whether the axis stays as it is."""
        return self.copied or (self.size == self.out_size and self.step == 1)

    @cached_property
    def ambiguous(self) -> bool:
        """Whether ATen takes one place here and another there: in one kernel and another, or forward and backward."""
        return self.nearest and any(
            self.copies(dtype, quick) != self.copies_backward() for dtype in _PRECISIONS for quick in (False, True)
        )

    def copies(self, dtype: torch.dtype, quick: bool) -> tuple[int, ...]:
        """Nearest, forward on the CPU: the source of each place."""
        return _nearest_forward(self.mode, self.dimensions, self.size, self.out_size, self.scale, dtype, quick)

    def copies_backward(self) -> tuple[int, ...]:
        """Nearest, backward on the CPU: the place that the gradient of each place goes to."""
        return _nearest_backward(self.mode, self.dimensions, self.size, self.out_size, self.scale)

    @cached_property
    def copies_on_gpu(self) -> tuple[int, ...]:
        """Nearest, forward on a GPU: the source of each place."""
        (places,), _ = self.sources(Interval(0, self.out_size), torch.float32)
        return tuple(places.tolist())

    @cached_property
    def copies_backward_on_gpu(self) -> tuple[int | None, ...]:
        """Nearest, backward on a GPU: the place that the gradient of each place goes to, if it goes to any."""
        step = np.float32(self.scale if self.scale else self.out_size / self.size)
        # The product of two float32 is exact in float64: one rounding, as in a fused multiplication and addition.
        places = np.arange(self.size + 1).astype(np.float64) * np.float64(step)
        if self.mode == "nearest-exact":
            places -= 0.5
        edges = np.ceil(places.astype(np.float32)).clip(0, self.out_size).astype(np.int64).tolist()
        found: list[int | None] = [None] * self.out_size
        for source, (first, last) in enumerate(itertools.pairwise(edges)):
            found[first:last] = [source] * (last - first)
        return tuple(found)

    def sources(self, output: Interval, dtype: torch.dtype) -> tuple[list[Numbers], list[Numbers]]:
        """For each tap: the source of each place, and its weight, computed as the operation computes it.

        No weights: the places are copies. For nearest these are the copies of a GPU.
        """
        if self.unchanged:
            return [np.arange(output.lo, output.hi)], []
        exact = np.float64 if dtype is torch.float64 and not self.nearest else np.float32
        places, last = np.arange(output.lo, output.hi).astype(exact), self.size - 1
        step, half = exact(self.step), exact(0.5)
        if self.nearest:
            place = places * step if self.mode == "nearest" else (places + half) * step
            return [_floor(place).clip(0, last)], []
        place = places * step if self.align_corners else (places + half) * step - half
        if self.mode == "linear":
            place = place.clip(min=0)
            base = _floor(place).clip(max=last)
            fraction = (place - base.astype(exact)).clip(0, 1)
            return [base, (base + 1).clip(max=last)], [1 - fraction, fraction]
        base = _floor(place)
        t = place - base.astype(exact)
        taps = [(base + offset).clip(0, last) for offset in (-1, 0, 1, 2)]
        return taps, [_far(t + 1), _near(t), _near(1 - t), _far(2 - t)]

    def needed(self, output: Interval) -> Interval:
        """The places of the source that some places need, in any precision and kernel."""
        first, last = self._reach
        return Interval(int(first[output.lo]), int(last[output.hi - 1]) + 1)

    @cached_property
    def _reach(self) -> tuple[Numbers, Numbers]:
        """The first and the last source of each place."""
        taps = [tap for dtype in _PRECISIONS for tap in self.sources(Interval(0, self.out_size), dtype)[0]]
        if self.nearest:
            taps.append(np.array(self.copies_backward()))
            taps += [np.array(self.copies(dtype, quick)) for dtype in _PRECISIONS for quick in (False, True)]
            pairs = zip(self.copies_backward_on_gpu, self.copies_on_gpu, strict=True)
            taps.append(np.array([ahead if back is None else back for back, ahead in pairs]))
        return np.minimum.reduce(taps), np.maximum.reduce(taps)


def quick_nearest(slab: Tensor, out_sizes: tuple[int, ...]) -> bool:
    """Whether ATen resizes a map by its vectorised kernel on the CPU, given the map's rows in its own memory format.

    ``out_sizes`` are those of the whole map.
    """
    channels_last = slab.shape[1] > 3 and slab.stride(1) == 1 and not slab.is_contiguous()
    small = len(out_sizes) == 2 and sum(out_sizes) <= _FEW
    return len(out_sizes) > 1 and (channels_last or small)


_FEW = 128
"""The height and width of a resized image together up to which ATen takes its vectorised kernel."""


def _column(dimensions: int, size: int, dtype: torch.dtype, quick: bool) -> Tensor:
    """The numbers of the places of an axis, in a map that one kernel or the other resizes (`quick_nearest`)."""
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    channels, width = (4, 2) if quick else (1, _FEW + 1 if dimensions == 2 else 1)
    numbers = torch.arange(size, dtype=torch.float64 if dtype is torch.float64 else torch.float32, device="cpu")
    column = numbers.view([1, 1, size] + [1] * (dimensions - 1))
    column = column.expand([1, channels, size] + [width] * (dimensions - 1))
    return column.contiguous(memory_format=formats[dimensions] if quick else torch.contiguous_format)


def _resized(column: Tensor, mode: str, out_size: int, scale: float | None) -> Tensor:
    others = list(column.shape[3:])
    if scale is None:
        return functional.interpolate(column, [out_size, *others], mode=mode)
    return functional.interpolate(column, scale_factor=[scale] + [1.0] * len(others), mode=mode)


def _along(column: Tensor) -> list[int]:
    first: Tensor = column[0, 0].reshape(column.shape[2], -1)[:, 0]
    return [int(number) for number in first.tolist()]


@lru_cache(1024)
def _nearest_forward(
    mode: str, dimensions: int, size: int, out_size: int, scale: float | None, dtype: torch.dtype, quick: bool
) -> tuple[int, ...]:
    """Found out by resizing the numbers of the places."""
    with with_data(), torch.no_grad():
        column = _column(dimensions, size, dtype, quick and dimensions > 1)
        return tuple(_along(_resized(column, mode, out_size, scale)))


@lru_cache(1024)
def _nearest_backward(mode: str, dimensions: int, size: int, out_size: int, scale: float | None) -> tuple[int, ...]:
    """Found out from how much gradient each place of the source gets: the sources come in order."""
    with with_data(), torch.inference_mode(False), torch.enable_grad():
        column = torch.zeros([1, 1, size] + [1] * (dimensions - 1), device="cpu", requires_grad=True)
        resized = _resized(column, mode, out_size, scale)
        (counts,) = torch.autograd.grad(resized, column, torch.ones_like(resized))
        return tuple(place for place, count in enumerate(_along(counts)) for _ in range(count))


def _floor(place: Numbers) -> Numbers:
    result: Numbers = np.floor(place).astype(np.int64)
    return result


def _near(x: Numbers) -> Numbers:
    """Cubic convolution kernel (A = -0.75) for |x| <= 1."""
    return ((-0.75 + 2) * x - (-0.75 + 3)) * x * x + 1


def _far(x: Numbers) -> Numbers:
    """Cubic convolution kernel (A = -0.75) for 1 < |x| < 2."""
    return ((-0.75 * x + 5 * 0.75) * x - 8 * 0.75) * x + 4 * 0.75
