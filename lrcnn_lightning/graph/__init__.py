"""Module -> graph: capture, functional form.

The graph is plain data.  It can be printed and tested without a plan or an engine.
"""

from lrcnn_lightning.graph.capture import CUMULATIVE, capture, under_autocast
from lrcnn_lightning.graph.draws import DrawOrder, draws
from lrcnn_lightning.graph.functional import buffer_values, dependent_values
from lrcnn_lightning.graph.graph import (
    Context,
    Graph,
    Node,
    Ref,
    Value,
    ValueKind,
    Write,
    dense_strides,
    map_refs,
    references,
)
from lrcnn_lightning.graph.guards import Guard
from lrcnn_lightning.graph.rehearsal import own_error
from lrcnn_lightning.graph.structure import Structure, take_apart
from lrcnn_lightning.graph.synchronised import SYNC_BATCH_NORM, processes

__all__ = [
    "CUMULATIVE",
    "SYNC_BATCH_NORM",
    "Context",
    "DrawOrder",
    "Graph",
    "Guard",
    "Node",
    "Ref",
    "Structure",
    "Value",
    "ValueKind",
    "Write",
    "buffer_values",
    "capture",
    "dense_strides",
    "dependent_values",
    "draws",
    "map_refs",
    "own_error",
    "processes",
    "references",
    "take_apart",
    "under_autocast",
]
