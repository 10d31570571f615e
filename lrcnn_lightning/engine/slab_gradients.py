"""The gradients of the slabs of a row, each a sum that comes piece by piece: from readers, from maps, from below."""

from __future__ import annotations

from torch import Tensor

from lrcnn_lightning.engine.slabs import Part
from lrcnn_lightning.graph.lines import in_zeros

__all__ = ["SlabGradients"]


class SlabGradients:
    """Gradients by value.

    What is added to a gradient goes into its memory, if that is nobody else's. The gradient of a sum is that of both
    its operands: the memory has two users, until the gradient of one of them has been taken and let go. A part of the
    gradient of a map has the memory of the map, which is not of this row.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._users: dict[int, int] = {}
        """Memory that was made for gradients of this row -> how many use it: values, and whoever holds it."""
        self._elsewhere: set[int] = set()
        """Memory of gradients of maps, which was not made for this row and lives longer."""

    def hold(self, gradient: Tensor) -> None:
        """Begin to use a gradient, which is new or has the memory of one that is here."""
        memory = _memory(gradient)
        if memory in self._users or (memory not in self._elsewhere and not _is_expanded(gradient)):
            self._users[memory] = self._users.get(memory, 0) + 1

    def let_go(self, gradient: Tensor) -> None:
        """No longer use what was held."""
        memory = _memory(gradient)
        if memory in self._users:
            self._users[memory] -= 1
            if not self._users[memory]:
                del self._users[memory]

    def is_alone(self, gradient: Tensor) -> bool:
        """Whether its memory has one user."""
        return self._users.get(_memory(gradient)) == 1

    def memory_here(self, gradient: Tensor) -> int | None:
        """The memory of a gradient, if it was made for this row."""
        memory = _memory(gradient)
        return memory if memory in self._users else None

    def add(self, value: int, gradient: Tensor, part: Part | None, elsewhere: bool = False) -> None:
        """Add the gradient of a slab, or of a part of it; ``elsewhere``: its memory is not of this row."""
        if elsewhere:
            self._elsewhere.add(_memory(gradient))
        present = self._tensors.get(value)
        if present is None and part is None:
            self._tensors[value] = gradient
            if _memory(gradient) in self._users:
                self._users[_memory(gradient)] += 1
        elif present is None:
            assert part is not None
            self._put(value, in_zeros(gradient, part.axis, part.start, part.total))
        elif self.is_alone(present):
            (present if part is None else part.of(present)).add_(gradient)
        else:
            total = present + gradient if part is None else present.clone()
            if part is not None:
                part.of(total).add_(gradient)
            self.let_go(present)
            self._put(value, total)

    def take(self, value: int) -> Tensor | None:
        """The gradient of a value, which is there no longer."""
        gradient = self._tensors.pop(value, None)
        if gradient is not None:
            self.let_go(gradient)
        return gradient

    def _put(self, value: int, gradient: Tensor) -> None:
        self._tensors[value] = gradient
        self._users[_memory(gradient)] = 1


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share a place in memory."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
