"""Buffers: memory that several tensors of a simulation may share, live as long as any of them is."""

from __future__ import annotations

from typing import Any

from lrcnn_lightning.planning.memory import Memory

__all__ = ["Buffers"]

Name = tuple[Any, ...]


class Buffers:
    """Tensors by name, a tuple whose first entry names a family of the `Memory`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._place: dict[Name, Name | None] = {}
        """Name -> buffer; ``None`` where the memory is that of something which lives longer (a full map)."""
        self._users: dict[Name, int] = {}
        self._loose: set[Name] = set()
        self._made = 0

    def __contains__(self, name: Name) -> bool:
        return name in self._place

    def make(self, name: Name, size: float, loose: bool = False) -> None:
        """A new tensor of ``size`` bytes. If there is one of that name, that is let go once the new one is there.

        ``loose``: elements share memory, or others may have it.
        """
        self._made += 1
        buffer = (*name, self._made)
        if loose:
            self._loose.add(buffer)
        self._memory.allocate(buffer, size)
        self.drop(name)
        self._place[name] = buffer
        self._users[buffer] = 1

    def share(self, name: Name, other: Name) -> None:
        """A view of another tensor, or of a full map where that is not known."""
        buffer = self._place.get(other)
        if buffer is not None:
            self._users[buffer] += 1
        self.drop(name)
        self._place[name] = buffer

    def is_alone(self, name: Name) -> bool:
        """Whether a tensor has its memory for itself."""
        buffer = self._place.get(name)
        return buffer is not None and self._users[buffer] == 1 and buffer not in self._loose

    def memory_of(self, name: Name) -> Name | None:
        """The key that the memory of a tensor is under."""
        return self._place.get(name)

    def hold(self, name: Name) -> Name | None:
        """Whoever gives the buffer that is returned to `release` uses it until then."""
        buffer = self._place.get(name)
        if buffer is not None:
            self._users[buffer] += 1
        return buffer

    def release(self, buffer: Name | None) -> None:
        if buffer is not None:
            self._users[buffer] -= 1
            if not self._users[buffer]:
                del self._users[buffer]
                self._memory.free(buffer)

    def drop(self, name: Name) -> None:
        """Let a tensor go, if it is there."""
        self.release(self._place.pop(name, None))

    def drop_all(self) -> None:
        """Let all of them go, and whatever is still used."""
        for buffer in self._users:
            self._memory.free(buffer)
        self._place.clear()
        self._users.clear()
