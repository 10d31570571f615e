"""Taking a call back that has failed, so that it can be made again in another way.

What a call changes are random states and the buffers that it writes. Of these there are copies in the first call of a
plan alone, where a plan that cannot be executed fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.graph import Node, ValueKind, draws
from lrcnn_lightning.rules import Operator, RowGraph

__all__ = ["Before", "Undone", "draws_numbers", "written_buffers"]


class Undone(Exception):
    """A call has failed with ``error`` and was taken back."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def draws_numbers(graph: RowGraph) -> bool:
    """Whether a call draws random numbers."""
    return any(map(draws, graph.nodes))


def written_buffers(graph: RowGraph) -> list[int]:
    """The buffers that an operation with effects is given."""
    given = {index for node in graph.nodes if _has_effects(node) for index in node.inputs}
    return sorted(index for index in given if graph.values[index].kind is ValueKind.BUFFER)


def _has_effects(node: Node) -> bool:
    if isinstance(node.op, Operator):
        return node.op.effect
    return isinstance(node.op, torch._ops.OpOverload) and node.op._schema.is_mutable


class Before:
    """How it was before a call: the tensors it is given, by value; random states, if it ``draws`` numbers; and what is
    in the values ``copied``.
    """

    def __init__(self, tensors: Mapping[int, Any], draws: bool, copied: Collection[int]) -> None:
        given = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
        # Of inference tensors no versions are counted; they are inputs, which are not written.
        self._versions = [(tensor, tensor._version) for tensor in given if not tensor.is_inference()]
        self._state = torch.get_rng_state() if draws else None
        devices = {tensor.device for tensor in given if tensor.is_cuda} if draws else set()
        self._device_states = {device: torch.cuda.get_rng_state(device) for device in devices}
        # Whoever looks on, as a measurement does, sees what a call does, and not this.
        unseen = torch._C._len_torch_dispatch_stack() == 0
        with torch.no_grad():
            self._copies = {id(tensors[i]): tensors[i].detach().clone() for i in copied} if unseen else {}

    def undo(self) -> bool:
        """Put everything back; False, and nothing done, where a tensor has been written of which there is no copy."""
        changed = [tensor for tensor, version in self._versions if tensor._version != version]
        if any(id(tensor) not in self._copies for tensor in changed):
            return False
        with torch.no_grad():
            for tensor in changed:
                tensor.copy_(self._copies[id(tensor)])
        if self._state is not None:
            torch.set_rng_state(self._state)
        for device, state in self._device_states.items():
            torch.cuda.set_rng_state(state, device)
        return True
