"""What the kernels of an operation take for themselves, forward and backward, on rows of any height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from lrcnn_lightning.planning.machine import Machine
from lrcnn_lightning.planning.trial import Trial
from lrcnn_lightning.planning.workspace import Call, NotOnALine, Workspaces, between

__all__ = ["Kernels"]

Bytes = tuple[float, float]
"""Forward and backward."""


class Kernels:
    """Workspaces by trials, which tell the calls; ``known`` are those that were found before."""

    def __init__(self, machine: Machine, known: dict[Any, int]) -> None:
        self.machine, self._workspaces = machine, Workspaces(machine, known)

    def of(self, trial: Trial | None) -> Bytes:
        """Bytes of one trial."""
        return (0.0, 0.0) if trial is None else self._largest(*trial.kernels)

    def on_a_line(
        self,
        low: tuple[int, Trial],
        high: tuple[int, Trial],
        trial: Callable[[int], Trial | None],
        length: int,
        height: int,
    ) -> Bytes:
        """Bytes on rows of some length, given the trials of two others; ``height`` is that of the map.

        They are no line in the length as sizes are: on a device an algorithm is chosen for each. So they are those of
        the very calls, at the lengths next to it; the calls are known from ``low`` and ``high``, or else from a
        ``trial``.
        """

        def at(rows: int) -> Bytes:
            part = Fraction(rows - low[0], high[0] - low[0])
            try:
                calls = [between(*pair, part) for pair in zip(low[1].kernels, high[1].kernels, strict=True)]
                return self._largest(*calls)
            except (NotOnALine, ValueError):  # other calls, or other numbers of them
                return self.of(trial(rows))

        below, above = _neighbours(length, height) if self.machine.interpolates else (length, length)
        lower = at(below)
        if below == above:
            return lower
        share, upper = (length - below) / (above - below), at(above)
        forward, backward = ((1 - share) * a + share * b for a, b in zip(lower, upper, strict=True))
        return forward, backward

    def _largest(self, forward: Sequence[Call], backward: Sequence[Call]) -> Bytes:
        """Of calls forward, one after another, and of calls backward."""
        if not self.machine.caching:
            return 0.0, 0.0
        largest = [float(max(map(self._workspaces.of, calls), default=0)) for calls in (forward, backward)]
        return largest[0], largest[1]


def _neighbours(length: int, height: int) -> tuple[int, int]:
    """The lengths next to one at which workspaces are tried: powers of two, one and a half times these, the map's."""
    below = 1 << (length.bit_length() - 1)
    lengths = (below, below * 3 // 2, 2 * below)
    return max(h for h in lengths if h <= length), min(height, min(h for h in lengths if h >= length))
