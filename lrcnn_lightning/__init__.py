"""lrcnn-lightning: exact row-wise training of convolutional networks in a fraction of the activation memory.

>>> import lrcnn_lightning                                    # doctest: +SKIP
>>> Trainer(strategy="lrcnn")                                 # doctest: +SKIP
>>> model = lrcnn_lightning.rowwise(model, mode="two_phase")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrcnn_lightning import strategy as _strategy
from lrcnn_lightning.checking import CheckReport, check
from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import (
    CaptureError,
    ConfigError,
    DoubleBackwardError,
    InputError,
    PlanError,
    RowwiseError,
)
from lrcnn_lightning.graph import elementwise
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.rowwise import frontier, plan, plan_of, restore, rowwise

if TYPE_CHECKING:
    from lrcnn_lightning.monitor import ActivationMemory
    from lrcnn_lightning.strategy import LRCNNDDPStrategy, LRCNNStrategy

_strategy.register()

__version__ = "0.1.0"

__all__ = [
    "ActivationMemory",
    "CaptureError",
    "CheckReport",
    "ConfigError",
    "DoubleBackwardError",
    "InputError",
    "LRCNNDDPStrategy",
    "LRCNNStrategy",
    "Plan",
    "PlanError",
    "RowConfig",
    "RowwiseError",
    "check",
    "elementwise",
    "frontier",
    "plan",
    "plan_of",
    "restore",
    "rowwise",
]

_NEED_LIGHTNING = {"ActivationMemory": "monitor", "LRCNNDDPStrategy": "strategy", "LRCNNStrategy": "strategy"}


def __getattr__(name: str) -> Any:
    """What needs Lightning is made when it is asked for; the engine works with torch alone."""
    if name in _NEED_LIGHTNING:
        return getattr(importlib.import_module(f"lrcnn_lightning.{_NEED_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
