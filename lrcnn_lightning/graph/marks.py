"""Marks: attributes that users put on tensors (``x.index = 3``). PyTorch itself puts only private ones there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import is_fake, names_of_fakes
from lrcnn_lightning.graph.state import PLAIN

__all__ = ["copy_marks", "marks_of", "refuse_marks"]


def marks_of(tensor: Tensor) -> dict[str, Any]:
    """The marks of a tensor that are numbers, strings or None; other objects are not for a module to compute with."""
    own = names_of_fakes() if is_fake(tensor) else frozenset()
    return {
        name: value
        for name, value in vars(tensor).items()
        if type(value) in PLAIN and not name.startswith("_") and name not in own
    }


def copy_marks(tensor: Tensor, stand_in: Tensor) -> dict[str, Any]:
    """Put the marks of a tensor on its stand-in, whose marks these then are."""
    for name, value in marks_of(tensor).items():
        setattr(stand_in, name, value)
    return marks_of(stand_in)


def refuse_marks(results: Iterable[Any], inputs: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
    """Raise `CaptureError` where code has put marks on what it was given or returns."""
    known = {id(tensor) for tensor, _ in inputs}
    changed = [marks_of(tensor) for tensor, before in inputs if marks_of(tensor) != before]
    changed += [marks_of(leaf) for leaf in results if is_fake(leaf) and id(leaf) not in known and marks_of(leaf)]
    if changed:
        raise CaptureError(
            f"its forward sets {', '.join(changed[0])} of a tensor that it takes or returns, which a captured graph "
            "would not do again; return it"
        )
