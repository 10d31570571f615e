"""Nested arguments and results, taken apart into leaves and put together again.

Lists, tuples, dicts, named tuples and whatever else is registered with PyTorch's pytrees are containers; so is, here,
every dataclass, which users need not register anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Structure", "take_apart"]


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
