"""Remove noise from photographs: a LightningCLI project, in which the strategy is chosen from outside.

Nothing but the import of ``lrcnn_lightning`` has to do with rows; it makes the names of the strategies known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lrcnn_lightning  # noqa: F401


class Denoiser(LightningModule):
    """A stack of convolutions that predicts the noise (Zhang et al., "Beyond a Gaussian Denoiser", 2017).

    Args:
        channels: Channels of every layer but the last.
        depth: Number of convolutions.
        noise: Standard deviation of the noise, where the image lies between 0 and 1.
        learning_rate: Of Adam.
    """

    def __init__(self, channels: int = 24, depth: int = 6, noise: float = 0.15, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1))

    def error(self, images: Tensor) -> Tensor:
        """Mean squared error after noise was added to ``N 3 H W`` and removed again."""
        noise = self.hparams["noise"] * torch.randn_like(images)
        return functional.mse_loss(self.network(images + noise), noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.error(batch[0])
        self.log("train/error", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the peak signal-to-noise ratio, in dB."""
        self.log("val/psnr", -10 * torch.log10(self.error(batch[0])), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


class Photographs(LightningDataModule):
    """The two photographs that scikit-learn brings along: train on squares of the one, validate on the other.

    Args:
        size: Height and width of the squares, at most 427 pixels.
        count: Number of squares in an epoch.
        batch_size: Squares in a step.
    """

    def __init__(self, size: int = 384, count: int = 24, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        size, count = self.hparams["size"], self.hparams["count"]
        china, flower = (torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images)
        random = torch.Generator().manual_seed(0)

        def square(image: Tensor) -> Tensor:
            top, left = (int(torch.randint(side - size + 1, (), generator=random)) for side in image.shape[1:])
            return image[:, top : top + size, left : left + size]

        self.squares = TensorDataset(torch.stack([square(china) for _ in range(count)]))
        self.validation = TensorDataset(square(flower)[None])

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.squares, batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.validation)


def main(arguments: Sequence[str] | None = None) -> LightningCLI:
    return LightningCLI(
        Denoiser,
        Photographs,
        seed_everything_default=0,
        save_config_callback=None,  # without a logger it would write into the current folder
        parser_kwargs={"default_env": True},  # options from environment variables, too
        args=arguments,
    )


if __name__ == "__main__":
    main()
