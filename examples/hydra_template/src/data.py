"""The digits of scikit-learn, enlarged."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split


class Digits(LightningDataModule):
    """Images ``1 size size`` and labels; a quarter of them is for validation."""

    def __init__(self, size: int, count: int, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels[: self.hparams["count"]], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        images = functional.interpolate(images, size=(self.hparams["size"],) * 2, mode="bilinear")
        dataset = TensorDataset(images, torch.tensor(labels[: self.hparams["count"]]))
        self.train, self.val = random_split(dataset, [0.75, 0.25], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val, batch_size=self.hparams["batch_size"])
