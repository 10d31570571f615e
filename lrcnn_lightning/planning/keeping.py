"""What to keep: the residency of each map of a segment.

Without a barrier inside, everything between the borders streams: that is LR-CNN. With normalisation in training mode,
a map that is reduced is read twice in the forward pass (its moments, then its use), and the reductions cut a segment
into many levels. Then

    reduced, and not much larger than what it is computed from      KEEP          (the narrow maps of a bottleneck)
    reduced, and wider than its source                              TRANSIENT in the forward pass; in the backward pass
                                                                    STREAM (``lean``: it and its gradient never exist
                                                                    whole) or TRANSIENT (one recomputation less)
    read in a later level (the shortcut of a residual block)        TRANSIENT
    anything else (normalised maps, activations)                    STREAM

Where nothing is differentiated, a reduced map may be STREAM in the forward pass, too: it is computed once for its
moments and once for its use (``nothing``).

These are where the planner begins. Single maps are then excepted from the rule where that pays: kept, because much is
computed again for want of few bytes, or not kept, because they are many bytes and cheap to compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from lrcnn_lightning.graph import draws
from lrcnn_lightning.planning.residency import KEEP, LEAN, STREAM, TRANSIENT, Residencies, Residency
from lrcnn_lightning.rules import Role, RowGraph

__all__ = ["FORWARD_KEEPINGS", "KEEPINGS", "Keeping", "choose_residencies"]

Keeping = Literal["borders", "demand", "narrow", "lean", "nothing"]
"""``borders``: nothing but segment borders, and the TRANSIENT maps come back all in one sweep; ``demand``: the same,
but each comes back when it is needed; ``narrow`` and ``lean``: narrow reduced maps too (see above), the others on
demand. ``nothing``: reduced maps do not even exist in the forward pass."""

KEEPINGS: tuple[Keeping, ...] = ("borders", "demand", "narrow", "lean")
"""Those for what is differentiated."""

FORWARD_KEEPINGS: tuple[Keeping, ...] = ("borders", "nothing")
"""Those for what runs forward only."""

_WIDE = 1.5
"""A map this many times larger than its largest source is wide: computing it again is cheaper than keeping it."""


def choose_residencies(
    graph: RowGraph,
    nodes: Sequence[int],
    outputs: Collection[int],
    keeping: Keeping = "lean",
    exceptions: Mapping[int, Residency] | None = None,
) -> Residencies:
    """Residencies of the maps that rows make in ``nodes``: by the rule, but for ``exceptions``.

    A segment's outputs are kept, and a map that a whole operation reads exists, whatever the exceptions say.
    """
    inside = set(nodes)
    level = _levels(graph, nodes)
    result: Residencies = {}
    for position in nodes:
        if graph.roles[position] is not Role.ROW:
            continue
        for value in graph.nodes[position].outputs:
            readers = [r for r in graph.readers[value] if r in inside]
            reduced = any(graph.roles[r] is Role.REDUCE for r in readers)
            later = any(level[r] > level[position] for r in readers if graph.roles[r] is Role.ROW)
            whole = any(graph.roles[r] is Role.WHOLE for r in readers)
            excepted = (exceptions or {}).get(value)
            if excepted is not None and value not in outputs and not (whole and excepted != KEEP):
                result[value] = excepted
            elif value in outputs or (
                reduced and later and keeping in ("narrow", "lean") and not _wide(graph, value, result)
            ):
                result[value] = KEEP
            elif reduced and later and keeping == "lean" and not whole:
                result[value] = LEAN
            elif reduced and later and keeping == "nothing" and not whole:
                result[value] = STREAM
            elif later or whole:
                result[value] = TRANSIENT
            else:
                result[value] = STREAM
    return result


def _levels(graph: RowGraph, nodes: Sequence[int]) -> dict[int, int]:
    """How many barriers of the segment lie before each node."""
    value_level: dict[int, int] = {}
    node_level: dict[int, int] = {}
    drawn = 0
    for position in nodes:
        node, role = graph.nodes[position], graph.roles[position]
        level = max((value_level.get(i, 0) for i in node.inputs), default=0)
        if draws(node):
            level = drawn = max(level, drawn)
        reads_rows = any(graph.is_map(i) and i in value_level for i in node.inputs)
        node_level[position] = level
        barrier = role is Role.REDUCE or (role is Role.WHOLE and reads_rows)
        for output in node.outputs:
            value_level[output] = level + barrier
        if barrier and draws(node):
            drawn += 1
    return node_level


def _wide(graph: RowGraph, value: int, residencies: Residencies) -> bool:
    """Whether a map is wider than everything that it is computed from, back to maps that exist."""
    largest, pending, seen = 0, [value], set()
    while pending:
        for index in graph.nodes[graph.producer[pending.pop()]].inputs:
            if not graph.is_map(index) or index in seen:
                continue
            seen.add(index)
            if index in residencies and residencies[index].backward == "stream":
                pending.append(index)
            else:
                largest = max(largest, graph.values[index].bytes)
    return graph.values[value].bytes > _WIDE * largest
