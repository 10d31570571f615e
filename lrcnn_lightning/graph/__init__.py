"""Module -> graph: capture, functional form.

The graph is plain data.  It can be printed and tested without a plan or an engine.
"""

from lrcnn_lightning.graph.capture import CUMULATIVE, capture, under_autocast
from lrcnn_lightning.graph.custom_functions import CustomFunction, elementwise, is_elementwise
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
    is_dense,
    map_refs,
    references,
)
from lrcnn_lightning.graph.guards import Guard
from lrcnn_lightning.graph.hooks import HOOK_TABLES, HookCall, computes_weight
from lrcnn_lightning.graph.marks import marks_of
from lrcnn_lightning.graph.reasons import in_words
from lrcnn_lightning.graph.rehearsal import fake_run, own_error
from lrcnn_lightning.graph.structure import Structure, take_apart
from lrcnn_lightning.graph.surroundings import ONE_AT_A_TIME, is_rehearsed, is_rehearsed_elsewhere
from lrcnn_lightning.graph.synchronised import SYNC_BATCH_NORM, processes
from lrcnn_lightning.graph.views import views_of, written_argument

__all__ = [
    "CUMULATIVE",
    "HOOK_TABLES",
    "ONE_AT_A_TIME",
    "SYNC_BATCH_NORM",
    "Context",
    "CustomFunction",
    "DrawOrder",
    "Graph",
    "Guard",
    "HookCall",
    "Node",
    "Ref",
    "Structure",
    "Value",
    "ValueKind",
    "Write",
    "buffer_values",
    "capture",
    "computes_weight",
    "dense_strides",
    "dependent_values",
    "draws",
    "elementwise",
    "fake_run",
    "in_words",
    "is_dense",
    "is_elementwise",
    "is_rehearsed",
    "is_rehearsed_elsewhere",
    "map_refs",
    "marks_of",
    "own_error",
    "processes",
    "references",
    "take_apart",
    "under_autocast",
    "views_of",
    "written_argument",
]
