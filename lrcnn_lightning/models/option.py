"""Checks of the options that networks have in common: numbers that a configuration may give in any form."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

from lrcnn_lightning.errors import ConfigError

__all__ = ["is_whole", "positive", "whole"]


def positive(owner: str, name: str, value: object) -> float:
    """Check a factor, such as that of all channels.

    Args:
        owner: what has the option, for the message.
        name: of the option.
        value: what was given for it.

    Raises:
        ConfigError: unless it is a finite number above zero.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} of {owner} must be positive, and a finite number such as 0.25 (given: {value!r})")
    return float(value)


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is a whole number of at least ``least``; ``True`` and ``2.0`` are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def whole(owner: str, name: str, value: object, least: int = 1) -> int:
    """Check a count, such as that of channels.

    Args:
        owner: what has the option, for the message.
        name: of the option.
        value: what was given for it.
        least: the smallest number that is allowed.

    Raises:
        ConfigError: unless it is a whole number of at least ``least``.
    """
    if not is_whole(value, least):
        raise ConfigError(f"{name} of {owner} must be a whole number of at least {least} (given: {value!r})")
    return int(value)
