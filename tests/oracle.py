"""The oracle: plain autograd in float64 on the same module.

What a step shows, and the verdict on each value of it, are those of `lrcnn_lightning.check`: every output, every input
gradient, every parameter gradient, every buffer, attribute and random number, one by one; a gradient that is missing on
one side only is a difference. There are no sums, no means, and no parameter is left out. No noise excuses an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.checking.check import compared
from lrcnn_lightning.checking.comparison import RELATIVE, compare
from lrcnn_lightning.checking.example import Example
from lrcnn_lightning.checking.steps import Shown, show, weighted
from lrcnn_lightning.checking.subject import twin
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.engine.rows import run_node
from lrcnn_lightning.graph import Graph, Ref, ValueKind, capture, map_refs
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.keeping import Keeping
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.rules import Interval, Reduction, Role, RowGraph, RowRule, Tile, lower
from lrcnn_lightning.rules.formula import paired

__all__ = ["RELATIVE", "assert_exact", "check_rules", "difference", "differences", "observe", "row_graph", "twin"]

MODES = ("two_phase", "overlap")
KEEPINGS: tuple[Keeping, ...] = ("lean", "narrow", "borders", "demand")


def observe(
    forward: Callable[..., Any], module: nn.Module, inputs: Sequence[Any], seed: int, differentiate: bool = True
) -> Shown:
    """What one step of ``forward``, which runs ``module``, shows; the loss weighs every output at random."""
    leaves, given = Example.of(module, tuple(inputs)).fresh(wide=False, move=lambda tensor: None)
    return show(forward, module, leaves, given, weighted(seed + 1) if differentiate else None, seed)


def difference(got: Tensor, want: Tensor) -> float:
    """The difference by the norm or by an element, whichever is larger, relative to ``want`` where that is not zero."""
    value = ("output", "output")
    item = compare(value, {value: got}, {value: want})
    return max(item.error, item.largest)


def differences(got: Shown, want: Shown, allowed: float = RELATIVE) -> list[str]:
    """A line for everything that differs, tensors by more than ``allowed`` of their norm or largest element."""
    found = [item for item in compared(got, want) if not item.exact]
    return [str(item) for item in found if not RELATIVE <= max(item.error, item.largest) < allowed]


def row_graph(module: nn.Module, inputs: Sequence[Any], axis: int | str = "auto") -> RowGraph:
    """Capture and lower."""
    return lower(capture(module, tuple(inputs)), axis)


def wanting_gradients(inputs: Iterable[Any]) -> list[Any]:
    """The inputs in float64, the floating ones requiring a gradient unless they are tagged by ``no_gradient``."""
    result = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().requires_grad_(not getattr(x, "frozen", False))
        result.append(x)
    return result


def no_gradient(x: Tensor) -> Tensor:
    """Tag an input as one that needs no gradient."""
    x.frozen = True  # type: ignore[attr-defined]
    return x


def assert_exact(
    module: nn.Module,
    *inputs: Any,
    modes: Sequence[str] = MODES,
    rows: Sequence[int] = (1, 2, 5),
    segments: Sequence[int] = (1, 2),
    batch_chunks: Sequence[int] = (1,),
    keeping: Sequence[Keeping] = ("lean",),
    train: bool | None = True,
    axis: int | str = "auto",
    seed: int = 0,
    differentiate: bool = True,
    choices: Sequence[Choices] | None = None,
    graph: RowGraph | None = None,
) -> RowGraph:
    """Row-wise equals plain, under each combination of choices (or under the given ``choices``).

    Parameters keep their ``requires_grad``; the module itself is not changed. ``graph`` is that of the same module in
    the same state, if it is there already; ``train`` None leaves each submodule in its state. Returns the row graph.
    """
    module = twin(module).double()
    if train is not None:
        module.train(train)
    given = wanting_gradients(inputs)
    plain = twin(module)
    want = observe(plain, plain, given, seed, differentiate)
    graph = graph or row_graph(module, given, axis)
    leaves = requires_grad_leaves(graph.graph, module, given) if differentiate else frozenset()
    if choices is None:
        combinations = itertools.product(modes, rows, segments, batch_chunks, keeping)
        choices = [Choices(*combination) for combination in combinations]
    for choice in choices:
        fresh = twin(module)
        plan = Planner(Problem(graph, leaves, differentiate)).plan(choice)
        got = observe(lambda *x, p=plan, m=fresh: Execution(p)(m, list(x)), fresh, given, seed, differentiate)
        wrong = differences(got, want)
        assert not wrong, f"{choice}:\n  " + "\n  ".join(wrong)
    return graph


# ------------------------------------------------------------------------------------------- rules, one by one


def roles(graph: RowGraph) -> dict[str, list[str]]:
    """Role -> names of the operations that have it and touch a map."""
    result: dict[str, list[str]] = {"row": [], "reduce": [], "whole": []}
    for node, role in zip(graph.nodes, graph.roles, strict=True):
        if role is Role.WHOLE and not any(graph.is_map(i) for i in (*node.inputs, *node.outputs)):
            continue
        if role is not Role.PROLOGUE:
            result[role.value].append(str(node.op))
    return result


def full_values(graph: RowGraph, module: nn.Module, inputs: Sequence[Tensor]) -> dict[int, Any]:
    """Every value of the graph, from full tensors, without autograd."""
    store: dict[int, Any] = {}
    source: Graph = graph.graph
    named = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    for value in source.values:
        if value.kind is ValueKind.INPUT:
            store[value.index] = inputs[int(str(value.source))].detach()
        elif value.kind in (ValueKind.PARAMETER, ValueKind.BUFFER):
            store[value.index] = named[str(value.source)].detach().clone()
        elif value.kind is ValueKind.CONSTANT:
            store[value.index] = source.constants[str(value.source)]
    with torch.no_grad():
        for node in graph.nodes:
            store.update(zip(node.outputs, run_node(node, store), strict=True))
    return store


def check_rules(module: nn.Module, *inputs: Tensor, axis: int | str = "auto") -> RowGraph:
    """Every rule of the module's graph, on every interval: the slab is the rows of the full result (1e-12)."""
    module = twin(module).double()
    given = wanting_gradients(inputs)
    graph = row_graph(module, given, axis)
    torch.manual_seed(0)
    store = full_values(graph, module, given)
    for node, rule in zip(graph.nodes, graph.rules, strict=True):
        if isinstance(rule, RowRule):
            for interval in _intervals(graph.height(node.outputs[0])):
                for batch in _batches(graph, node.outputs[0]):
                    _check_row(graph, store, node, rule, Tile(interval, batch))
        elif isinstance(rule, Reduction):
            _check_reduction(graph, store, node, rule)
    return graph


def _intervals(height: int) -> list[Interval]:
    """All intervals of a low map; of a higher one single rows, beginnings and ends."""
    everything = [Interval(a, b) for a in range(height) for b in range(a + 1, height + 1)]
    if height <= 9:
        return everything
    return [i for i in everything if i.length == 1 or i.lo == 0 or i.hi == height]


def _batches(graph: RowGraph, output: int) -> list[Interval]:
    """All samples, and the last one, if the batch can be divided at all."""
    samples = graph.samples(output)
    divisible = graph.batch_splits and samples > 1
    return [Interval(0, samples), *([Interval(samples - 1, samples)] if divisible else [])]


def _cut(tensor: Tensor, dimension: int | None, part: Interval) -> Tensor:
    return tensor if dimension is None else tensor.narrow(dimension, part.lo, part.length)


def _check_row(graph: RowGraph, store: dict[int, Any], node: Any, rule: RowRule, tile: Tile) -> None:
    needed = rule.needed(tile.rows)
    where = f"{node.op} of {node.name}, rows {tuple(tile.rows)}, samples {tuple(tile.batch)}"

    def argument(ref: Ref) -> Any:
        full = store[ref.index]
        if not graph.is_map(ref.index):
            return full
        height = graph.height(ref.index)
        assert 0 <= needed.lo < needed.hi <= height, f"{where}: needs {tuple(needed)} of {height} rows"
        axes = graph.axes[ref.index]
        return _cut(_cut(full, axes.row, needed), axes.batch if graph.batch_splits else None, tile.batch)

    args, kwargs = map_refs(node.args, argument), map_refs(node.kwargs, argument)
    with torch.no_grad():
        result = rule.run(args, kwargs, tile)
    slabs = tuple(result) if isinstance(result, (list, tuple)) else (result,)
    for value, slab in zip(node.outputs, slabs, strict=True):
        axes = graph.axes[value]
        want = _cut(_cut(store[value], axes.row, tile.rows), axes.batch if graph.batch_splits else None, tile.batch)
        if not graph.readers[value] and value not in graph.graph.output_values() and slab is slabs[0]:
            # What nobody reads may be a stand-in: of the shape and the type that it would have.
            assert (slab.shape, slab.dtype) == (want.shape, want.dtype), where
            continue
        gap = difference(slab, want)
        assert gap < 1e-12, f"{where}: differs by {gap:.2e} (shapes {list(slab.shape)}, {list(want.shape)})"
    _check_formula(graph, node, rule, args, kwargs, tile, where)


def _check_formula(
    graph: RowGraph, node: Any, rule: RowRule, args: tuple[Any, ...], kwargs: dict[str, Any], tile: Tile, where: str
) -> None:
    """A formula gives the results and the gradients of the operation, and the gradients also of a hollow one."""
    buffers = [isinstance(ref, Ref) and graph.values[ref.index].kind is ValueKind.BUFFER for ref in _flat(node.args)]
    floats = [
        isinstance(a, Tensor) and a.is_floating_point() and not buffer
        for a, buffer in zip(_flat(args), buffers, strict=True)
    ]
    formula = rule.formula(tile, _nested(args, floats))
    assert not rule.hollow or formula is not None, f"{where}: hollow without a formula"
    if (
        formula is None
        or any(isinstance(item, Tensor) for item in kwargs.values())
        or not formula.applies(args, kwargs)
    ):
        return
    leaves = [
        a.detach().clone().requires_grad_(wanted) if isinstance(a, Tensor) else a
        for a, wanted in zip(_flat(args), floats, strict=True)
    ]
    outputs = rule.run(_nested(args, leaves), kwargs, tile)
    outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(o.shape, generator=generator, dtype=o.dtype) if o.requires_grad else None for o in outputs]
    if all(seed is None for seed in seeds):
        return
    torch.autograd.backward(
        [o for o, s in zip(outputs, seeds, strict=True) if s is not None], [s for s in seeds if s is not None]
    )
    for hollow in (False, True)[: 1 + rule.hollow]:
        with torch.no_grad():
            result, saved = formula.forward(args, kwargs, hollow)
            made = [gradient for _, gradient in paired(args, formula.backward(saved, list(seeds)))]
        if not hollow:
            for mine, theirs in zip(result if isinstance(result, tuple) else (result,), outputs, strict=True):
                assert difference(mine, theirs) < 1e-12, f"{where}: the formula's result differs"
        for mine, leaf in zip(made, leaves, strict=True):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad is not None:
                assert mine is not None, f"{where}: the formula has no gradient"
                assert mine.shape == leaf.shape and difference(mine, leaf.grad) < 1e-12, f"{where}: by formula"


def _flat(tree: Sequence[Any]) -> list[Any]:
    """What is inside nested lists and tuples, in order."""
    return [item for item, _ in paired(tree, ())]


def _nested(tree: Any, items: Sequence[Any]) -> Any:
    """The items in the places of what is inside nested lists and tuples."""
    remaining = iter(items)

    def placed(item: Any) -> Any:
        return [placed(inner) for inner in item] if isinstance(item, (list, tuple)) else next(remaining)

    return tuple(placed(item) for item in tree)


def _check_reduction(graph: RowGraph, store: dict[int, Any], node: Any, rule: Reduction) -> None:
    """Partial results of any split, merged, are the full result; injected slabs are the full gradient."""
    index = node.inputs[0]
    height, axes = graph.height(index), graph.axes[index]
    leaf = store[index].detach().clone().requires_grad_()
    args = map_refs(node.args, lambda ref: leaf if ref.index == index else store[ref.index])
    result = node.op(*args, **node.kwargs)
    outputs = tuple(result) if isinstance(result, (list, tuple)) else (result,)
    roots = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in roots]
    (want,) = torch.autograd.grad(roots, [leaf], seeds)
    by_output = iter(seeds)
    gradients = [next(by_output) if o.requires_grad else None for o in outputs]
    finished = [o.detach() for o in outputs]
    splits = [[0, a, height] for a in range(1, height)] + [list(range(height + 1)), [0, height]]
    for split in splits:
        intervals = [Interval(a, b) for a, b in itertools.pairwise(split)]
        state = None
        for interval in intervals:
            slab = _cut(leaf.detach(), axes.row, interval)
            part = rule.partial(slab, interval)
            state = part if state is None else rule.merge(state, part)
            injected = rule.inject(slab, interval, rule.coefficients(finished, gradients))
            gap = difference(injected.expand(slab.shape).contiguous(), _cut(want, axes.row, interval).contiguous())
            assert gap < 1e-12, f"{node.op}: gradient of rows {tuple(interval)} differs by {gap:.2e}"
        assert state is not None
        for mine, theirs in zip(rule.finish(state), finished, strict=True):
            assert difference(mine, theirs) < 1e-12, f"{node.op} of {node.name}: split {split} differs"
