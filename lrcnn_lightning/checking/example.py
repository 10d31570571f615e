"""The input of a check: as given, with data where it has none, or cut to a smaller size.

example    2 x 3 x 2048 x 2048        plain PyTorch would take 22 GiB
cut        2 x 3 x  288 x  288        every axis that is as long as one of the map's is as short as that one's part
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcnn_lightning.checking.state import named_leaves
from lrcnn_lightning.checking.subject import widened
from lrcnn_lightning.errors import InputError
from lrcnn_lightning.graph import Structure, take_apart

__all__ = ["Example"]


@dataclass(frozen=True)
class Example:
    """Arguments of one call: their leaves with names, how these are nested, and the device of those without data."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: Structure
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, example: Any) -> Example:
        """A tensor, a tuple of arguments or a dict of keyword arguments.

        Raises `InputError` if there is no tensor in it.
        """
        args: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
        kwargs: dict[str, Any] = {}
        if isinstance(example, Mapping):
            args, kwargs = (), dict(example)
        leaves, structure = take_apart((args, kwargs))
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise InputError(
                f"{type(module).__name__}: the example has no tensor (given: {example!r}; allowed: a tensor, a tuple "
                "of arguments, a dict of keyword arguments; tensors on the meta device stand for random data)"
            )
        known = _parameters(module)
        named = [(known[i] if i < len(known) else f"input {i}", arg) for i, arg in enumerate(args)]
        names = [name for of, arg in (*named, *kwargs.items()) for name, _ in named_leaves(arg, of)]
        held = next(module.parameters(), None)
        return cls(tuple(names), tuple(leaves), structure, torch.device("cpu") if held is None else held.device)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        shapes = {n: t for n, t in zip(self.names, self.leaves, strict=True) if isinstance(t, Tensor)}
        return ", ".join(
            f"{name}: {' x '.join(map(str, t.shape)) or 'a scalar'} {str(t.dtype).removeprefix('torch.')}"
            for name, t in shapes.items()
        )

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments themselves."""
        args, kwargs = self.structure.put_together(self.leaves)
        return args, kwargs

    def with_data(self, seed: int) -> Example:
        """Random data in the place of tensors on the ``meta`` device: normal numbers; zeros for integers, which may be
        indices.
        """
        generator = torch.Generator().manual_seed(seed)

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_meta:
                return leaf
            made = torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
            if made.is_floating_point() or made.is_complex():
                made.normal_(generator=generator)
            made = made.contiguous(memory_format=_memory_format(leaf)).to(self.device)
            return made.requires_grad_(leaf.requires_grad)

        return dataclasses.replace(self, leaves=tuple(map(real, self.leaves)))

    def fresh(self, wide: bool, move: Callable[[Tensor], object]) -> tuple[Example, Example]:
        """Copies that a call may change, each passed to ``move`` first; a tensor that is given twice stays one.

        The first ones take the gradients, the second ones are for the call: a tensor with a history has one there, too.
        """
        copies: dict[int, tuple[Any, Any]] = {}

        def fresh(leaf: Any) -> tuple[Any, Any]:
            if not isinstance(leaf, Tensor):
                return leaf, copy.deepcopy(leaf)
            if id(leaf) not in copies:
                made = leaf.detach().clone()
                made = widened(made) if wide else made
                move(made)
                made.requires_grad_(leaf.requires_grad)
                copies[id(leaf)] = made, made if leaf.is_leaf else made.clone()
            return copies[id(leaf)]

        pairs = list(map(fresh, self.leaves))
        leaves, given = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        return dataclasses.replace(self, leaves=leaves), dataclasses.replace(self, leaves=given)

    # ------------------------------------------------------------------ sizes

    @property
    def longest(self) -> int:
        """The most rows that it can have."""
        return max((size for tensor in self.tensors for size in tensor.shape[2:]), default=1)

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    def smaller(self, share: float) -> Iterator[Example]:
        """Examples of the same kind with at most a ``share`` of the places of the maps, the best ones first.

        Sizes are multiples of 32, else of 64 or 128, as networks with many strides need; where maps have to have the
        size that they have, the batch is smaller.
        """
        maps = [tensor.shape for tensor in self.tensors if tensor.dim() >= 4]
        maps = maps or [tensor.shape for tensor in self.tensors if tensor.dim() == 3]
        sizes = {size for shape in maps for size in shape[2:] if size > 32}
        axes = max((len(shape) - 2 for shape in maps), default=0)
        for multiple in (32, 64, 128):
            factor = share ** (1 / axes) if axes else 1.0
            cut = {size: min(size, max(int(size * factor) // multiple, 1) * multiple) for size in sizes}
            if any(cut[size] < size for size in sizes):
                yield self._cut(cut)
        samples = {tensor.shape[0] for tensor in self.tensors if tensor.dim()}
        if len(samples) == 1 and max(samples) > 2:
            few = max(2, math.floor(max(samples) * share))
            yield self._mapped(lambda tensor: tensor[:few] if tensor.dim() else tensor)

    def _cut(self, sizes: Mapping[int, int]) -> Example:
        labels = any(tensor.dim() >= 4 for tensor in self.tensors)  # what has three axes beside N C H W is N H W

        def cut(tensor: Tensor) -> Tensor:
            first = 1 if tensor.dim() == 3 and labels else 2
            for axis in range(first, tensor.dim()):
                tensor = tensor.narrow(axis, 0, sizes.get(tensor.shape[axis], tensor.shape[axis]))
            return tensor

        return self._mapped(cut)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Example:
        def changed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            part = change(leaf.detach())
            return part.contiguous(memory_format=_memory_format(leaf)).requires_grad_(leaf.requires_grad)

        return dataclasses.replace(self, leaves=tuple(map(changed, self.leaves)))


def _parameters(module: nn.Module) -> list[str]:
    """The names of the parameters of a module's forward, without its own."""
    try:
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):
        return []
    return [p.name for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL][1:]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """The order of a tensor's elements in memory, which its parts keep."""
    for dimensions, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=order) and not tensor.is_contiguous():
            return order
    return torch.contiguous_format
