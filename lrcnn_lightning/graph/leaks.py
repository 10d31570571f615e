"""Tensors of a trace that live on after it.

A trace runs the module's code on tensors that have shapes and no data. Where the code remembers a result outside of
the module (a function under ``functools.lru_cache``, a dictionary of a file, a hook that stores what it sees), such a
tensor would be found there by the next call, and everything computed with it would have no data either.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lrcnn_lightning.fake import is_fake

__all__ = ["Leaks"]


class Leaks(TorchFunctionMode):
    """Notes the tensors that are made while the module's code runs on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[TensorWeakRef] = []
        self._fakes: list[Tensor] = []
        self._originals: list[Tensor] = []
        self._of_data = WeakTensorKeyDictionary()
        self.lost: str | None = None
        """The type of a container outside of the module that held a tensor computed from the module's inputs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            self.note(item)
        return result

    def note(self, item: Any) -> None:
        """Note what may be a tensor without data."""
        if is_fake(item):
            self._made.append(TensorWeakRef(item))

    def note_of_data(self, tensor: Any) -> None:
        """Note a tensor that is an input of the module or computed from one."""
        if isinstance(tensor, Tensor):
            self._of_data[tensor] = True

    def depends_on_data(self, tree: Any) -> bool:
        """Whether a tensor among nested arguments does."""
        return any(isinstance(leaf, Tensor) and leaf in self._of_data for leaf in tree_leaves(tree))

    def note_stand_in(self, fake: Tensor, tensor: Tensor) -> None:
        """Note a tensor without data that the code has in the place of another."""
        self._fakes.append(fake)
        self._originals.append(tensor)

    def undo(self) -> None:
        """Take those that are still alive out of the caches, dictionaries and lists that hold them; what others stand
        in for takes its place again.

        What else may hold one belongs to the trace, which is over. Whoever holds a tensor is looked for among all
        objects of the process, which takes long; so those that nobody holds are left out.
        """
        fakes, self._fakes = self._fakes, []
        originals = {id(fake): tensor for fake, tensor in zip(fakes, self._originals, strict=True)}
        made = [reference() for reference in self._made]
        alive = [tensor for tensor in made if tensor is not None and id(tensor) not in originals]
        del made
        remaining = [*_held_elsewhere(fakes), *_held_elsewhere(alive)]
        leaked = {id(tensor) for tensor in alive}
        for holder in gc.get_referrers(*remaining) if remaining else ():
            if holder is alive or holder is fakes or holder is remaining:
                continue
            if hasattr(holder, "cache_clear"):
                holder.cache_clear()
            elif type(holder) is dict:
                for key, value in list(holder.items()):
                    if id(value) in originals:
                        holder[key] = originals[id(value)]
                    elif id(value) in leaked:
                        self._note_loss(holder, value)
                        del holder[key]
            elif type(holder) is list:
                for item in holder:
                    if id(item) in leaked:
                        self._note_loss(holder, item)
                holder[:] = [originals.get(id(item), item) for item in holder if id(item) not in leaked]

    def _note_loss(self, holder: Any, tensor: Tensor) -> None:
        if tensor in self._of_data:
            self.lost = type(holder).__name__


def _held_elsewhere(tensors: list[Tensor]) -> list[Tensor]:
    """Those to which there are more references than that of the list, which nothing else may refer to."""
    items = [*tensors, Tensor()]  # the last one shows what the count is otherwise
    tensors.clear()
    counts = [sys.getrefcount(item) for item in items]
    tensors.extend(items[:-1])
    return [item for item, count in zip(tensors, counts[:-1], strict=True) if count > counts[-1]]
