"""Full maps that are written slab by slab, and gradients that are added slab by slab."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrcnn_lightning.rules import Axes, Tile

__all__ = ["Gradients", "cut", "write"]


def cut(tensor: Tensor, axes: Axes, tile: Tile) -> Tensor:
    """The view of a full map that lies in ``tile``."""
    if axes.batch is not None and tile.batch.length != tensor.shape[axes.batch]:
        tensor = tensor.narrow(axes.batch, tile.batch.lo, tile.batch.length)
    if axes.row is not None and tile.rows.length != tensor.shape[axes.row]:
        tensor = tensor.narrow(axes.row, tile.rows.lo, tile.rows.length)
    return tensor


def _memory_format(slab: Tensor) -> torch.memory_format:
    """The memory format of a slab, to be that of the full map. The slab may be a cut, which is dense in neither."""
    if slab.dim() in (4, 5) and slab.shape[1] > 1 and slab.stride(1) == 1 and not slab.is_contiguous():
        return torch.channels_last if slab.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def write(full: Tensor | None, slab: Tensor, shape: tuple[int, ...], axes: Axes, tile: Tile) -> Tensor:
    """Put ``slab`` into the full map, which is made when the first slab arrives (its dtype and memory format)."""
    if full is None:
        if tuple(slab.shape) == shape:
            return slab
        full = torch.empty(shape, dtype=slab.dtype, device=slab.device, memory_format=_memory_format(slab))
    cut(full, axes, tile).copy_(slab)
    return full


class Gradients:
    """Gradients by value: maps that are added to slab by slab, and whole tensors.

    A tensor that came from outside is borrowed: it is read, and copied before anything is added to it. Whole
    gradients are summed in float32 or better.
    """

    def __init__(self, shape_of: Callable[[int], tuple[int, ...]], axes_of: Callable[[int], Axes]) -> None:
        self._shape_of, self._axes_of = shape_of, axes_of
        self._tensors: dict[int, Tensor] = {}
        self._borrowed: set[int] = set()

    def __contains__(self, value: int) -> bool:
        return value in self._tensors

    def get(self, value: int) -> Tensor | None:
        """The gradient so far, or None."""
        return self._tensors.get(value)

    def pop(self, value: int) -> Tensor | None:
        """The gradient, which is dropped here."""
        self._borrowed.discard(value)
        return self._tensors.pop(value, None)

    def add(self, value: int, gradient: Tensor) -> None:
        """Add the gradient of a whole value or full map."""
        present = self._tensors.get(value)
        if present is None:
            # Autograd may have given the same tensor to somebody else: not ours to change.
            if self._axes_of(value).row is not None:
                self._tensors[value] = gradient
                self._borrowed.add(value)
            elif gradient.dtype in (torch.float16, torch.bfloat16):
                self._tensors[value] = gradient.float()
            else:
                self._tensors[value] = gradient.clone()
        elif value in self._borrowed:
            self._tensors[value] = present + gradient
            self._borrowed.discard(value)
        else:
            present.add_(gradient)

    def add_tile(self, value: int, gradient: Tensor, tile: Tile) -> None:
        """Add the gradient of the part of a map that lies in ``tile``."""
        shape, axes = self._shape_of(value), self._axes_of(value)
        if tuple(gradient.shape) == shape:
            self.add(value, gradient)
            return
        present = self._tensors.get(value)
        if present is None:
            present = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device)
            present = present.contiguous(memory_format=_memory_format(gradient))
            self._tensors[value] = present
        elif value in self._borrowed:
            present = present.clone()
            self._tensors[value] = present
            self._borrowed.discard(value)
        cut(present, axes, tile).add_(gradient)
