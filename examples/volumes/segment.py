"""Segment vessels in a volume with a 3-D network, slab of slices by slab of slices.

The volumes are made here: bright tubes (vessels, to be found) and bright balls (nodules, not to be found) in noise.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lrcnn_lightning import ActivationMemory, LRCNNStrategy


def make_volume(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A volume and the mask of its vessels, both ``1 D H W``."""
    random = torch.Generator().manual_seed(seed)
    depth, height, width = shape
    z, y, x = torch.meshgrid(*(torch.arange(float(side)) for side in shape), indexing="ij")
    vessels, balls = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for _ in range(4):  # tubes that wind along the depth
        at_y, at_x, sway_y, sway_x, phase = torch.rand(5, generator=random)
        centre_y = height * (0.2 + 0.6 * at_y + 0.2 * sway_y * torch.sin(6.3 * (z / depth + phase)))
        centre_x = width * (0.2 + 0.6 * at_x + 0.2 * sway_x * torch.cos(6.3 * (z / depth + phase)))
        vessels |= (y - centre_y) ** 2 + (x - centre_x) ** 2 < 2.5**2
    for _ in range(6):
        at_z, at_y, at_x, radius = torch.rand(4, generator=random)
        distance = (z - depth * at_z) ** 2 + (y - height * at_y) ** 2 + (x - width * at_x) ** 2
        balls |= distance < (3 + 3 * radius) ** 2
    noise = 0.3 * torch.randn(shape, generator=random)
    return ((vessels | balls).float() + noise)[None], (vessels & ~balls).float()[None]


def volumes(count: int, shape: tuple[int, int, int], first_seed: int) -> TensorDataset:
    """``count`` volumes with their masks."""
    pairs = [make_volume(shape, first_seed + number) for number in range(count)]
    return TensorDataset(*(torch.stack(tensors) for tensors in zip(*pairs, strict=True)))


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, on ``N C D H W``."""
    convolution = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))


class VolumeNetwork(nn.Module):
    """One level down and up again, with a skip connection: ``N 1 D H W`` to scores of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(1, channels), block(channels, channels))
        self.bottom = nn.Sequential(
            nn.MaxPool3d(2),
            block(channels, 2 * channels),
            block(2 * channels, 2 * channels),
            nn.ConvTranspose3d(2 * channels, channels, 2, stride=2),
        )
        self.decoder = nn.Sequential(block(2 * channels, channels), nn.Conv3d(channels, 1, 1))

    def forward(self, volume: Tensor) -> Tensor:
        features = self.encoder(volume)
        return self.decoder(torch.cat((features, self.bottom(features)), dim=1))


class VesselSegmenter(LightningModule):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = VolumeNetwork(channels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        volume, vessels = batch
        weight = torch.tensor(4.0, device=self.device)  # vessels are rare
        loss = functional.binary_cross_entropy_with_logits(self.network(volume), vessels, pos_weight=weight)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        volume, vessels = batch
        found = (self.network(volume) > 0).float()
        self.log("dice", 2 * (found * vessels).sum() / (found + vessels).sum(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(
    strategy: str | Strategy,
    shape: tuple[int, int, int] = (128, 64, 64),
    count: int = 6,
    epochs: int = 4,
    channels: int = 8,
) -> VesselSegmenter:
    seed_everything(0, verbose=False)
    model = VesselSegmenter(channels)
    memory = ActivationMemory(picture="outputs/memory.png")
    trainer = Trainer(
        strategy=strategy,
        devices=1,
        max_epochs=epochs,
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(volumes(count, shape, 0)), DataLoader(volumes(2, shape, 1000)))
    print(f"Dice coefficient on two other volumes: {float(trainer.callback_metrics['dice']):.3f}")
    print(f"activation memory of a step: {memory.peaks[0] / 2**20:.1f} MiB")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="train plainly, for comparison")
    parser.add_argument("--axis", type=int, default=2, help="axis that is cut: 2 depth (default), 3 height, 4 width")
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 64, 64), metavar=("D", "H", "W"))
    arguments = parser.parse_args()
    rows = LRCNNStrategy(mode="two_phase", memory_budget=None, axis=arguments.axis)
    main("auto" if arguments.plain else rows, tuple(arguments.shape))
