"""Constants: numbers that a rule knows before any step, as tensors on the device of the data.

A GPU and the processor wait for each other while numbers are copied between them. So each constant is copied once, in
the first step that reads it; later steps, and one that is captured as a CUDA graph, find it there. On the CPU it is
made anew each time, which costs nothing and holds no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrcnn_lightning.fake import is_fake, mode_of

__all__ = ["Constant"]


class Constant:
    """A vector of numbers."""

    __slots__ = ("_dtype", "_held", "_numbers")

    def __init__(self, numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> None:
        self._numbers, self._dtype = list(numbers), dtype
        self._held: tuple[Any, Tensor] | None = None
        """For which device (and which mode of tensors without data) it was made last, and the tensor."""

    def on(self, like: Tensor) -> Tensor:
        """The numbers as a tensor ``[n]`` on the device of ``like``."""
        if like.device.type == "cpu":
            return torch.tensor(self._numbers, dtype=self._dtype, device="cpu")
        place = like.device, mode_of(like)
        if self._held is None or self._held[0] != place:
            # Autograd may save it, which no tensor allows that was made in inference mode.
            with torch.inference_mode(False):
                self._held = place, self._made(like)
        return self._held[1]

    def _made(self, like: Tensor) -> Tensor:
        if is_fake(like):
            return like.new_empty((len(self._numbers),), dtype=self._dtype)
        return torch.tensor(self._numbers, dtype=self._dtype, device=like.device)
