"""What projects put around their networks and into them: checkpointing, pruning, tensors and modules of other kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, ModelPruning
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcnn_lightning
from lrcnn_lightning import LRCNNStrategy, PlanError
from tests.tasks import QUIET, Task, assert_same_run, fit, loader

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


# Weights that are computed before each call


def test_the_next_pruning_reads_the_weights_of_now(tmp_path: Path) -> None:
    """Pruning sets ``weight`` at each call, and reads it when it prunes further."""
    runs = []
    for strategy in ("auto", rows()):
        pruning = ModelPruning(
            "l1_unstructured", parameter_names=["weight"], amount=0.3, use_lottery_ticket_hypothesis=False
        )
        runs.append(fit(strategy, callbacks=[pruning], max_epochs=3, limit_val_batches=0))
    plain, ours = runs
    assert_same_run(plain[0], ours[0], RELATIVE, tmp_path)
    expected, weight = plain[1].body[0].weight, ours[1].body[0].weight
    torch.testing.assert_close(weight, expected, rtol=RELATIVE, atol=1e-12)
    assert 0 < int((weight == 0).sum()) < weight.numel()


# Transforms of torch.func


class Transformed(Task):
    """A gradient and a map over samples taken by ``torch.func``, beside an ordinary pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = {name: parameter.detach() for name, parameter in self.body.named_parameters()}

        def energy(weights: dict[str, Tensor]) -> Tensor:
            maps: Tensor = torch.func.functional_call(self.body, weights, (batch[0],))
            return maps.square().mean()

        self.body.eval()
        gradient = torch.func.grad(energy)(weights)
        single = torch.func.vmap(self.body)(batch[0][:, None])
        self.body.train()
        return (
            super().training_step(batch, batch_idx) + sum(g.square().sum() for g in gradient.values()) + single.mean()
        )


def test_transforms_of_functions(tmp_path: Path) -> None:
    """Tensors of a transform cannot be captured; inside of one the network runs as it is."""
    assert_same_training(Transformed, tmp_path)


# Modules of other kinds


class Distance(torchmetrics.Metric):
    """A metric with a network of its own, such as LPIPS has."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        self.total += self.layer(images).abs().mean().to(self.total.dtype)
        self.count += 1

    def compute(self) -> Tensor:
        return self.total / self.count


class Measured(Task):
    def __init__(self) -> None:
        super().__init__()
        self.distance = Distance()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.distance(batch[0])
        self.log("distance", self.distance, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_a_metric_with_a_network_of_its_own(tmp_path: Path) -> None:
    """It was run row by row, which left its state alone, and NaN was logged."""
    assert_same_training(Measured, tmp_path)


class Traced(Task):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.fx.symbolic_trace(self.body)


def test_a_graph_module(tmp_path: Path) -> None:
    """Its graph was run in the trace without a look at its forward, so nothing was known of what it returns."""
    assert_same_training(Traced, tmp_path)
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(2)))
    plan = lrcnn_lightning.plan(module, torch.empty(1, 3, 32, 32, device="meta"), mode="two_phase", rows=2)
    assert [node.module for node in plan.graph.nodes] == ["0", "1"]


# Tensors of classes of their own


class Named(torch.Tensor):
    """The default of a derived class: the results of operations are of that class."""


def _of_monai(images: Tensor) -> Tensor:
    data = pytest.importorskip("monai.data")
    made: Tensor = data.MetaTensor(images, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    return made


def _named(images: Tensor) -> Tensor:
    return images.as_subclass(Named)


@pytest.mark.parametrize("options", [{"mode": "two_phase", "rows": 4}, {}], ids=["rows", "plain"])
@pytest.mark.parametrize("make", [_of_monai, _named])
def test_tensors_that_carry_something(make: Any, options: dict[str, Any]) -> None:
    """MONAI's loaders give images with their position in space; a slab of them failed in its own ``new_empty``."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            maps = self.layers(images)
            return {"maps": maps, "mean": maps.mean((2, 3))}

    torch.manual_seed(0)
    plain, images = Several().double(), torch.randn(2, 3, 16, 12, dtype=torch.float64)
    ours = lrcnn_lightning.rowwise(copy.deepcopy(plain), **options)
    results = []
    for net in (plain, ours):
        given = make(images.clone()).requires_grad_()
        found = net(given)
        (found["maps"].square().sum() + found["mean"].sum()).backward()
        results.append((found, given.grad, [parameter.grad for parameter in net.parameters()]))
    (want, want_input, want_gradients), (got, got_input, got_gradients) = results
    for name, expected in want.items():
        assert type(got[name]) is type(expected)
        assert vars(got[name]).keys() == vars(expected).keys()
    pairs = zip([*got.values(), got_input, *got_gradients], [*want.values(), want_input, *want_gradients], strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(
            mine.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor), rtol=RELATIVE, atol=1e-12
        )


# A batch for which no plan fits


class OfSize(Task):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)  # more than any batch: the finder never halves a whole dataset

    def val_dataloader(self) -> Any:
        return loader(4, self.batch_size)


def test_the_batch_size_finder_halves_what_does_not_fit_the_budget(tmp_path: Path) -> None:
    """Where plain PyTorch is out of memory the finder tries less; that no plan fits ended the run."""
    seed_everything(1, verbose=False)
    options = {**QUIET, "max_epochs": 1, "default_root_dir": tmp_path, "enable_checkpointing": True}
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, max_trials=8)
    strategy = LRCNNStrategy(memory_budget="48KiB")
    Trainer(strategy=strategy, callbacks=[finder], **options).fit(OfSize())
    assert finder.optimal_batch_size in (1, 2, 4, 8)
    assert strategy.plans["body"].peak_bytes <= 48 * 1024
    module = OfSize()
    module.batch_size = 16
    with pytest.raises(PlanError, match=r"no plan fits memory_budget=48.00 KiB.*What helps"):
        Trainer(strategy=LRCNNStrategy(memory_budget="48KiB"), **options).fit(module)
