"""Simulated memory: live bytes by key, their peak, and what is live at it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lrcnn_lightning.plan.machine import CPU, Machine

__all__ = ["Memory", "PeakMemory"]


class Memory:
    """Live bytes by key, and their peak. A key is a tuple whose first entry names a family."""

    def __init__(self, machine: Machine = CPU) -> None:
        self.machine = machine
        self.live = 0
        self._before = 0  # the peak until the last mark
        self._recent = 0  # the peak since then
        self.timeline: list[int] = []
        """Live bytes after each allocation."""
        self._families: dict[str, dict[tuple[Any, ...], int]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were ever live."""
        return max(self._before, self._recent)

    def mark(self) -> int:
        """The most bytes that were live since the last mark."""
        recent, self._before, self._recent = self._recent, self.peak, self.live
        return recent

    def allocate(self, key: tuple[Any, ...], size: float) -> None:
        """A tensor under a key that is not in use; under one in use, nothing happens."""
        self.put(key, self.machine.rounded(size))

    def allocate_alike(self, key: tuple[Any, ...], size: float, count: int) -> None:
        """So many tensors of one size under one key."""
        self.put(key, self.machine.rounded(size) * count if self.machine.caching else int(size * count))

    def put(self, key: tuple[Any, ...], size: int) -> None:
        """Count so many bytes under a key that is not in use; under one in use, nothing happens."""
        family = self._families.setdefault(key[0], {})
        if key in family:
            return
        family[key] = size
        self.live += size
        self._recent = max(self._recent, self.live)
        self.timeline.append(self.live)

    def free(self, key: tuple[Any, ...]) -> None:
        """Drop it, if it is there."""
        family = self._families.get(key[0])
        if family:
            self.live -= family.pop(key, 0)

    def rename(self, key: tuple[Any, ...], other: tuple[Any, ...]) -> None:
        """Call what is under a key by another one, which is not in use."""
        self._families.setdefault(other[0], {})[other] = self._families[key[0]].pop(key)

    def free_all(self, name: str, first: str | None = None) -> None:
        """Drop a family, or its keys whose second entry is ``first`` or begins with ``first`` and a dot."""
        for key in list(self.within(name, first)):
            self.live -= self._families[name].pop(key)

    def free_matching(self, name: str, entries: tuple[Any, ...]) -> None:
        """Drop the keys of a family that go on with ``entries``."""
        for key in self.matching(name, entries):
            self.live -= self._families[name].pop(key)

    def within(self, name: str, first: str | None = None) -> dict[tuple[Any, ...], int]:
        """A family, or its keys whose second entry is ``first`` or begins with ``first`` and a dot, and their bytes."""
        family = self._families.get(name, {})
        return {k: n for k, n in family.items() if first is None or k[1] == first or k[1].startswith(f"{first}.")}

    def matching(self, name: str, entries: tuple[Any, ...]) -> dict[tuple[Any, ...], int]:
        """The keys of a family that go on with ``entries``, and their bytes."""
        return {k: n for k, n in self._families.get(name, {}).items() if k[1 : 1 + len(entries)] == entries}

    def of(self, name: str, values: Collection[int]) -> dict[tuple[Any, ...], int]:
        """The keys of a family that go on with one of the ``values``, and their bytes."""
        return {k: n for k, n in self._families.get(name, {}).items() if k[1] in values}

    def entries(self) -> list[tuple[tuple[Any, ...], int]]:
        """Everything that is live, and its bytes."""
        return [entry for family in self._families.values() for entry in family.items()]

    def touch(self, size: float) -> None:
        """A tensor that lives for an instant."""
        self._recent = max(self._recent, self.live + int(size))

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._families.get(key[0], {})


class PeakMemory(Memory):
    """Also remembers what is live at the peak: key -> bytes."""

    def __init__(self, machine: Machine = CPU) -> None:
        super().__init__(machine)
        self.at_peak: dict[tuple[Any, ...], int] = {}

    def put(self, key: tuple[Any, ...], size: int) -> None:
        before = self.peak
        super().put(key, size)
        if self.peak > before:
            self.at_peak = {key: size for family in self._families.values() for key, size in family.items()}

    def touch(self, size: float) -> None:
        before = self.peak
        super().touch(size)
        if self.peak > before:
            self.at_peak = {key: size for family in self._families.values() for key, size in family.items()}
            self.at_peak["passing",] = int(size)
