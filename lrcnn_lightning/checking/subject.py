"""The module that is checked, fresh for every run, and the caller's own as it was.

A run needs a module that no run before has changed. That is a deep copy, in float64 if it can be. What a copy cannot
have is a history (a weight that a hook computes): such a tensor is copied without it. Tensors that share memory share
it in the copy, too: a buffer that the code reaches through a list is the same buffer there.

Some modules have no copies: an attribute refuses to be copied, or a function inside holds the module's own parameters
and would go on using them. Such a module runs itself, in its own precision, and is put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.checking.state import held_tensors
from lrcnn_lightning.graph.state import PythonState
from lrcnn_lightning.rowwise import restore

__all__ = ["Subject", "put_back_afterwards", "twin", "widened"]

WIDER = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
"""The type in which rounding is smallest, for each one that has more of it."""


@dataclass(frozen=True)
class Subject:
    """What is checked: copies of a module, in float64 if they are ``wide``, or else the module ``itself``."""

    module: nn.Module
    wide: bool
    itself: bool = False

    @contextlib.contextmanager
    def fresh(self) -> Iterator[nn.Module]:
        """A module to run, which equals the caller's."""
        if self.itself:
            with put_back_afterwards(self.module) as module:
                yield module
        else:
            yield twin(self.module, self.wide)


def widened(tensor: Tensor) -> Tensor:
    """The tensor with as many digits as there are."""
    return tensor.to(WIDER.get(tensor.dtype, tensor.dtype))


def twin(module: nn.Module, wide: bool = False) -> nn.Module:
    """A deep copy with its own forward; in float64 and complex128, if it is to be ``wide``.

    Raises whatever a part of the module raises that cannot be copied.
    """
    copies = _Copies(wide)
    memo: dict[int, Any] = {id(tensor): copies.of(tensor) for tensor in held_tensors(module) if _is_ordinary(tensor)}
    made = copy.deepcopy(module, memo)
    restore(made)
    if wide:
        made._apply(widened)  # type: ignore[no-untyped-call]
    return made


class _Copies:
    """Copies of tensors; of each memory one."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self.memories: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.dtype
        with torch.no_grad():
            if key not in self.memories:
                everything = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
                dtype = WIDER.get(tensor.dtype, tensor.dtype) if self.wide else tensor.dtype
                self.memories[key] = everything.to(dtype, copy=True)
            memory = self.memories[key]
            made = torch.empty(0, dtype=memory.dtype, device=memory.device)
            made.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)  # by which `nn.Buffer` knows its kind
        return made.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is a stretch of memory and nothing else."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and not (tensor.is_conj() or tensor.is_neg() or tensor.is_meta)


@contextlib.contextmanager
def put_back_afterwards(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself with its own forward, and afterwards everything about it as it was."""
    tensors = [
        (tensor, tensor.data, tensor.detach().clone(), tensor.requires_grad, tensor.grad if tensor.is_leaf else None)
        for tensor in held_tensors(module)
    ]
    for tensor in held_tensors(module):
        if tensor.is_leaf:
            tensor.grad = None  # so that nothing is added to what is there
    try:
        with PythonState(module):
            yield restore(module)
    finally:
        for tensor, memory, value, requires_grad, gradient in tensors:
            memory.copy_(value)
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
                tensor.grad = gradient
