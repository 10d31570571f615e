r"""Lightning strategies: the user's step runs with its convolutional modules row-wise, and nothing else changes.

    Trainer(strategy="lrcnn")                     one device
    Trainer(strategy="lrcnn_ddp", devices=2)      one process a device

A strategy is the natural place: it alone stands between the Trainer and the user's step, so a project changes one
argument. The chosen submodules' ``forward`` is replaced while a step runs and put back before the step returns.

``lightning.pytorch`` and ``pytorch_lightning`` are two libraries to Python, with a Trainer, base classes and a registry
each. Both get classes made from the source below:

    RowwiseSteps ----- SingleDevice + SingleDeviceStrategy of each Lightning -> LRCNNStrategy
                 \---- Parallel     + DDPStrategy of each Lightning          -> LRCNNDDPStrategy

They are made, and their names registered, when that Lightning is imported, before or after this package: whoever uses
the engine alone does not wait for a library that takes longer to import than torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABCMeta
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from lrcnn_lightning.parallel import Parallel
from lrcnn_lightning.single_device import SingleDevice
from lrcnn_lightning.steps import CLASSES

__all__ = ["NAMES", "LRCNNDDPStrategy", "LRCNNStrategy", "register"]

_NAMESPACES = {"lightning.pytorch.strategies": "lightning.pytorch", "pytorch_lightning.strategies": "pytorch_lightning"}
"""The module that holds the registry -> the Lightning that it belongs to; the preferred one first."""

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "lrcnn": ("LRCNNStrategy", {}),
    "lrcnn_two_phase": ("LRCNNStrategy", {"mode": "two_phase"}),
    "lrcnn_overlap": ("LRCNNStrategy", {"mode": "overlap"}),
    "lrcnn_ddp": ("LRCNNDDPStrategy", {}),
    "lrcnn_ddp_two_phase": ("LRCNNDDPStrategy", {"mode": "two_phase"}),
    "lrcnn_ddp_overlap": ("LRCNNDDPStrategy", {"mode": "overlap"}),
}
"""Name in the Trainer -> class and options."""


def _make(namespace: str) -> dict[str, Any]:
    """The strategy classes of one Lightning."""
    if namespace in CLASSES:
        return CLASSES[namespace]
    library = importlib.import_module(f"{namespace}.strategies")
    if namespace in CLASSES:  # the import has come by here
        return CLASSES[namespace]
    prefix = "" if namespace == _preferred() else "PytorchLightning"
    distributed = torch.nn.parallel.DistributedDataParallel
    made: dict[str, Any] = {}
    for name, source, base, further in (
        ("LRCNNStrategy", SingleDevice, library.SingleDeviceStrategy, ()),
        ("LRCNNDDPStrategy", Parallel, library.DDPStrategy, (distributed.__init__,)),
    ):
        body = {
            "__doc__": source.__doc__,
            "__module__": __name__,
            "__qualname__": prefix + name,
            "_namespace": namespace,
            "_kind": name,
            "_base": base,
            "_passed_on": (base.__init__, *further),
        }
        made[name] = ABCMeta(name, (source, base), body)
    for other in CLASSES.values():
        for name in made:
            first, second = (made, other) if prefix == "" else (other, made)
            # A Trainer asks whether a strategy is one of its own library; `_join` makes it one.
            second[name]._base.register(first[name])
            first[name].register(second[name])
    CLASSES[namespace] = made
    return made


def _preferred() -> str:
    """The Lightning whose class goes by the plain name: the first one that is installed."""
    for namespace in _NAMESPACES.values():
        spec = importlib.util.find_spec(namespace.partition(".")[0])
        if spec is not None and spec.origin is not None:  # a folder of that name is no package
            return namespace
    raise ImportError("the strategies need Lightning; install lightning or pytorch-lightning")


def _register_names(library: ModuleType) -> None:
    for name, (kind, options) in NAMES.items():
        source = _make(_NAMESPACES[library.__name__])[kind]
        mode = options.get("mode", "auto")
        library.StrategyRegistry.register(
            name, source, description=f"{kind} with mode {mode!r}", override=True, **options
        )


class _RegisterOnImport(MetaPathFinder):
    """Registers the strategies in each Lightning once it has been imported.

    It finds nothing itself: it lets the other finders find the module that holds the registry, and adds a step to
    its execution.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _NAMESPACES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _RegisterOnImport))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_names(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register `NAMES` in each Lightning that has been imported, and in the others when they are.

    Doing so again changes nothing.
    """
    for name in _NAMESPACES:
        if hasattr(sys.modules.get(name), "StrategyRegistry"):
            _register_names(sys.modules[name])
    if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


if TYPE_CHECKING:

    class LRCNNStrategy(SingleDevice): ...

    class LRCNNDDPStrategy(Parallel): ...


def __getattr__(name: str) -> Any:
    """Make the classes when they are asked for; importing this file must not import Lightning."""
    kind = name.removeprefix("PytorchLightning")
    if kind in ("LRCNNStrategy", "LRCNNDDPStrategy"):
        namespace = _preferred() if kind == name else "pytorch_lightning"
        made = _make(namespace)[kind]
        if made.__qualname__ == name:
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
