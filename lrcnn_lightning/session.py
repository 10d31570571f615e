"""The row-wise modules of one model: which they are, and the time for which they run row by row.

A strategy does not change a model: it chooses modules, and while a step runs they have another ``forward``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.forward import RowwiseForward
from lrcnn_lightning.outside import OutsideCalls
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.selection import has_convolution, has_direct_layers, has_own_forward, select_modules

__all__ = ["RowwiseSession", "has_convolution", "select_modules"]


class RowwiseSession:
    """The row-wise modules of one model, patched only while `active`.

    What the strategies use: plans live as long as the session; the model is untouched outside of ``with
    session.active()``. In the place of a module that cannot run row by row its own parts do.
    """

    def __init__(
        self,
        root: nn.Module,
        config: RowConfig,
        plans: Mapping[str, SavedPlan] | None = None,
        notify: Callable[[str], None] = warnings.warn,
        has_limit: bool | None = None,
    ) -> None:
        self.notify = notify
        self.root, self.config, self.given = root, config, dict(plans or {})
        self.has_limit = not config.fits_free_memory if has_limit is None else has_limit
        """Whether the budget of the configuration is the user's, and not what the devices have free."""
        self.observer: Callable[[RowwiseForward, tuple[Any, ...], dict[str, Any]], None] | None = None
        """Told of each call of a row-wise module, with its arguments."""
        chosen = select_modules(root, config.modules)
        self.forwards: dict[str, RowwiseForward] = {
            name: self._forward(name, module) for name, module in chosen.items()
        }
        if config.modules == "auto" and has_own_forward(root) and has_direct_layers(root):
            # The model's own forward, where layers hang directly on it; its parts serve steps that call them.
            self.forwards = {"": self._forward("", root), **self.forwards}
        self._depth = 0
        self.outside = OutsideCalls(self._watched, notify)
        """Notices calls outside of `active`, from its ``start`` to its ``stop``."""
        parts = [name for name, _ in root.named_modules() if any(name.startswith(f"{outer}.") for outer in chosen)]
        for name in self.given:
            if name not in self.forwards and name not in parts:
                known = ", ".join(repr(other) for other in self.forwards) or "none"
                raise ConfigError(f"plan: no module {name!r} runs row-wise; those that do are {known}")

    def _forward(self, name: str, module: nn.Module) -> RowwiseForward:
        forward = RowwiseForward(module, self.config, name, self.notify, self._divide)
        forward.given = self.given.get(name)
        forward.passing = True
        forward.has_limit = self.has_limit
        forward.observe = self._observe
        return forward

    def _observe(self, forward: RowwiseForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is not None:
            self.observer(forward, args, kwargs)

    def _watched(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that a call outside of `active` would have run row by row, as far as is known."""
        for name, forward in self.forwards.items():
            if forward.refusal is None and (forward.plan is None or forward.plan.mode != "plain"):
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
        if any(forward.is_called for forward in self.forwards.values()):
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

    def _divide(self, forward: RowwiseForward) -> list[RowwiseForward]:
        """The parts of a module that cannot run row by row, one level down, which do so in its place from now on."""
        parts = []
        for name, module in select_modules(forward.module).items():
            known = next((other for other in self.forwards.values() if other.module is module), None)
            part = known or self._forward(f"{forward.name}.{name}" if forward.name else name, module)
            if known is None:
                self.forwards[part.name] = part
                if self._depth:
                    self._patch(part)
            parts.append(part)
        return parts
