"""What projects put around their networks and into them: checkpointing, pruning, tensors and modules of other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrcnn_lightning import LRCNNStrategy
from tests.test_strategy import Task, assert_same_run, fit

RELATIVE = 1e-9
ROWS = [{"mode": "two_phase", "rows": 3}, {"mode": "overlap", "rows": 3, "segments": 2, "batch_chunks": 2}]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*no plan was found",
    "ignore:.*this batch fits without rows",
)


def rows(index: int = 0) -> LRCNNStrategy:
    return LRCNNStrategy(**ROWS[index])


def assert_same_training(task: type[Any], folder: Path, index: int = 0, **options: Any) -> Any:
    """Train plainly and row by row; everything in the checkpoints agrees. Returns the module trained by rows."""
    plain, _ = fit("auto", task, **options)
    ours, module = fit(rows(index), task, **options)
    assert_same_run(plain, ours, RELATIVE, folder)
    return module


class Checkpointed(Task):
    """Its network is run once more in the backward pass, after the step has ended."""

    reentrant = True

    def forward(self, images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        return self.head(checkpoint(self.body, images, use_reentrant=self.reentrant).mean((2, 3)))


class CheckpointedByHooks(Checkpointed):
    """Hooks on saved tensors are in force while the network is captured."""

    reentrant = False


class SavedOnTheHost(Task):
    def forward(self, images: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(images)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("task", [Checkpointed, CheckpointedByHooks, SavedOnTheHost])
def test_checkpointing_around_a_network(task: type[Task], index: int, tmp_path: Path) -> None:
    """The backward pass ran the network plainly where the step had run it row by row, and a first call failed."""
    assert_same_training(task, tmp_path, index)
