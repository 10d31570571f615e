"""``lrcnn-plan``: print the plan for a network and an image size, without training and without the memory.

lrcnn-plan model=vgg16 data.size=4096 strategy.memory_budget=2GiB
lrcnn-plan model=resnet50 data.size=1024 frontier=true
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

import lrcnn_lightning
from lrcnn_lightning.cli.build import application, build, strategy_options, user_errors
from lrcnn_lightning.cli.progress import progress
from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.session import select_modules

__all__ = ["main"]


@application("plan")
def main(config: DictConfig) -> None:
    """Print the plan; draw it, too, if ``plot`` names a file. With ``frontier=true``: memory against work."""
    with user_errors():
        options = strategy_options(config)
        if not isinstance(config.frontier, bool):
            raise ConfigError(f"frontier must be true or false (given: {config.frontier!r})")
        shape = _shape(config)
        # On the meta device weights and image have shapes and no bytes, so neither need fit into this machine.
        with torch.device("meta"):
            model: nn.Module = build(config.model)
            example = torch.empty(shape)
        _check_modules(model, config.strategy.get("modules", "auto"))
        if config.frontier:
            with progress("looking for the plans worth having"):
                frontier = lrcnn_lightning.frontier(model.train(), example, **options)
            print(frontier)
            _draw(frontier, config.plot or "frontier.png", f"{type(model).__name__}, input {list(shape)}")
            return
        with progress("planning"):
            plan = lrcnn_lightning.plan(model.train(), example, **options)
        print(plan)
        if config.plot is not None:
            _draw(plan, config.plot)


def _draw(subject: Any, name: str, *title: str) -> None:
    path = Path(HydraConfig.get().runtime.output_dir) / name
    subject.plot(path, *title)
    print(f"picture: {path}")


class Task(nn.Module):
    """What has the network as its ``model``, as the LightningModule of ``lrcnn-train`` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _check_modules(model: nn.Module, modules: Any) -> None:
    """Raise `ConfigError` for modules that are not the whole network: what enters a part is not known here."""
    names = RowConfig(modules=modules).module_names
    if names is None:
        return
    select_modules(Task(model), names)
    if names != ("model",):
        raise ConfigError(
            f"strategy.modules: lrcnn-plan plans the whole network (given: {', '.join(names)}; allowed: auto or "
            "model); leave it out, or run lrcnn-train, which prints the plan of each module"
        )


def _shape(config: DictConfig) -> tuple[int, ...]:
    """Shape of the input, from ``shape`` or from group ``data``."""
    if config.shape is not None:
        shape = tuple(config.shape) if not isinstance(config.shape, str | int) else ()
        if len(shape) < 3 or not all(isinstance(length, int) and length > 0 for length in shape):
            raise ConfigError(
                f"shape: {config.shape} is not the shape of a batch of images; give positive whole numbers, batch "
                "and channels first, for example shape=[1,3,1024,1024]"
            )
        return shape
    data = build(config.data)
    if not hasattr(data, "example_shape"):
        raise ConfigError(
            f"data: {type(data).__name__} has no property example_shape; give the input's shape, for example "
            "shape=[1,3,1024,1024]"
        )
    return tuple(data.example_shape)


if __name__ == "__main__":
    main()
