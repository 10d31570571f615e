"""Write docs/operations.md: every operation that has a row rule, from the registry itself.

python docs/generate_operations.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lrcnn_lightning.rules import registered
from lrcnn_lightning.rules.expansion import expanded
from lrcnn_lightning.rules.rule import find_factory

HEADER = """# Operations with a row rule

This file is written by `python docs/generate_operations.py`. The names are those of ATen overloads. Those that begin
with `rowwise` are parts into which the package splits other operations, such as the moments of a normalisation.

- *streams*: computed on slabs of rows.
- *reduces*: needs all rows; a partial result for each row, and a merge. It is a barrier.

A rule may decline what arrives, for example a softmax along the row axis; the operation then runs whole, on the full
map. Every other operation that ATen tags as pointwise streams. What is left runs whole.
"""

REWRITTEN = """## Rewritten

These operations are first rewritten as several of the others, where that lets rows through: normalisation as moments
and a pointwise application, dropout as a mask and a pointwise application.
"""


def _name(operation: Any) -> str:
    return str(operation).removeprefix("aten.")


def _manner(operation: Any) -> str:
    """What the rules of the operation's factory do, from its return type."""
    factory = find_factory(operation)
    assert factory is not None
    kinds = str(inspect.signature(factory).return_annotation)
    manners = [word for kind, word in (("RowRule", "streams"), ("Reduction", "reduces")) if kind in kinds]
    return " or ".join(manners)


def operations() -> str:
    """The text of the file."""
    families: dict[str, list[str]] = {}
    for operation, family in registered().items():
        if not isinstance(operation, str):
            families.setdefault(family, []).append(f"| `{_name(operation)}` | {_manner(operation)} |")
    parts = [HEADER]
    for family in sorted(families):
        table = "\n".join(["| operation | on rows |", "| --- | --- |", *sorted(families[family])])
        parts.append(f"## {family.capitalize()}\n\n{table}\n")
    parts += [REWRITTEN, "\n".join(sorted(f"- `{_name(operation)}`" for operation in expanded())) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("operations.md").write_text(operations(), encoding="utf-8")
