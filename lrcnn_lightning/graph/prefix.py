"""The beginning of a graph that changes the caller's tensors: it runs as it was written, before all rows.

    def forward(x):
        m = x.mean((2, 3), keepdim=True)      prefix, on the caller's tensors, under ordinary autograd
        x -= m
        return conv(x) + m                    graph: its inputs are x, as it is then, and m

What the caller sees of its tensors afterwards, and the gradients that go through them, are those of plain PyTorch.
"""

from __future__ import annotations

from dataclasses import replace

from lrcnn_lightning.graph.graph import Graph, Node, Prefix, ValueKind, references
from lrcnn_lightning.graph.views import base_of, views_of, written_argument

__all__ = ["with_prefix"]


def with_prefix(graph: Graph) -> Graph:
    """The same graph, whose nodes up to the last that writes an input are its `Prefix`."""
    end = _last_write(graph)
    if end == 0:
        return graph
    nodes, rest = graph.nodes[:end], graph.nodes[end:]
    computed = {output for node in nodes for output in node.outputs}
    read = {ref.index for ref in references(([(node.args, node.kwargs) for node in rest], graph.outputs))}
    results = tuple(sorted(computed & read))
    values = list(graph.values)
    for number, index in enumerate(results):
        values[index] = replace(values[index], kind=ValueKind.INPUT, source=graph.arguments + number)
    return replace(graph, values=tuple(values), nodes=rest, prefix=Prefix(nodes, results))


def _last_write(graph: Graph) -> int:
    """The position behind the last node that writes the memory of an input; 0 if none does."""
    view: dict[int, Node] = {}
    end = 0
    for position, node in enumerate(graph.nodes):
        written = written_argument(node)
        if written is not None and graph.values[base_of(view, written.index)].kind is ValueKind.INPUT:
            end = position + 1
        view.update(views_of(node))
    return end
