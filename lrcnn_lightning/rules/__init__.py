"""Row rules: one family a file. Importing this package fills the registry."""

from lrcnn_lightning.rules import (
    contraction,
    dropout,
    maximum,
    norm,
    normalisation,
    pointwise,
    reduction,
    resize,
    shape,
    transposed,
    variance,
    window,
)
from lrcnn_lightning.rules.lowering import Role, RowGraph, lower
from lrcnn_lightning.rules.rule import Axes, Interval, Operator, Reduction, RowRule, Tile, registered

__all__ = [
    "Axes",
    "Interval",
    "Operator",
    "Reduction",
    "Role",
    "RowGraph",
    "RowRule",
    "Tile",
    "contraction",
    "dropout",
    "lower",
    "maximum",
    "norm",
    "normalisation",
    "pointwise",
    "reduction",
    "registered",
    "resize",
    "shape",
    "transposed",
    "variance",
    "window",
]
