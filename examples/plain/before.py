"""A small network learns handwritten digits.

The last line printed is the highest memory that the process has held: of the GPU where there is one, else of the
machine.
"""

from __future__ import annotations

import resource

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class DigitClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self.network(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits(count: int, size: int) -> TensorDataset:
    """The first digits of scikit-learn, enlarged: images ``1 size size`` and labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:count], dtype=torch.get_default_dtype()).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(functional.interpolate(images, size=(size, size)), torch.tensor(labels[:count]))


def main(count: int = 32, size: int = 512) -> DigitClassifier:
    seed_everything(0, verbose=False)
    model = DigitClassifier()
    trainer = Trainer(max_epochs=1, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(digits(count, size), batch_size=8))

    print(f"loss of the last step {float(trainer.callback_metrics['train/loss']):.6f}")
    if torch.cuda.is_available():
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    else:
        print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    return model


if __name__ == "__main__":
    main()
