"""Tensors of a trace that live on after it.

A trace runs the module's code on tensors that have shapes and no data. Where the code remembers a result outside of
the module (a function under ``functools.lru_cache``, a dictionary of a file, a hook that stores what it sees), such a
tensor would be found there by the next call, and everything computed with it would have no data either.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrcnn_lightning.fake import is_fake

__all__ = ["Leaks"]


class Leaks(TorchFunctionMode):
    """Notes the tensors that are made while the module's code runs on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []
        self._standing_in: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            self.note(item)
        return result

    def note(self, item: Any) -> None:
        """Note what may be a tensor without data."""
        if is_fake(item):
            self._made.append(weakref.ref(item))

    def note_stand_in(self, fake: Tensor, tensor: Tensor) -> None:
        """Note a tensor without data that the code has in the place of another."""
        self._standing_in.append((fake, tensor))

    def undo(self) -> None:
        """Take those that are still alive out of the caches, dictionaries and lists that hold them; what others stand
        in for takes its place again.

        What else may hold one belongs to the trace, which is over.
        """
        originals = {id(fake): tensor for fake, tensor in self._standing_in}
        made = (reference() for reference in self._made)
        alive = {id(tensor): tensor for tensor in made if tensor is not None and id(tensor) not in originals}
        fakes = [*alive.values(), *(fake for fake, _ in self._standing_in)]
        for holder in gc.get_referrers(*fakes) if fakes else ():
            if holder is alive or holder is fakes:
                continue
            if hasattr(holder, "cache_clear"):
                holder.cache_clear()
            elif type(holder) is dict:
                for key, value in list(holder.items()):
                    if id(value) in originals:
                        holder[key] = originals[id(value)]
                    elif id(value) in alive:
                        del holder[key]
            elif type(holder) is list:
                holder[:] = [originals.get(id(item), item) for item in holder if id(item) not in alive]
