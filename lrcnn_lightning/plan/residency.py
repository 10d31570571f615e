"""Residency: where a feature map lives, in the forward and in the backward pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["KEEP", "STREAM", "TRANSIENT", "Residencies", "Residency"]

Place = Literal["keep", "transient", "stream"]


class Residency(NamedTuple):
    """``keep``: the full map lives until the backward pass has used it. ``transient``: the full map lives within one
    pass, until its last reader there. ``stream``: only slabs exist.
    """

    forward: Place
    backward: Place

    def __str__(self) -> str:
        return self.forward if self.forward == self.backward else f"{self.forward}/{self.backward}"


KEEP = Residency("keep", "keep")
TRANSIENT = Residency("transient", "transient")
STREAM = Residency("stream", "stream")

Residencies = dict[int, Residency]
