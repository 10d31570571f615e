"""Groups: the parts of a segment that are differentiated at once.

A reader and what it reads belong to one group where nothing but slabs exists between them in the backward pass, and
where a reduction lies between them whose gradient is needed before. Groups that so depend on each other both ways
become one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrcnn_lightning.rules import RowGraph

__all__ = ["groups"]


def groups(graph: RowGraph, nodes: Sequence[int], joined: Callable[[int, int], bool]) -> list[tuple[int, ...]]:
    """Partition of ``nodes`` (positions) in topological order, each group in graph order.

    ``joined(position, value)``: whether the node belongs to the group of the node that makes this input of it.
    """
    return _Groups(graph, nodes, joined).ordered()


class _Groups:
    """Sets of nodes that are united step by step (union-find)."""

    def __init__(self, graph: RowGraph, nodes: Sequence[int], joined: Callable[[int, int], bool]) -> None:
        self.graph, self.nodes, self.joined = graph, nodes, joined
        self.inside = {output for position in nodes for output in graph.nodes[position].outputs}
        self.parent = {position: position for position in nodes}

    def find(self, position: int) -> int:
        while self.parent[position] != position:
            self.parent[position] = self.parent[self.parent[position]]
            position = self.parent[position]
        return position

    def ordered(self) -> list[tuple[int, ...]]:
        graph = self.graph
        for position in self.nodes:
            for index in graph.nodes[position].inputs:
                if index in self.inside and self.joined(position, index):
                    self.parent[self.find(position)] = self.find(graph.producer[index])
        for component in _components(self._edges()):
            first = component[0]
            for other in component[1:]:
                self.parent[self.find(other)] = self.find(first)
        members: dict[int, list[int]] = {}
        for position in self.nodes:
            members.setdefault(self.find(position), []).append(position)
        return [tuple(members[component[0]]) for component in _components(self._edges())]

    def _edges(self) -> dict[int, set[int]]:
        """Group -> the groups that read its values."""
        graph = self.graph
        edges: dict[int, set[int]] = {self.find(position): set() for position in self.nodes}
        for position in self.nodes:
            for index in graph.nodes[position].inputs:
                if index in self.inside:
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
