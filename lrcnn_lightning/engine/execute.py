"""Executing a plan: the prologue, then the segments, on the live parameters and buffers of a module."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrcnn_lightning.engine.record import CallRecord, SegmentCall
from lrcnn_lightning.engine.rows import run_node
from lrcnn_lightning.engine.segment import CHANGED_ARGUMENT, CHANGED_MAP, INTACT, run_segment
from lrcnn_lightning.engine.slabs import Prepared
from lrcnn_lightning.engine.undo import Before, Undone, draws_numbers, written_buffers
from lrcnn_lightning.errors import is_out_of_memory
from lrcnn_lightning.fake import is_fake
from lrcnn_lightning.graph import Graph, Node, Value, ValueKind, Write, draws, map_refs, views_of, written_argument
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.rules import RowGraph

__all__ = ["Execution", "live_tensor", "requires_grad_leaves"]

_NONE: Mapping[int, Any] = {}


def live_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name, as it is now."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    tensor: Tensor = getattr(owner, leaf)
    return tensor


def source_tensor(graph: Graph, module: nn.Module, value: Value, inputs: Sequence[Any]) -> Any:
    """The tensor that a value is which no node computes, as it is now."""
    if value.kind is ValueKind.INPUT:
        assert isinstance(value.source, int)
        return inputs[value.source]
    held = graph.constants.get(str(value.source))
    return live_tensor(module, str(value.source)) if held is None else held


def _sources(graph: Graph, module: nn.Module, inputs: Sequence[Any]) -> dict[int, Any]:
    """The tensors that no node computes, as far as ``inputs`` go."""
    return {
        value.index: source_tensor(graph, module, value, inputs)
        for value in graph.values
        if value.kind is not ValueKind.COMPUTED and not (isinstance(value.source, int) and value.source >= len(inputs))
    }


def _prefixed(graph: Graph, module: nn.Module, inputs: Sequence[Any]) -> Sequence[Any]:
    """Run the prefix of a graph on the inputs of a call; its results stand behind them then."""
    if not graph.prefix.nodes:
        return inputs
    store = _sources(graph, module, inputs)
    for node in graph.prefix.nodes:
        store.update(zip(node.outputs, run_node(node, store), strict=True))
    return [*inputs, *(store[index] for index in graph.prefix.results)]


class Execution:
    """A plan made ready to be run, step after step."""

    def __init__(
        self,
        program: Program,
        tell: Callable[[str], None] = lambda event: None,
        pending: weakref.WeakSet[CallRecord] | None = None,
        is_part: bool = False,
    ) -> None:
        """``is_part``: whether the module is called by the code of another one that cannot run row by row, which may
        change in place what it has given to its parts. Then copies of arguments are kept until a backward pass finds
        all as it was, and for good where it does not.
        """
        self.program, self._tell = program, tell
        """``tell`` is told of backward passes that take more than was planned (`engine.segment`)."""
        self._copies = False
        self._prepared = Prepared(program.graph)
        self._draws = draws_numbers(program.graph)
        self._copied = written_buffers(program.graph)
        """Of what, with the random states, there are copies while the plan has not been executed to its end yet."""
        self._drops = program.drops
        self._writes = _weight_writes(program)
        self._pending: weakref.WeakSet[CallRecord] = weakref.WeakSet() if pending is None else pending
        """Of calls of the module, by this plan or another, whose backward pass may come."""
        self._views = _returned_views(program.graph)
        self._remade = _remade(program)
        self._keeps_arguments, self._arguments_change = is_part, False
        self._arguments = [value.index for value in program.graph.graph.inputs if program.graph.is_map(value.index)]

    def __call__(self, module: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run the plan on the flat inputs of a call; returns what the module would return.

        Raises `Undone` where the call fails and could be taken back, so that it can be made in another way. (Not where
        other processes take part, which would have to do the same.)
        """
        before = Before(_sources(self.program.graph.graph, module, inputs), self._draws, self._copied)
        try:
            result = self._run(module, inputs)
        except Exception as error:
            if is_out_of_memory(error) or self.program.graph.communicates or not before.undo():
                raise
            raise Undone(error) from error
        self._draws, self._copied = False, []
        return result

    def _run(self, module: nn.Module, inputs: Sequence[Any]) -> Any:
        program, graph = self.program, self.program.graph
        store = _sources(graph.graph, module, _prefixed(graph.graph, module, inputs))
        self._run_plainly(program.problem.prologue, store, self._writes)
        record = CallRecord()
        if self._writes and torch.is_grad_enabled():
            self._pending.add(record)
        if self._keeps_arguments and torch.is_grad_enabled():
            record.keep_copies({index: store[index] for index in self._arguments})
        for number, segment in enumerate(program.segments):
            call = SegmentCall(graph, segment, self._prepared)
            if segment.plain:
                if number in self._remade:
                    record.note(call, store)
                self._run_plainly(segment.nodes, store)
            else:
                outputs = run_segment(call, [store[index] for index in segment.inputs], record, self._told)
                store.update(zip(segment.outputs, outputs, strict=True))
            for index in segment.inputs:
                if program.last_reader.get(index) == number:
                    store.pop(index, None)
        if self._copies:
            kept = {index for segment in program.segments for index in segment.kept}
            store.update(
                {i: store[i].clone() for i in graph.graph.output_values() if i in kept and i in graph.producer}
            )
        for node in self._views:
            store.update(zip(node.outputs, run_node(node, store), strict=True))
        leaves = map_refs(list(graph.graph.outputs), lambda ref: store[ref.index])
        returned = graph.graph.structure.size
        _write(module, graph.graph.writes, leaves[returned:])
        return graph.graph.structure.put_together(leaves[:returned])

    def _run_plainly(
        self, nodes: Sequence[int], store: dict[int, Any], writes: Mapping[int, _WeightWrite] = _NONE
    ) -> None:
        """Run nodes under ordinary autograd, and drop what is not read any more; ``writes``: which of them change a
        weight in place, and how.
        """
        for position in nodes:
            node, write = self.program.graph.nodes[position], writes.get(position)
            with contextlib.nullcontext() if write is None else _written(store[write.value], write, self._pending):
                results = run_node(node, store)
            store.update(zip(node.outputs, results, strict=True))
            for index in self._drops.get(position, ()):
                del store[index]

    def _told(self, event: str) -> None:
        """Maps that are returned are copied once one was changed, so that what is kept of the next ones stays."""
        self._copies = self._copies or event == CHANGED_MAP
        self._arguments_change = self._arguments_change or event == CHANGED_ARGUMENT
        self._keeps_arguments = self._arguments_change or (self._keeps_arguments and event != INTACT)
        if event != INTACT:
            self._tell(event)


def _remade(program: Program) -> set[int]:
    """The numbers of the segments that run plainly and whose results rows read: these may have to be made once more."""
    read = {index for segment in program.segments if not segment.plain for index in segment.inputs}
    return {
        number
        for number, segment in enumerate(program.segments)
        if segment.plain
        and not read.isdisjoint(segment.outputs)
        and not any(draws(program.graph.nodes[position]) for position in segment.nodes)
    }


class _WeightWrite(NamedTuple):
    """A weight is changed in place: by ``weight.data.mul_(mask)`` or without gradients, ``weight.mul_(mask)``."""

    value: int
    """What is written: the parameter, or its data."""
    by_data: bool


def _weight_writes(program: Program) -> dict[int, _WeightWrite]:
    """The nodes of the prologue that write a parameter in place, or its data."""
    nodes = {position: program.graph.nodes[position] for position in program.problem.prologue}
    weights = {value.index for value in program.graph.values if value.kind is ValueKind.PARAMETER}
    detached = (node for node in nodes.values() if node.op is torch.ops.aten.detach.default)
    data = {node.outputs[0] for node in detached if node.inputs[0] in weights}
    written = {position: written_argument(node) for position, node in nodes.items()}
    return {
        position: _WeightWrite(ref.index, ref.index in data)
        for position, ref in written.items()
        if ref is not None and ref.index in weights | data
    }


@contextlib.contextmanager
def _written(tensor: Tensor, write: _WeightWrite, pending: Collection[CallRecord]) -> Iterator[None]:
    """Records of ``pending`` calls, whose backward pass is still to come, keep what a weight was before it is written.

    For autograd a weight that is written without gradients has changed only if its values are others afterwards: masked
    convolutions write the same zeros in each call, and the backward pass of a call before would be refused for that.
    One that is written by its data has not changed at all, as in plain PyTorch.
    """
    if is_fake(tensor) or not (pending or write.by_data):  # without data it has no values
        yield
        return
    before = tensor.detach().clone() if pending else None
    with torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore[attr-defined]
        yield
    if before is not None and not torch.equal(before, tensor):
        for record in pending:
            record.keep_before(tensor, before)
        if not write.by_data:
            torch.autograd.graph.increment_version(tensor)


def _returned_views(graph: RowGraph) -> list[Node]:
    """The nodes by which returned values are views of other returned ones, in order.

    They are run once more on what is returned, so that, as in plain PyTorch, whoever changes one changes the other.
    """
    view = {index: node for node in graph.nodes for index, node in views_of(node).items()}
    returned = set(graph.graph.output_values())
    wanted: set[int] = set()
    for index in returned & view.keys():
        chain = [index]
        while chain[-1] in view and (chain[-1] not in returned or chain[-1] == index):
            chain.append(view[chain[-1]].inputs[0])
        if chain[-1] in returned:
            wanted.update(id(view[link]) for link in chain[:-1])
    return [node for node in graph.nodes if id(node) in wanted]


def _write(module: nn.Module, writes: Sequence[Write], leaves: list[Any]) -> None:
    """Set the attributes that the module's own code would have set."""
    for write in writes:
        owner = module.get_submodule(write.path) if write.path else module
        value = write.structure.put_together(leaves[: write.structure.size])
        if write.buffer is not None and write.name not in owner._buffers:
            owner.register_buffer(write.name, value, persistent=write.buffer)
        else:
            setattr(owner, write.name, value)
        leaves = leaves[write.structure.size :]


def requires_grad_leaves(graph: Graph, module: nn.Module, inputs: Sequence[Any]) -> frozenset[int]:
    """Inputs and live tensors that require a gradient now; those that the prefix writes or computes, after it."""
    sources = _sources(graph, module, inputs)
    leaves = {index for index, tensor in sources.items() if tensor.requires_grad}
    for node in graph.prefix.nodes:
        if node.context.grad and not leaves.isdisjoint(node.inputs):
            written = written_argument(node)
            results = (*node.outputs, *(() if written is None else (written.index,)))
            leaves.update(index for index in results if graph.values[index].dtype.is_floating_point)
    return frozenset(index for index in leaves if graph.values[index].kind is not ValueKind.COMPUTED)
