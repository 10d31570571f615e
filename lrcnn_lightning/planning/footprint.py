"""Footprints: what each operation of a graph holds on a row of any height, learned from a few trials.

What an operation takes is linear in the rows that it computes, but for the rows at the border of the map, where it may
pad. So a node is tried on two heights of each kind of row, when that kind is first asked for, and lies on the line
through them:

    map  |  top  |   inner   |  bottom |        and, where one row is the whole map, that one

Nodes that do the same on the same shapes share their trials.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from lrcnn_lightning.graph import Ref, dense_strides, map_refs, references
from lrcnn_lightning.graph.switches import entered
from lrcnn_lightning.planning.kernels import Kernels
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.trial import Operand, Trial, called, results_of, tried, without_data
from lrcnn_lightning.rules import Interval, Reduction, Role, RowGraph, RowRule, Tile
from lrcnn_lightning.rules.formula import NumberedCall

__all__ = ["Footprint", "Footprints"]

_LOW, _HIGH = 4, 12
"""The heights of rows that are tried."""


_EVERYWHERE: dict[Any, Trial | None] = {}
"""Trials of PyTorch's own operations by their signatures. They are alike in every graph, and graphs of one network have
many in common: in another mode, at another size, for training and for evaluation.
"""
_MOST = 50_000
"""Trials that are remembered."""


class Footprint(NamedTuple):
    """What a call takes on all samples of the batch, in bytes. Values go by their indices in the graph."""

    views: tuple[int | None, ...]
    """Of each result: the input whose memory it has."""
    saved_inputs: tuple[int, ...]
    saved_results: tuple[int, ...]
    passed_on: dict[int, int]
    """Input -> the result whose gradient's memory the input's gradient has."""
    forward: float
    """At the peak where it is only run, beside inputs and results."""
    recompute: float
    """At the peak where it is recorded, beside inputs, results and what is saved beside these."""
    extra: float
    """Saved beside inputs and results."""
    backward: float
    """At the peak of the backward pass, beside what is saved, the gradients of results and ``whole``."""
    whole: float
    """Gradients of whole inputs (parameters, mostly); they do not shrink with the batch."""
    results: tuple[float, ...]
    """Each result; 0 for a view."""
    gradients: dict[int, float]
    """The gradient of each map among the inputs that has one."""
    largest: float
    """Elements (and not bytes) of the largest tensor that is made on the way, forward or backward, gradients of weights
    left out."""
    copies: tuple[bool, bool] = (False, False)
    """Whether kernels make dense copies of what has gaps first, forward and backward (`workspace`)."""
    gaps: tuple[bool, ...] = ()
    """Whether each result has gaps, being a part of a larger tensor."""
    by_formula: bool = False
    """Whether the gradients are those of a formula, which nobody else has."""


class ReductionFootprint(NamedTuple):
    """What some rows of the input of a reduction take, in bytes."""

    partial: float
    """At the peak of the rows' part."""
    inject: float
    """At the peak of making the gradient of the rows."""
    gradient: float
    """That gradient, which may be one line for all rows."""


class Footprints:
    """The footprints of the nodes of a graph; ``differentiable`` are the values that have a gradient."""

    def __init__(self, graph: RowGraph, differentiable: Collection[int], machine: Machine = CPU) -> None:
        self.graph, self.differentiable, self.machine = graph, differentiable, machine
        self.outside = frozenset(graph.graph.output_values())
        """What the module returns. A gradient from outside may be one number for all places, where the loss is a sum or
        a mean.
        """
        self._kernels = Kernels(machine, graph.learned.setdefault("workspaces", {}))
        kind = "trials by format" if machine.caching else "trials"
        self._trials: dict[Any, Trial | None] = graph.learned.setdefault(kind, {})
        self._footprints: dict[Any, Footprint] = {}
        self._reductions: dict[int, ReductionFootprint] = {}
        self._slabs: dict[Any, Trial | None] = {}
        self._strides: dict[int, tuple[int, ...]] | None = graph.learned.get(self._strides_key)

    @classmethod
    def of(cls, graph: RowGraph, differentiable: Collection[int], machine: Machine = CPU) -> Footprints:
        """Those that are known of the graph already, if any are."""
        footprints: dict[Any, Footprints] = graph.learned.setdefault("footprints", {})
        key = frozenset(differentiable), machine.caching, machine.device, machine.interpolates
        if key not in footprints:
            footprints[key] = cls(graph, differentiable, machine)
        return footprints[key]

    def slab(self, position: int, computed: Interval, unwanted: frozenset[int] = frozenset()) -> Footprint:
        """Of a node with a row rule that computes the rows ``computed`` of its result; nobody wants the gradients of
        its ``unwanted`` inputs.
        """
        height = self.graph.height(self.graph.nodes[position].outputs[0])
        key = (position, computed.length, computed.lo == 0, computed.hi == height, unwanted)
        footprint = self._footprints.get(key)
        if footprint is None:
            footprint = self._footprints[key] = self._on_the_line(position, computed, height, unwanted)
        return footprint

    def whole(self, position: int) -> Footprint:
        """Of a node that runs on full maps."""
        key = (position, -1, 0, 0)
        footprint = self._footprints.get(key)
        if footprint is None:
            trial = self._whole_trial(position)
            footprint = self._with_workspaces(self._named(position, trial, None), trial, self._kernels.of(trial))
            if footprint.copies[1]:
                returned = self.outside.intersection(self.graph.nodes[position].outputs)
                footprint = footprint._replace(
                    backward=footprint.backward + sum(self._bytes(index, None) for index in returned)
                )
            self._footprints[key] = footprint
        return footprint

    def reduction(self, position: int, rows: int, samples: int) -> ReductionFootprint:
        """Of a reduction's part of so many rows of its input."""
        value = self.graph.nodes[position].inputs[0]
        footprint = self._reductions.get(position)
        if footprint is None:
            footprint = self._reductions[position] = self._reduction_trial(position)
        share = rows / self.graph.height(value) * samples / (self.graph.samples(value) or samples or 1)
        return ReductionFootprint(*(size * share for size in footprint))

    # ---------------------------------------------------------------- trials

    def _on_the_line(self, position: int, computed: Interval, height: int, unwanted: frozenset[int]) -> Footprint:
        """From two trials at the same border, or from one where the map is low or the row is the whole of it."""
        rule = self.graph.rules[position]
        assert isinstance(rule, RowRule)
        length, top, bottom = computed.length, computed.lo == 0, computed.hi == height
        if top or bottom:
            # Nothing is different at a border where as many rows are needed as elsewhere.
            middle = rule.needed(Interval(height // 2, height // 2 + 1)).length
            if all(rule.needed(Interval(row, row + 1)).length == middle for row in (0, height - 1)):
                top = bottom = False
        if (top and bottom) or height < _HIGH + 2:
            return self._alone(position, computed, unwanted)
        low, high = _LOW, _HIGH

        def trial(rows: int) -> Trial | None:
            lo = 0 if top else height - rows if bottom else (height - rows) // 2
            return self._slab_trial(position, Interval(lo, lo + rows), unwanted)

        first, second = trial(low), trial(high)
        if first is None or second is None or first.gradients.keys() != second.gradients.keys():
            return self._alone(position, computed, unwanted)
        part = (length - low) / (high - low)

        def at(a: float, b: float) -> float:
            return max(a + part * (b - a), 0.0)

        line = second._replace(
            forward=at(first.forward, second.forward),
            recompute=at(first.recompute, second.recompute),
            extra=at(first.extra, second.extra),
            backward=at(first.backward, second.backward),
            whole=at(first.whole, second.whole),
            results=tuple(at(a, b) for a, b in zip(first.results, second.results, strict=True)),
            gradients={number: at(first.gradients[number], b) for number, b in second.gradients.items()},
            largest=at(first.largest, second.largest),
        )
        workspaces = 0.0, 0.0
        if self.machine.caching and any(second.kernels):
            workspaces = self._kernels.on_a_line((low, first), (high, second), trial, length, height)
        return self._with_workspaces(self._named(position, line, computed), second, workspaces)

    def _alone(self, position: int, computed: Interval, unwanted: frozenset[int]) -> Footprint:
        """From one trial of a row."""
        trial = self._slab_trial(position, computed, unwanted)
        return self._with_workspaces(self._named(position, trial, computed), trial, self._kernels.of(trial))

    # ---------------------------------------------------------------- workspaces

    def cuts(self, value: int, rows: int, of: int, samples: int) -> bool:
        """Whether so many ``rows`` of a slab (or map) ``of`` so many rows, and of so many samples, have gaps (on a GPU,
        where that matters).
        """
        if not self.machine.caching:
            return False
        graph = self.graph
        shape, row, batch = list(graph.values[value].shape), graph.axes[value].row, graph.axes[value].batch
        if row is None or rows >= of:
            return False
        if batch is not None:
            shape[batch] = samples
        strides = dense_strides(graph.values[value].shape, self._known_strides().get(value))
        return any(size > 1 and stride > strides[row] for size, stride in zip(shape, strides, strict=True))

    def _with_workspaces(self, footprint: Footprint, trial: Trial | None, workspaces: tuple[float, float]) -> Footprint:
        """With the bytes that kernels take forward and backward; ``trial`` tells which kernels."""
        if trial is None or not self.machine.caching:
            return footprint
        (forward, backward), kernels = workspaces, trial.kernels
        return footprint._replace(
            forward=footprint.forward + forward,
            recompute=footprint.recompute + forward,
            backward=footprint.backward + backward,
            copies=(any(call.copies for call in kernels[0]), any(call.copies for call in kernels[1])),
            gaps=trial.gaps,
        )

    def _slab_trial(self, position: int, computed: Interval, unwanted: frozenset[int]) -> Trial | None:
        key = (position, computed, unwanted)
        if key not in self._slabs:
            self._slabs[key] = self._try_slab(position, computed, unwanted)
        return self._slabs[key]

    def _try_slab(self, position: int, computed: Interval, unwanted: frozenset[int]) -> Trial | None:
        graph, node, rule = self.graph, self.graph.nodes[position], self.graph.rules[position]
        assert isinstance(rule, RowRule)
        batch = graph.axes[node.outputs[0]].batch
        samples = 0 if batch is None else graph.values[node.outputs[0]].shape[batch]
        tile, needed = Tile(computed, Interval(0, samples)), rule.needed(computed)
        operands = {number: self._operand(index, needed) for number, index in enumerate(node.inputs)}
        for number, index in enumerate(node.inputs):
            if index in unwanted:
                operands[number] = operands[number]._replace(wanted=False)

        numbers = {index: number for number, index in enumerate(node.inputs)}

        def arguments(tensors: Sequence[Any]) -> tuple[Any, Any]:
            remaining = iter(tensors)
            args, kwargs = map_refs((node.args, node.kwargs), lambda ref: next(remaining))
            return args, kwargs

        order = tuple(numbers[ref.index] for ref in references((node.args, node.kwargs)))

        def call(tensors: Mapping[int, Tensor]) -> Any:
            with entered(node.context):
                return rule.prepare(tile)(*arguments([tensors[number] for number in order]))

        recorded = None
        if not any(references(node.kwargs)):
            formula = rule.formula(tile, map_refs(node.args, lambda ref: operands[numbers[ref.index]].wanted))
            recorded = None if formula is None else NumberedCall(formula, order, arguments, node.context)
        return self._tried((rule, tile), position, call, operands, recorded)

    def _whole_trial(self, position: int) -> Trial | None:
        node = self.graph.nodes[position]
        operands = {number: self._operand(index, None) for number, index in enumerate(node.inputs)}

        def call(tensors: Mapping[int, Tensor]) -> Any:
            return called(node, {index: tensors[number] for number, index in enumerate(node.inputs)})

        return self._tried(None, position, call, operands)

    def _tried(
        self,
        key: Any,
        position: int,
        call: Callable[[Mapping[int, Tensor]], Any],
        operands: Mapping[int, Operand],
        recorded: NumberedCall | None = None,
    ) -> Trial | None:
        signature = self._signature(position, key, operands)
        trials = self._trials
        if isinstance(self.graph.nodes[position].op, OpOverload) and signature[0] != position:
            signature, trials = (*signature, self.graph.autocast, self.machine.caching), _EVERYWHERE
        if signature not in trials:
            if len(trials) >= _MOST:
                trials.clear()
            try:
                trials[signature] = tried(call, operands, self.graph.autocast, self.machine.caching, recorded)
            except Exception:  # some operations have no backward pass without data: taken to save their inputs
                trials[signature] = None
        return trials[signature]

    def _signature(self, position: int, key: Any, operands: Mapping[int, Operand]) -> Any:
        """Equal for trials that are alike."""
        node = self.graph.nodes[position]
        numbers = {index: Ref(number) for number, index in enumerate(node.inputs)}
        args = map_refs((node.args, node.kwargs), lambda ref: numbers[ref.index])
        try:
            signature = (node.op, key, _frozen(args), node.context, tuple(operands.values()))
            hash(signature)
        except TypeError:
            return position, repr(key)
        return signature

    def _operand(self, index: int, rows: Interval | None) -> Operand:
        """What stands for a value, or for some rows of it if it is a map."""
        graph, value = self.graph, self.graph.values[index]
        shape, row = list(value.shape), graph.axes[index].row if graph.is_map(index) else None
        if row is not None and rows is not None:
            shape[row] = rows.length
        wanted = index in self.differentiable and (value.dtype.is_floating_point or value.dtype.is_complex)
        counted = graph.is_map(index) or (rows is None and value.kind.value == "computed")
        made_by_rows = index in graph.producer and graph.roles[graph.producer[index]] is Role.ROW
        # Rows are written to a map that is contiguous; a slab may be a view. On a GPU memory formats are told apart.
        plain = rows is None and made_by_rows and not self.machine.caching
        order = None if plain else self._known_strides().get(index)
        strides = dense_strides(shape, order)
        return Operand(tuple(shape), strides, value.dtype, value.device, counted, wanted)

    def _known_strides(self) -> dict[int, tuple[int, ...]]:
        """The strides of each value, from one run of the graph without data and without autograd."""
        if self._strides is None:
            self._strides = self.graph.learned[self._strides_key] = {}
            if self.machine.caching:
                given = (value for value in self.graph.values if value.strides is not None)
                self._strides.update((value.index, dense_strides(value.shape, value.strides)) for value in given)
            with without_data(self.graph.autocast), torch.no_grad():
                self._run_for_strides(self._strides)
        return self._strides

    @property
    def _strides_key(self) -> str:
        return "strides by format" if self.machine.caching else "strides"

    def _run_for_strides(self, strides: dict[int, tuple[int, ...]]) -> None:
        graph = self.graph
        for node, rule in zip(graph.nodes, graph.rules, strict=True):
            if isinstance(rule, Reduction):  # what it makes is small, and contiguous
                continue
            tensors: dict[int, Tensor] = {}
            for index in node.inputs:
                value = graph.values[index]
                given = strides.get(index) or dense_strides(value.shape)
                tensors[index] = torch.empty_strided(value.shape, given, dtype=value.dtype, device=value.device)
            for index, result in results_of(node, tensors, graph.values).items():
                strides[index] = tuple(result.stride())

    def _reduction_trial(self, position: int) -> ReductionFootprint:
        """On the full map; what a reduction takes is in proportion to its rows."""
        graph, node, rule = self.graph, self.graph.nodes[position], self.graph.rules[position]
        assert isinstance(rule, Reduction)
        (index, *_), rows = node.inputs, Interval(0, graph.height(node.inputs[0]))
        slab = self._operand(index, rows)._replace(wanted=False)
        outputs = [self._operand(output, None)._replace(wanted=False, counted=False) for output in node.outputs]
        gradients = dict(enumerate((slab, *outputs)))
        footprints: dict[Any, ReductionFootprint] = graph.learned.setdefault("reductions", {})
        signature = self._signature(position, (rule, rows), gradients)
        if signature in footprints:
            return footprints[signature]

        def inject(tensors: Mapping[int, Tensor]) -> Any:
            whole = [tensors[number] for number in range(1, len(tensors))]
            return rule.inject(tensors[0], rows, rule.coefficients(whole, whole))

        def partial(tensors: Mapping[int, Tensor]) -> Any:
            return [part for part in tree_leaves(rule.partial(tensors[0], rows)) if isinstance(part, Tensor)]

        sizes = []
        for call, operands in ((partial, {0: slab}), (inject, gradients)):
            try:
                trial = tried(call, operands, graph.autocast)
                sizes.append((trial.forward + self._kernels.of(trial)[0], float(sum(trial.results))))
            except Exception:  # as above
                sizes.append((0.0, float(graph.values[index].bytes)))
        (passing, part), (injecting, gradient) = sizes
        footprints[signature] = ReductionFootprint(passing + part, injecting + gradient, gradient)
        return footprints[signature]

    def _named(self, position: int, trial: Trial | None, rows: Interval | None) -> Footprint:
        """A trial by the indices of the node's values."""
        graph, node = self.graph, self.graph.nodes[position]
        inputs, outputs = node.inputs, node.outputs
        rule = graph.rules[position]
        if trial is None:
            sizes = tuple(self._bytes(output, rows) for output in outputs)
            needed = rule.needed(rows) if rows is not None and isinstance(rule, RowRule) else None
            maps = graph.maps_read[position]
            wanted = {index: self._bytes(index, needed) for index in maps if index in self.differentiable}
            none: tuple[None, ...] = (None,) * len(outputs)
            total = sum(wanted.values())
            elements = [self._bytes(index, rows) / graph.values[index].dtype.itemsize for index in outputs]
            largest = max(elements, default=0.0)
            return Footprint(none, maps, (), {}, 0.0, 0.0, 0.0, total, 0.0, sizes, wanted, largest)
        return Footprint(
            tuple(None if view is None else inputs[view] for view in trial.views[: len(outputs)]),
            tuple(inputs[number] for number in trial.saved_inputs),
            tuple(outputs[number] for number in trial.saved_results if number < len(outputs)),
            {inputs[number]: outputs[result] for number, result in trial.passed_on.items() if result < len(outputs)},
            trial.forward,
            trial.recompute,
            trial.extra,
            max(trial.backward - trial.whole, sum(trial.gradients.values())),
            trial.whole,
            trial.results[: len(outputs)],
            {inputs[number]: size for number, size in trial.gradients.items()},
            trial.largest,
            by_formula=trial.by_formula,
        )

    def _bytes(self, index: int, rows: Interval | None) -> float:
        size, height = float(self.graph.values[index].bytes), self.graph.height(index)
        return size if rows is None or not height else size * rows.length / height


def _frozen(tree: Any) -> Any:
    """Nested arguments as something that can be hashed."""
    if isinstance(tree, (list, tuple)):
        return tuple(_frozen(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _frozen(item)) for key, item in tree.items())
    return type(tree), tree
