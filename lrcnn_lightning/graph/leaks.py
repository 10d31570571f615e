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
    """Notes the tensors that are made while the module's code is traced."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if is_fake(item):
                self._made.append(weakref.ref(item))
        return result

    def undo(self) -> None:
        """Take those that are still alive out of the caches, dictionaries and lists that hold them.

        What else may hold one belongs to the trace, which is over.
        """
        alive = {id(tensor): tensor for made in self._made if (tensor := made()) is not None}
        for holder in gc.get_referrers(*alive.values()) if alive else ():
            if holder is alive:
                continue
            if hasattr(holder, "cache_clear"):
                holder.cache_clear()
            elif type(holder) is dict:
                for key in [key for key, value in holder.items() if id(value) in alive]:
                    del holder[key]
            elif type(holder) is list:
                holder[:] = [item for item in holder if id(item) not in alive]
