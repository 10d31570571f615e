"""Inputs of classes derived from ``torch.Tensor``: images that carry what is known of them.

Such a class sees every operation on its tensors (``__torch_function__``). Rows run on plain tensors, and the class sees
a call of a row-wise module as one operation: it makes of the outputs what it would make of any other results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import handle_torch_function

from lrcnn_lightning.graph import take_apart

__all__ = ["with_subclasses", "without_subclasses"]


def without_subclasses(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with plain tensors in the place of those that are of a class of their own."""
    leaves, structure = take_apart((args, dict(kwargs)))
    if not any(map(_is_subclass, leaves)):
        return args, dict(kwargs)
    plain: tuple[tuple[Any, ...], dict[str, Any]] = structure.put_together(
        [leaf.as_subclass(torch.Tensor) if _is_subclass(leaf) else leaf for leaf in leaves]
    )
    return plain


def with_subclasses(result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a call with these arguments returns, its tensors of the classes that those of the arguments give them."""
    given = [leaf for leaf in take_apart((args, dict(kwargs)))[0] if _is_subclass(leaf)]
    if not given:
        return result
    leaves, structure = take_apart(result)
    return structure.put_together(
        [
            handle_torch_function(_last, given, *given, leaf) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
    )


def _last(*tensors: torch.Tensor) -> torch.Tensor:
    """Stands for the module: a function of tensors with a known result."""
    return tensors[-1]


def _is_subclass(leaf: object) -> bool:
    """Whether a tensor is of a class that carries something; those that compute in their own way are no such."""
    if not isinstance(leaf, torch.Tensor) or type(leaf) in (torch.Tensor, torch.nn.Parameter):
        return False
    kind = type(leaf)
    computes_in_its_own_way = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not computes_in_its_own_way and kind.__torch_function__ is not torch._C._disabled_torch_function_impl
