"""Full maps that are written slab by slab, and gradients that are added slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lrcnn_lightning.graph import dense_strides
from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.planning.machine import MOST_ELEMENTS
from lrcnn_lightning.rules import Axes, Interval, Tile

__all__ = ["Cuts", "Gradients", "cut", "cuts_of", "taken", "write"]


Cuts = tuple[tuple[int, int, int], ...]
"""Dimension, start and length of each narrowing that makes a part of a tensor."""


def cuts_of(shape: tuple[int, ...], axes: Axes, tile: Tile) -> Cuts:
    """The cuts that make the part of a full map that lies in ``tile``."""
    cuts = []
    if axes.batch is not None and tile.batch.length != shape[axes.batch]:
        cuts.append((axes.batch, tile.batch.lo, tile.batch.length))
    if axes.row is not None and tile.rows.length != shape[axes.row]:
        cuts.append((axes.row, tile.rows.lo, tile.rows.length))
    return tuple(cuts)


def taken(tensor: Tensor, cuts: Cuts) -> Tensor:
    """The view that the cuts make."""
    for dimension, start, length in cuts:
        tensor = lines(tensor, dimension, start, length)
    return tensor


def cut(tensor: Tensor, axes: Axes, tile: Tile) -> Tensor:
    """The view of a full map that lies in ``tile``."""
    return taken(tensor, cuts_of(tuple(tensor.shape), axes, tile))


def _new_map(shape: tuple[int, ...], slab: Tensor) -> Tensor:
    """A full map for slabs, with their dtype, laid out as what an operation makes of the whole: in the order of their
    strides. The slab may be a part of something larger, which is dense in no order.

    One line of a slab in channels last has the strides of several orders: there the format decides.
    """
    order = None if slab.is_contiguous() else slab.stride()
    if slab.dim() in (4, 5) and slab.shape[1] > 1 and order is not None and order[1] == 1:
        layout = torch.channels_last if slab.dim() == 4 else torch.channels_last_3d
        return torch.empty(shape, dtype=slab.dtype, device=slab.device, memory_format=layout)
    return torch.empty_strided(shape, dense_strides(shape, order), dtype=slab.dtype, device=slab.device)


def write(full: Tensor | None, slab: Tensor, shape: tuple[int, ...], axes: Axes, tile: Tile) -> Tensor:
    """Put ``slab`` into the full map, which is made when the first slab arrives (its dtype and memory format)."""
    if full is None:
        if tuple(slab.shape) == shape:
            return slab
        full = _new_map(shape, slab)
    cut(full, axes, tile).copy_(slab)
    return full


class _Filling:
    """A new map that tiles are added to. What they reach first is written, and only what they reach again is added to.

    Rows come from the bottom, chunk by chunk, and the lines between the tiles may belong to none (a stride that is
    larger than the kernel); so one interval says what of a chunk is written:

        chunk 1   | nothing yet | tile r | written: rows r + 1 and below |
                                     |___| in both, added
    """

    def __init__(self, full: Tensor, axes: Axes) -> None:
        self.full, self.axes = full, axes
        self._done: list[Interval] = []
        self._batch: Interval | None = None
        self._written = Interval(0, 0)

    def add(self, gradient: Tensor, tile: Tile) -> None:
        """Add the gradient of the part that lies in ``tile``."""
        batch = tile.batch if self.axes.batch is not None else Interval(0, 0)
        if batch in self._done:
            cut(self.full, self.axes, tile).add_(gradient)
            return
        if batch != self._batch:
            self._close()
            self._batch, self._written = batch, Interval(tile.rows.lo, tile.rows.lo)
        (lo, hi), (first, last) = self._written, tile.rows
        self._zero(last, lo)
        self._zero(hi, first)
        lines = Axes(self.axes.row)
        for start, stop, known in (
            (first, min(last, lo), False),
            (max(first, lo), min(last, hi), True),
            (max(first, hi), last, False),
        ):
            if start < stop:
                part = cut(self.full, self.axes, Tile(Interval(start, stop), tile.batch))
                given = cut(gradient, lines, Tile(Interval(start - first, stop - first), tile.batch))
                if known:
                    part.add_(given)
                else:
                    part.copy_(given)
        self._written = Interval(min(lo, first), max(hi, last))

    def finish(self) -> None:
        """Whatever no tile has reached has no gradient."""
        self._close()
        if self.axes.batch is None:
            return
        end, samples = 0, self.full.shape[self.axes.batch]
        for batch in (*sorted(self._done), Interval(samples, samples)):
            self._clear(self.full.narrow(self.axes.batch, end, batch.lo - end))
            end = batch.hi

    def _close(self) -> None:
        """The chunk is done."""
        if self._batch is not None:
            assert self.axes.row is not None
            self._zero(0, self._written.lo)
            self._zero(self._written.hi, self.full.shape[self.axes.row])
            self._done.append(self._batch)
            self._batch = None

    def _zero(self, start: int, stop: int) -> None:
        if start < stop and self._batch is not None:
            self._clear(cut(self.full, self.axes, Tile(Interval(start, stop), self._batch)))

    def _clear(self, part: Tensor) -> None:
        assert self.axes.row is not None
        for (piece,) in _pieces(self.axes.row, part) if part.numel() else ():
            piece.zero_()


def _pieces(axis: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape along an axis, in pieces that are small enough for one operation, of a line at least."""
    height, elements = tensors[0].shape[axis], tensors[0].numel()
    lines = height if elements <= MOST_ELEMENTS else max(1, height * MOST_ELEMENTS // elements)
    for start in range(0, height, max(1, lines)):
        length = min(lines, height - start)
        yield tuple(tensor.narrow(axis, start, length) for tensor in tensors)


def _duplicate(full: Tensor, axes: Axes) -> Tensor:
    """A copy of a full map."""
    if full.numel() <= MOST_ELEMENTS or axes.row is None:
        return full.clone()
    copy = torch.empty_like(full)
    for part, given in _pieces(axes.row, copy, full):
        part.copy_(given)
    return copy


def _is_all(tensor: Tensor) -> bool:
    """Whether it is all of its memory: no view of something larger, and nothing that is expanded."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Gradients:
    """Gradients by value: maps that are added to slab by slab, and whole tensors.

    A tensor that came from outside is borrowed: it is read, and copied before anything is added to it. One that is a
    part of something larger is copied at once, since it would keep all of that alive. Whole gradients are summed in
    float32 or better.
    """

    def __init__(self, shape_of: Callable[[int], tuple[int, ...]], axes_of: Callable[[int], Axes]) -> None:
        self._shape_of, self._axes_of = shape_of, axes_of
        self._tensors: dict[int, Tensor] = {}
        self._borrowed: set[int] = set()
        self._filling: dict[int, _Filling] = {}

    def __contains__(self, value: int) -> bool:
        return value in self._tensors

    def get(self, value: int) -> Tensor | None:
        """The gradient so far, or None."""
        self._finish(value)
        return self._tensors.get(value)

    def pop(self, value: int) -> Tensor | None:
        """The gradient, which is dropped here."""
        self._finish(value)
        self._borrowed.discard(value)
        return self._tensors.pop(value, None)

    def lend(self, value: int, gradient: Tensor) -> None:
        """Begin with a gradient that others have, too."""
        if self._axes_of(value).row is None:
            self.add(value, gradient)
            return
        self._tensors[value] = gradient
        self._borrowed.add(value)

    def add(self, value: int, gradient: Tensor, more: bool = False, alone: bool = False) -> None:
        """Add the gradient of a whole value or full map; ``more``: others will come, so a copy of it is begun with,
        unless it is ``alone``, with memory that nobody else has.
        """
        self._finish(value)
        present = self._tensors.get(value)
        if present is None:
            if gradient.dtype in (torch.float16, torch.bfloat16) and self._axes_of(value).row is None:
                self._tensors[value] = gradient.float()
            elif (more and not alone) or not _is_all(gradient):
                self._tensors[value] = gradient.clone()
            else:
                self._tensors[value] = gradient
                if not alone:
                    self._borrowed.add(value)
        elif value in self._borrowed:
            self._tensors[value] = present + gradient
            self._borrowed.discard(value)
        else:
            present.add_(gradient)

    def own(self, value: int) -> None:
        """Nobody else has the gradient any more."""
        self._borrowed.discard(value)

    def add_tile(self, value: int, gradient: Tensor, tile: Tile, alone: bool = False) -> bool:
        """Add the gradient of the part of a map that lies in ``tile``; ``alone``: nobody else has its memory.

        Returns whether it has become that of the map.
        """
        shape, axes = self._shape_of(value), self._axes_of(value)
        if tuple(gradient.shape) == shape:
            self.add(value, gradient, alone=alone)
            return self._tensors[value] is gradient
        present = self._tensors.get(value)
        if present is None:
            present = self._tensors[value] = _new_map(shape, gradient)
            self._filling[value] = _Filling(present, axes)
        if value in self._filling:
            self._filling[value].add(gradient, tile)
            return False
        if value in self._borrowed:
            present = _duplicate(present, axes)
            self._tensors[value] = present
            self._borrowed.discard(value)
        cut(present, axes, tile).add_(gradient)
        return False

    def _finish(self, value: int) -> None:
        filling = self._filling.pop(value, None)
        if filling is not None:
            filling.finish()
