"""The schema of the configuration group ``strategy``, made from `RowConfig` so that no option is written twice.

OmegaConf checks what it can express: which keys exist, and the types of plain texts and numbers.  Options that are a
number *or* a word (``rows=8``, ``rows=auto``) are left open here and checked by `RowConfig` itself when the strategy
is made, before anything else runs.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from lrcnn_lightning.config import strategy_defaults

__all__ = ["StrategySchema", "register_schemas"]

_TYPES: dict[str, Any] = {"mode": str, "max_overhead": float, "on_unsupported": str}

StrategySchema = make_dataclass(
    "StrategySchema",
    [
        ("_target_", str, field(default="lrcnn_lightning.LRCNNStrategy")),
        ("_convert_", str, field(default="all")),
        *((name, _TYPES.get(name, Any), field(default=default)) for name, default in strategy_defaults().items()),
    ],
)
"""Every field of `RowConfig`, with its default in strategies, and the class that takes them."""


def register_schemas() -> None:
    """Put the schema into Hydra's ConfigStore as ``lrcnn_strategy``; doing so again changes nothing.

    It belongs to no group: an option of group ``strategy`` could be chosen, and would be offered.
    """
    ConfigStore.instance().store(name="lrcnn_strategy", node=StrategySchema, provider="lrcnn_lightning")
