"""Networks of other libraries, by name.  The libraries are optional, so each is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from lrcnn_lightning.errors import ConfigError

__all__ = ["monai_model", "timm_model"]


def timm_model(name: str, *, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Make a network of timm.

    Args:
        name: any name that ``timm.list_models()`` has.
        num_classes: number of scores.
        in_channels: channels of the input image.
        options: further arguments of ``timm.create_model``.
    """
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    return model


def monai_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Make a network of MONAI.

    Args:
        name: a class of ``monai.networks.nets``.
        options: its arguments.

    Raises:
        ConfigError: if MONAI has no such class.
    """
    networks = importlib.import_module("monai.networks.nets")
    builder = getattr(networks, name, None)
    if builder is None:
        raise ConfigError(
            f"model.name: monai.networks.nets has no {name!r}; give the name of one of its classes, for example "
            "DenseNet121, SEResNet50 or EfficientNetBN"
        )
    model: nn.Module = builder(**options)
    return model
