"""Module -> graph: capture, functional form.

The graph is plain data.  It can be printed and tested without a plan or an engine.
"""

from lrcnn_lightning.graph.capture import CUMULATIVE, capture
from lrcnn_lightning.graph.functional import dependent_values
from lrcnn_lightning.graph.graph import Context, Graph, Node, Ref, Value, ValueKind, map_refs, references

__all__ = [
    "CUMULATIVE",
    "Context",
    "Graph",
    "Node",
    "Ref",
    "Value",
    "ValueKind",
    "capture",
    "dependent_values",
    "map_refs",
    "references",
]
