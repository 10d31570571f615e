"""The strategy for one device: it takes the Trainer's device, and refuses what would need several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.steps import OPTIONS, RowwiseSteps, refuse_unnamed

if TYPE_CHECKING:
    from lightning.pytorch.strategies import SingleDeviceStrategy
else:
    SingleDeviceStrategy = object

__all__ = ["SingleDevice"]


class SingleDevice(RowwiseSteps, SingleDeviceStrategy):
    __doc__ = f"""Lightning strategy for one device: the user's steps run with their convolutional modules row-wise.

    The loss, the gradients, the buffers and the checkpoints are those of plain training, up to rounding; the activation
    memory is a fraction. Checkpoints move freely to and from any other strategy. What is called outside of the user's
    steps (``example_input_array``, callbacks that call the module) runs plain.

    Args:
{OPTIONS}
        device: The device, such as ``"cuda:1"``; without it, that of the Trainer.
        kwargs: ``accelerator``, ``checkpoint_io`` and ``precision_plugin``, as for ``SingleDeviceStrategy``.

    Raises:
        ConfigError: an option does not exist or has a value that is not allowed; the Trainer has more than one device
            or node, or ``sync_batchnorm=True``; a module that is to run row-wise does not exist or is compiled.
    """

    strategy_name = "lrcnn"

    def __init__(self, *given: Any, device: str | int | torch.device | None = None, **kwargs: Any) -> None:
        refuse_unnamed(type(self).__name__, given)
        super().__init__(**kwargs, device="cpu" if device is None else _indexed(torch.device(device)))
        self._device_is_given = device is not None
        self._arguments["device"] = device

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The device given to the constructor, in a list; empty where the Trainer chooses it.

        Lightning assigns the Trainer's devices to a strategy that has this attribute, and not to other strategies.
        """
        return [self.root_device] if self._device_is_given else []

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device]) -> None:
        if len(devices) > 1:
            self._refuse(f"devices={len(devices)}", "devices=1")
        self._root_device = torch.device(devices[0])

    @property
    def num_nodes(self) -> int:
        """The number of nodes: one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count > 1:
            self._refuse(f"num_nodes={count}", "num_nodes=1")

    @property
    def _layer_sync(self) -> None:
        """Lightning assigns what ``sync_batchnorm=True`` asks for."""
        return None

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: object) -> None:
        if layer_sync is not None:
            self._refuse("sync_batchnorm=True", "sync_batchnorm=False")

    def _refuse(self, given: str, allowed: str) -> None:
        raise ConfigError(
            f"Trainer({given}): {type(self).__name__} runs on a single device (allowed: {allowed}); for several, use "
            'strategy="lrcnn_ddp" or LRCNNDDPStrategy with the same options'
        )


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``: Lightning sets the current device by its index."""
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device
