"""Mean and variance over space, the reduction half of a normalisation.

The moments of several slabs are merged by Chan's formula (Chan, Golub, LeVeque 1979), with count n, mean m and sum of
squared deviations M2:

    d = m_b - m_a      m = m_a + d * n_b / n      M2 = M2_a + M2_b + d^2 * n_a * n_b / n

which is stable where sums of squares are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.fake import is_fake
from lrcnn_lightning.rules.reduction import wide
from lrcnn_lightning.rules.rule import WHOLE, Axes, Interval, Operator, Reduction, Scope, register

__all__ = ["Moments", "moments"]


@dataclass(frozen=True)
class Moments(Reduction):
    """Mean and biased variance over space, and over the batch where ``groups`` is None.

    Of a map ``N C *``: ``[C]`` each, or, with groups G, ``[N, G]`` each (instance normalisation has G = C).
    """

    groups: int | None
    count: int
    keeps_batch: int | None
    axes: tuple[Axes, ...] = (WHOLE, WHOLE)

    def partial(self, slab: Tensor, rows: Interval) -> tuple[Any, ...]:
        count = slab.numel() // (slab.shape[1] if self.groups is None else slab.shape[0] * self.groups)
        variance, mean = _variance_and_mean(slab, self.groups)
        return [count], [mean], [variance]

    def merge(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        merged = tuple(mine + others for mine, others in zip(first, second, strict=True))
        return merged if len(merged[0]) < _AT_ONCE else _merged(*merged)

    def finish(self, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
        _, (mean,), (variance,) = _merged(*state)
        return mean, variance

    def coefficients(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
        scale, shift = _coefficients(outputs[0], gradients, self.count)
        if self.groups is None and scale.device.type == "cuda":
            return scale, shift, torch.zeros_like(scale), torch.ones_like(scale)
        return scale, shift

    def inject(self, slab: Tensor, rows: Interval, coefficients: Any) -> Tensor:
        scale, shift, *constants = coefficients
        if constants:  # as a normalisation, which reads half precision as it is
            zeros, ones = constants
            return torch.batch_norm(slab, scale, shift, zeros, ones, False, 0.0, 0.0, torch.backends.cudnn.enabled)
        if self.groups is not None:
            repeat = slab.shape[1] // self.groups
            scale, shift = (t.repeat_interleave(repeat, 1) for t in (scale, shift))
        return _scaled(slab, scale, shift)


def _coefficients(mean: Tensor, gradients: Sequence[Tensor | None], count: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of the gradient dx = dmean/n + 2/n * dvar * (x - mean), from those of mean and variance."""
    for_mean, for_variance = gradients
    scale = 0 * mean if for_variance is None else for_variance * (2 / count)
    if for_mean is None:
        return scale, -scale * mean
    return scale, torch.addcmul(for_mean / count, scale, mean, value=-1)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, with a number for each channel (``[C]``) or for each one of each sample (``[N, C]``).

    Rounded once, to the type of ``x``.
    """
    shape = [*([1] if scale.dim() == 1 else []), *scale.shape, *[1] * (x.dim() - 2)]
    return torch.addcmul(shift.view(shape), wide(x), scale.view(shape)).to(x.dtype)


_AT_ONCE = 64
"""Slabs whose moments are merged together."""


def _merged(counts: list[int], means: list[Tensor], variances: list[Tensor]) -> tuple[Any, ...]:
    """The moments of several slabs as those of one (Chan, Golub and LeVeque): counts, means and biased variances.

    The variance is the average of the slabs' own ones, and of their means' squared distances from the mean of all. A
    few calls for any number of slabs.
    """
    if len(counts) == 1:
        return counts, means, variances
    total = sum(counts)
    shares = [count / total for count in counts]
    mean = torch.stack(torch._foreach_mul(means, shares)).sum(0)
    apart, parts = torch._foreach_sub(means, [mean] * len(means)), torch._foreach_mul(variances, shares)
    torch._foreach_addcmul_(parts, apart, apart, shares)
    return [total], [mean], [torch.stack(parts).sum(0)]


def _variance_and_mean(x: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    """Biased variance and mean, in float32 or better: ``[C]``, or ``[N, G]`` of the groups of each sample."""
    if groups is None:
        return _of_channels(x)
    # Every sample's groups become channels of one sample.
    variance, mean = _of_channels(x.reshape(1, x.shape[0] * groups, -1))
    return variance.reshape(-1, groups), mean.reshape(-1, groups)


def _of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.var_mean`` of every channel of ``N C *``, by what is fast on the device and takes no memory there."""
    if x.device.type not in ("cpu", "cuda"):
        return torch.var_mean(wide(x), [0, *range(2, x.dim())], correction=0)
    if x.device.type == "cpu":
        x = wide(x)
        if not _is_channels_last(x):
            return _in_two_passes(x)
    if x.requires_grad and torch.is_grad_enabled():
        variance, mean = _Kernel.apply(x)  # type: ignore[no-untyped-call]
        return variance, mean
    return _by_kernel(x)


def _is_channels_last(x: Tensor) -> bool:
    """Whether a map lies channels last, without gaps."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return layout is not None and x.stride(1) == 1 and x.is_contiguous(memory_format=layout)


_PIECE = 2**20
"""Bytes of deviations that exist at once, unless one channel takes more."""


def _in_two_passes(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.var_mean`` takes one pass, which on the CPU adds one number at a time, as the kernel does if channels are
    apart: two passes with vectorised sums are several times faster. The deviations are made channels by channels, so
    that no second slab exists.
    """
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True)
    channels = x.shape[1]
    pieces = max(1, min(channels, x.numel() * x.element_size() // _PIECE))
    variances = []
    for i in range(pieces):
        start, end = channels * i // pieces, channels * (i + 1) // pieces
        deviations = x.narrow(1, start, end - start) - mean.narrow(1, start, end - start)
        variances.append(deviations.square_().mean(dims))
    variance = variances[0] if pieces == 1 else torch.cat(variances, -1)
    return variance, mean.reshape(variance.shape)


def _by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel of ATen's batch normalisation: one pass, in which a GPU reads half precision as it is.

    The one of ``torch.var_mean`` takes a buffer of 32 bytes an element there where channels lie next to each other
    (H200, PyTorch 2.11). So would this one of volumes, which it does not know to be channels last, and of slices.
    """
    if x.dim() > 4:
        x = x.flatten(2, -2)
    if x.stride(1) == 1 and not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.clone()
    if is_fake(x) or x.is_meta:  # it has no shape rule: what reads as much and makes as much
        kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        mean = x.sum([0, *range(2, x.dim())], dtype=kind)
        return torch.empty_like(mean), mean
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return variance, mean


class _Kernel(torch.autograd.Function):
    """`_by_kernel`, with the derivative that it does not have of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = _by_kernel(x.detach())
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return variance, mean

    @staticmethod
    def backward(ctx: Any, for_variance: Tensor | None, for_mean: Tensor | None) -> Tensor:
        x, mean = ctx.saved_tensors
        scale, shift = _coefficients(mean, (for_mean, for_variance), x.numel() // x.shape[1])
        return _scaled(x, scale, shift)


def _moments(x: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    variance, mean = _variance_and_mean(x, groups)
    return mean, variance


moments = Operator("moments", _moments)


@register("reduction", moments)
def moments_rule(scope: Scope) -> Reduction | None:
    """``moments(input, groups)``: the reduction half of a normalisation over space."""
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    groups = scope.node.args[1]
    if axes.row is None or axes.row < 2:
        return None
    elements = 1
    for size in shape:
        elements *= size
    count = elements // (shape[1] if groups is None else shape[0] * groups)
    return Moments(groups, count, None if groups is None else axes.batch)
