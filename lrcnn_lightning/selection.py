"""Which submodules run row by row: those that were named, or the outermost ones that contain a convolution."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from lrcnn_lightning.config import did_you_mean
from lrcnn_lightning.errors import ConfigError

__all__ = ["has_convolution", "has_direct_layers", "has_own_forward", "select_modules"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def has_convolution(module: nn.Module) -> bool:
    """Whether a convolution is anywhere inside."""
    return any(isinstance(child, _CONVOLUTIONS) for child in module.modules())


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module computes something itself, and does not only hold others."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def has_direct_layers(root: nn.Module) -> bool:
    """Whether convolutions hang directly on the model, or its network is spread over several children."""
    return sum(has_convolution(child) and not _is_metric(child) for child in root.children()) > 1


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric: its ``forward`` adds to a state in Python, whatever network it has inside."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(module, library.Metric)


def select_modules(root: nn.Module, names: str | Iterable[str] = "auto") -> dict[str, nn.Module]:
    """The submodules of ``root`` that run row by row, by name.

    ``"auto"``: the outermost submodules that contain a convolution and have a forward of their own, but for metrics.
    Raises `ConfigError` for a name that does not exist, or is inside of another.
    """
    if names == "auto":
        found: dict[str, nn.Module] = {}
        _collect(root, "", found)
        return found
    table = dict(root.named_modules())
    chosen: dict[str, nn.Module] = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in table or name == "":
            outer = sorted(child for child, _ in root.named_children())
            hint = did_you_mean(name, [key for key in table if key])
            raise ConfigError(
                f"modules={name!r}: {type(root).__name__} has no submodule of that name{hint}; its submodules are "
                f"{', '.join(outer) or 'none'} and what is inside them (see `named_modules()`)"
            )
        chosen[name] = table[name]
    for name in chosen:
        inside = [other for other in chosen if other.startswith(f"{name}.")]
        if inside:
            raise ConfigError(f"modules: {inside[0]!r} is inside {name!r}, which runs row by row as a whole; name one")
    return chosen


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Module]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not has_convolution(child) or _is_metric(child):
            continue
        if has_own_forward(child):
            if not any(child is other for other in found.values()):
                found[path] = child
        else:
            _collect(child, f"{path}.", found)
