"""What was used of late, remembered up to a weight."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Recent"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by their keys, each with a weight; those that were not used for longest are dropped first.

    Args:
        most: What all of them may weigh together.
        least: So many stay, whatever they weigh.
    """

    def __init__(self, most: int, least: int) -> None:
        self.most, self.least = most, least
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._weight = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._entries))

    def items(self) -> Iterator[tuple[Key, Value]]:
        """All keys and values, the latest used last."""
        return ((key, value) for key, (value, _) in tuple(self._entries.items()))

    def values(self) -> Iterator[Value]:
        """All values, the latest used last."""
        return (value for _, value in self.items())

    def get(self, key: Key) -> Value | None:
        """The value of a key, which has been used now; None if there is none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Key, value: Value, weight: int) -> None:
        """Remember a value, and drop the oldest ones for which there is no room beside it."""
        if key in self._entries:
            self._weight -= self._entries.pop(key)[1]
        self._entries[key] = value, weight
        self._weight += weight
        while self._weight > self.most and len(self._entries) > self.least:
            self._weight -= self._entries.popitem(last=False)[1][1]
