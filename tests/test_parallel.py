"""Two processes: row-wise they end with the weights of plain DDP, and with synchronised BatchNorm with those of one.

The processes are started as a user's script is: once, and Lightning's launcher runs this file a second time; or once on
each of two machines (which here are one). What takes several Trainers, such as a checkpoint of one process that two
resume, is prepared, or gone on with, by the test itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import CaptureError, ConfigError, LRCNNDDPStrategy, LRCNNStrategy
from lrcnn_lightning import parallel as parallel_module
from lrcnn_lightning.rowwise import RowwiseForward
from tests.launching import run_together
from tests.tasks import ROWWISE, Direct, Manual, Steps, Task, assert_same, body, fit, loader

RELATIVE = 1e-9
TWO: dict[str, Any] = {"devices": 2, "max_epochs": 1}
TWO_MACHINES: dict[str, Any] = {"devices": 1, "num_nodes": 2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


class Sober(Task):
    """Without dropout, of which each process draws its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body[7].p = 0.0  # type: ignore[assignment]


class Branches(Sober):
    """Every step leaves one of two row-wise branches unused, and one is never used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(3)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([self.branches[batch_idx % 2](batch[0]), batch[1]], batch_idx)


class Outside(Sober):
    """A BatchNorm that does not run row-wise."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))  # type: ignore[assignment]


class Unsynchronised(Sober):
    """Keeps the gradients of every step before they are stepped with, to be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def on_after_backward(self) -> None:
        self.seen.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


class Sharded(Steps, LightningModule):
    """FSDP2: parameters are sharded in ``configure_model``, and the unit that is sharded runs row-wise."""

    by_rows = True
    units = "body and head"

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "body"):
            return
        torch.manual_seed(3)
        self.body, self.head = body(), nn.Linear(6, 3)
        self.body[7].p = 0.0  # type: ignore[assignment]
        self.double()
        mesh = self.device_mesh["data_parallel"]
        if self.units == "inside":
            fully_shard(self.body[4], mesh=mesh)
        for unit in (self,) if self.units == "around" else (self.body, self.head):
            fully_shard(unit, mesh=mesh)
        if self.by_rows:
            lrcnn_lightning.rowwise(self.body, mode="two_phase", rows=3)

    def forward(self: Any, images: Tensor) -> Tensor:
        return Task.forward(self, images.double())


class ShardedPlainly(Sharded):
    by_rows = False


class ShardedAround(Sharded):
    units = "around"


class ShardedInside(Sharded):
    units = "inside"


def compare(name: str, plain: Any, ours: Any, modes: set[str]) -> None:
    """Weights, buffers and metrics of two runs, and that all processes have the same."""
    module = ours.lightning_module
    assert_same(plain.lightning_module.state_dict(), module.state_dict(), RELATIVE, name)
    assert_same(dict(plain.callback_metrics), dict(ours.callback_metrics), RELATIVE, name)
    assert {plan.mode for plan in ours.strategy.plans.values()} == modes, name
    for parameter in module.parameters():
        every = ours.strategy.all_gather(parameter.detach())
        assert torch.equal(every[0], every[1]), f"{name}: the processes have different weights"
    assert not any(isinstance(vars(child).get("forward"), RowwiseForward) for child in module.modules()), name


def tasks() -> None:
    for task, options in (
        (Task, {}),
        (Direct, {"gradient_as_bucket_view": True}),
        (Sober, {"static_graph": True}),
        (Manual, {"find_unused_parameters": True}),
        (Branches, {"find_unused_parameters": True}),
    ):
        plain, _ = fit(plain_ddp(**options), task, **TWO)
        ours, _ = fit(LRCNNDDPStrategy(**ROWWISE[task is Direct], **options), task, **TWO)
        compare(task.__name__, plain, ours, {ROWWISE[task is Direct]["mode"]})


def plain_ddp(**options: Any) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(**options)


def unused_parameters() -> None:
    """Those of branches that no step ran have no gradient; without the option, the error is Lightning's own."""
    for strategy in (plain_ddp(), LRCNNDDPStrategy(**ROWWISE[0])):
        given = f"={type(strategy).__name__}\\(find_unused_parameters=True\\)"
        with pytest.raises(RuntimeError, match=f"parameters that were not used in producing the loss.*{given}"):
            fit(strategy, Branches, **TWO)
    _, module = fit(LRCNNDDPStrategy(**ROWWISE[0], find_unused_parameters=True), Branches, **TWO)
    seed_everything(1, verbose=False)
    initial = Branches().double().state_dict()
    for name, tensor in module.state_dict().items():
        changed = not torch.equal(tensor, initial[name])
        assert changed == (not name.startswith("branches.2")) or not tensor.is_floating_point(), name


def accumulation_and_clipping() -> None:
    for options in (
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ):
        plain, expected = fit("ddp", Unsynchronised, **TWO, **options)
        ours, module = fit("lrcnn_ddp_two_phase", Unsynchronised, **TWO, **options)
        compare(str(options), plain, ours, {"two_phase"})
        assert_same(expected.seen, module.seen, RELATIVE, f"{options}: gradients")
        if "accumulate_grad_batches" in options:
            first, last = (ours.strategy.all_gather(module.seen[step]["head.weight"]) for step in (0, 1))
            assert not torch.equal(first[0], first[1]), "gradients were synchronised before the last batch"
            assert torch.equal(last[0], last[1])


def synchronised_batch_norm(folder: Path) -> None:
    """Statistics and weights are those of one process with the global batch.

    Which samples are in it is up to the sampler, so it holds all of them.
    """
    options_of_both: dict[str, Any] = {**TWO_MACHINES, "batch": 4, "max_epochs": 3}
    whole = torch.load(folder / "whole.pt", weights_only=True)
    for options in ROWWISE:
        trainer, module = fit(LRCNNDDPStrategy(**options), Sober, sync_batchnorm=True, **options_of_both)
        assert_same(whole, dict(module.state_dict()), RELATIVE, f"sync_batchnorm, {options}")
        assert {plan.mode for plan in trainer.strategy.plans.values()} == {options["mode"]}
        # As with DDP on GPUs, the layers are ordinary ones again after the run.
        assert not any(isinstance(child, nn.SyncBatchNorm) for child in module.modules())
        trainer.validate(module, loader(4), verbose=False)
    separate, _ = fit("lrcnn_ddp_two_phase", Sober, **options_of_both)
    difference = separate.lightning_module.state_dict()["body.1.running_var"] - whole["body.1.running_var"]
    assert difference.abs().max() > 1e-4, "without it each process has statistics of its own"
    with pytest.raises(ConfigError, match=r"head\.0 \(BatchNorm1d\) does not run row-wise.*'body'.*leave out sync_"):
        fit("lrcnn_ddp_two_phase", Outside, sync_batchnorm=True, **TWO_MACHINES)


def resuming(folder: Path) -> None:
    """A checkpoint of one process, and one for one process."""
    resumed = [
        fit(strategy, Sober, ckpt_path=str(folder / "one.ckpt"), **TWO_MACHINES)[0]
        for strategy in ("ddp", LRCNNDDPStrategy(**ROWWISE[0]))
    ]
    assert resumed[1].global_step == 4 + 2, "four steps of one process, and two of two"
    compare("resumed", *resumed, {"two_phase"})
    states = [trainer.optimizers[0].state_dict() for trainer in resumed]
    assert_same(*states, RELATIVE, "optimizer")
    half, _ = fit(LRCNNDDPStrategy(**ROWWISE[1]), Sober, max_epochs=1, **TWO_MACHINES)
    half.save_checkpoint(folder / "two.ckpt")


def budgets(rank: int) -> None:
    """What is free differs; the plans must not."""
    example = torch.empty(2, 3, 96, 72, dtype=torch.float64)
    least = lrcnn_lightning.plan(Large().double().body, example, memory_budget=None, max_overhead=float("inf"))
    assert least.peak_bytes < least.plain_peak_bytes
    between = (least.peak_bytes + least.plain_peak_bytes) // 2
    free = [2**34, 2 * between][rank]
    with free_memory(free):
        trainer, _ = fit("lrcnn_ddp", Large, **TWO)
    gathered: list[Any] = [None, None]
    plans = {name: plan.to_dict() for name, plan in trainer.strategy.plans.items()}
    torch.distributed.all_gather_object(gathered, plans)
    assert gathered[0] == gathered[1] and list(gathered[0]) == ["body"]
    plan = trainer.strategy.plans["body"]
    assert plan.mode != "plain" and plan.peak_bytes <= between < plan.plain_peak_bytes, "two processes share the CPU"
    assert trainer.strategy.config.memory_budget == "auto", "the options stay as they were given"
    with free_memory(free):  # a number is given, so there is no budget to agree upon
        trainer, _ = fit(LRCNNDDPStrategy(rows=4), Large, **TWO)
    assert trainer.strategy.plans["body"].rows == 4


class Large(Sober):
    """Maps large enough that rows save memory."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([nn.functional.interpolate(batch[0], scale_factor=6.0), batch[1]], batch_idx)


@contextlib.contextmanager
def free_memory(size: int) -> Iterator[None]:
    before = parallel_module.usable_bytes
    parallel_module.usable_bytes = lambda device: size  # type: ignore[assignment]
    try:
        yield
    finally:
        parallel_module.usable_bytes = before


def sharded() -> None:
    """FSDP2 by `ModelParallelStrategy`, which is not this package's, with a row-wise module."""

    def strategy() -> Any:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    runs = []
    for task in (ShardedPlainly, Sharded, ShardedAround):
        _, module = fit(strategy(), task, precision="32-true", **TWO)
        state = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in module.state_dict().items()}
        runs.append(state)
        assert task is ShardedPlainly or module.body.__dict__["forward"].training_plan.mode == "two_phase"
        assert_same(runs[0], state, RELATIVE, task.__name__)
    with pytest.raises(
        CaptureError, match=r"sharded over several devices \(4\.weight\); allowed is fully_shard\(\) of"
    ):
        fit(strategy(), ShardedInside, precision="32-true", **TWO)


def in_two_processes(folder: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    if scenario == "one and two":
        synchronised_batch_norm(folder)
        resuming(folder)
    elif scenario == "sharded":
        sharded()
    else:
        tasks()
        unused_parameters()
        accumulation_and_clipping()
        budgets(torch.distributed.get_rank())
    (folder / f"done{torch.distributed.get_rank()}").touch()


def launch(folder: Path, scenario: str, machines: int = 1) -> None:
    """As a user starts a script, on each machine; there Lightning starts a second process if it is to."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1"}
    if machines > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(machines)}
        environment |= {"LOCAL_RANK": "0"}
    environments = [{**environment, "NODE_RANK": str(machine)} for machine in range(machines)]
    run_together("tests.test_parallel", [[str(folder), scenario]] * machines, environments, folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes(tmp_path: Path) -> None:
    launch(tmp_path, "two")


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="PyTorch 2.6 shards parameters on GPUs only")
def test_two_processes_with_sharded_parameters(tmp_path: Path) -> None:
    launch(tmp_path, "sharded")


def test_one_process_and_two(tmp_path: Path) -> None:
    _, whole = fit("auto", Sober, batch=8, max_epochs=3)
    torch.save(dict(whole.state_dict()), tmp_path / "whole.pt")
    half, _ = fit(LRCNNStrategy(**ROWWISE[0]), Sober, max_epochs=1)
    half.save_checkpoint(tmp_path / "one.ckpt")
    launch(tmp_path, "one and two", machines=2)
    resumed = [
        fit(strategy, Sober, ckpt_path=str(tmp_path / "two.ckpt"))[0]
        for strategy in ("auto", LRCNNStrategy(**ROWWISE[0]))
    ]
    assert resumed[1].global_step == 2 + 4, "two steps of two processes, and four of one"
    assert_same(*(trainer.lightning_module.state_dict() for trainer in resumed), RELATIVE, "resumed")
    assert_same(*(trainer.optimizers[0].state_dict() for trainer in resumed), RELATIVE, "optimizer")


@pytest.mark.slow
def test_spawned_processes() -> None:
    _, plain = fit("ddp_spawn", **TWO)
    trainer, ours = fit(LRCNNDDPStrategy(start_method="spawn", **ROWWISE[0]), **TWO)
    assert_same(plain.state_dict(), ours.state_dict(), RELATIVE, "weights")
    assert trainer.strategy.plans == {}, "the plans are those of the processes"


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]), sys.argv[2])
