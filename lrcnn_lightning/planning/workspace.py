"""Workspaces: memory that a kernel takes for itself inside of an operation, and that no dispatch mode sees.

On a GPU convolutions take most of it. cuDNN computes them with channels last, and of maps in the other format it makes
copies, forward and back, for the time of the call; its algorithms need room besides. How much that is, only a trial on
the device tells: the operation is run there once on tensors of the same shapes, outside of any step, and what the
allocator has given out meanwhile, less the results, is the workspace. Where there is no device to try it on, and for
maps so large that a trial could take long, a bound holds:

    maps not channels last     a copy of each map and weight that a convolution reads and makes
    maps channels last         room for an algorithm, a fixed number of bytes at most
    weight gradients           sums in float32, of a few parts of the map at once
    float64, depthwise         nothing: these kernels convolve maps as they lie
    slices of a map            a dense copy, of convolutions, poolings and others
    variances                  32 bytes an element, where channels lie next to each other (H200, PyTorch 2.11)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lrcnn_lightning.graph import is_dense
from lrcnn_lightning.planning.machine import Machine

__all__ = ["Call", "NotOnALine", "Operand", "Workspaces", "between", "kernel_call"]

aten = torch.ops.aten

_FORWARD, _BACKWARD = aten.convolution.default, aten.convolution_backward.default
_PRODUCTS = {_FORWARD, _BACKWARD, *(getattr(aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))}
_VARIANCES = {aten.var_mean.correction, aten.var.correction, aten.std.correction, aten.std_mean.correction}
"""With the products what is tried on a device. Whatever its tensors hold, these run."""

_COPYING = (
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
    *("_softmax", "_log_softmax", "native_layer_norm"),
)
_DENSE = {
    getattr(aten, name + suffix).default
    for name in _COPYING
    for suffix in ("", "_backward", "_backward_data")
    if hasattr(aten, name + suffix)
}
"""What takes no room but for dense copies of the maps that it reads, where these are slices; as convolutions do."""

_PARTS = 4
"""Of a map, over which a weight gradient is summed apart."""

_ROOM = 32 * 2**20
"""Of an algorithm, at most, where maps are channels last."""

_BUFFER = 32
"""Bytes an element that a variance takes, where channels lie next to each other."""

_MOST_TRIED = 2**28
"""Elements of a tensor of a trial. Beyond, some kernels take seconds: an H200 took 14 of them for the gradient of a
weight in float32 from a map of twice as many, and 0.05 from one of as many."""

_SHARE = 0.25
"""Of the memory that is free on a device, at most, for the tensors of a trial."""


class Operand(NamedTuple):
    """A tensor of a call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        return is_dense(self.shape, self.strides)


class Call(NamedTuple):
    """One call of an operation, with an `Operand` in the place of each tensor. Equal calls take the same."""

    operation: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    """Arguments by name."""

    @property
    def copies(self) -> bool:
        """Whether slices of maps are copied first, so that they are dense."""
        return self.operation in _DENSE or self.operation in (_FORWARD, _BACKWARD)


def kernel_call(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call, if it is one whose kernels may take memory for themselves."""
    if not (operation in _VARIANCES or (not kwargs and (operation in _PRODUCTS or operation in _DENSE))):
        return None
    return Call(operation, _without_tensors(args), tuple(sorted(kwargs.items())))


def _without_tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return Operand(tuple(tree.shape), tuple(tree.stride()), tree.dtype)
    return tuple(map(_without_tensors, tree)) if isinstance(tree, (list, tuple)) else tree


class NotOnALine(Exception):
    """A call on rows of some height is not known from those on two others."""


def between(first: Any, second: Any, part: Fraction) -> Any:
    """What lies on the line through two calls on rows of different heights, ``part`` of the way from the first.

    Raises `NotOnALine` where that is no call: half of an odd number of rows of a strided operation, say.
    """
    if isinstance(first, Call):
        if first.operation is not second.operation or first.options != second.options:
            raise NotOnALine
        return Call(first.operation, between(first.arguments, second.arguments, part), first.options)
    if isinstance(first, Operand):
        shape, strides = between(first.shape, second.shape, part), between(first.strides, second.strides, part)
        return Operand(shape, strides, first.dtype)
    if isinstance(first, tuple):
        return tuple(between(a, b, part) for a, b in zip(first, second, strict=True))
    if first == second:
        return first
    number = first + part * (second - first)
    if not isinstance(first, int) or number.denominator != 1 or number < 1:
        raise NotOnALine
    return int(number)


class Workspaces:
    """The workspaces of calls on a machine; ``known`` are those that were found before."""

    def __init__(self, machine: Machine, known: dict[Any, int]) -> None:
        self.machine, self._known = machine, known

    def of(self, call: Call) -> int:
        """Bytes."""
        key = self.machine.device, call
        if key not in self._known:
            self._known[key] = max(map(self._found, _alone(call)), default=0)
        return self._known[key]

    def taken(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Bytes, by what was called."""
        call = kernel_call(operation, args, kwargs)
        return 0 if call is None else self.of(call)

    def _found(self, call: Call) -> int:
        device = self.machine.device
        if device is None or call.operation in _DENSE or _largest(call) > _MOST_TRIED or not _fits(call, device):
            return _bound(call)
        try:
            return self._tried(call, device)
        except RuntimeError:  # no memory for it, or no kernel: a step would say so, a trial stops nothing
            return _bound(call)

    def _tried(self, call: Call, device: torch.device) -> int:
        """What the allocator gives out during the call, beside the results."""

        def made(tree: Any) -> Any:
            if isinstance(tree, Operand):
                return torch.empty_strided(tree.shape, tree.strides, dtype=tree.dtype, device=device)
            return [made(item) for item in tree] if isinstance(tree, tuple) else tree

        off = torch.autocast(device.type, enabled=False)
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), off, torch.cuda.device(device):
            arguments = made(call.arguments)
            options = dict(call.options)
            call.operation(*arguments, **options)  # whatever is set up once is not counted
            before = _given_out(device)
            results = call.operation(*arguments, **options)
            given = _given_out(device) - before
            results = results if isinstance(results, (list, tuple)) else (results,)
            sizes = [result.untyped_storage().nbytes() for result in results if isinstance(result, Tensor)]
        return max(0, given - sum(map(self.machine.rounded, sizes)))


def _alone(call: Call) -> list[Call]:
    """The kernels of a call, which run one after another: of a convolution one for each gradient."""
    if call.operation is not _BACKWARD:
        return [call]
    *others, mask = call.arguments
    single = [tuple(place == number for place in range(3)) for number in range(2) if mask[number]]
    return [Call(call.operation, (*others, only)) for only in single]


def _given_out(device: torch.device) -> int:
    """Bytes that the allocator of a device has ever given out; asking for it changes no statistic of the user's."""
    total: int = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    return total


def _fits(call: Call, device: torch.device) -> bool:
    """Whether there is room to try a call, and nothing is being captured meanwhile."""
    if torch.cuda.is_current_stream_capturing():
        return False
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return sum(operand.bytes for operand in _operands(call)) < _SHARE * (free + cached)


def _operands(call: Call) -> list[Operand]:
    return [argument for argument in call.arguments if isinstance(argument, Operand)]


def _largest(call: Call) -> int:
    """Elements of the largest tensor that is read or made."""
    operands = _operands(call)
    if call.operation is _FORWARD:
        operands.append(_result(call))
    return max(math.prod(operand.shape) for operand in operands)


def _bound(call: Call) -> int:
    """See the module's docstring; a matrix product takes nothing."""
    operands, sums = _operands(call), 0
    if call.operation in _VARIANCES:
        return sum(_BUFFER * math.prod(operand.shape) for operand in operands if _channels_last(operand))
    if call.operation is _FORWARD:
        x, weight = operands[:2]
        groups, maps = call.arguments[8], [x]
    elif call.operation is _BACKWARD:
        x, weight = operands[1:3]
        *_, groups, mask = call.arguments
        maps = operands[:2]
        sums = 4 * math.prod(weight.shape) * _PARTS if mask[1] else 0
    else:
        return sum(operand.bytes for operand in operands if not operand.dense) if call.operation in _DENSE else 0
    slices = sum(operand.bytes for operand in maps if not operand.dense)
    if x.dtype is torch.float64 or groups == x.shape[1] > 1:
        return slices
    other = operands[0] if call.operation is _BACKWARD else _result(call)
    if _channels_last(x) or _channels_last(weight):
        copies = sum(operand.bytes for operand in maps if operand.dense and not _channels_last(operand))
        return min(_ROOM, x.bytes + other.bytes) + sums + copies + slices
    return x.bytes + other.bytes + weight.bytes + sums + slices


def _channels_last(operand: Operand) -> bool:
    """Whether channels lie next to each other, and not because there is one place."""
    return len(operand.shape) > 2 and operand.strides[1] == 1 and math.prod(operand.shape[2:]) > 1 < operand.shape[1]


def _result(call: Call) -> Operand:
    """What a convolution makes."""
    arguments = [
        torch.empty(argument.shape, dtype=argument.dtype, device="meta") if isinstance(argument, Operand) else argument
        for argument in call.arguments
    ]
    with _disable_current_modes():
        result = call.operation(*arguments)
    return Operand(tuple(result.shape), tuple(result.stride()), result.dtype)
