"""Every precision of the Trainer on the device: training by rows goes where plain training goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrcnn_lightning import LRCNNStrategy

EPS = {
    "32-true": 2.0**-23,
    "64-true": 2.0**-52,
    "16-mixed": 2.0**-10,
    "bf16-mixed": 2.0**-7,
    "16-true": 2.0**-10,
    "bf16-true": 2.0**-7,
}
"""Of each precision but ``transformer-engine``, which exchanges layers for its own: one rounding, relatively."""

ON_THE_CPU = ("32-true", "64-true", "bf16-mixed", "bf16-true")


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
        )
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.head(self.body(images.to(self.head.weight.dtype)).mean((2, 3)))
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(7)
        images = torch.randn(6, 3, 48, 32, generator=generator)
        labels = torch.randint(0, 4, (6,), generator=generator)
        return DataLoader(TensorDataset(images, labels), batch_size=2)


def trained(precision: str, strategy: Any, device: torch.device, folder: Path) -> dict[str, Tensor]:
    """Parameters and running statistics after three steps, in float64."""
    torch.manual_seed(0)
    module = Task()
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    assert trainer.global_step == 3
    return {name: value.double().cpu() for name, value in module.state_dict().items() if value.is_floating_point()}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("precision", EPS)
def test_precisions(precision: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" and precision not in ON_THE_CPU:
        pytest.skip("Lightning has it on a GPU only")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = trained("64-true", "auto", device, tmp_path)
    plain = trained(precision, "auto", device, tmp_path)
    for mode in ("two_phase", "overlap"):
        strategy = LRCNNStrategy(mode=mode, rows=3, max_overhead=float("inf"))
        ours = trained(precision, strategy, device, tmp_path)
        assert ours.keys() == exact.keys()
        for name, want in exact.items():
            theirs, mine = (float((found[name] - want).norm()) for found in (plain, ours))
            allowed = 4 * (theirs + EPS[precision] * float(want.norm()) + 1e-12)
            assert mine <= allowed, f"{mode}, {name}: off by {mine:.1e}, plain training by {theirs:.1e}"
            assert bool(ours[name].isfinite().all())
