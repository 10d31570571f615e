"""Train on the digits 0 to 4; then fine-tune on 5 to 9, first with the first layers frozen, later with all of them.

Frozen layers need no backward pass, so their feature maps need not be kept, and the plan changes with the freezing.
Nobody tells it to: the plan is looked up anew in each step by what requires a gradient.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lrcnn_lightning import LRCNNStrategy, Plan


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitClassifier(LightningModule):
    """``first`` is what will be frozen: it works at full resolution, where the maps are large."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        wide = 2 * channels
        parts = {
            "first": nn.Sequential(block(1, channels), block(channels, channels), nn.MaxPool2d(2)),
            "later": nn.Sequential(block(channels, wide), nn.MaxPool2d(2), block(wide, wide)),
            "head": nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * wide, 5)),
        }
        self.network = nn.Sequential(OrderedDict(parts))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.02, momentum=0.9)


class Unfreeze(BaseFinetuning):
    """Freeze the first layers, BatchNorm's running statistics included, until an epoch."""

    def __init__(self, at_epoch: int) -> None:
        super().__init__()
        self.at_epoch = at_epoch

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.network.first, train_bn=False)
        pl_module.network.first.eval()

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.at_epoch:
            self.unfreeze_and_add_param_group(pl_module.network.first, optimizer)
            pl_module.network.first.train()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = "frozen" if trainer.current_epoch < self.at_epoch else "trained"
        print(f"epoch {trainer.current_epoch}, first layers {frozen}: loss {trainer.callback_metrics['loss']:.4f}")
        for name, plan in getattr(trainer.strategy, "plans", {}).items():
            print(f"  {name}: {describe(plan)}")


def describe(plan: Plan) -> str:
    megabytes, plain = (size / 2**20 for size in (plan.peak_bytes, plan.plain_peak_bytes))
    rows = "1 row" if plan.rows == 1 else f"{plan.rows} rows"
    return f"{plan.mode}, {rows}, activation peak {megabytes:.1f} MiB (plain PyTorch {plain:.1f} MiB)"


def digits(labels: range, count: int, size: int) -> DataLoader[list[Tensor]]:
    """Images ``1 size size`` of the digits in ``labels``, which are counted from 0."""
    pixels, digit = map(torch.tensor, load_digits(return_X_y=True))
    wanted = ((digit >= labels.start) & (digit < labels.stop)).nonzero()[:count, 0]
    images = pixels[wanted].to(torch.get_default_dtype()).reshape(-1, 1, 8, 8) / 16
    images = functional.interpolate(images, size=(size, size), mode="bilinear")
    return DataLoader(TensorDataset(images, digit[wanted] - labels.start), batch_size=8)


def main(strategy: str | Strategy, size: int = 256, count: int = 64, channels: int = 16) -> DigitClassifier:
    seed_everything(0, verbose=False)
    model = DigitClassifier(channels)
    options = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    pretrainer = Trainer(max_epochs=1, **options)
    pretrainer.fit(model, digits(range(0, 5), count, size))

    trainer = Trainer(strategy=strategy, max_epochs=4, callbacks=[Unfreeze(at_epoch=2)], **options)
    trainer.fit(model, digits(range(5, 10), count, size))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="fine-tune plainly, for comparison")
    main("auto" if parser.parse_args().plain else LRCNNStrategy(mode="two_phase", rows=8, memory_budget=None))
