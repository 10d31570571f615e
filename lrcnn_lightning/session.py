"""The row-wise modules of one model: which they are, and the time for which they run row by row.

A strategy does not change a model: it chooses modules, and while a step runs they have another ``forward``.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lrcnn_lightning.config import RowConfig, did_you_mean
from lrcnn_lightning.errors import CaptureError, ConfigError
from lrcnn_lightning.outside import OutsideCalls
from lrcnn_lightning.plan.plan import Plan
from lrcnn_lightning.plan.saved import SavedPlan
from lrcnn_lightning.rowwise import RowwiseForward

__all__ = ["RowwiseSession", "has_convolution", "select_modules"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def has_convolution(module: nn.Module) -> bool:
    """Whether a convolution is anywhere inside."""
    return any(isinstance(child, _CONVOLUTIONS) for child in module.modules())


def _has_own_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric: its ``forward`` adds to a state in Python, whatever network it has inside."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(module, library.Metric)


def select_modules(root: nn.Module, names: str | Iterable[str] = "auto") -> dict[str, nn.Module]:
    """The submodules of ``root`` that run row by row, by name.

    ``"auto"``: the outermost submodules that contain a convolution and have a forward of their own, but for metrics.
    Raises `ConfigError` for a name that does not exist, or where nothing contains a convolution.
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
        if _has_own_forward(child):
            if not any(child is other for other in found.values()):
                found[path] = child
        else:
            _collect(child, f"{path}.", found)


class RowwiseSession:
    """The row-wise modules of one model, patched only while `active`.

    What the strategies use: plans live as long as the session; the model is untouched outside of ``with
    session.active()``. With ``modules="auto"`` a module that cannot be captured is replaced by its own parts.
    """

    def __init__(
        self,
        root: nn.Module,
        config: RowConfig,
        plans: Mapping[str, SavedPlan] | None = None,
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.notify = notify
        self.root, self.config, self.given = root, config, dict(plans or {})
        self.observer: Callable[[RowwiseForward, tuple[Any, ...], dict[str, Any]], None] | None = None
        """Told of each call of a row-wise module, with its arguments."""
        names = config.modules
        self.automatic = names == "auto"
        chosen = select_modules(root, names)
        self.forwards: dict[str, RowwiseForward] = {
            name: self._forward(name, module) for name, module in chosen.items()
        }
        if self.automatic and _has_own_forward(root) and _direct_layers(root):
            # The model's own forward, where layers hang directly on it; its parts serve steps that call them.
            self.forwards = {"": self._forward("", root), **self.forwards}
        self._depth = 0
        self.outside = OutsideCalls(self._watched, notify)
        """Notices calls outside of `active`, from its ``start`` to its ``stop``."""
        for name in self.given:
            if name not in self.forwards:
                known = ", ".join(repr(other) for other in self.forwards) or "none"
                raise ConfigError(f"plan: no module {name!r} runs row-wise; those that do are {known}")

    def _forward(self, name: str, module: nn.Module) -> RowwiseForward:
        forward = RowwiseForward(module, self.config, name, self._descend if self.automatic else None, self.notify)
        forward.given = self.given.get(name)
        forward.passing = True
        forward.observe = self._observe
        return forward

    def _observe(self, forward: RowwiseForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is not None:
            self.observer(forward, args, kwargs)

    def _watched(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that a call outside of `active` would have run row by row, as far as is known."""
        for name, forward in self.forwards.items():
            if forward.plan is None or forward.plan.mode != "plain":
                yield name, forward.module

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans in force by module name: of the latest training call, or of the latest call."""
        table = {}
        for name, forward in self.forwards.items():
            latest = forward.training_plan or forward.plan
            if latest is not None:
                table[name] = latest
        return table

    @property
    def idle(self) -> dict[str, list[str]]:
        """The modules by name, each with the names of its parts that could be chosen instead, if none was called."""
        if any(forward.plan is not None or forward._runs_plain for forward in self.forwards.values()):
            return {}
        return {
            name: [f"{name}.{part}" for part in select_modules(forward.module)]
            for name, forward in self.forwards.items()
            if name
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the chosen modules run row by row inside this context."""
        self._depth += 1
        if self._depth == 1:
            self.outside.pause()
            for forward in self.forwards.values():
                self._patch(forward)
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for forward in self.forwards.values():
                    self._unpatch(forward)
                self.outside.resume()

    @staticmethod
    def _patch(forward: RowwiseForward) -> None:
        forward.previous = forward.module.__dict__.get("forward")
        forward.module.__dict__["forward"] = forward

    @staticmethod
    def _unpatch(forward: RowwiseForward) -> None:
        if forward.module.__dict__.get("forward") is forward:
            del forward.module.__dict__["forward"]
            if forward.previous is not None:
                forward.module.__dict__["forward"] = forward.previous

    def _descend(self, forward: RowwiseForward, error: CaptureError, run: Callable[[], Any]) -> Any:
        """Replace a module that cannot be captured by its parts, one level down, and run this call so."""
        parts = {} if forward.name == "" else select_modules(forward.module, "auto")
        forward._unsupported = None
        if not parts and forward.name != "":
            return forward._without_rows(error, run)
        self._unpatch(forward)
        self.forwards = {name: other for name, other in self.forwards.items() if other is not forward}
        for name, part in parts.items():
            inner = self._forward(f"{forward.name}.{name}" if forward.name else name, part)
            self.forwards[inner.name] = inner
            if self._depth:
                self._patch(inner)
        return run()


def _direct_layers(root: nn.Module) -> bool:
    """Whether convolutions hang directly on the model, or its network is spread over several children."""
    return sum(has_convolution(child) and not _is_metric(child) for child in root.children()) > 1
