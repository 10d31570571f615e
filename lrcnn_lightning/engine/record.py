"""The record of a call: where its values are as long as somebody keeps them, and how they are made once more.

A backward pass mostly finds what it needs among what was kept for it. Two passes need more: one whose own gradient is
wanted, which needs the inputs of a segment with their history, and one that finds a map changed by whoever it was
returned to. The record holds next to nothing alive, so it costs nothing where neither comes.

    value of the call   kept by somebody, and as it was       -> that tensor
                        made by a segment                     -> the segment runs again, from values found in this way
                                                                 (one that runs plainly, too, unless it draws numbers)
                        else                                  -> lost
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lrcnn_lightning.engine.rows import Carries, RowLoop, run_node
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.graph import draws
from lrcnn_lightning.planning.steps import Effect, Free, RunRows, RunWhole, Segment
from lrcnn_lightning.rules import RowGraph

__all__ = ["Ambient", "CallRecord", "SegmentCall", "replayed", "run_forward", "run_plainly"]


@dataclass
class Ambient:
    """Autocast at the time of the forward pass, to be the same in the backward pass."""

    autocast: list[tuple[str, torch.dtype, bool]]

    @staticmethod
    def now(kinds: set[str]) -> Ambient:
        """That of these kinds of devices."""
        known = sorted(filter(torch.amp.is_autocast_available, kinds))  # of some, such as ``meta``, it knows nothing
        return Ambient([(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in known])

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As it was."""
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@dataclass
class SegmentCall:
    """One call of a segment: the graph, the program, its slab calls, and the whole nodes' random states."""

    graph: RowGraph
    program: Segment
    prepared: Prepared
    random: dict[int, Any] = field(default_factory=dict)

    def needed(self) -> list[int]:
        """The inputs that its results depend on; a running statistic that is only updated is none."""
        nodes = (self.graph.nodes[position] for position in self.program.nodes)
        read = {index for node in nodes if node.outputs for index in node.inputs}
        return [index for index in self.program.inputs if index in read]


_SMALL = 4096
"""Elements of a value that is kept because it is small: statistics, weights of a normalisation."""


class CallRecord:
    """Of one call of a module: the values that its segments read, and the segments that make them."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[TensorWeakRef, int]] = {}
        self._makers: dict[int, SegmentCall] = {}
        self._small: dict[int, Tensor] = {}
        """Whole values that hardly take memory and that nobody else may keep."""
        self._before: dict[int, Tensor] = {}
        """What weights were whose data a later call of the module has changed."""
        self._copies: dict[int, Tensor] = {}
        """Arguments as they were."""
        self.needs_copies = False
        """Whether one of the arguments has been changed in place."""

    def keep_copies(self, tensors: Mapping[int, Tensor]) -> None:
        """Keep copies of arguments, which whoever has called may change in place."""
        self._copies = {index: tensor.detach().clone() for index, tensor in tensors.items()}

    def keep_before(self, tensor: Tensor, before: Tensor) -> None:
        """The data of a tensor has been changed by a later call of the module; it was ``before``."""
        memory = tensor.untyped_storage()._cdata
        for index, (reference, version) in self._values.items():
            own = reference()
            if own is None or own._version != version or index in self._before:
                continue
            if own.untyped_storage()._cdata == memory and (own.shape, own.dtype) == (before.shape, before.dtype):
                self._before[index] = before

    def later(self, call: SegmentCall) -> dict[int, Tensor]:
        """Of the inputs of a segment those whose data a later call has changed, as they are now."""
        tensors = {index: self._values[index][0]() for index in call.program.inputs if index in self._before}
        return {index: tensor for index, tensor in tensors.items() if tensor is not None}

    def note(self, call: SegmentCall, tensors: dict[int, Any]) -> None:
        """Take down what a segment reads and will make."""
        for index in call.program.inputs:
            tensor = tensors[index]
            if index not in self._values and not tensor.is_inference():
                self._values[index] = TensorWeakRef(tensor), tensor._version
                if tensor.numel() <= _SMALL and not call.graph.is_map(index):
                    self._small[index] = tensor
        self._makers.update(dict.fromkeys(call.program.outputs, call))

    def value(self, index: int, ambient: Ambient, history: bool = False) -> Tensor | None:
        """A value as it was in the call, with its history if that is asked for; None if it is lost."""
        reference, version = self._values.get(index, (None, 0))
        tensor: Tensor | None = None if reference is None else reference()
        if tensor is not None and tensor._version == version and index not in self._before:
            return tensor
        if index in self._before and not history:
            return self._before[index].clone()
        if index in self._copies and not history:
            self.needs_copies = True
            return self._copies[index]
        call = self._makers.get(index)
        if call is None:
            return None
        store = self.inputs(call, ambient, history)
        if store is None:
            return None
        with ambient.restored(), torch.set_grad_enabled(history):
            if history or call.program.plain:
                run_plainly(call, store)
            else:
                run_forward(call, store, again=True)
        result: Tensor = store[index]
        return result

    def inputs(self, call: SegmentCall, ambient: Ambient, history: bool = False) -> dict[int, Any] | None:
        """What a segment has read, as it was; None if anything of it is lost."""
        if call.graph.communicates:  # other processes do not run anything again
            return None
        store: dict[int, Any] = {}
        for index in call.needed():
            tensor = self.value(index, ambient, history)
            if tensor is None:
                return None
            store[index] = tensor
        return store


def run_forward(call: SegmentCall, store: dict[int, Any], again: bool = False) -> dict[str, Carries]:
    """Run a segment's forward program; returns the carries that it keeps, by loop.

    ``again``: without its effects, and with the same random numbers.
    """
    graph = call.graph
    rows = RowLoop(call.prepared, store)
    carries: dict[str, Carries] = {}
    for step in call.program.forward:
        if isinstance(step, RunRows):
            with torch.autograd.profiler.record_function(f"lrcnn {step.loop.name}"):
                kept = rows.forward(step.loop, step.kept_carries)
            if step.kept_carries:
                carries[step.loop.name] = kept
        elif isinstance(step, (RunWhole, Effect)):
            node = graph.nodes[step.node]
            if again and not node.outputs:
                continue
            if not again and call.program.backward and draws(node):
                call.random[step.node] = _random_state(store, node.inputs)
            with replayed(call.random.get(step.node) if again else None):
                store.update(zip(node.outputs, run_node(node, store), strict=True))
        elif isinstance(step, Free):
            store.pop(step.value, None)
    return carries


def run_plainly(call: SegmentCall, store: dict[int, Any]) -> None:
    """Run a segment's operations on full tensors, without its effects and with the same random numbers.

    Under autograd they can be differentiated as often as those of plain PyTorch. ``store`` has what the segment reads;
    of what it makes the outputs remain.
    """
    program, graph = call.program, call.graph
    last = {index: position for position in program.nodes for index in graph.nodes[position].inputs}
    kept = {*program.outputs, *store}
    for position in program.nodes:
        node = graph.nodes[position]
        if node.outputs:
            with replayed(call.random.get(position)):
                store.update(zip(node.outputs, run_node(node, store), strict=True))
        for index in {*node.inputs, *node.outputs}:
            if last.get(index, position) == position and index not in kept:
                store.pop(index, None)


def _random_state(store: dict[int, Any], inputs: tuple[int, ...]) -> Any:
    devices = {store[index].device for index in inputs if store[index].is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


@contextlib.contextmanager
def replayed(state: Any) -> Iterator[None]:
    """Random numbers from a state, and afterwards from where they were."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=list(state[1])):
        torch.set_rng_state(state[0])
        for device, device_state in state[1].items():
            torch.cuda.set_rng_state(device_state, device)
        yield
