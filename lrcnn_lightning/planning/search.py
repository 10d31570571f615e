"""Choosing a plan: candidates are built and priced by the cost model, and one is chosen by what was asked for.

With a budget: the fastest plan predicted to fit. Without: the plan of least memory whose extra work is within
``max_overhead``, or the fastest if none is. Numbers that the user gave are not varied. Where none is given, plain
PyTorch is a plan, too: it is chosen where it fits the budget, and where the best row-wise plan takes no less memory.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lrcnn_lightning.config import RowConfig, format_count, format_size
from lrcnn_lightning.errors import BudgetError, ConfigError
from lrcnn_lightning.monitor.measure import without_collector
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.keeping import FORWARD_KEEPINGS, Keeping
from lrcnn_lightning.planning.limit import largest_map
from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.moves import Moves
from lrcnn_lightning.planning.notes import notes
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner, plain_plan
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.report import held_at_peak
from lrcnn_lightning.planning.transfer import transferred
from lrcnn_lightning.rules import RowGraph

__all__ = ["choose_plan", "free_bytes", "search_plans", "usable_bytes"]

_ROWS = (2, 4, 8, 16, 32)
_MORE = (1.1, 1.5, 2, 4)
"""Where maps are so large that they must be divided: times the fewest rows that this takes."""
_SEGMENTS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARE_OF_FREE = 0.8
_SMALL = 250
"""Nodes of a graph for which a whole grid of plans is tried in seconds."""
_LEVELS = 32
"""Barriers of a segment from which on plans that restore single maps are tried only when nothing else fits: the way to
a map is walked again and again, which takes many times plain PyTorch's time (and it takes long to price it)."""
_REFINEMENTS = 400
_REFINED_NODES = 50_000
"""Plans that are tried at most when the best one is refined, and nodes that these have together."""
_STARTS = 3
_DEAR = 0.1
"""Extra work of a plan for a budget from which on it is worth to look for it the other way, too."""
_PRESSING = 8.0
"""The first price of a limit that is exceeded from the start."""
_DEARER = 1.3
_RESTS = 6
"""How the price of the limit changes at each step, and after how many steps without a change the walk ends."""


_AIMS = 3
"""Searches at most, each for a lower peak than the one before."""

_LOWER = (0.9, 0.7)
"""Of a budget that nothing was found for: what is looked for then."""

_OUT_OF_MEMORY = " (tools that search for a batch size take this for 'CUDA out of memory')"
"""They know a batch that is too large by these words, on every device."""


def choose_plan(problem: Problem, config: RowConfig, device: torch.device, others: Iterable[Plan] = ()) -> Plan:
    """The plan for a configuration; ``device`` is where its memory is, and ``others`` are plans for other sizes, whose
    decisions it may take over (`transfer`).

    Raises `ConfigError` when more rows are asked for than the input has, `BudgetError` when nothing fits a budget, and
    `PlanError` when nothing keeps the limit on what an operation may have (`limit`).
    """
    graph = problem.graph
    height = max(graph.input_height, 1)
    if isinstance(config.rows, int) and config.rows > height:
        shapes = ", ".join(str(list(v.shape)) for v in graph.graph.inputs)
        raise ConfigError(
            f"rows={config.rows} is more than the {height} rows of the input (shapes {shapes}): "
            f"allowed are 1 to {height}, or 'auto'"
        )
    plain = plain_plan(problem)
    if graph.axis is None:  # no input is longer than one
        return plain
    budget = budget_of(config, device)
    may_be_plain = config.chooses_freely and not graph.communicates and plain.oversized is None
    if may_be_plain and budget is not None and plain.peak_bytes <= budget:
        return plain
    near = transferred(problem, config, budget, others)
    if near is not None:
        return near
    best = _searched(problem, config, budget)
    if may_be_plain and plain.peak_bytes <= best.peak_bytes:
        best = plain
    if budget is not None and best.peak_bytes > budget:
        raise BudgetError(
            f"no plan fits memory_budget={format_size(budget)}: the least peak of activation memory that was found is "
            f"{format_size(best.peak_bytes)} ({format_count(best.choices.rows, 'row')}, "
            f"{format_count(best.choices.segments, 'segment')}); plain PyTorch would take "
            f"{format_size(best.plain_peak_bytes)}. At that peak live: "
            f"{held_at_peak(best)}. What helps: a smaller batch or image, half precision, freezing the first layers, "
            "or a larger budget"
            f"{_OUT_OF_MEMORY}",
            best,
            budget,
        )
    return with_notes(best, config, budget)


def budget_of(config: RowConfig, device: torch.device) -> int | None:
    """The budget in bytes, where there is one."""
    budget = config.budget_bytes
    if budget == "auto":
        return usable_bytes(device) if config.fits_free_memory else None
    return budget


def with_notes(plan: Plan, config: RowConfig, budget: int | None) -> Plan:
    """The plan with a note on each thing in which it departs from the options."""
    remarks = notes(plan, plan.cost, plan.plain_cost, config, budget)
    return replace(plan, notes=remarks) if remarks else plan


def _searched(problem: Problem, config: RowConfig, budget: int | None) -> Plan:
    """The best plan, with its memory as it is. Raises `PlanError` where an operation has a tensor that is too large.

    On a device that workspaces are tried on, the search takes them from a few heights of rows. Those of the plan that
    it finds are then tried as they are, and where it does not fit with these, another search aims lower.
    """
    planner, aim = Planner(problem), budget
    for _ in range(_AIMS):
        best = search_plans(planner, config, aim, config.max_overhead)
        planner.limit.check(best)
        if aim is not None and best.peak_bytes > aim:
            best = _by_lower_aims(planner, config, aim, best)
        if problem.machine.device is None or best.mode == "plain":
            return best
        exact = best.on(replace(problem.machine, interpolates=False))
        if budget is None or aim is None or exact.peak_bytes <= budget or best.peak_bytes > aim:
            return exact
        aim = aim * budget // exact.peak_bytes
    return exact


def _by_lower_aims(planner: Planner, config: RowConfig, budget: int, best: Plan) -> Plan:
    """A plan that fits a budget which the search missed, or the best one: aiming lower it goes other ways."""
    for share in _LOWER:
        other = search_plans(planner, config, int(share * budget), config.max_overhead)
        best = min(best, other, key=lambda plan: plan.peak_bytes)
        if best.peak_bytes <= budget:
            break
    return best


def search_plans(
    planner: Planner,
    config: RowConfig,
    budget: int | None,
    max_overhead: float,
    tried: dict[Choices, tuple[float, float]] | None = None,
) -> Plan:
    """The best plan that is found; ``tried`` takes the peak (bytes) and the work (seconds) of every one tried.

    Several searches are faster with one ``planner``.
    """
    problem = planner.problem
    graph, height = problem.graph, problem.graph.input_height
    search = _Search(planner, budget, max_overhead)
    with without_collector():
        for options in _stages(planner, config, height):
            search.vary(options)
        search.divide_more(config, height)
        assert search.best is not None
        if planner.limit.oversized(search.best) is None:
            if budget is not None:
                search.vary(_grid(planner, config, height))
                search.try_dismissed()
            moves = Moves(graph, config, search.best)
            search.refine(moves)
            if budget is not None and search.overhead > _DEAR:
                search.refine_the_other_way(moves)
    if tried is not None:
        tried.update(search.tried)
    return search.best


class _Search:
    """Tries choices around the best ones so far."""

    def __init__(self, planner: Planner, budget: int | None, max_overhead: float) -> None:
        self.planner, self.graph, self.training = planner, planner.problem.graph, planner.problem.training
        self.budget, self.max_overhead = budget, max_overhead
        self.tried: dict[Choices, tuple[float, float]] = {}
        self.dismissed: list[Choices] = []
        self.best: Plan | None = None
        self.barriers = self.graph.barriers if self.training else 0
        self.plain = plain_plan(planner.problem).cost

    @property
    def overhead(self) -> float:
        """The extra work of the best plan."""
        assert self.best is not None
        return self.planner.cost(self.best).seconds / self.plain.seconds - 1

    def refine(self, moves: Moves) -> None:
        """Walk from the best plan, and from the best ones with other numbers of segments."""
        if self.best is None or self.best.mode == "plain":
            return
        by_rank = self._kinds(lambda choices: self._rank(*self.tried[choices]))
        by_price = self._kinds(lambda choices: self._priced(*self.tried[choices], 1.0))
        starts = list(dict.fromkeys([*by_rank[: _STARTS - 1], *by_price]))[:_STARTS]
        limit = self._limit
        for start in starts:
            reached = self._walk(self._made(start), moves, limit // len(starts))
            self._climb(reached, moves, limit // len(starts))
        self._climb(self.best, moves, limit)

    def refine_the_other_way(self, moves: Moves) -> None:
        """Look for less memory in the time of the best plan for the budget: it leaves room to be faster.

        Where a budget is tight, the plans that fit at first are slow ones of another kind, and the way from these to
        the good ones is long.
        """
        assert self.best is not None
        other = _Search(self.planner, None, self.overhead)
        other.tried, other.best = self.tried, self.best
        other.refine(moves)
        best = min(self.tried, key=lambda choices: self._rank(*self.tried[choices]))
        if best != self.best.choices:
            self.best = self._made(best)
            self._climb(self.best, moves, self._limit)

    @property
    def _limit(self) -> int:
        """How many plans are made at most to refine one."""
        return max(24, min(_REFINEMENTS, _REFINED_NODES // max(len(self.graph.nodes), 1)))

    def _kinds(self, order: Callable[[Choices], Any]) -> list[Choices]:
        """The first plan of each kind (number of segments, keeping), in an order."""
        first: dict[Any, Choices] = {}
        for choices in sorted(self.tried, key=order):
            kind = choices.segments, choices.keeping, choices.forward_segments, choices.forward_keeping
            first.setdefault(kind, choices)
        return list(first.values())

    def _walk(self, current: Plan, moves: Moves, limit: int) -> Plan:
        """Change a plan little by little, and make at most ``limit`` plans; the best one on the way.

        Mostly it takes two changes to gain anything: one that pays time (or memory), and one that buys more for it. So
        the walk goes by what it wants less of and, at a price, what is limited. The price rises while the limit is
        exceeded and falls while it is not, and the walk goes to and fro around the limit. The best plan that was met
        counts.
        """
        price, resting, best = 1.0, 0, current
        if self._exceeds(*self.tried[current.choices]):
            price = _PRESSING
        while limit > 0 and resting < _RESTS:
            limit -= 1  # so that a walk in circles ends, too
            here = self._priced(*self.tried[current.choices], price)
            for choices in moves.of(current, self.planner.cost(current)):
                plan = None
                if choices not in self.tried:
                    limit -= 1
                    plan = self._try(choices)
                if self._priced(*self.tried[choices], price) < here - 1e-4:
                    current, resting = plan or self._made(choices), -1
                    best = min(best, current, key=self._rank_of)
                    break
                if limit <= 0:
                    break
            resting += 1
            price *= _DEARER if self._exceeds(*self.tried[current.choices]) else 1 / _DEARER
        return best

    def _climb(self, current: Plan, moves: Moves, limit: int) -> None:
        """Change a plan as long as a single change makes it better, and make at most ``limit`` plans.

        A change counts, too, that gains only of what is limited: it makes room for the next one.
        """
        improved = True
        while improved and limit > 0:
            improved = False
            for choices in moves.of(current, self.planner.cost(current)):
                plan = None
                if choices not in self.tried:
                    limit -= 1
                    plan = self._try(choices, self._most_bytes(current))
                if self._rank(*self.tried[choices]) < self._rank_of(current):
                    current, improved = plan or self._made(choices), True
                    break
                if limit <= 0:
                    break

    def _most_bytes(self, current: Plan) -> float:
        """The highest peak of a plan that can be better than the current one."""
        peak, seconds = self.tried[current.choices]
        if self._exceeds(peak, seconds):
            return math.inf if self.budget is None else peak
        return peak if self.budget is None else self.budget

    def _rank_of(self, plan: Plan) -> tuple[float, ...]:
        return self._rank(*self.tried[plan.choices])

    def _exceeds(self, peak: float, seconds: float) -> bool:
        if self.budget is not None:
            return peak > self.budget
        return seconds > self.plain.seconds * (1 + self.max_overhead)

    def _priced(self, peak: float, seconds: float, price: float) -> float:
        """What is wanted less of, and at a price what is limited, both by their logarithms."""
        wanted, limited = (seconds, peak) if self.budget is not None else (peak, seconds)
        return math.log(max(wanted, 1e-12)) + price * math.log(max(limited, 1e-12))

    def _made(self, choices: Choices, most_bytes: float = math.inf) -> Plan:
        return self.planner.plan(choices, most_bytes)

    def _try(self, choices: Choices, most_bytes: float = math.inf) -> Plan:
        """Build and price a plan, and remember it if it is the best one so far."""
        plan = self._made(choices, most_bytes)
        if self.planner.limit.oversized(plan) is None:
            cost = self.planner.cost(plan)
            self.tried[choices] = cost.peak_bytes, cost.seconds
        else:
            self.tried[choices] = math.inf, math.inf
        if self.best is None or self._rank(*self.tried[choices]) < self._rank_of(self.best):
            self.best = plan
        return plan

    def vary(self, options: dict[str, Sequence[Any]]) -> None:
        """Try all combinations of these options, the others being those of the best plan so far."""
        base = Choices() if self.best is None else self.best.choices
        for values in itertools.product(*options.values()):
            choices = replace(base, **dict(zip(options, values, strict=True)))
            if choices in self.tried:
                continue
            levels = self.barriers / choices.segments
            if choices.keeping != "borders" and levels > _LEVELS and len(options.get("segments", ())) > 1:
                self.dismissed.append(choices)
            else:
                self._try(choices)

    def divide_more(self, config: RowConfig, height: int) -> None:
        """Try more chunks and rows, as far as these are free, while operations have tensors that are too large."""
        assert self.best is not None
        rows, samples = self.best.choices.rows, self.graph.input_samples if self.graph.batch_splits else 1
        if config.batch_chunks == "auto" and self._is_oversized() and samples > 1:
            self.vary({"batch_chunks": [samples]})
        while config.rows == "auto" and rows < height and self._is_oversized():
            rows = min(2 * rows, height)
            self.vary({"rows": [rows]})
        if self._is_oversized():
            self.vary({"heights": ["balanced"]})

    def _is_oversized(self) -> bool:
        assert self.best is not None
        return self.planner.limit.oversized(self.best) is not None

    def try_dismissed(self) -> None:
        """Try what seemed to take too long, while nothing fits."""
        for choices in self.dismissed:
            if self.best is not None and not self._exceeds(*self.tried[self.best.choices]):
                break
            if choices not in self.tried:
                self._try(choices)

    def _rank(self, peak: float, seconds: float) -> tuple[float, ...]:
        """Smaller is better. With a budget: fitting plans by time, others by memory. Without: plans within the
        allowed overhead by memory, others by time, those that save nothing last.
        """
        wanted, limited = (seconds, peak) if self.budget is not None else (peak, seconds)
        if not self._exceeds(peak, seconds):
            return 0, wanted, limited
        return 1 + (self.budget is None and peak >= self.plain.peak_bytes), limited, wanted


def _fewest_rows(graph: RowGraph, machine: Machine, chunks: int) -> int:
    """The fewest rows of which, in so many chunks, no slab is too large, if it had no halo."""
    chunk = -(-graph.input_samples // chunks) if graph.batch_splits and graph.input_samples else 1
    share = chunk / graph.input_samples if graph.batch_splits and graph.input_samples else 1.0
    return max(1, math.ceil(largest_map(graph) * share / machine.most_elements))


def _numbers_of_rows(graph: RowGraph, height: int, machine: Machine, chunks: Sequence[int]) -> list[int]:
    """Numbers of rows to try with some of these chunks: the usual ones, and where maps are very large others."""
    fewest = [_fewest_rows(graph, machine, count) for count in chunks]
    rows = {r for r in _ROWS if 2 * r <= height and r >= min(fewest)}
    rows |= {math.ceil(least * factor) for least in fewest if least > 1 for factor in _MORE}
    return sorted(r for r in rows if r <= height) or [height if min(fewest) > 1 else 1]


def _stages(planner: Planner, config: RowConfig, height: int) -> Iterator[dict[str, Sequence[Any]]]:
    """Which options are varied together, in order: where borders stand and what is kept, then rows, then chunks."""
    problem, graph = planner.problem, planner.problem.graph
    samples = graph.input_samples
    chunks = [config.batch_chunks] if isinstance(config.batch_chunks, int) else [1]
    if config.batch_chunks == "auto" and samples > 1 and graph.batch_splits:
        chunks = sorted({1, min(samples, 4), max(1, samples // 4), samples})
    rows = [config.rows] if isinstance(config.rows, int) else _numbers_of_rows(graph, height, problem.machine, chunks)
    modes = ["two_phase"] if config.mode == "auto" else [config.mode]
    first_chunks = chunks[len(chunks) // 2]
    # A batch is divided first, since that needs no halos; rows are then tried on top.
    enough = [r for r in rows if r > _fewest_rows(graph, problem.machine, first_chunks)] or rows
    middle = enough[len(enough) // 2]
    if first_chunks > 1 and config.rows == "auto" and _fewest_rows(graph, problem.machine, first_chunks) == 1:
        middle = 1
    first, *others = _borders(planner, config, _SEGMENTS[::2])
    divided = {"mode": modes, "rows": [middle], "batch_chunks": [first_chunks]}
    yield {**divided, **first, "rows_where_needed": [config.rows == "auto"]}
    yield from others
    yield {"rows": [1, *rows] if config.rows == "auto" else rows, "batch_chunks": chunks}
    for options in _borders(planner, config, _SEGMENTS):
        yield {name: counts for name, counts in options.items() if name.endswith("segments")}
    if config.mode == "auto":
        yield {"mode": ["two_phase", "overlap"]}
    yield {"rows": rows}


def _borders(planner: Planner, config: RowConfig, counts: Sequence[int]) -> list[dict[str, Sequence[Any]]]:
    """Numbers of segments and what is kept: of what is differentiated, and of what runs forward only."""
    problem, kinds = planner.problem, {stretch.kind for stretch in planner.stretches}
    barriers = problem.graph.barriers > 0
    options: list[dict[str, Sequence[Any]]] = []
    if problem.has_backward or "frozen" not in kinds:
        segments = [config.segments] if isinstance(config.segments, int) else counts
        keepings: Sequence[Keeping] = ("lean", "narrow", "demand", "borders") if barriers else ("borders",)
        options.append({"segments": segments, "keeping": keepings})
    if "frozen" in kinds:
        fixed = isinstance(config.segments, int) and not problem.has_backward
        keepings = FORWARD_KEEPINGS if barriers else ("borders",)
        options.append({"forward_segments": [config.segments] if fixed else counts, "forward_keeping": keepings})
    return options


def _grid(planner: Planner, config: RowConfig, height: int) -> dict[str, Sequence[Any]]:
    """For the fastest plan that fits, plans of every kind: with few rows, and with much or little kept.

    Of a large graph fewer, so that planning takes seconds.
    """
    fine = len(planner.problem.graph.nodes) <= _SMALL
    rows = (
        [r for r in ((1, 2, 4, 8, 16) if fine else (1, 4)) if r <= height] if config.rows == "auto" else [config.rows]
    )
    modes = ["two_phase", "overlap"] if config.mode == "auto" and fine else [config.mode]
    modes = ["two_phase"] if modes == ["auto"] else modes
    borders = _borders(planner, config, (1, 2, 3, 4, 6, 8) if fine else (2, 4, 8))[0]
    return {"mode": modes, "rows": rows, **borders}


def usable_bytes(device: torch.device) -> int:
    """What a step may take of what the device has free, in bytes."""
    return int(free_bytes(device) * _SHARE_OF_FREE)


def free_bytes(device: torch.device) -> int:
    """What the device has free, in bytes."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
