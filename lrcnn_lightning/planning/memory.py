"""Simulated memory: live bytes by key, their peak, and what is live at it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from lrcnn_lightning.planning.machine import CPU, Machine

__all__ = ["Entry", "Key", "Memory", "PeakMemory"]

Key = tuple[Any, ...]
"""The first entry names a family."""


class Entry(NamedTuple):
    """What is under a key, to be taken over by another memory: bytes, and the number of the storage that has them.

    ``held``: whether something that is not taken over has the same storage.
    """

    key: Key
    size: int
    storage: int
    held: bool = False


class _Storage:
    """Bytes that are there as long as any key stands for them; ``number`` is that of an `Entry` that it came by."""

    __slots__ = ("number", "size", "users")

    def __init__(self, size: int, number: int | None = None) -> None:
        self.size, self.number, self.users = size, number, 0


class Memory:
    """Live bytes by key, and their peak. Several keys may stand for the same bytes, as views of a tensor do."""

    def __init__(self, machine: Machine = CPU) -> None:
        self.machine = machine
        self.live = 0
        self._before = 0  # the peak until the last mark
        self._recent = 0  # the peak since then
        self.timeline: list[int] = []
        """Live bytes after each allocation."""
        self._families: dict[str, dict[Key, _Storage]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were ever live."""
        return max(self._before, self._recent)

    def mark(self) -> int:
        """The most bytes that were live since the last mark."""
        recent, self._before, self._recent = self._recent, self.peak, self.live
        return recent

    def allocate(self, key: Key, size: float) -> None:
        """A tensor under a key that is not in use; under one in use, nothing happens."""
        self.put(key, self.machine.rounded(size))

    def allocate_alike(self, key: Key, size: float, count: int) -> None:
        """So many tensors of one size under one key."""
        self.put(key, self.machine.rounded(size) * count if self.machine.caching else int(size * count))

    def put(self, key: Key, size: int) -> None:
        """Count so many bytes under a key that is not in use; under one in use, nothing happens."""
        family = self._families.setdefault(key[0], {})
        if key in family:
            return
        family[key] = storage = _Storage(size)
        storage.users = 1
        self.live += size
        self._recent = max(self._recent, self.live)
        self.timeline.append(self.live)

    def share(self, key: Key, other: Key) -> None:
        """A view, under a key that is not in use, of what is under another; of what lives longer, if nothing is."""
        storage = self._families.get(other[0], {}).get(other)
        storage = storage or _Storage(0)
        storage.users += 1
        self._families.setdefault(key[0], {})[key] = storage

    def free(self, key: Key) -> None:
        """Drop it, if it is there."""
        family = self._families.get(key[0])
        storage = family.pop(key, None) if family else None
        if storage is not None:
            storage.users -= 1
            if not storage.users:
                self.live -= storage.size

    def rename(self, key: Key, other: Key) -> None:
        """Call what is under a key by another one, which is not in use."""
        self._families.setdefault(other[0], {})[other] = self._families[key[0]].pop(key)

    def free_all(self, name: str, first: str | None = None) -> None:
        """Drop a family, or its keys whose second entry is ``first`` or begins with ``first`` and a dot."""
        for key in self.within(name, first):
            self.free(key)

    def free_matching(self, name: str, entries: tuple[Any, ...]) -> None:
        """Drop the keys of a family that go on with ``entries``."""
        for key in self.matching(name, entries):
            self.free(key)

    def within(self, name: str, first: str | None = None) -> list[Key]:
        """The keys of a family, or those whose second entry is ``first`` or begins with ``first`` and a dot."""
        family = self._families.get(name, {})
        return [k for k in family if first is None or k[1] == first or k[1].startswith(f"{first}.")]

    def matching(self, name: str, entries: tuple[Any, ...]) -> list[Key]:
        """The keys of a family that go on with ``entries``."""
        return [k for k in self._families.get(name, {}) if k[1 : 1 + len(entries)] == entries]

    def of(self, name: str, values: Collection[int]) -> list[Key]:
        """The keys of a family that are its name and one of the ``values``."""
        family = self._families.get(name, {})
        return [key for value in sorted(values) if (key := (name, value)) in family]

    def given(self, keys: Iterable[Key]) -> tuple[Entry, ...]:
        """What is under these keys, for another memory to begin with."""
        storages = [(key, self._families[key[0]][key]) for key in keys]
        numbers: dict[int, int] = {}
        users: dict[int, int] = {}
        for _, storage in storages:
            number = numbers.setdefault(id(storage), len(numbers))
            users[number] = users.get(number, 0) + 1
        return tuple(
            Entry(key, storage.size, (number := numbers[id(storage)]), storage.users > users[number])
            for key, storage in storages
        )

    @staticmethod
    def beginning_with(entries: Iterable[Entry], machine: Machine) -> Memory:
        """A memory in which nothing else is live."""
        memory, storages = Memory(machine), dict[int, _Storage]()
        for key, size, number, held in entries:
            if number not in storages:
                storages[number] = _Storage(size, number)
                storages[number].users = int(held)
                memory.live += size
            storages[number].users += 1
            memory._families.setdefault(key[0], {})[key] = storages[number]
        memory._recent = memory.live
        return memory

    def left(self) -> tuple[Entry, ...]:
        """What is live: storages that it began with by their numbers, others by numbers below zero."""
        numbers: dict[int, int] = {}
        entries = []
        for family in self._families.values():
            for key, storage in family.items():
                number = storage.number
                if number is None:
                    number = numbers.setdefault(id(storage), -1 - len(numbers))
                entries.append(Entry(key, storage.size, number))
        return tuple(entries)

    def replace(self, given: Iterable[Entry], left: Iterable[Entry]) -> None:
        """Let what was `given` to another memory become what that has `left`."""
        given = tuple(given)
        storages = {number: self._families[key[0]][key] for key, _, number, _ in given}
        placed = []
        for key, size, number, _ in left:
            if number not in storages:
                storages[number] = _Storage(size)
                self.live += size
            storages[number].users += 1
            placed.append((key, storages[number]))
        for key, *_ in given:
            self.free(key)
        for key, storage in placed:
            self._families.setdefault(key[0], {})[key] = storage
        self._recent = max(self._recent, self.live)

    def touch(self, size: float) -> None:
        """A tensor that lives for an instant."""
        self._recent = max(self._recent, self.live + int(size))

    def size(self, key: Key) -> int:
        """Bytes of what is under a key; 0 if nothing is."""
        storage = self._families.get(key[0], {}).get(key)
        return 0 if storage is None else storage.size

    def __contains__(self, key: Key) -> bool:
        return key in self._families.get(key[0], {})

    def sizes(self) -> dict[Key, int]:
        """Live bytes by key, each storage under the first key that stands for it."""
        seen: set[int] = set()
        result: dict[Key, int] = {}
        for family in self._families.values():
            for key, storage in family.items():
                if id(storage) not in seen:
                    seen.add(id(storage))
                    result[key] = storage.size
        return result


class PeakMemory(Memory):
    """Also remembers what is live at the peak: key -> bytes."""

    def __init__(self, machine: Machine = CPU) -> None:
        super().__init__(machine)
        self.at_peak: dict[Key, int] = {}

    def put(self, key: Key, size: int) -> None:
        before = self.peak
        super().put(key, size)
        if self.peak > before:
            self.at_peak = self.sizes()

    def touch(self, size: float) -> None:
        before = self.peak
        super().touch(size)
        if self.peak > before:
            self.at_peak = self.sizes()
            self.at_peak["passing",] = int(size)
