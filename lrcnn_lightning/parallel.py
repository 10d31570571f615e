"""The strategy for several devices: one process a device, and what these processes must agree upon.

each process                                     all of them
------------------------------------------       -----------------------------------------------
rows of its own samples, its own gradients   ->  gradients averaged by DistributedDataParallel
moments of its own samples                   ->  moments of the global batch (``sync_batchnorm=True``)
what its device has free                     ->  the least of all, as the budget of every plan
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrcnn_lightning.config import RowConfig
from lrcnn_lightning.errors import ConfigError
from lrcnn_lightning.planning.search import usable_bytes
from lrcnn_lightning.session import RowwiseSession
from lrcnn_lightning.steps import OPTIONS, RowwiseSteps, refuse_unnamed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import LayerSync
    from lightning.pytorch.strategies import DDPStrategy
else:
    DDPStrategy = object

__all__ = ["Parallel"]


class Parallel(RowwiseSteps, DDPStrategy):
    __doc__ = f"""Lightning strategy for several devices: ``DDPStrategy`` with the user's steps run row-wise.

    The loss, the gradients, the buffers and the checkpoints are those of ``DDPStrategy``, up to rounding; the
    activation memory is a fraction. Checkpoints move freely to and from any other strategy.

    Args:
{OPTIONS}
        kwargs: Arguments of ``DDPStrategy`` (``accelerator``, ``parallel_devices``, ``cluster_environment``,
            ``checkpoint_io``, ``precision_plugin``, ``process_group_backend``, ``start_method``, ...) and of
            ``DistributedDataParallel`` (``find_unused_parameters``, ``static_graph``, ...).

    Raises:
        ConfigError: an option does not exist or has a value that is not allowed; a module that is to run row-wise does
            not exist or is compiled; with ``sync_batchnorm=True`` on the CPU, a BatchNorm that does not run row-wise.
    """

    strategy_name = "lrcnn_ddp"

    def __init__(self, *given: Any, **kwargs: Any) -> None:
        refuse_unnamed(type(self).__name__, given)
        super().__init__(**kwargs)
        self._sync_when_wrapped: LayerSync | None = None

    def setup(self, trainer: Trainer) -> None:
        # PyTorch's SyncBatchNorm runs on GPUs only, and DistributedDataParallel refuses it elsewhere. By rows it runs
        # anywhere; so on the CPU layers are converted once the module is wrapped, and keep parameters and buffers.
        layer_sync = self._layer_sync
        if self.root_device.type == "cpu":
            self._sync_when_wrapped, self._layer_sync = layer_sync, None
        try:
            super().setup(trainer)
        finally:
            self._layer_sync = layer_sync

    def configure_ddp(self) -> None:
        super().configure_ddp()
        module = self.lightning_module
        if self._sync_when_wrapped is not None and module is not None and self.world_size > 1:
            self._sync_when_wrapped.apply(module)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # Lightning's advice on unused parameters names its own strategies, which run plainly.
        other = "either by setting the string value `strategy='ddp_find_unused_parameters_true'` or "
        exception.args = tuple(
            arg.replace(other, "").replace("=DDPStrategy(", f"={type(self).__name__}(") if isinstance(arg, str) else arg
            for arg in exception.args
        )

    def _check(self, trainer: Trainer, module: nn.Module, session: RowwiseSession) -> None:
        super()._check(trainer, module, session)
        if self._sync_when_wrapped is None or trainer.state.fn != "fit" or self.world_size == 1:
            return
        by_rows = {child for forward in session.forwards.values() for child in forward.module.modules()}
        for name, child in module.named_modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child not in by_rows:
                raise ConfigError(
                    f"Trainer(sync_batchnorm=True, accelerator='cpu'): {name} ({type(child).__name__}) does not run "
                    "row-wise, and PyTorch's SyncBatchNorm runs on GPUs only; allowed on the CPU are layers inside of "
                    f"row-wise modules ({', '.join(map(repr, session.forwards)) or 'none here'}): name its module in "
                    "`modules`, or leave out sync_batchnorm"
                )

    def _planned_with(self) -> RowConfig:
        """With the memory that the device of each process has free, if that is the budget.

        Agreed upon in the set-up, which all processes run through: in a step, one with a batch of a new shape would
        wait for the others for ever. Processes that have a device in common share what is free of it.
        """
        config = super()._planned_with()
        if not config.fits_free_memory or self.world_size == 1:
            return config
        assert self.parallel_devices is not None
        mine = usable_bytes(self.root_device) // self.parallel_devices.count(self.root_device)
        least = torch.tensor(max(mine, 1), dtype=torch.int64, device=self.root_device)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
        return replace(config, memory_budget=int(least))
