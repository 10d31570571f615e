"""Products of several operands: ``matmul`` and ``einsum``, along other dimensions than the row axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Ref
from lrcnn_lightning.rules.pointwise import AlongRows, cut_whole
from lrcnn_lightning.rules.rule import Axes, RowRule, Scope, Tile, register

__all__ = ["Einsum"]

aten = torch.ops.aten


@register("contraction", aten.matmul.default)
def matmul(scope: Scope) -> RowRule | None:
    """``matmul(map, matrix)`` with channels last and the row axis before the last dimension."""
    axes, rank = scope.of(scope.node.args[0]), len(scope.shape(scope.node.args[0]))
    if not scope.only_first_has_rows() or not isinstance(scope.node.args[1], Ref):
        return None
    if len(scope.shape(scope.node.args[1])) != 2 or axes.row is None or axes.row >= rank - 1:
        return None
    return AlongRows(scope.node.op, (axes,))


@dataclass(frozen=True)
class Einsum(RowRule):
    """``einsum`` that leaves the row axis alone; ``lines`` says where each operand has the row and the batch axis."""

    equation: str
    lines: tuple[tuple[int | None, int | None], ...]
    height: int
    samples: int
    axes: tuple[Axes, ...]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], tile: Tile) -> Tensor:
        operands = []
        for operand, (row, batch) in zip(args[1], self.lines, strict=True):
            if row is not None and operand.shape[row] != tile.rows.length:
                operand = cut_whole(operand, operand.dim(), row, self.height, tile.rows)
            if batch is not None and operand.shape[batch] != tile.batch.length:
                operand = cut_whole(operand, operand.dim(), batch, self.samples, tile.batch)
            operands.append(operand)
        return torch.einsum(self.equation, *operands)


@register("contraction", aten.einsum.default)
def einsum(scope: Scope) -> RowRule | None:
    """``einsum(equation, operands)``: the row axis has one letter, once in an operand, and is in the result."""
    equation = scope.node.args[0].replace(" ", "")
    operands = scope.node.args[1]
    if "->" not in equation or "." in equation:
        return None
    left, out = equation.split("->")
    terms = left.split(",")
    letters = {term[axes.row] for term, axes in _with_rows(scope, terms, operands) if axes.row is not None}
    batches = {None if axes.batch is None else term[axes.batch] for term, axes in _with_rows(scope, terms, operands)}
    if len(letters) != 1:
        return None
    (row,) = letters
    if any(term.count(row) > 1 for term in terms) or out.count(row) != 1:
        return None
    batch = batches.pop() if len(batches) == 1 else None
    if batch is not None and (any(term.count(batch) > 1 for term in terms) or out.count(batch) != 1):
        batch = None
    lines = tuple((_place(term, row), _place(term, batch)) for term in terms)
    shape = scope.output.shape
    out_axes = Axes(out.index(row), _place(out, batch))
    samples = 0 if out_axes.batch is None else shape[out_axes.batch]
    return Einsum(equation, lines, shape[out.index(row)], samples, (out_axes,))


def _with_rows(scope: Scope, terms: list[str], operands: list[Ref]) -> list[tuple[str, Axes]]:
    pairs = [(term, scope.of(operand)) for term, operand in zip(terms, operands, strict=True)]
    return [(term, axes) for term, axes in pairs if axes.row is not None]


def _place(term: str, letter: str | None) -> int | None:
    return None if letter is None or letter not in term else term.index(letter)
