"""Segments: where borders are kept.

Nodes in execution order are cut into runs. A map that is made before a cut and read after it crosses the border and is
kept. Whole operations before the first row and after the last (a classifier's head) run under ordinary autograd. A
frozen prefix, of which nothing is differentiated, is a segment of its own that runs forward only.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from lrcnn_lightning.graph import HookCall
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["Stretch", "cut_points", "differentiable_values", "segment_borders", "stretches"]

_CUTS = 80
"""Cuts that are considered at most; the choice among them is quadratic."""


@dataclass(frozen=True)
class Stretch:
    """A run of nodes (positions) that is executed alike."""

    nodes: tuple[int, ...]
    kind: str
    """``plain`` (whole operations under ordinary autograd), ``frozen`` (rows, forward only) or ``rows``."""


def differentiable_values(graph: RowGraph, leaves: Collection[int]) -> set[int]:
    """The values that have a gradient, given the leaf values (inputs, parameters) that require one.

    These depend on a leaf, and an output depends on them: plain autograd leaves others without a gradient.
    """
    found = set(leaves)
    for node in graph.nodes:
        if not node.context.grad or node.op is torch.ops.aten.detach.default:
            continue
        if any(index in found for index in node.inputs):
            for output in node.outputs[getattr(node.op, "constants", 0) :]:
                dtype = graph.values[output].dtype
                if dtype.is_floating_point or dtype.is_complex:
                    found.add(output)
    escaping = {index for node in graph.nodes if isinstance(node.op, HookCall) for index in node.inputs}
    reached = found.intersection({*graph.graph.output_values(), *escaping})
    for node in reversed(graph.nodes):
        if any(output in reached for output in node.outputs):
            reached.update(index for index in node.inputs if index in found)
    return reached


def stretches(graph: RowGraph, differentiable: Collection[int], training: bool) -> list[Stretch]:
    """The graph's nodes but for the prologue, as stretches."""
    positions = [p for p in range(len(graph.nodes)) if graph.roles[p] is not Role.PROLOGUE]
    by_rows = [p for p in positions if graph.roles[p] in (Role.ROW, Role.REDUCE)]
    if not by_rows:
        return [Stretch(tuple(positions), "plain")] if positions else []
    first, last = by_rows[0], by_rows[-1]
    # Effects of the last reductions belong to the rows before them.
    while any(graph.roles[p] is Role.WHOLE and not graph.nodes[p].outputs for p in positions if p == last + 1):
        last += 1
    result = []
    before = tuple(p for p in positions if p < first)
    after = tuple(p for p in positions if p > last)
    middle = [p for p in positions if first <= p <= last]
    if before:
        result.append(Stretch(before, "plain"))
    start = 0
    if training:
        while start < len(middle) and not any(o in differentiable for o in graph.nodes[middle[start]].outputs):
            start += 1
    result.extend(_between_hooks(graph, middle[:start], "frozen"))
    result.extend(_between_hooks(graph, middle[start:], "rows" if training else "frozen"))
    if after:
        result.append(Stretch(after, "plain"))
    return result


def _between_hooks(graph: RowGraph, nodes: Sequence[int], kind: str) -> Iterator[Stretch]:
    """Stretches of a kind, and hooks, which run under ordinary autograd."""
    for hooks, run in itertools.groupby(nodes, key=lambda p: isinstance(graph.nodes[p].op, HookCall)):
        yield Stretch(tuple(run), "plain" if hooks else kind)


def segment_borders(graph: RowGraph, nodes: Sequence[int], count: int, rows: int) -> list[tuple[int, ...]]:
    """Cut ``nodes`` into at most ``count`` segments.

    Among the cuts that keep each segment's maps within a limit, those whose crossing maps are smallest; among the
    limits, the one for which kept maps and the largest segment's slabs (its maps over ``rows``) are smallest together.
    """
    if count <= 1 or len(nodes) <= 1:
        return [tuple(nodes)]
    crossing = _crossing_bytes(graph, nodes)
    if any(graph.roles[p] is Role.REDUCE for p in nodes):
        rows = 1  # behind a barrier maps are materialised within a segment: they are not divided by the rows
    weight = [sum(graph.values[o].bytes for o in graph.nodes[p].outputs if graph.is_map(o)) for p in nodes]
    prefix = [0]
    for bytes_ in weight:
        prefix.append(prefix[-1] + bytes_)
    points = [0, *_sensible_cuts(crossing, prefix), len(nodes)]
    best: tuple[float, list[int]] | None = None
    for denominator in (1, 1.5, 2, 3, 4, 6, 8, 12, 16):
        limit = prefix[-1] / min(denominator, count)
        chosen = _cheapest(points, crossing, prefix, count, limit)
        if chosen is None:
            continue
        ends = [0, *chosen, len(nodes)]
        largest = max(prefix[b] - prefix[a] for a, b in itertools.pairwise(ends))
        cost = sum(crossing[c] for c in chosen) + largest / max(rows, 1)
        short_of = count - 1 - len(chosen)
        if best is None or (short_of, cost) < (count - 1 - len(best[1]), best[0]):
            best = (cost, chosen)
    ends = [0, *(best[1] if best else []), len(nodes)]
    return [tuple(nodes[a:b]) for a, b in itertools.pairwise(ends)]


def cut_points(graph: RowGraph, nodes: Sequence[int]) -> list[int]:
    """Nodes (positions) before which a segment may well begin: few bytes cross there."""
    weight = [sum(graph.values[o].bytes for o in graph.nodes[p].outputs if graph.is_map(o)) for p in nodes]
    prefix = [0, *itertools.accumulate(weight)]
    return [nodes[i] for i in _sensible_cuts(_crossing_bytes(graph, nodes), prefix)]


def _sensible_cuts(crossing: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """Cuts where fewer bytes cross than on both sides; of very many, the best in each stretch of equal bytes."""
    cuts = []
    for i in range(1, len(crossing)):
        after = next((c for c in crossing[i:] if c != crossing[i]), crossing[i] + 1)
        if crossing[i - 1] > crossing[i] < after:
            cuts.append(i)
    if len(cuts) <= _CUTS:
        return cuts
    best: dict[int, int] = {}
    for i in cuts:
        bucket = prefix[i] * _CUTS // max(prefix[-1], 1)
        if bucket not in best or crossing[i] < crossing[best[bucket]]:
            best[bucket] = i
    return sorted(best.values())


def _crossing_bytes(graph: RowGraph, nodes: Sequence[int]) -> list[int]:
    """For each cut before ``nodes[i]``: bytes of the maps made before it among ``nodes`` and read after it."""
    order = {position: i for i, position in enumerate(nodes)}
    returned = set(graph.graph.output_values())
    change = [0] * (len(nodes) + 2)
    for i, position in enumerate(nodes):
        for value in graph.nodes[position].outputs:
            if not graph.is_map(value):
                continue
            last = max((order[r] for r in graph.readers[value] if r in order), default=i)
            if value in returned:
                continue
            change[i + 1] += graph.values[value].bytes
            change[last + 1] -= graph.values[value].bytes
    result, live = [], 0
    for i in range(len(nodes)):
        live += change[i]
        result.append(live)
    return result


def _cheapest(
    points: Sequence[int], crossing: Sequence[int], prefix: Sequence[int], count: int, limit: float
) -> list[int] | None:
    """At most ``count - 1`` cuts with the least crossing bytes, no segment above ``limit``; as many cuts as allowed."""
    table: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for _ in range(count):
        row: dict[int, tuple[float, int]] = {}
        for j in range(1, len(points)):
            for i, (cost, _previous) in table[-1].items():
                if i >= j or prefix[points[j]] - prefix[points[i]] > limit:
                    continue
                total = cost + (crossing[points[j]] if j < len(points) - 1 else 0)
                if j not in row or total < row[j][0]:
                    row[j] = (total, i)
        table.append(row)
    end = len(points) - 1
    for used in range(count, 0, -1):
        if end in table[used]:
            path, j = [], end
            for level in range(used, 0, -1):
                j = table[level][j][1]
                path.append(points[j])
            return sorted(point for point in path if point != 0)
    return None
