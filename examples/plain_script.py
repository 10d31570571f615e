"""An ordinary Lightning script: a small network learns handwritten digits.

    python examples/plain_script.py                               # as Lightning would train it
    python examples/plain_script.py --strategy lrcnn_two_phase    # row by row, with the same weights at the end
    python examples/plain_script.py --check                       # compare a step by rows with a plain one

Nothing but the import and the argument of the Trainer has to do with rows. A step of this small network would fit
plainly, too, and the strategy says so in a warning.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lrcnn_lightning  # registers the names of the strategies


class DigitClassifier(LightningModule):
    """A small convolutional network with BatchNorm, trained by cross entropy."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = functional.cross_entropy(self.network(images), digits)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits(images: int, size: int) -> TensorDataset:
    """Digits enlarged to ``size`` x ``size`` pixels, as ``N 1 H W``, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    maps = torch.tensor(pixels[:images], dtype=torch.get_default_dtype()).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(functional.interpolate(maps, size=(size, size), mode="nearest"), torch.tensor(labels[:images]))


def train(strategy: str = "auto", images: int = 64, size: int = 256, epochs: int = 1) -> DigitClassifier:
    """Train with a strategy and return the trained module."""
    seed_everything(0, verbose=False)
    model = DigitClassifier()
    trainer = Trainer(
        strategy=strategy,
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(digits(images, size), batch_size=8, shuffle=True))
    print(f"strategy {strategy}: loss of the last step {float(trainer.callback_metrics['train/loss']):.6f}")
    return model


def check(size: int = 64) -> lrcnn_lightning.CheckReport:
    """Compare all that a training step by rows shows with a plain one, and print it."""
    images = torch.stack([image for image, _ in digits(4, size)])  # N 1 H W
    return lrcnn_lightning.check(DigitClassifier().network, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="auto", help="strategy of the Trainer (default: auto)")
    parser.add_argument("--images", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--size", type=int, default=256, help="height and width, in pixels (default: 256)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the images (default: 1)")
    parser.add_argument("--check", action="store_true", help="check the network instead of training it")
    arguments = parser.parse_args()
    if arguments.check:
        check()
        return
    train(arguments.strategy, arguments.images, arguments.size, arguments.epochs)


if __name__ == "__main__":
    main()
