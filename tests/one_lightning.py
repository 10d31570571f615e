"""What `test_namespaces` runs in an environment with one Lightning: a project that imports nothing else.

python -m tests.one_lightning pytorch_lightning
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrcnn_lightning

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}


def task(library: Any) -> Any:
    """An ordinary module of that Lightning."""

    class Task(library.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.head = nn.Linear(width, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.body(batch[0]).mean((2, 3))), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def train_dataloader(self) -> Any:
            generator = torch.Generator().manual_seed(7)
            images = torch.randn(8, 3, 16, 12, generator=generator)
            return DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=2)

    return Task


def trained(library: Any, folder: Path, strategy: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    module = task(library)()
    options = {"max_epochs": 2, "precision": "64-true", "default_root_dir": folder, **QUIET, **options}
    path = options.pop("ckpt_path", None)
    trainer = library.Trainer(strategy=strategy, enable_model_summary=False, **options)
    trainer.fit(module, ckpt_path=path)
    return trainer


def assert_same(expected: Any, actual: Any) -> None:
    states = [trainer.lightning_module.state_dict() for trainer in (expected, actual)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def main(namespace: str, folder: Path) -> None:
    torch.set_num_threads(1)
    other = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning"}[namespace]
    assert importlib.util.find_spec(other) is None, f"{other} is installed in this environment"
    assert not any(name.partition(".")[0] in ("lightning", "pytorch_lightning") for name in sys.modules)
    library: Any = importlib.import_module(namespace)
    strategies: Any = importlib.import_module(f"{namespace}.strategies")

    plain, ddp = (trained(library, folder, name, enable_checkpointing=False) for name in ("auto", "ddp"))
    for expected, strategy in (
        (plain, "lrcnn"),
        (plain, "lrcnn_two_phase"),
        (plain, "lrcnn_overlap"),
        (plain, lrcnn_lightning.LRCNNStrategy(mode="overlap", rows=3)),
        (ddp, "lrcnn_ddp_two_phase"),
        (ddp, lrcnn_lightning.LRCNNDDPStrategy(rows=3)),
    ):
        ours = trained(library, folder, strategy, enable_checkpointing=False)
        assert_same(expected, ours)
        assert isinstance(ours.strategy, (lrcnn_lightning.LRCNNStrategy, lrcnn_lightning.LRCNNDDPStrategy))
        assert isinstance(ours.strategy, strategies.Strategy)
        assert (ours.strategy.plans["body"].mode == "plain") == (strategy == "lrcnn")

    used = pickle.loads(pickle.dumps(lrcnn_lightning.LRCNNStrategy(rows=2)))
    assert type(used) is lrcnn_lightning.LRCNNStrategy and used.config.rows == 2

    paths = [
        trained(library, folder, name, max_epochs=1).checkpoint_callback.best_model_path
        for name in ("auto", "lrcnn_two_phase")
    ]
    resumed = trained(library, folder, "auto", ckpt_path=paths[0])
    for name, path in (("auto", paths[1]), ("lrcnn_overlap", paths[0]), ("lrcnn_overlap", paths[1])):
        assert_same(resumed, trained(library, folder, name, ckpt_path=path))

    measured = lrcnn_lightning.ActivationMemory()
    trained(library, folder, "lrcnn_two_phase", callbacks=[measured], enable_checkpointing=False)
    assert isinstance(measured, library.Callback)

    cli: Any = importlib.import_module(f"{namespace}.cli")
    arguments = ["--trainer.strategy=lrcnn_lightning.LRCNNStrategy", "--trainer.strategy.rows=3"]
    made = cli.LightningCLI(task(library), run=False, args=arguments, save_config_callback=None)
    assert type(made.trainer.strategy) is lrcnn_lightning.LRCNNStrategy
    assert made.trainer.strategy.config.rows == 3
    # The command line hands over every argument of DistributedDataParallel, and all of them must be taken.
    arguments = ["fit", "--trainer.strategy=lrcnn_lightning.LRCNNDDPStrategy", "--trainer.strategy.mode=overlap"]
    defaults = {**QUIET, "max_epochs": 2, "precision": "64-true", "enable_checkpointing": False}
    torch.manual_seed(0)
    made = cli.LightningCLI(
        task(library),
        args=arguments,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults=defaults,
    )
    assert made.trainer.strategy.plans["body"].mode == "overlap"
    assert_same(ddp, made.trainer)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(sys.argv[1], Path(made))
