"""Options of lean convolutions: their types, and checks that say what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.models.option import is_whole

__all__ = ["PaddingMode", "Stencil", "check_choice", "listed", "pair"]

Stencil = Literal["4-point", "5-point", "full"]
"""Positions at which the spatial part has weights: the four neighbours, these and the centre, or the whole kernel."""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
"""What lies outside of the map, as in `torch.nn.Conv2d`."""


def check_choice(owner: str, name: str, value: object, kind: object) -> None:
    """Check an option that has one of a few names.

    Args:
        owner: what has the option, for the message.
        name: of the option.
        value: what was given for it.
        kind: `Stencil` or `PaddingMode`.

    Raises:
        ConfigError: unless it is one of those names.
    """
    if value not in get_args(kind):
        raise ConfigError(f"{name} of {owner} must be one of {listed(get_args(kind))} (given: {value!r})")


def pair(owner: str, name: str, value: object, least: int) -> tuple[int, int]:
    """Height and width, or rows and columns, of an option that may be one number for both.

    Args:
        owner: what has the option, for the message.
        name: of the option.
        value: what was given for it.
        least: the smallest number that is allowed, in pixels.

    Raises:
        ConfigError: unless it is one or two whole numbers of at least ``least``.
    """
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(numbers) != 2 or not all(is_whole(number, least) for number in numbers):
        raise ConfigError(
            f"{name} of {owner} must be a whole number of at least {least}, or two of them, for height and width "
            f"(given: {value!r})"
        )
    return int(numbers[0]), int(numbers[1])


def listed(names: Iterable[str]) -> str:
    """Names in quotes, with commas."""
    return ", ".join(repr(name) for name in names)
