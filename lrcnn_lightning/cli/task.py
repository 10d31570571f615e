"""The default job's LightningModule: classification, as anybody would write it.

It knows nothing of rows.  Which strategy trains it is the Trainer's business, and that is the point of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lrcnn_lightning.errors import ConfigError

__all__ = ["Classifier"]

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Train a network to classify images, by cross entropy.

    It logs ``train/loss``, ``train/accuracy``, and the same for ``val`` and ``test``.

    Args:
        model: maps images ``N C H W`` to scores ``N num_classes``.
        num_classes: number of classes.
        optimizer: called with the parameters; makes the optimizer.
        scheduler: called with the optimizer and ``total_steps``, the number of optimizer steps in the whole run;
            makes a learning-rate scheduler that is stepped after each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Score images ``N C H W``; returns ``N num_classes``."""
        scores: Tensor = self.model(images)
        return scores

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of a batch, a number, and the scores ``N num_classes``.

        Raises:
            ConfigError: if the model's result is not ``N num_classes``.
        """
        images, labels = batch
        scores = self(images)
        expected = (len(images), self.num_classes)
        if tuple(scores.shape) != expected:
            raise ConfigError(
                f"model {type(self.model).__name__} maps images {tuple(images.shape)} to {tuple(scores.shape)}, but "
                f"classification needs scores {expected} (images, classes); choose a classification network, and "
                "check its number of classes"
            )
        return functional.cross_entropy(scores, labels), scores

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch: images ``N C H W`` and labels ``N``."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of a batch: images ``N C H W`` and labels ``N``."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of a batch: images ``N C H W`` and labels ``N``."""
        self._step(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.scheduler(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _step(self, batch: Batch, name: str, accuracy: MulticlassAccuracy) -> Tensor:
        loss, scores = self.loss(batch)
        accuracy(scores.detach(), batch[1])
        size = len(batch[1])
        shown: dict[str, Any] = {"prog_bar": True, "batch_size": size, "on_epoch": True, "on_step": name == "train"}
        self.log(f"{name}/loss", loss, **shown)
        self.log(f"{name}/accuracy", accuracy, **{**shown, "on_step": False})
        return loss
