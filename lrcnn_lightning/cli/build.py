"""What both applications share: making objects from the configuration, and turning mistakes into one clear message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import hydra
import hydra.utils
import torch
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lrcnn_lightning.errors import ConfigError, RowwiseError

__all__ = ["CommandError", "application", "build", "build_all", "causes", "strategy_options", "user_errors"]

_EXTRA = "lrcnn-lightning[models]"
_LIBRARIES = {"torchvision": _EXTRA, "timm": _EXTRA, "monai": _EXTRA, "tensorboard": "tensorboard"}
"""Optional libraries that the shipped configurations name, and what to install for each."""


_OPEN = {"model.name": "model=timm model.name=convnext_tiny, or model=torchvision model.name=resnet18"}
"""Values that the shipped configurations leave open, with an example."""


class CommandError(CompactHydraException):
    """A mistake of the user's: its message alone is printed, or everything with ``HYDRA_FULL_ERROR=1``."""


_allow: Any = getattr(hydra.utils, "execution_whitelist", None)
"""Hydra 1.4 and later ask the code what a configuration may make objects of, and behave like no older release."""


def application(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Make an application of a function of the configuration: it reads the command line, and reports errors.

    Args:
        config_name: the shipped configuration that the command line changes.
    """
    base: dict[str, Any] = {"version_base": "1.3"} if _allow is None else {}
    hydra_main = hydra.main(config_path="pkg://lrcnn_lightning.conf", config_name=config_name, **base)

    def made(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        return _reporting(hydra_main(function))

    return made


def _reporting(main: Callable[[], Any]) -> Callable[[], Any]:
    """Print the message alone of what Hydra takes for a mistake: Hydra 1.4 gives a trace with every error of a job."""

    @wraps(main)
    def run() -> Any:
        before = sys.excepthook  # which Hydra calls

        def report(kind: Any, error: BaseException, trace: Any) -> None:
            if isinstance(error, HydraException):
                print(error, file=sys.stderr)
            else:
                before(kind, error, trace)

        sys.excepthook = report
        try:
            return main()
        finally:
            sys.excepthook = before

    return run


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can mend into a `CommandError`; anything else, out-of-memory errors included, passes as is.

    Hydra wraps an error of a constructor into one of its own that repeats it as a representation, so the causes are
    searched for the error that says what to do.
    """
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, RowwiseError):
                raise CommandError(f"error: {cause}") from error
            if isinstance(cause, MissingMandatoryValue):
                raise CommandError(f"error: {_missing(cause)}") from None  # Hydra would print this cause, too
            if isinstance(cause, ModuleNotFoundError) and cause.name and not cause.name.startswith("lrcnn_lightning"):
                package = cause.name.partition(".")[0]
                raise CommandError(
                    f"error: the Python package {package!r} is not installed, and the chosen configuration needs it; "
                    f"run: pip install '{_LIBRARIES.get(package, package)}', or choose a configuration without it"
                ) from error
        raise


def _missing(error: MissingMandatoryValue) -> str:
    """What to write for a value that a configuration leaves open (``???``), with an example if it is a shipped one."""
    key = str(error.full_key or error.key)
    if key in _OPEN:
        return f"{key} is not given, and the chosen configuration has no default for it; write for example {_OPEN[key]}"
    return f"{key} is not given, and the chosen configuration has no default for it; write {key}=VALUE"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Go through an error, what caused it, what caused that, and so on."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def build(node: DictConfig | None, **arguments: Any) -> Any:
    """Make the object that a node describes; ``None`` if the node is empty or its ``_target_`` is null.

    Raises:
        HydraException: if it cannot be made, from what its constructor raises; errors of memory pass as they are.
    """
    if node is None or node.get("_target_") is None:
        return None
    with _allowed(node):
        try:
            return hydra.utils.instantiate(node, **arguments)
        except (HydraException, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # Hydra 1.3 turns it into an error of its own, Hydra 1.4 does not
            raise CommandError(f"error: {node._target_}: {type(error).__name__}: {error}") from error


_SHIPPED = ("builtins.str", "lightning.pytorch.*", "lrcnn_lightning.*", "torch.optim.*")
"""What the shipped configurations make objects of, as Hydra writes it: names, and packages with all that is in them."""

_ZOO = "lrcnn_lightning.cli.zoo."
"""What is made of these is of any class that is registered with another library."""


def _allowed(node: DictConfig) -> AbstractContextManager[Any]:
    """What Hydra may make objects of: nothing else than the shipped configurations do, if a node asks for no more.

    A configuration of the user's own may name any class. Hydra judges it: some are refused, of others it warns.
    """
    packages = tuple(pattern[:-1] for pattern in _SHIPPED if pattern.endswith("*"))
    shipped = (
        target in _SHIPPED or (target.startswith(packages) and not target.startswith(_ZOO))
        for target in _targets(OmegaConf.to_container(node))
    )
    if _allow is None or not all(shipped):
        return nullcontext()
    context: AbstractContextManager[Any] = _allow(_SHIPPED)
    return context


def _targets(node: Any) -> Iterator[str]:
    """Go through everything that a node, or one inside of it, names as what to make an object of."""
    if isinstance(node, dict):
        if node.get("_target_") is not None:
            yield str(node["_target_"])
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _targets(item)


def build_all(node: DictConfig | None) -> list[Any]:
    """Make every object of a node whose values describe one each, such as the callbacks; null values are left out."""
    if node is None:
        return []
    made = (build(node[name]) for name in node)
    return [thing for thing in made if thing is not None]


def strategy_options(config: DictConfig) -> dict[str, Any]:
    """Read the options of group ``strategy`` as keyword arguments of ``rowwise`` and ``plan``.

    A strategy without the option ``mode`` is that of plain PyTorch.

    Args:
        config: the whole configuration.

    Raises:
        ConfigError: if the strategy is plain PyTorch, which has no options.
    """
    if config.strategy is None or "mode" not in config.strategy:
        raise ConfigError("strategy=plain has no plan; choose strategy=auto, strategy=two_phase or strategy=overlap")
    options = OmegaConf.to_container(config.strategy, resolve=True)
    assert isinstance(options, dict)  # a DictConfig always gives a dict
    return {str(name): value for name, value in options.items() if not str(name).startswith("_") and name != "modules"}
