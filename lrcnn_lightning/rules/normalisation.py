"""Normalisation over space, split in three: moments per row, a merge, and a pointwise application.

    y = weight * (x - mean) / sqrt(variance + eps) + bias

``batch_norm`` in training mode, ``instance_norm`` and ``group_norm`` become

    mean, variance = moments(x)                       a reduction: a barrier
    update_statistics(mean, variance, ...)            an effect on the running statistics, once a step
    y = normalise(x, mean, variance, weight, bias)    pointwise

With frozen statistics (``eval`` mode) ``batch_norm`` is pointwise as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import CUMULATIVE, Node, Ref
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.pointwise import AlongRows, cut_whole
from lrcnn_lightning.rules.precision import as_read_by
from lrcnn_lightning.rules.reduction import moments
from lrcnn_lightning.rules.rule import Axes, Operator, RowRule, Scope, Tile, register

__all__ = ["Normalise", "normalise", "update_statistics"]

aten = torch.ops.aten


def _strides_mislead(x: Tensor) -> bool:
    """Whether ATen's batch norm would mix up the channels of ``x`` in its backward pass on the CPU.

    A view of one sample, channels last, can have a batch stride of C. It means nothing where there is one sample, but
    ATen takes it for the stride of a memory format.
    """
    return x.shape[0] == 1 and x.stride(0) < x.numel() and not x.is_contiguous()


def _with_plain_strides(x: Tensor) -> Tensor:
    """The same tensor, with the batch stride that a larger batch would have where its own would mislead."""
    return x.as_strided(x.shape, (x.numel(), *x.stride()[1:])) if _strides_mislead(x) else x


def _like(statistic: Tensor, affine: Tensor | None) -> Tensor | None:
    """A weight in the type of the statistics: ATen takes both in half precision or both in float32.

    The statistics of maps in half precision are float32; the weights of a module in half precision are not.
    """
    return None if affine is None else affine.to(statistic.dtype)


class _Normalise(torch.autograd.Function):
    """Frozen-statistics batch normalisation that also differentiates its statistics.

    Only the input is saved. With g the gradient of y and s = 1/sqrt(variance + eps), two sums over the slab give all:
    dbias = sum g, dweight = sum g (x - mean) s, dmean = -weight s dbias, dvariance = -1/2 weight s^2 dweight. Where the
    gradient is differentiated again, these are computed by operations that can be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps = eps
        x = _with_plain_strides(x)
        weight, bias = (_like(mean, affine) for affine in (weight, bias))
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, mean, variance, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx.needs_input_grad, gradient, x, mean, variance, weight, ctx.eps)
        x, gradient = _with_plain_strides(x), _with_plain_strides(gradient)
        weight = _like(mean, weight)
        needs = ctx.needs_input_grad
        statistics = needs[1] or needs[2]
        wanted = (needs[0], statistics or needs[3], statistics or needs[4])
        find = _gradients_on_cpu if x.device.type == "cpu" else _gradients_on_gpu
        result, for_weight, for_bias = find(gradient, x, weight, mean, variance, ctx.eps, wanted)
        for_mean = for_variance = None
        if statistics:
            assert for_weight is not None and for_bias is not None
            scale = torch.rsqrt(variance + ctx.eps)
            weighted = scale if weight is None else scale * weight
            for_mean = -weighted * for_bias
            for_variance = -0.5 * weighted * scale * for_weight
        return (
            result,
            for_mean,
            for_variance,
            for_weight if needs[3] else None,
            for_bias if needs[4] else None,
            None,
        )


def _differentiable_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Any, eps: float
) -> tuple[Any, ...]:
    """The gradients of `_Normalise`, of operations that can be differentiated again."""
    shape, dims = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
    scale = torch.rsqrt(variance + eps)
    weighted = scale if weight is None else scale * weight.to(scale.dtype)
    wide = gradient.to(scale.dtype)
    for_bias = wide.sum(dims)
    for_weight = (wide * (x.to(scale.dtype) - mean.view(shape))).sum(dims) * scale
    results = (
        (wide * weighted.view(shape)).to(x.dtype),
        -weighted * for_bias,
        -0.5 * weighted * scale * for_weight,
        None if weight is None else for_weight.to(weight.dtype),
        for_bias if weight is None else for_bias.to(weight.dtype),
    )
    return (*(result if needed else None for result, needed in zip(results, needs, strict=False)), None)


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Those of the input, of the weight and of the bias, as far as they are wanted."""


def _aligned(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory format of ``x``, which ATen takes it to be in."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    for layout in (torch.contiguous_format, last):
        if x.is_contiguous(memory_format=layout):
            return gradient.contiguous(memory_format=layout)
    return gradient if gradient.stride() == x.stride() else gradient.contiguous()


def _gradients_on_cpu(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> _Gradients:
    """One kernel computes all. What a forward pass saves for it is read in training mode only."""
    found: _Gradients = _native_backward(
        _aligned(gradient, x), x, weight, mean, variance, None, None, False, eps, wanted
    )
    return found


def _gradients_on_gpu(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> _Gradients:
    """The kernels of a GPU differ by what is wanted and how it lies in memory. Some read what a forward pass saves,
    all return sums of the type of the weight, which there must be, and an input gradient that is never channels last.

    So that gradient, g weight / sqrt(variance + eps), is a normalisation of its own here.
    """
    result = None
    if wanted[0]:
        enabled = torch.backends.cudnn.enabled
        result = torch.batch_norm(gradient, weight, None, torch.zeros_like(mean), variance, False, 0.0, eps, enabled)
    if not (wanted[1] or wanted[2]):
        return result, None, None
    weight = torch.ones_like(mean) if weight is None else weight
    saved, mask = (mean, torch.rsqrt(variance + eps)), (False, *wanted[1:])
    _, for_weight, for_bias = _native_backward(gradient, x, weight, mean, variance, *saved, False, eps, mask)
    return result, for_weight, for_bias


_native_backward = aten.native_batch_norm_backward.default


def _normalise(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float, written: Any = None
) -> Tensor:
    """``written``: the operation that this stands for, if autocast treats it in a way of its own."""
    if written is not None:
        x = as_read_by(written, x)
    if mean.dim() == 1:
        result: Tensor = _Normalise.apply(x, mean, variance, weight, bias, eps)  # type: ignore[no-untyped-call]
        return result
    # One mean a sample and group: every sample's channels become channels of one sample.
    samples, channels = x.shape[:2]
    repeat = channels // mean.shape[1]
    means, variances = (t.repeat_interleave(repeat, 1).reshape(-1) for t in (mean, variance))
    flat = x.reshape(1, samples * channels, *x.shape[2:])
    scale = None if weight is None else weight.repeat(samples)
    shift = None if bias is None else bias.repeat(samples)
    if scale is None and shift is not None:
        scale = torch.ones_like(shift)
    elif shift is None and scale is not None:
        shift = torch.zeros_like(scale)
    result = _Normalise.apply(flat, means, variances, scale, shift, eps)  # type: ignore[no-untyped-call]
    return result.reshape(x.shape)


normalise = Operator("normalise", _normalise)


@dataclass(frozen=True)
class Normalise(RowRule):
    """``normalise`` on a slab; statistics of single samples are cut to the samples of the tile."""

    samples: int
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        x, mean, variance, *rest = args
        if mean.dim() == 2 and mean.shape[0] != x.shape[0]:
            mean, variance = (cut_whole(t, 2, 0, self.samples, tile.batch) for t in (mean, variance))
        return _normalise(x, mean, variance, *rest)


@register("normalisation", normalise)
def normalise_rule(scope: Scope) -> RowRule | None:
    """``normalise(input, mean, variance, weight, bias, eps, written)``."""
    axes = scope.of(scope.node.args[0])
    if axes.row is None or axes.row < 2 or not scope.only_first_has_rows():
        return None
    return Normalise(scope.shape(scope.node.args[0])[0], (axes,))


@dataclass(frozen=True)
class FrozenNorm(AlongRows):
    """``batch_norm`` with frozen statistics."""

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        x: Tensor = args[0]
        if _strides_mislead(x):
            x = x.contiguous()
        result: Tensor = self.operation(x, *args[1:], **kwargs)
        return result


@register("normalisation", aten.batch_norm.default)
def frozen_batch_norm(scope: Scope) -> RowRule | None:
    """``batch_norm`` with frozen statistics (training mode has been expanded)."""
    axes = scope.of(scope.node.args[0])
    if axes.row is None or axes.row < 2 or scope.node.args[5] or not scope.only_first_has_rows():
        return None
    return FrozenNorm(scope.node.op, (axes,))


def _update_statistics(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    count: int | Tensor,
    batches: Tensor | None = None,
) -> None:
    """Move the running statistics towards these; the variance with Bessel's correction, as ATen does.

    Statistics of single samples (``[N, C]``) are averaged over the samples. With ``batches`` the running statistics
    are the averages over that many batches, this one included (``momentum=None`` of BatchNorm).
    """
    with torch.no_grad():
        if mean.dim() == 2:
            mean, variance = mean.mean(0), variance.mean(0)
        # A count of several processes is a tensor, which is not read back.
        others = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
        unbiased = variance * (count / others)
        for running, now in ((running_mean, mean), (running_variance, unbiased)):
            # In the type of the moments and rounded once, as in ATen: running statistics may be in half precision.
            before = running.to(now.dtype)
            if batches is None:
                running.copy_(before * (1 - momentum) + now * momentum)
            else:
                running.copy_(before.lerp(now, 1 / batches.to(now.dtype)))


update_statistics = Operator("update_statistics", _update_statistics, effect=True)


def _channels_and_count(builder: Builder, x: Ref, groups: int | None) -> tuple[int, int]:
    shape = builder.values[x.index].shape
    elements = 1
    for size in shape:
        elements *= size
    return shape[1], elements // (shape[1] if groups is None else shape[0] * groups)


def _split(builder: Builder, node: Node, x: Ref, groups: int | None, affine: tuple[Any, Any], eps: float) -> Any:
    """Emit moments and their use; returns the two statistics."""
    value = builder.values[x.index]
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    shape = (value.shape[1],) if groups is None else (value.shape[0], groups)
    statistics = [builder.value(f"{node.name}_{part}", shape, dtype, value.device) for part in ("mean", "variance")]
    builder.emit(node, moments, (x, groups), tuple(s.index for s in statistics), "moments")
    builder.emit(node, normalise, (x, *statistics, *affine, eps, node.op), node.outputs, "normalise")
    return statistics


@expands(aten.batch_norm.default)
def expand_batch_norm(builder: Builder, node: Node) -> bool:
    """Training mode only; ``batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, ...)``."""
    x, weight, bias, running_mean, running_variance, training, momentum, eps = node.args[:8]
    if not training:
        return False
    _, count = _channels_and_count(builder, x, None)
    if count == 1:
        return False  # ATen's own error: more than one value per channel is expected
    mean, variance = _split(builder, node, x, None, (weight, bias), eps)
    if isinstance(running_mean, Ref):
        args: tuple[Any, ...] = (mean, variance, running_mean, running_variance, momentum, count)
        if momentum == CUMULATIVE:
            args = (*args, builder.batches_of(node, running_mean))
        builder.emit(node, update_statistics, args, (), "statistics")
    return True


@expands(aten.instance_norm.default)
def expand_instance_norm(builder: Builder, node: Node) -> bool:
    """``instance_norm(x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, ...)``."""
    x, weight, bias, running_mean, running_variance, from_input, momentum, eps = node.args[:8]
    if not from_input:
        frozen = (x, weight, bias, running_mean, running_variance, False, momentum, eps, False)
        builder.emit(node, aten.batch_norm.default, frozen, node.outputs, "frozen")
        return True
    channels = builder.values[x.index].shape[1]
    _, count = _channels_and_count(builder, x, channels)
    mean, variance = _split(builder, node, x, channels, (weight, bias), eps)
    if isinstance(running_mean, Ref):
        args = (mean, variance, running_mean, running_variance, momentum, count)
        builder.emit(node, update_statistics, args, (), "statistics")
    return True


@expands(aten.group_norm.default)
def expand_group_norm(builder: Builder, node: Node) -> bool:
    """``group_norm(x, num_groups, weight, bias, eps)``."""
    x, groups = node.args[:2]
    weight = node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
    bias = node.args[3] if len(node.args) > 3 else node.kwargs.get("bias")
    eps = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
    if len(builder.values[x.index].shape) < 3:
        return False
    _split(builder, node, x, groups, (weight, bias), eps)
    return True
