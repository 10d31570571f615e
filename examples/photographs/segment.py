"""Segment a whole photograph with a U-Net, without cutting it into patches.

The network sees grey values alone. What it has to find is derived from the colours, which it does not see:

- ``flower`` (scikit-learn, 427 x 640): the petals, which are redder than they are green;
- ``retina`` (scikit-image, 1411 x 1411): the blood vessels, as a ridge filter marks them. No physician drew them.

The loss looks only at the part left of a line; the score is taken right of it. The picture that is written shows both.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lrcnn_lightning import ActivationMemory, LRCNNStrategy
from lrcnn_lightning.models import UNet


@dataclass
class Photograph:
    """Grey values and target, both ``1 H W``, and the column up to which the loss looks."""

    grey: Tensor
    target: Tensor
    border: int


def flower() -> Photograph:
    from sklearn.datasets import load_sample_image

    colours = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1) / 255
    redness = functional.avg_pool2d(colours[:1] - colours[1:2], 5, stride=1, padding=2)
    return Photograph(colours.mean(0, keepdim=True), (redness > 0.1).float(), border=320)


def retina() -> Photograph:
    from skimage import data, filters, morphology

    colours = torch.tensor(data.retina()).permute(2, 0, 1) / 255
    eye = morphology.erosion((colours[0] > 0.3).numpy(), morphology.disk(15))
    ridges = filters.sato(colours[1].numpy(), sigmas=range(2, 8)) * eye
    vessels = morphology.remove_small_objects(ridges > 0.012, max_size=300)
    return Photograph(colours.mean(0, keepdim=True), torch.tensor(vessels)[None].float(), border=705)


class Segmenter(LightningModule):
    def __init__(self, border: int, channels: int) -> None:
        super().__init__()
        self.border = border
        self.network = UNet(num_classes=1, in_channels=1, depth=3, base_channels=channels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        grey, target = batch
        mirror = [-1] if self.global_step % 2 else []  # every other step sees the mirrored picture
        scores = self.network(grey.flip(mirror)).flip(mirror)
        scores, target = scores[..., : self.border], target[..., : self.border]
        rarity = (1 - target.mean()) / target.mean()  # the rarer the target, the more its pixels count
        loss = functional.binary_cross_entropy_with_logits(scores, target, pos_weight=rarity.sqrt())
        self.log("loss", loss, prog_bar=True)
        return loss

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network(batch[0]).sigmoid()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=4e-3)


def overlap_of(prediction: Tensor, target: Tensor) -> float:
    """Intersection over union of two masks."""
    found, wanted = prediction > 0.5, target > 0.5
    return float((found & wanted).sum() / (found | wanted).sum().clamp(min=1))


def draw(photograph: Photograph, prediction: Tensor, score: float, path: Path) -> None:
    """Write input, target and prediction side by side, 1800 pixels wide."""
    height = 0.4 + 6 * photograph.grey.shape[-2] / photograph.grey.shape[-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(18, height), dpi=100, layout="constrained")
    titles = ("input: grey values", "target: from the colours", f"prediction: IoU {score:.2f} right of the line")
    for axis, image, title in zip(axes, (photograph.grey, photograph.target, prediction), titles, strict=True):
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axis.axvline(photograph.border, color="tab:orange", linestyle="--")
        axis.set_title(title)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(
    photograph: Photograph,
    strategy: str | Strategy,
    steps: int = 80,
    channels: int = 16,
    picture: Path | None = None,
) -> Segmenter:
    seed_everything(0, verbose=False)
    model = Segmenter(photograph.border, channels)
    # Drawn beside the segmentation, if that is drawn.
    memory = ActivationMemory(picture=None if picture is None else picture.absolute().with_name("memory.png"))
    trainer = Trainer(
        strategy=strategy,
        devices=1,
        max_epochs=steps,  # an epoch is one step: there is one photograph
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    data = DataLoader([[photograph.grey, photograph.target]])
    trainer.fit(model, data)
    (prediction,) = trainer.predict(model, data)

    right = slice(photograph.border, None)
    score = overlap_of(prediction[0][..., right], photograph.target[..., right])
    print(f"IoU where the loss did not look: {score:.3f}")
    print(f"activation memory of a step: {memory.peaks[0] / 2**20:.1f} MiB")
    if picture is not None:
        draw(photograph, prediction[0], score, picture)
        print(f"pictures: {picture} and {memory.picture_path}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photograph", choices=["flower", "retina"], default="flower")
    parser.add_argument("--plain", action="store_true", help="train plainly, for comparison")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: 80)")
    parser.add_argument("--picture", type=Path, default=Path("outputs/segmentation.png"), help="file to write")
    arguments = parser.parse_args()
    main(
        flower() if arguments.photograph == "flower" else retina(),
        "auto" if arguments.plain else LRCNNStrategy(memory_budget=None),
        arguments.steps,
        picture=arguments.picture,
    )
