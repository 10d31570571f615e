"""Users' LightningModules, their data, and what two runs of them may differ in: nothing but the memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NAMESPACES = [
    "lightning.pytorch",
    pytest.param(
        "pytorch_lightning",
        marks=pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="not installed"),
    ),
]
ROWWISE = [{"mode": "two_phase", "rows": 4}, {"mode": "overlap", "rows": 3, "segments": 2, "batch_chunks": 2}]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


# Networks and data.  Parameters are few; each has a gradient that is not all rounding (no bias before BatchNorm).


def body(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
    )


class Steps:
    """The user's steps; they know nothing of rows."""

    def loss(self: Any, batch: Any, name: str) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log(name, loss, on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch, "test_loss")

    def predict_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class Task(Steps, LightningModule):
    """An ordinary module: one network and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Several(Task):
    """Several sub-networks, one of them a list and one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.decoder = nn.Sequential(nn.ConvTranspose2d(6, 3, 2, stride=2), nn.Tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0]
        for stem in self.stem:
            images = stem(images)
        coded = self.body(images)
        again = self.body(self.decoder(coded))
        loss = nn.functional.mse_loss(self.decoder(again), batch[0])
        self.log("train_loss", loss, on_epoch=True)
        return loss + nn.functional.cross_entropy(self.head(coded.mean((2, 3))), batch[1])


class Direct(Task):
    """Layers hang directly on the LightningModule and are called through ``self(x)``."""

    def __init__(self) -> None:
        super().__init__()
        del self.body
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(images)))).mean((2, 3)))


class Manual(Task):
    """Manual optimization with two optimizers, as in adversarial training; backward runs inside the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        critic, generator = self.optimizers()
        self.toggle_optimizer(critic)
        loss = nn.functional.cross_entropy(self(images), labels) + self(self.generator(images).detach()).square().mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        adversarial = nn.functional.cross_entropy(self(self.generator(images)), labels)
        generator.zero_grad()
        self.manual_backward(adversarial)
        generator.step()
        self.untoggle_optimizer(generator)
        self.log("train_loss", loss + adversarial, on_epoch=True)

    def configure_optimizers(self) -> Any:
        critic = [*self.body.parameters(), *self.head.parameters()]
        return torch.optim.SGD(critic, lr=0.05), torch.optim.SGD(self.generator.parameters(), lr=0.05)


def loader(samples: int = 8, batch: int = 2) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(samples, 3, 16, 12, generator=generator)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch)


def fit(
    strategy: Any,
    task: type[Any] = Task,
    *,
    trainer: type[Any] = Trainer,
    ckpt_path: str | None = None,
    batch: int = 2,
    **options: Any,
) -> tuple[Any, Any]:
    """Train a new ``task`` for two epochs of four steps with validation; returns the Trainer and the module."""
    seed_everything(1, verbose=False)
    module = task()
    made = trainer(strategy=strategy, **{**QUIET, "max_epochs": 2, "precision": "64-true", **options})
    made.fit(module, loader(batch=batch), loader(4), ckpt_path=ckpt_path)
    return made, module


def assert_same(expected: Any, actual: Any, tolerance: float, where: str = "") -> None:
    """Equal, part by part; tensors and floats up to a tolerance relative to the largest element."""
    assert type(expected) is type(actual), where
    if isinstance(expected, Tensor):
        assert expected.shape == actual.shape and expected.dtype == actual.dtype, where
        if expected.is_floating_point():
            error = (expected - actual).abs().max() if expected.numel() else torch.zeros(())
            scale = expected.abs().max() if expected.numel() else torch.ones(())
            assert float(error) <= tolerance * float(scale), f"{where}: {float(error)} of {float(scale)}"
        else:
            assert torch.equal(expected, actual), where
    elif isinstance(expected, dict):
        assert list(expected) == list(actual), where
        for key in expected:
            assert_same(expected[key], actual[key], tolerance, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual), where
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            assert_same(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=max(tolerance, 1e-12)), where
    else:
        assert expected == actual, where


def checkpoint(trainer: Any, folder: Path, name: str) -> dict[str, Any]:
    trainer.save_checkpoint(folder / name)
    contents: dict[str, Any] = torch.load(folder / name, weights_only=False)
    return contents


def assert_same_run(plain: Any, ours: Any, tolerance: float, folder: Path) -> None:
    assert_same(dict(plain.callback_metrics), dict(ours.callback_metrics), tolerance, "metrics")
    assert "train_loss" in ours.callback_metrics
    expected, actual = checkpoint(plain, folder, "plain.ckpt"), checkpoint(ours, folder, "ours.ckpt")
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"} <= set(actual)
    assert_same(expected, actual, tolerance, "checkpoint")


def patched(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if "forward" in vars(child)]
