"""Nested arguments and results, taken apart into leaves and put together again.

Lists, tuples, dicts, named tuples and whatever else is registered with PyTorch's pytrees are containers; so is, here,
every dataclass, which users need not register anywhere.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lrcnn_lightning.errors import CaptureError

__all__ = ["CONSTANTS", "Structure", "refuse_unknown", "take_apart"]

CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format),
)
"""Types of leaves, beside tensors, that never change and have no tensor inside."""


@dataclass(frozen=True)
class Structure:
    """How leaves are nested. ``records`` are the places that are dataclasses: number among the tree's leaves, type,
    names of the fields, and the structure of these.
    """

    tree: TreeSpec
    records: tuple[tuple[int, type, tuple[str, ...], Structure], ...] = ()

    @property
    def size(self) -> int:
        """The number of leaves."""
        return self.tree.num_leaves + sum(inner.size - 1 for _, _, _, inner in self.records)

    def put_together(self, leaves: Sequence[Any]) -> Any:
        """The nested object with these leaves."""
        remaining = list(leaves)
        for place, kind, names, inner in self.records:
            fields = inner.put_together(remaining[place : place + inner.size])
            remaining[place : place + inner.size] = [_record(kind, dict(zip(names, fields, strict=True)))]
        return tree_unflatten(remaining, self.tree)


def take_apart(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves in order, and the structure that puts them together."""
    found, specification = tree_flatten(tree)
    leaves: list[Any] = []
    records = []
    for place, leaf in enumerate(found):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            names = tuple(field.name for field in dataclasses.fields(leaf))
            inner_leaves, inner = take_apart([getattr(leaf, name) for name in names])
            records.append((place, type(leaf), names, inner))
            leaves.extend(inner_leaves)
        else:
            leaves.append(leaf)
    return leaves, Structure(specification, tuple(records))


def _record(kind: type, fields: dict[str, Any]) -> Any:
    """An instance with these fields; its constructor, which may do more, is not called."""
    instance: Any = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
    return instance


def refuse_unknown(leaves: Sequence[Any], what: str) -> None:
    """Raise `CaptureError` for an object of another kind, which could hide tensors: a trace would freeze them."""
    for leaf in leaves:
        if not isinstance(leaf, (*CONSTANTS, torch.Tensor)):
            raise CaptureError(
                f"{what} an object of type {type(leaf).__name__}; allowed are tensors, numbers, strings and None, in "
                "lists, tuples, dicts, dataclasses and whatever is registered with torch.utils._pytree"
            )
