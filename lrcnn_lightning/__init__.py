"""lrcnn-lightning: exact row-wise training of convolutional networks in a fraction of the activation memory.

>>> import lrcnn_lightning                                    # doctest: +SKIP
>>> Trainer(strategy="lrcnn")                                 # doctest: +SKIP
>>> model = lrcnn_lightning.rowwise(model, mode="two_phase")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import (
    CaptureError,
    ConfigError,
    DoubleBackwardError,
    InputError,
    PlanError,
    RowwiseError,
)
from lrcnn_lightning.plan.plan import Plan
from lrcnn_lightning.rowwise import plan, restore, rowwise

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ConfigError",
    "DoubleBackwardError",
    "InputError",
    "Plan",
    "PlanError",
    "RowConfig",
    "RowwiseError",
    "plan",
    "restore",
    "rowwise",
]
