"""What both applications share: making objects from the configuration, and turning mistakes into one clear message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import CompactHydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lrcnn_lightning.errors import ConfigError, RowwiseError

__all__ = ["CommandError", "build", "build_all", "causes", "strategy_options", "user_errors"]

_EXTRA = "lrcnn-lightning[models]"
_LIBRARIES = {"torchvision": _EXTRA, "timm": _EXTRA, "monai": _EXTRA, "tensorboard": "tensorboard"}
"""Optional libraries that the shipped configurations name, and what to install for each."""


_OPEN = {"model.name": "model=timm model.name=convnext_tiny, or model=torchvision model.name=resnet18"}
"""Values that the shipped configurations leave open, with an example."""


class CommandError(CompactHydraException):
    """A mistake of the user's: Hydra prints its message alone, or everything with ``HYDRA_FULL_ERROR=1``."""


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
    """Make the object that a node describes; ``None`` if the node is empty or its ``_target_`` is null."""
    if node is None or node.get("_target_") is None:
        return None
    return instantiate(node, **arguments)


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
