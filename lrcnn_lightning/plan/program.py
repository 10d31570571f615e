"""A segment's program: what the forward and the backward pass of one segment do, step by step.

Forward, level by level. A reduction ends a level, because its result is there only after all rows:

    level 0   rows: x -> conv1 -> c1, moments(c1)
    level 1   rows: c1 -> normalise -> relu -> conv2 -> c2, moments(c2)         c1 from its map, or computed again
    ...

Backward, group by group, from the last. A group is a part of the segment that is differentiated at once: between its
maps (values with a residency other than STREAM in the backward pass) nothing exists but slabs. Where a reduction lies
inside a group, its gradient is needed before the group can be differentiated: a pass over the rows collects it, for
the innermost reduction last, and the final pass collects all the rest:

    group  c2 -> normalise -> relu -> conv3 -> c3 (STREAM) -> normalise -> relu -> y      (moments of c3 inside)
      pass 1    rows: c2 ... y again, gradients of y's rows   -> gradients of mean(c3), variance(c3)
      pass 0    rows: the same, with what the moments add to c3 -> gradient map of c2, weight gradients

The design's worked example (a bottleneck block) is this with c1 and c2 kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from lrcnn_lightning.plan.loop import BackwardPass, Loop, closure, make_loop
from lrcnn_lightning.plan.residency import Residencies
from lrcnn_lightning.rules import Interval, Role, RowGraph, RowRule

__all__ = [
    "BackwardRows",
    "BackwardWhole",
    "Effect",
    "Free",
    "FreeGradient",
    "ProgramBuilder",
    "RunRows",
    "RunWhole",
    "SegmentProgram",
    "Step",
    "Sweep",
    "reads_of",
    "writes_of",
]


@dataclass(frozen=True)
class RunRows:
    """Run a loop forward, and keep what the nodes in ``kept_carries`` carry for the backward pass."""

    loop: Loop
    kept_carries: frozenset[int] = frozenset()


@dataclass(frozen=True)
class RunWhole:
    """Run a whole node (its position)."""

    node: int


@dataclass(frozen=True)
class Effect:
    """Run a node that changes a buffer, once a step."""

    node: int


@dataclass(frozen=True)
class Free:
    """Drop a full map or whole value."""

    value: int


@dataclass(frozen=True)
class FreeGradient:
    """Drop a gradient map: it has been handed on."""

    value: int


@dataclass(frozen=True)
class BackwardRows:
    """Run a backward pass, with the carries that were kept under the loop's name ``carries``.

    The last pass that reads them (``drops``) drops each row's carries as soon as that row is done: the rows run from
    the bottom, so the first row, the largest under two-phase sharing, finds none of the others' left.
    """

    run: BackwardPass
    carries: str | None
    drops: bool = False


@dataclass(frozen=True)
class Sweep:
    """Run a loop for its carries alone: the forward pass kept none that serve it."""

    loop: Loop


@dataclass(frozen=True)
class BackwardWhole:
    """Differentiate a whole node (its position)."""

    node: int


Step = RunRows | RunWhole | Effect | Sweep | BackwardRows | BackwardWhole | Free | FreeGradient


@dataclass(frozen=True)
class SegmentProgram:
    """One segment.

    ``inputs`` and ``outputs`` are values at its borders (inputs include parameters and prologue values); ``kept`` are
    the values, of its inside and of its inputs, that its backward pass reads. A running statistic that is only
    updated is not among them, so a later call may change it.
    """

    name: str
    nodes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kept: tuple[int, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    plain: bool = False
    differentiable: frozenset[int] = frozenset()
    residencies: Residencies = field(default_factory=dict)


class ProgramBuilder:
    """Builds the program of one segment from its nodes, residencies, rows and halo policies."""

    def __init__(
        self,
        graph: RowGraph,
        name: str,
        nodes: Sequence[int],
        outputs: Collection[int],
        residencies: Residencies,
        rows: int | Sequence[int],
        carried: Collection[int],
        chunks: Sequence[Interval],
        differentiable: Collection[int],
        on_demand: bool = False,
        balanced: bool = False,
    ) -> None:
        self.graph, self.name = graph, name
        self.nodes = tuple(nodes)
        self.residencies, self.on_demand, self.balanced = residencies, on_demand, balanced
        self.rows, self.carried, self.chunks = rows, carried, tuple(chunks)
        self.differentiable = differentiable
        inside = {output for position in nodes for output in graph.nodes[position].outputs}
        self.inside = inside
        read = dict.fromkeys(i for position in nodes for i in graph.nodes[position].inputs)
        self.inputs = tuple(index for index in read if index not in inside)
        self.outputs = tuple(index for index in outputs if index in inside)

    # ---------------------------------------------------------------- forward

    def build(self, training: bool) -> SegmentProgram:
        """The program; without ``training`` there is no backward pass and nothing is kept."""
        forward, last_loops = self._forward(training)
        backward: list[Step] = []
        kept: tuple[int, ...] = ()
        if training:
            backward, kept, used = self._backward(last_loops)
            forward = [
                RunRows(step.loop, frozenset(used.get(step.loop.name, ()))) if isinstance(step, RunRows) else step
                for step in forward
            ]
        return SegmentProgram(
            self.name,
            self.nodes,
            self.inputs,
            self.outputs,
            kept,
            tuple(forward),
            tuple(backward),
            False,
            frozenset(self.differentiable) if training else frozenset(),
            self.residencies,
        )

    def _loop(
        self,
        name: str,
        nodes: Sequence[int],
        sources: Collection[int],
        stored: Collection[int],
        reductions: Sequence[int] = (),
        further: Collection[int] = (),
    ) -> Loop:
        """A loop, divided as all loops of the segment are; ``further`` are targets that are not stored."""
        divided = (self.rows, self.carried, self.chunks, self.balanced)
        return make_loop(self.graph, name, nodes, sources, stored, reductions, further, *divided)

    def _levels(self) -> tuple[dict[int, int], dict[int, int]]:
        """Per value: the level whose loop makes it (maps), or before which it is there (whole values). Per node too."""
        value_level: dict[int, int] = {}
        node_level: dict[int, int] = {}
        for position in self.nodes:
            node, role = self.graph.nodes[position], self.graph.roles[position]
            levels = [0]
            for index in node.inputs:
                if index not in self.inside:
                    continue
                after_rows = self._made_by_rows(index)
                step = 1 if role is Role.WHOLE and after_rows else 0
                levels.append(value_level[index] + step)
            level = max(levels)
            node_level[position] = level
            for output in node.outputs:
                value_level[output] = level + (role is Role.REDUCE)
        return value_level, node_level

    def _made_by_rows(self, index: int) -> bool:
        position = self.graph.producer.get(index)
        return position is not None and index in self.inside and self.graph.roles[position] is Role.ROW

    def _forward(self, training: bool) -> tuple[list[Step], list[Loop]]:
        graph = self.graph
        value_level, node_level = self._levels()
        top = max((*value_level.values(), *node_level.values(), 0))
        available = {i for i in self.inputs if graph.is_map(i)}
        steps: list[Step] = []
        loops: list[Loop] = []
        for level in range(top + 1):
            for position in self.nodes:
                if graph.roles[position] is Role.WHOLE and node_level[position] == level:
                    is_effect = not graph.nodes[position].outputs
                    steps.append(Effect(position) if is_effect else RunWhole(position))
                    available.update(i for i in graph.nodes[position].outputs if graph.is_map(i))
            stored = [
                index
                for index in sorted(self.inside)
                if self._made_by_rows(index) and value_level[index] == level and self._stored_forward(index)
            ]
            reductions = [
                position
                for position in self.nodes
                if graph.roles[position] is Role.REDUCE and node_level[position] == level
            ]
            if not stored and not reductions:
                continue
            wanted = {*stored, *(graph.nodes[position].inputs[0] for position in reductions)}
            nodes, sources = closure(graph, wanted, available)
            loop = self._loop(f"{self.name}.f{level}", nodes, sources, stored, reductions)
            loops.append(loop)
            steps.append(RunRows(loop))
            available.update(stored)
        kept = {i for i in self.inside if self._survives(i)} if training else set()
        return self._with_frees(steps, keep={*self.outputs, *kept}), loops

    def _stored_forward(self, index: int) -> bool:
        return index in self.outputs or self.residencies[index].forward != "stream"

    def _survives(self, index: int) -> bool:
        """Whether a value of the inside lives until the backward pass: kept maps, and every whole value."""
        if not self.graph.is_map(index) or not self._made_by_rows(index) or index in self.outputs:
            return True
        return self.residencies[index].backward == "keep"

    def _with_frees(self, steps: list[Step], keep: Collection[int]) -> list[Step]:
        """Free each full map and whole value of the inside after the last step that reads it."""
        last: dict[int, int] = {}
        for i, step in enumerate(steps):
            for index in (*reads_of(self.graph, step), *writes_of(self.graph, step)):
                if index in self.inside and index not in keep:
                    last[index] = i
        result: list[Step] = []
        for i, step in enumerate(steps):
            result.append(step)
            result.extend(Free(index) for index, when in last.items() if when == i)
        return result

    # --------------------------------------------------------------- backward

    def _materialised_backward(self, index: int) -> bool:
        if index not in self.inside or not self.graph.is_map(index) or index in self.outputs:
            return True
        return not self._made_by_rows(index) or self.residencies[index].backward != "stream"

    def _backward(self, forward_loops: list[Loop]) -> tuple[list[Step], tuple[int, ...], dict[str, set[int]]]:
        graph = self.graph
        groups = _Groups(self).ordered()
        steps: list[Step] = []
        used: dict[str, set[int]] = {}
        for number, group in reversed(list(enumerate(groups))):
            if len(group) == 1 and graph.roles[group[0]] is Role.WHOLE:
                if any(output in self.differentiable for output in graph.nodes[group[0]].outputs):
                    steps.append(BackwardWhole(group[0]))
                continue
            steps.extend(self._group(f"{self.name}.b{number}", group, forward_loops, used))
        reads = [reads_of(graph, step) for step in steps]
        restored = [
            index
            for index in sorted(self.inside)
            if self._made_by_rows(index)
            and self.residencies[index].backward == "transient"
            and index not in self.outputs
            and any(index in read for read in reads)
        ]
        steps = self._with_restored(steps, reads, restored)
        needed = {index for step in steps for index in reads_of(graph, step)}
        at_hand = {*self.inputs, *(i for i in self.inside if self._at_hand(i))}
        kept = tuple(sorted(at_hand & needed))
        return self._with_backward_frees(steps), kept, used

    def _with_restored(
        self, steps: list[Step], reads: Sequence[Collection[int]], restored: Sequence[int]
    ) -> list[Step]:
        """Bring TRANSIENT maps back: all in one sweep before the first step, or each before its first reader.

        On demand only one or two exist at a time, but the rows of each are computed from the nearest maps at hand, so a
        chain of n of them is walked n times.
        """
        graph = self.graph
        readers = {v: [i for i, read in enumerate(reads) if v in read] for v in restored}
        result: list[Step] = []
        for i, step in enumerate(steps):
            due = [v for v in restored if (readers[v][0] if self.on_demand else 0) == i]
            if due:
                alive = {v for v in restored if readers[v][0] < i <= readers[v][-1]} if self.on_demand else set()
                kept = (v for v in (*self.inputs, *self.inside) if graph.is_map(v) and self._at_hand(v))
                nodes, sources = closure(graph, due, {*kept, *alive})
                result.append(RunRows(self._loop(f"{self.name}.r{i}", nodes, sources, due)))
            result.append(step)
        return result

    def _at_hand(self, index: int) -> bool:
        """Whether a value is there when the backward pass starts."""
        return index not in self.inside or self._survives(index)

    def _with_backward_frees(self, steps: list[Step]) -> list[Step]:
        """Free maps after their last reader, and gradient maps after the step that hands them on."""
        last: dict[int, int] = {}
        gradients: dict[int, int] = {}
        carries: dict[str, int] = {}
        for i, step in enumerate(steps):
            for index in (*reads_of(self.graph, step), *writes_of(self.graph, step)):
                if index in self.inside:
                    last[index] = i
            if isinstance(step, BackwardRows):
                gradients.update(dict.fromkeys(step.run.outputs, i))
                if step.carries is not None:
                    carries[step.carries] = i
            elif isinstance(step, BackwardWhole):
                gradients.update(dict.fromkeys(self.graph.nodes[step.node].outputs, i))
        result: list[Step] = []
        for i, step in enumerate(steps):
            if isinstance(step, BackwardRows) and carries.get(step.carries or "") == i:
                step = replace(step, drops=True)
            result.append(step)
            result.extend(Free(index) for index, when in last.items() if when == i)
            result.extend(FreeGradient(index) for index, when in gradients.items() if when == i)
        return result

    def _group(
        self, name: str, group: Sequence[int], forward_loops: list[Loop], used: dict[str, set[int]]
    ) -> list[Step]:
        """The passes of one group."""
        graph = self.graph
        members = set(group)
        made = {output for position in group for output in graph.nodes[position].outputs}
        rows = [p for p in group if graph.roles[p] is Role.ROW]
        reductions = [
            p
            for p in group
            if graph.roles[p] is Role.REDUCE
            and graph.nodes[p].inputs[0] in self.differentiable
            and any(o in self.differentiable for o in graph.nodes[p].outputs)
        ]
        outputs = [
            o
            for p in rows
            for o in graph.nodes[p].outputs
            if o in self.differentiable
            and (
                o in self.outputs
                or any(r in self.nodes and (r not in members or graph.roles[r] is Role.WHOLE) for r in graph.readers[o])
            )
        ]
        if not outputs and not reductions:
            return []
        levels = self._group_levels(group, made)
        streamed = {output for position in rows for output in graph.nodes[position].outputs}
        available = {i for i in (*self.inputs, *self.inside) if graph.is_map(i) and i not in streamed}
        targets = {*outputs, *(graph.nodes[p].inputs[0] for p in reductions)}
        nodes, sources = closure(graph, targets, available)
        loop = self._loop(name, nodes, sources, (), reductions, outputs)
        carries = next((f.name for f in forward_loops if loop.carries and loop.same_rows(f)), None)
        steps: list[Step] = []
        if carries is not None:
            used.setdefault(carries, set()).update(loop.carried)
        elif loop.carries:
            carries = loop.name
            steps.append(Sweep(loop))
        barred = made - streamed  # made by the group's reductions and whole operations
        for level in range(max((levels[i] for i in barred), default=0), 0, -1):
            wanted = [
                i
                for i in sorted(barred)
                if levels[i] == level
                and i in self.differentiable
                and any(r in members and graph.roles[r] is Role.ROW for r in graph.readers[i])
            ]
            if wanted:
                maps = [i for i in wanted if graph.is_map(i)]
                wholes = [i for i in wanted if not graph.is_map(i)]
                run = self._pass(loop, levels, level, outputs, reductions, maps, wholes)
                steps.append(BackwardRows(run, carries))
            for position in reversed(group):
                if graph.roles[position] is Role.WHOLE and any(
                    levels[o] == level and o in self.differentiable for o in graph.nodes[position].outputs
                ):
                    steps.append(BackwardWhole(position))
        wanted = [
            i
            for p in nodes
            for i in graph.nodes[p].inputs
            if i in self.differentiable and not graph.is_map(i) and i not in made
        ]
        maps = [i for i in loop.sources if i in self.differentiable and levels.get(i, 0) == 0]
        if wanted or maps:
            run = self._pass(loop, levels, 0, outputs, reductions, maps, wanted)
            steps.append(BackwardRows(run, carries))
        return steps

    def _group_levels(self, group: Sequence[int], made: Collection[int]) -> dict[int, int]:
        """Levels within a group: how many of its barriers lie before a value."""
        graph = self.graph
        levels: dict[int, int] = {}
        for position in group:
            node, role = graph.nodes[position], graph.roles[position]
            inside = [i for i in node.inputs if i in made]
            barrier = role is Role.REDUCE or (role is Role.WHOLE and any(self._made_by_rows(i) for i in inside))
            for output in node.outputs:
                levels[output] = max((levels[i] for i in inside), default=0) + barrier
        return levels

    def _pass(
        self,
        loop: Loop,
        levels: dict[int, int],
        level: int,
        outputs: Sequence[int],
        reductions: Sequence[int],
        maps: Sequence[int],
        wholes: Sequence[int],
    ) -> BackwardPass:
        graph = self.graph
        active = [p for p in reductions if min(levels[o] for o in graph.nodes[p].outputs) > level]
        wanted = {*outputs, *(graph.nodes[p].inputs[0] for p in active)}
        nodes, _ = closure(graph, wanted, {*loop.sources})
        nodes = tuple(p for p in nodes if p in loop.nodes)
        differentiated = frozenset(
            p
            for p in nodes
            if any(o in self.differentiable and levels.get(o, 0) >= level for o in graph.nodes[p].outputs)
        )
        ordered = tuple(dict.fromkeys(wholes))
        hollow = frozenset(p for p in nodes if self._hollow(p, nodes, active, differentiated))
        return BackwardPass(loop, nodes, differentiated, tuple(outputs), tuple(active), tuple(maps), ordered, hollow)

    def _hollow(
        self, position: int, nodes: Sequence[int], injections: Sequence[int], differentiated: Collection[int]
    ) -> bool:
        """Whether only the gradient of a node is wanted in a pass, not its values."""
        graph = self.graph
        rule = graph.rules[position]
        if position not in differentiated or not isinstance(rule, RowRule) or type(rule).hollow is RowRule.hollow:
            return False
        (output,) = graph.nodes[position].outputs
        if any(reader in nodes for reader in graph.readers[output]):
            return False
        injected = any(graph.nodes[p].inputs[0] == output for p in injections)
        return not injected or self._materialised_backward(output)


def reads_of(graph: RowGraph, step: Step) -> tuple[int, ...]:
    """The full maps and whole values that a step reads."""
    if isinstance(step, (RunRows, Sweep)):
        inner = {o for p in step.loop.nodes for o in graph.nodes[p].outputs}
        wholes = [i for p in step.loop.nodes for i in graph.nodes[p].inputs if not graph.is_map(i)]
        return tuple(dict.fromkeys((*(s for s in step.loop.sources if s not in inner), *wholes)))
    if isinstance(step, (RunWhole, Effect)):
        return graph.nodes[step.node].inputs
    if isinstance(step, BackwardWhole):
        return (*graph.nodes[step.node].inputs, *graph.nodes[step.node].outputs)
    if isinstance(step, BackwardRows):
        run = step.run
        wholes = [i for p in run.nodes for i in graph.nodes[p].inputs if not graph.is_map(i)]
        for position in run.injections:
            wholes.extend(graph.nodes[position].outputs)
        maps = [
            graph.nodes[p].inputs[0]
            for p in run.injections
            if graph.producer.get(graph.nodes[p].inputs[0]) in run.hollow
        ]
        return tuple(dict.fromkeys((*run.loop.sources, *wholes, *maps)))
    return ()


def writes_of(graph: RowGraph, step: Step) -> tuple[int, ...]:
    """The full maps and whole values that a step makes."""
    if isinstance(step, RunRows):
        outputs = [o for p in step.loop.reductions for o in graph.nodes[p].outputs]
        return (*step.loop.stored, *outputs)
    if isinstance(step, RunWhole):
        return graph.nodes[step.node].outputs
    return ()


class _Groups:
    """Partition of a segment's nodes into groups; see the module's docstring."""

    def __init__(self, builder: ProgramBuilder) -> None:
        self.builder = builder
        self.parent = {position: position for position in builder.nodes}

    def find(self, position: int) -> int:
        while self.parent[position] != position:
            self.parent[position] = self.parent[self.parent[position]]
            position = self.parent[position]
        return position

    def ordered(self) -> list[tuple[int, ...]]:
        """Groups in topological order, each in graph order."""
        builder, graph = self.builder, self.builder.graph
        for position in builder.nodes:
            role = graph.roles[position]
            for index in graph.nodes[position].inputs:
                if index not in builder.inside or not builder._made_by_rows(index):
                    continue
                streams = not builder._materialised_backward(index)
                if (streams and role is not Role.WHOLE) or role is Role.REDUCE:
                    self.parent[self.find(position)] = self.find(graph.producer[index])
        for component in _components(self._edges()):
            first = component[0]
            for other in component[1:]:
                self.parent[self.find(other)] = self.find(first)
        members: dict[int, list[int]] = {}
        for position in builder.nodes:
            members.setdefault(self.find(position), []).append(position)
        edges = self._edges()
        order = [component[0] for component in _components(edges)]
        ranked = [tuple(members[root]) for root in order]
        return ranked

    def _edges(self) -> dict[int, set[int]]:
        """Group -> the groups that read its values."""
        builder, graph = self.builder, self.builder.graph
        edges: dict[int, set[int]] = {self.find(position): set() for position in builder.nodes}
        for position in builder.nodes:
            for index in graph.nodes[position].inputs:
                if index in builder.inside:
                    source, target = self.find(graph.producer[index]), self.find(position)
                    if source != target:
                        edges[source].add(target)
        return edges


def _components(edges: dict[int, set[int]]) -> list[list[int]]:
    """Strongly connected components in topological order (Tarjan, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    result: list[list[int]] = []
    for root in edges:
        if root in number:
            continue
        work = [(root, iter(sorted(edges[root])))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            vertex, successors = work[-1]
            advanced = False
            for successor in successors:
                if successor not in number:
                    number[successor] = low[successor] = len(number)
                    stack.append(successor)
                    on_stack.add(successor)
                    work.append((successor, iter(sorted(edges[successor]))))
                    advanced = True
                    break
                if successor in on_stack:
                    low[vertex] = min(low[vertex], number[successor])
            if advanced:
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[vertex])
            if low[vertex] == number[vertex]:
                component = []
                while True:
                    member = stack.pop()
                    on_stack.discard(member)
                    component.append(member)
                    if member == vertex:
                        break
                result.append(component)
    return result[::-1]
