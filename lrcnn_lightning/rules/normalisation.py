"""Normalisation over space, split: moments per row, a merge, vectors of these once a step, a pointwise application.

    y = weight * (x - mean) / sqrt(variance + eps) + bias

``batch_norm`` in training mode, ``instance_norm`` and ``group_norm`` become

    mean, variance = moments(x)                                              a reduction: a barrier
    update_statistics(mean, variance, ...)                                   an effect on the running statistics
    centre, ones, scale, shift = scale_and_shift(mean, variance, ...)        vectors, with weight and bias
    y = normalise(x, centre, ones, scale, shift)                             pointwise: (x - centre) * scale + shift

so that a row has two vectors to sum gradients for, and what they mean for the statistics is worked out once.

With frozen statistics (``eval`` mode) ``batch_norm`` is pointwise as it stands (`frozen`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import CUMULATIVE, Node, Ref
from lrcnn_lightning.rules.expansion import Builder, expands
from lrcnn_lightning.rules.formula import Formula, Saved
from lrcnn_lightning.rules.moments import moments
from lrcnn_lightning.rules.pointwise import cut_whole
from lrcnn_lightning.rules.precision import as_read_by
from lrcnn_lightning.rules.rule import Axes, Operator, RowRule, Scope, Tile, register

__all__ = [
    "Normalise",
    "aligned",
    "emit_normalise",
    "gradients_on_gpu",
    "native_backward",
    "normalise",
    "scale_and_shift",
    "strides_mislead",
    "update_statistics",
]

aten = torch.ops.aten


def strides_mislead(x: Tensor) -> bool:
    """Whether ATen's batch norm would mix up the channels of ``x`` in its backward pass on the CPU.

    A view of one sample, channels last, can have a batch stride of C. It means nothing where there is one sample, but
    ATen takes it for the stride of a memory format.
    """
    return x.shape[0] == 1 and x.stride(0) < x.numel() and not x.is_contiguous()


def _with_plain_strides(x: Tensor) -> Tensor:
    """The same tensor, with the batch stride that a larger batch would have where its own would mislead."""
    return x.as_strided(x.shape, (x.numel(), *x.stride()[1:])) if strides_mislead(x) else x


def _scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(centre, ones, scale, shift)``, each ``[C]``, or ``[N, C]`` where statistics are those of samples and groups.

    The mean is taken off before anything is multiplied, as a large one has to be. It has no gradient there
    (``centre``); it has it in ``shift``, to which it adds zero. The ``ones`` are the variance of what `normalise`
    calls. All in the type of the statistics, which is float32 at least.
    """
    scale = torch.rsqrt(variance + eps)
    if mean.dim() == 2 and mean.shape[1] != channels:
        mean, scale = (vector.repeat_interleave(channels // mean.shape[1], 1) for vector in (mean, scale))
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    centre = mean.detach()
    shift = (centre - mean) * scale
    return centre, torch.ones_like(scale), scale, shift if bias is None else shift + bias.to(scale.dtype)


scale_and_shift = Operator("scale_and_shift", _scale_and_shift, constants=2)


class _Normalise(torch.autograd.Function):
    """``(x - centre) * scale + shift``, by ATen's batch normalisation with a variance of one.

    Only the input is saved. With g the gradient of y, that of the input is g scale, of the scale sum g (x - centre), of
    the shift sum g. Where the gradient is differentiated again, these are computed by operations that can be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, centre, ones, scale)
        return _normalised(x, centre, ones, scale, shift)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, centre, ones, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            results = _differentiable_gradients(gradient, x, centre, scale)
        else:
            results = _gradients(gradient, x, centre, ones, scale, wanted)
        for_x, for_scale, for_shift = (r if asked else None for r, asked in zip(results, wanted, strict=True))
        return for_x, None, None, for_scale, for_shift


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Those of the input, of the scale and of the shift, as far as they are wanted."""


def _normalised(x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = _with_plain_strides(x)
    return torch.batch_norm(x, scale, shift, centre, ones, False, 0.0, 0.0, torch.backends.cudnn.enabled)


def _gradients(
    gradient: Tensor, x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, wanted: tuple[bool, bool, bool]
) -> _Gradients:
    find = _gradients_on_cpu if x.device.type == "cpu" else gradients_on_gpu
    for_x, for_scale, for_shift = find(
        _with_plain_strides(gradient), _with_plain_strides(x), centre, ones, scale, wanted
    )
    return for_x if wanted[0] else None, for_scale if wanted[1] else None, for_shift if wanted[2] else None


def _differentiable_gradients(gradient: Tensor, x: Tensor, centre: Tensor, scale: Tensor) -> _Gradients:
    """The gradients of `_Normalise`, of operations that can be differentiated again."""
    shape, dims = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
    wide = gradient.to(scale.dtype)
    deviations = x.to(scale.dtype) - centre.view(shape)
    return (wide * scale.view(shape)).to(x.dtype), (wide * deviations).sum(dims), wide.sum(dims)


def aligned(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory format of ``x``, which ATen takes it to be in."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    for layout in (torch.contiguous_format, last):
        if x.is_contiguous(memory_format=layout):
            return gradient.contiguous(memory_format=layout)
    return gradient if gradient.stride() == x.stride() else gradient.contiguous()


def _gradients_on_cpu(
    gradient: Tensor, x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, wanted: tuple[bool, bool, bool]
) -> _Gradients:
    """One kernel computes all. What a forward pass saves for it is read in training mode only."""
    gradient = aligned(gradient, x)
    found: _Gradients = native_backward(gradient, x, scale, centre, ones, None, None, False, 0.0, wanted)
    return found


def gradients_on_gpu(
    gradient: Tensor, x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, wanted: tuple[bool, bool, bool]
) -> _Gradients:
    """The kernels of a GPU differ by what is wanted and how it lies in memory. Some read what a forward pass saves,
    all return sums of the type of the weight, which there must be, and an input gradient that is never channels last.

    So that gradient, g scale, is a product here, or of two types a normalisation of its own.
    """
    result = None
    if wanted[0] and gradient.dtype is scale.dtype:
        result = gradient * scale.view([1, -1] + [1] * (x.dim() - 2))
    elif wanted[0]:
        zeros, enabled = torch.zeros_like(centre), torch.backends.cudnn.enabled
        result = torch.batch_norm(gradient, scale, None, zeros, ones, False, 0.0, 0.0, enabled)
    if not (wanted[1] or wanted[2]):
        return result, None, None
    mask = (False, *wanted[1:])
    _, for_scale, for_shift = native_backward(gradient, x, scale, centre, ones, centre, ones, False, 0.0, mask)
    return result, for_scale, for_shift


native_backward = aten.native_batch_norm_backward.default


def _normalise(x: Tensor, centre: Tensor, ones: Tensor, scale: Tensor, shift: Tensor, written: Any = None) -> Tensor:
    """``written``: the operation that this stands for, if autocast treats it in a way of its own."""
    if written is not None:
        x = as_read_by(written, x)
    if centre.dim() == 1:
        result: Tensor = _Normalise.apply(x, centre, ones, scale, shift)  # type: ignore[no-untyped-call]
        return result
    # Every sample's channels become channels of one sample.
    flat = x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
    vectors = (vector.reshape(-1) for vector in (centre, ones, scale, shift))
    result = _Normalise.apply(flat, *vectors)  # type: ignore[no-untyped-call]
    return result.reshape(x.shape)


normalise = Operator("normalise", _normalise)


@dataclass(frozen=True)
class Normalise(RowRule):
    """``normalise`` on a slab; vectors of single samples are cut to the samples of the tile."""

    samples: int
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        x, *vectors, written = args
        if vectors[0].dim() == 2 and vectors[0].shape[0] != x.shape[0]:
            vectors = [cut_whole(vector, 2, 0, self.samples, tile.batch) for vector in vectors]
        centre, ones, scale, shift = vectors
        return _normalise(x, centre, ones, scale, shift, written)

    def formula(self, tile: Tile, wanted: Sequence[Any]) -> Formula | None:
        return _NormaliseFormula(bool(wanted[0]), bool(wanted[3]), bool(wanted[4]))


@dataclass(frozen=True)
class _NormaliseFormula(Formula):
    """That of `_Normalise`, for channels of all samples."""

    wants_x: bool
    wants_scale: bool
    wants_shift: bool

    def applies(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        x, centre, *_, written = args
        return centre.dim() == 1 and (written is None or as_read_by(written, x) is x)

    def forward(self, args: Sequence[Any], kwargs: dict[str, Any], hollow: bool = False) -> tuple[Any, Saved]:
        x, centre, ones, scale, shift, _ = args
        return _normalised(x, centre, ones, scale, shift), (x, centre, ones, scale)

    def backward(self, saved: Saved, gradients: list[Tensor | None]) -> Sequence[Any]:
        x, centre, ones, scale = saved
        gradient = gradients.pop()
        assert gradient is not None
        wanted = (self.wants_x, self.wants_scale, self.wants_shift)
        for_x, for_scale, for_shift = _gradients(gradient, x, centre, ones, scale, wanted)
        return for_x, None, None, for_scale, for_shift, None


@register("normalisation", normalise)
def normalise_rule(scope: Scope) -> RowRule | None:
    """``normalise(input, centre, ones, scale, shift, written)``."""
    axes = scope.of(scope.node.args[0])
    if axes.row is None or axes.row < 2 or not scope.only_first_has_rows():
        return None
    return Normalise(scope.shape(scope.node.args[0])[0], (axes,))


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
            weight = momentum if batches is None else 1 / batches.to(now.dtype)
            if running.dtype is now.dtype:
                running.lerp_(now, weight)
            else:
                running.copy_(running.to(now.dtype).lerp(now, weight))


update_statistics = Operator("update_statistics", _update_statistics, effect=True)


def _channels_and_count(builder: Builder, x: Ref, groups: int | None) -> tuple[int, int]:
    shape = builder.values[x.index].shape
    elements = 1
    for size in shape:
        elements *= size
    return shape[1], elements // (shape[1] if groups is None else shape[0] * groups)


def emit_normalise(
    builder: Builder,
    node: Node,
    x: Ref,
    statistics: Sequence[Ref],
    affine: tuple[Any, Any],
    eps: float,
    output: int,
    written: Any = None,
) -> None:
    """Emit the use of mean and variance, with weight and bias."""
    channels, mean = builder.values[x.index].shape[1], builder.values[statistics[0].index]
    shape = (channels,) if len(mean.shape) == 1 else (mean.shape[0], channels)
    vectors = [builder.like(node, mean, part, shape) for part in ("centre", "ones", "scale", "shift")]
    arguments = (*statistics, *affine, eps, channels)
    builder.emit(node, scale_and_shift, arguments, tuple(vector.index for vector in vectors), "vectors")
    builder.emit(node, normalise, (x, *vectors, written), (output,), "normalise")


def _split(builder: Builder, node: Node, x: Ref, groups: int | None, affine: tuple[Any, Any], eps: float) -> Any:
    """Emit moments and their use; returns the two statistics."""
    value = builder.values[x.index]
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    shape = (value.shape[1],) if groups is None else (value.shape[0], groups)
    statistics = [builder.value(f"{node.name}_{part}", shape, dtype, value.device) for part in ("mean", "variance")]
    builder.emit(node, moments, (x, groups), tuple(s.index for s in statistics), "moments")
    emit_normalise(builder, node, x, statistics, affine, eps, node.outputs[0], node.op)
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
