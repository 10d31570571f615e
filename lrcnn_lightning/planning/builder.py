"""Building a segment's program: what the forward and the backward pass of one segment do, step by step.

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

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from lrcnn_lightning.graph import draws
from lrcnn_lightning.planning.groups import groups
from lrcnn_lightning.planning.loop import BackwardPass, Loop, closure
from lrcnn_lightning.planning.loops import Loops
from lrcnn_lightning.planning.residency import Residencies
from lrcnn_lightning.planning.restore import Restores
from lrcnn_lightning.planning.steps import (
    BackwardRows,
    BackwardWhole,
    Effect,
    Free,
    FreeGradient,
    RunRows,
    RunWhole,
    Segment,
    Step,
    Sweep,
    reads_of,
    writes_of,
)
from lrcnn_lightning.rules import Interval, Role, RowRule

__all__ = ["SegmentBuilder"]


class SegmentBuilder:
    """Builds the program of one segment from its nodes, residencies, rows and halo policies."""

    def __init__(
        self,
        loops: Loops,
        name: str,
        nodes: Sequence[int],
        outputs: Collection[int],
        residencies: Residencies,
        rows: int,
        carried: Collection[int],
        chunks: Sequence[Interval],
        differentiable: Collection[int],
        on_demand: bool = False,
        balanced: bool = False,
    ) -> None:
        graph = loops.graph
        self.loops, self.graph, self.name = loops, graph, name
        self.nodes = tuple(nodes)
        self._members = frozenset(nodes)
        self.residencies, self.on_demand, self.balanced = residencies, on_demand, balanced
        self.rows, self.carried, self.chunks = rows, carried, tuple(chunks)
        self.differentiable = differentiable
        inside = {output for position in nodes for output in graph.nodes[position].outputs}
        self.inside = inside
        self._by_rows = {o for p in nodes if graph.roles[p] is Role.ROW for o in graph.nodes[p].outputs}
        read = dict.fromkeys(i for position in nodes for i in graph.nodes[position].inputs)
        self.inputs = tuple(index for index in read if index not in inside)
        self.outputs = tuple(index for index in outputs if index in inside)
        self._maps = {index for index in (*self.inputs, *inside) if graph.is_map(index)}
        self._forward_draft: tuple[list[Step], list[Loop]] | None = None
        self._draft: tuple[Restores, dict[str, set[int]]] | None = None
        self._with_room: dict[tuple[int, ...], Segment] = {}

    # ---------------------------------------------------------------- forward

    def build(self, training: bool, room: Sequence[int] | None = None) -> Segment:
        """The program; without ``training`` there is no backward pass and nothing is kept.

        ``room``: bytes, at each step of the backward pass but those that restore maps, that maps may take which are
        restored before they are due (`restore`).
        """
        if self._forward_draft is None:
            self._forward_draft = self._forward(training)
        forward, loops = self._forward_draft
        if not training:
            return self._program(forward, (), (), frozenset())
        if self._draft is None:
            self._draft = self._passes(loops)
        restores, used = self._draft
        steps = restores.on_demand(room) if self.on_demand else restores.in_one_sweep()
        forward = [
            RunRows(step.loop, frozenset(used.get(step.loop.name, ()))) if isinstance(step, RunRows) else step
            for step in forward
        ]
        needed = {index for step in steps for index in reads_of(self.graph, step)}
        at_hand = {*self.inputs, *(i for i in self.inside if self._at_hand(i))}
        kept = tuple(sorted(at_hand & needed))
        return self._program(forward, self._with_backward_frees(steps), kept, frozenset(self.differentiable))

    def with_room(self, room: Sequence[int]) -> Segment:
        """The program of a training step, with maps restored early as far as there is ``room`` (see `build`)."""
        most = sum(self.graph.values[value].bytes for value in self._by_rows)
        key = tuple(min(left, most) for left in room)
        if key not in self._with_room:
            self._with_room[key] = self.build(training=True, room=key)
        return self._with_room[key]

    @property
    def restores_twice(self) -> bool:
        """Whether the program that was built computes a map again on the way to another, and again for itself."""
        return self._draft is not None and self._draft[0].passes

    def _program(
        self, forward: Sequence[Step], backward: Sequence[Step], kept: tuple[int, ...], differentiable: frozenset[int]
    ) -> Segment:
        return Segment(
            self.name,
            self.nodes,
            self.inputs,
            self.outputs,
            kept,
            tuple(forward),
            tuple(backward),
            False,
            differentiable,
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
        return self.loops.make(name, nodes, sources, stored, reductions, further, *divided)

    def _levels(self) -> tuple[dict[int, int], dict[int, int]]:
        """Per value: the level whose loop makes it (maps), or before which it is there (whole values). Per node too.

        Effects keep their order, whatever they wait for: a module that is called twice updates its statistics twice.
        So do draws of random numbers, which a generator gives in the order in which they are asked for.
        """
        value_level: dict[int, int] = {}
        node_level: dict[int, int] = {}
        effects = drawn = 0
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
            if not node.outputs:
                level = effects = max(level, effects)
            if draws(node):
                level = drawn = max(level, drawn)
            node_level[position] = level
            for output in node.outputs:
                value_level[output] = level + (role is Role.REDUCE)
        return value_level, node_level

    def _made_by_rows(self, index: int) -> bool:
        return index in self._by_rows

    def _forward(self, training: bool) -> tuple[list[Step], list[Loop]]:
        graph = self.graph
        value_level, node_level = self._levels()
        top = max((*value_level.values(), *node_level.values(), 0))
        available = {i for i in self.inputs if graph.is_map(i)}
        stored_at = _by_level((i for i in sorted(self._by_rows) if self._stored_forward(i)), value_level)
        wholes_at = _by_level((p for p in self.nodes if graph.roles[p] is Role.WHOLE), node_level)
        reductions_at = _by_level((p for p in self.nodes if graph.roles[p] is Role.REDUCE), node_level)
        steps: list[Step] = []
        loops: list[Loop] = []
        for level in range(top + 1):
            for position in wholes_at.get(level, []):
                is_effect = not graph.nodes[position].outputs
                steps.append(Effect(position) if is_effect else RunWhole(position))
                available.update(i for i in graph.nodes[position].outputs if graph.is_map(i))
            stored = stored_at.get(level, [])
            reductions = reductions_at.get(level, [])
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
        freed = _by_level(last, last)
        result: list[Step] = []
        for i, step in enumerate(steps):
            result.append(step)
            result.extend(Free(index) for index in freed.get(i, ()))
        return result

    # --------------------------------------------------------------- backward

    def _materialised_backward(self, index: int) -> bool:
        if index not in self.inside or not self.graph.is_map(index) or index in self.outputs:
            return True
        return not self._made_by_rows(index) or self.residencies[index].backward != "stream"

    def _joined(self, position: int, index: int) -> bool:
        """Whether a node is differentiated at once with the one that makes this input of it."""
        if not self._made_by_rows(index):
            return False
        role = self.graph.roles[position]
        streams = not self._materialised_backward(index)
        return (streams and role is not Role.WHOLE) or role is Role.REDUCE

    def _passes(self, forward_loops: list[Loop]) -> tuple[Restores, dict[str, set[int]]]:
        """The steps of the backward pass but for restoring maps, and the nodes of each forward loop whose carries they
        use.
        """
        graph = self.graph
        ordered = groups(graph, self.nodes, self._joined)
        steps: list[Step] = []
        used: dict[str, set[int]] = {}
        for number, group in reversed(list(enumerate(ordered))):
            if len(group) == 1 and graph.roles[group[0]] is Role.WHOLE:
                if any(output in self.differentiable for output in graph.nodes[group[0]].outputs):
                    steps.append(BackwardWhole(group[0]))
                continue
            steps.extend(self._group(f"{self.name}.b{number}", group, forward_loops, used))
        reads = [reads_of(graph, step) for step in steps]
        transient = (v for v in sorted(self._by_rows) if self.residencies[v].backward == "transient")
        restored = [value for value in transient if value not in self.outputs]
        at_hand = [value for value in self._maps if self._at_hand(value)]

        def make(i: int, nodes: Sequence[int], sources: Collection[int], stored: Collection[int]) -> Loop:
            return self._loop(f"{self.name}.r{i}", nodes, sources, stored)

        return Restores(graph, steps, reads, restored, at_hand, make), used

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
        freed, handed_on = _by_level(last, last), _by_level(gradients, gradients)
        result: list[Step] = []
        for i, step in enumerate(steps):
            if isinstance(step, BackwardRows) and carries.get(step.carries or "") == i:
                step = replace(step, drops=True)
            result.append(step)
            result.extend(Free(index) for index in freed.get(i, ()))
            result.extend(FreeGradient(index) for index in handed_on.get(i, ()))
        return result

    def _group(
        self, name: str, group: Sequence[int], forward_loops: list[Loop], used: dict[str, set[int]]
    ) -> list[Step]:
        """The passes of one group."""
        graph = self.graph
        members, mine = set(group), self._members
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
                or any(r in mine and (r not in members or graph.roles[r] is Role.WHOLE) for r in graph.readers[o])
            )
        ]
        if not outputs and not reductions:
            return []
        levels = self._group_levels(group, made)
        streamed = {output for position in rows for output in graph.nodes[position].outputs}
        available = self._maps - streamed
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
        inside = frozenset(nodes).intersection(loop.nodes)
        nodes = tuple(p for p in nodes if p in inside)
        differentiated = frozenset(
            p
            for p in nodes
            if any(o in self.differentiable and levels.get(o, 0) >= level for o in graph.nodes[p].outputs)
        )
        ordered = tuple(dict.fromkeys(wholes))
        hollow = frozenset(p for p in nodes if self._hollow(p, inside, active, differentiated))
        return BackwardPass(loop, nodes, differentiated, tuple(outputs), tuple(active), tuple(maps), ordered, hollow)

    def _hollow(
        self, position: int, nodes: Collection[int], injections: Sequence[int], differentiated: Collection[int]
    ) -> bool:
        """Whether only the gradient of a node is wanted in a pass, not its values."""
        graph = self.graph
        rule = graph.rules[position]
        if position not in differentiated or not isinstance(rule, RowRule) or not rule.hollow:
            return False
        (output,) = graph.nodes[position].outputs
        if any(reader in nodes for reader in graph.readers[output]):
            return False
        injected = any(graph.nodes[p].inputs[0] == output for p in injections)
        return not injected or self._materialised_backward(output)


def _by_level(members: Iterable[int], level: Mapping[int, int]) -> dict[int, list[int]]:
    """The members of each level (or step), in order."""
    result: dict[int, list[int]] = {}
    for member in members:
        result.setdefault(level[member], []).append(member)
    return result
