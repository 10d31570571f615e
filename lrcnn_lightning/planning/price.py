"""The price of a map: what is computed again because it is not kept, against its bytes.

A rematerialisation planner keeps what saves most time a byte, and drops what costs least time a byte. Both are first
guessed here, from how often each operation of a plan runs, and then the plan is made and priced exactly:

    map not kept    its operation runs n times, where 2 would do (forward, and once to be differentiated); with it run
                    those that make it from the maps at hand:      seconds saved = sum of (n - 2) * seconds
    map kept        dropped, every pass that reads it computes it:  seconds spent = passes * seconds
"""

from __future__ import annotations

from lrcnn_lightning.planning.loop import closure
from lrcnn_lightning.planning.program import Program
from lrcnn_lightning.planning.residency import KEEP, LEAN, TRANSIENT, Residency
from lrcnn_lightning.planning.steps import BackwardRows, RunRows, Segment, Sweep
from lrcnn_lightning.planning.work import Work

__all__ = ["exchanges"]


def exchanges(program: Program, count: int) -> list[tuple[int, Residency]]:
    """At most ``count`` maps worth keeping, the best first, and as many that are not, in turn."""
    work = Work(program.graph, program.machine, program.machine.seconds_a_slab * program.rows)
    keeps: list[tuple[float, int]] = []
    drops: list[tuple[float, int]] = []
    for segment in program.segments:
        if not segment.plain and segment.backward:
            _price(program, segment, work, keeps, drops)
    best = [(value, KEEP) for _, value in sorted(keeps, reverse=True)[:count]]
    worst = [(value, residency) for _, value in sorted(drops)[:count] for residency in (LEAN, TRANSIENT)]
    result: list[tuple[int, Residency]] = []
    for i in range(max(len(best), len(worst))):
        result += best[i : i + 1] + worst[i : i + 1]
    return result


def _price(
    program: Program, segment: Segment, work: Work, keeps: list[tuple[float, int]], drops: list[tuple[float, int]]
) -> None:
    graph = program.graph
    runs: dict[int, int] = {}
    for step in (*segment.forward, *segment.backward):
        nodes = step.loop.nodes if isinstance(step, (RunRows, Sweep)) else ()
        nodes = step.run.nodes if isinstance(step, BackwardRows) else nodes
        for position in nodes:
            runs[position] = runs.get(position, 0) + 1
    kept = {v for v, residency in segment.residencies.items() if residency.backward == "keep"}
    made_by_rows = set(segment.residencies)
    inside = {o for p in segment.nodes for o in graph.nodes[p].outputs}
    at_hand = {v for v in (*segment.inputs, *inside) if graph.is_map(v) and v not in made_by_rows} | kept
    for value, residency in segment.residencies.items():
        if value in segment.outputs:
            continue
        upstream, _ = closure(graph, [value], at_hand - {value})
        size = max(graph.values[value].bytes, 1)
        if residency.backward == "keep":
            again = max((runs.get(r, 0) for r in graph.readers[value]), default=1)
            drops.append((again * sum(work.forward(p) for p in upstream) / size, value))
        else:
            saved = sum(max(0, runs.get(p, 0) - 2) * work.forward(p) for p in upstream)
            if saved > 0:
                keeps.append((saved / size, value))
