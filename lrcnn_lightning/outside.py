"""Noticing calls of row-wise modules outside of the Trainer's steps, where they run plainly.

    setup ---- step ---- between steps ---- step ---- teardown
          watch      -                 watch      -

A hook on the modules themselves would be part of whatever copies or saves them. So it is one for all modules, and in
force only between the steps, where hardly any module is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lrcnn_lightning.fake import current_mode
from lrcnn_lightning.messages import outside_call

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["OutsideCalls"]


class OutsideCalls:
    """Says once that a module was called, between `start` and `stop`.

    Args:
        modules: Gives the modules by name, as they are at the time of a call.
        notify: Takes the warning.
    """

    def __init__(self, modules: Callable[[], Iterable[tuple[str, nn.Module]]], notify: Callable[[str], None]) -> None:
        self._modules, self._notify = modules, notify
        self._handle: RemovableHandle | None = None
        self._on = False

    def start(self) -> None:
        """Begin to watch."""
        self._on = True
        self.resume()

    def resume(self) -> None:
        """Watch again, if it was started, and until the warning has been given."""
        if self._handle is not None or not self._on:
            return
        watcher = weakref.ref(self)

        def look(module: nn.Module, args: Any) -> None:
            watching = watcher()
            if watching is None:  # whoever watched was forgotten, not stopped
                handle.remove()
            else:
                watching._look(module)

        handle = self._handle = register_module_forward_pre_hook(look)

    def pause(self) -> None:
        """Look away until `resume`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stop(self) -> None:
        """End watching."""
        self._on = False
        self.pause()

    def _look(self, module: nn.Module) -> None:
        name = next((name for name, other in self._modules() if other is module), None)
        if name is None or current_mode() is not None:  # a run on tensors without data takes no memory
            return
        self.stop()
        self._notify(outside_call(name))
