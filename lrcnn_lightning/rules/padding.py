"""Padding: rows are added at the map's own border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrcnn_lightning.rules.constant import Constant
from lrcnn_lightning.rules.pointwise import AlongRows
from lrcnn_lightning.rules.rule import Axes, Interval, RowRule, Scope, Tile, register
from lrcnn_lightning.rules.window import pad_rows

__all__ = ["PadRows"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PadRows(RowRule):
    """``pad``: rows of a constant, or copies of the border rows (``reflect``, ``replicate``)."""

    mode: str
    value: float
    axis: int
    above: int
    height: int
    others: tuple[int, ...]
    axes: tuple[Axes, ...]

    def _source(self, row: int) -> int:
        place = row - self.above
        if self.mode == "reflect":
            place = abs(place)
            return place if place < self.height else 2 * (self.height - 1) - place
        return min(max(place, 0), self.height - 1)

    def needed(self, output: Interval) -> Interval:
        if self.mode == "constant":
            lo = min(max(output.lo - self.above, 0), self.height - 1)
            return Interval(lo, min(max(output.hi - self.above, lo + 1), self.height))
        rows = [self._source(row) for row in range(output.lo, output.hi)]
        return Interval(min(rows), max(rows) + 1)

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        result: Tensor = self.prepare(tile)(args, kwargs)
        return result

    def prepare(self, tile: Tile) -> Callable[[Sequence[Any], dict[str, Any]], Any]:
        given, start, stop = self.needed(tile.rows), tile.rows.lo - self.above, tile.rows.hi - self.above
        if self.mode == "constant":
            return lambda args, kwargs: pad_rows(
                self._beside(args[0]), self.axis, given.lo - start, stop - given.hi, self.value
            )
        if (start, stop) == given:
            return lambda args, kwargs: self._beside(args[0])
        rows = Constant([self._source(row) - given.lo for row in range(tile.rows.lo, tile.rows.hi)])
        return lambda args, kwargs: self._beside(args[0]).index_select(self.axis, rows.on(args[0]))

    def _beside(self, slab: Tensor) -> Tensor:
        """The slab, padded along the other axes."""
        if not any(self.others):
            return slab
        if self.mode == "constant":
            return functional.pad(slab, list(self.others), value=self.value)
        # The modes that copy exist only for all spatial dimensions at once.
        return functional.pad(slab, list(self.others), mode=self.mode)


@register("shape", aten.pad.default, aten.constant_pad_nd.default)
@register("shape", aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
@register("shape", aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def pad(scope: Scope) -> RowRule | None:
    """``pad(input, pad, mode, value)``; circular padding along the row axis runs whole."""
    if not scope.only_first_has_rows():
        return None
    shape, axes = scope.shape(scope.node.args[0]), scope.of(scope.node.args[0])
    widths = list(scope.node.args[1])
    name = scope.node.op._schema.name.split("::")[1]
    mode, value = "constant", 0.0
    if name == "pad":
        mode, value = scope.argument(2, "mode", "constant"), scope.argument(3, "value", None) or 0.0
    elif name == "constant_pad_nd":
        value = scope.argument(2, "value", 0)
    else:
        mode = "reflect" if name.startswith("reflection") else "replicate"
    assert axes.row is not None
    place = 2 * (len(shape) - 1 - axes.row)
    above, below = (widths[place], widths[place + 1]) if place < len(widths) else (0, 0)
    others = list(widths)
    if place < len(widths):
        others[place : place + 2] = [0, 0]
    if mode == "circular":
        if above or below:
            return None
        return AlongRows(scope.node.op, (axes,))
    if mode != "constant" and (above < 0 or below < 0):
        return None
    batch = axes.batch
    if batch is not None:
        place = 2 * (len(shape) - 1 - batch)
        if place < len(widths) and (widths[place] or widths[place + 1]):
            batch = None
    return PadRows(mode, value, axes.row, above, shape[axes.row], tuple(others), (Axes(axes.row, batch),))
