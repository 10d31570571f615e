"""Residency: where a feature map lives, in the forward and in the backward pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["KEEP", "LEAN", "STREAM", "TRANSIENT", "Residencies", "Residency"]

Place = Literal["keep", "transient", "stream"]


class Residency(NamedTuple):
    """``keep``: the full map lives until the backward pass has used it. ``transient``: the full map lives within one
    pass, until its last reader there. ``stream``: only slabs exist.
    """

    forward: Place
    backward: Place

    def __str__(self) -> str:
        return self.forward if self.forward == self.backward else f"{self.forward}/{self.backward}"

    @staticmethod
    def parse(text: str) -> Residency:
        """The residency whose ``str`` this is. Raises `ValueError` for any other text."""
        for residency in (KEEP, TRANSIENT, STREAM, LEAN):
            if text == str(residency):
                return residency
        raise ValueError(f"allowed are {', '.join(repr(str(r)) for r in (KEEP, TRANSIENT, STREAM, LEAN))}")


KEEP = Residency("keep", "keep")
TRANSIENT = Residency("transient", "transient")
STREAM = Residency("stream", "stream")
LEAN = Residency("transient", "stream")
"""Read twice in the forward pass, and never whole in the backward pass, where no gradient map of it is made either."""

Residencies = dict[int, Residency]
