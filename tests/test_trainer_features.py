"""Every feature of the Trainer that touches a step, against plain training: nothing may differ but rounding.

A feature is tested by the checkpoint that it ends with: every parameter, every buffer, every entry of the optimizers'
states and of the loops, one by one, in float64.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcnn_lightning import LRCNNStrategy
from lrcnn_lightning.rowwise import RowwiseForward
from tests.tasks import QUIET, Task, assert_same, assert_same_run, body, fit, loader, patched

RELATIVE = 1e-9
ROWS = [{"mode": "two_phase", "rows": 3}, {"mode": "overlap", "rows": 3, "segments": 2, "batch_chunks": 2}]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*is smaller than the logging interval"
)


def rows(index: int = 0) -> LRCNNStrategy:
    return LRCNNStrategy(**ROWS[index])


# Steps of other kinds than a loss that is returned


class Lbfgs(Task):
    """The closure runs several times a step; dropout would make each another function."""

    def __init__(self) -> None:
        super().__init__()
        self.body[7].p = 0.0  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, history_size=3)


class Adversarial(LightningModule):
    """A small GAN: two optimizers and their schedules by hand, one network frozen while the other is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(5, 6, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, stride=2, padding=1)
        )

    def score(self, images: Tensor, real: bool) -> Tensor:
        scores = self.critic(images).mean((1, 2, 3))
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0]
        noise = torch.randn(len(images), 5, 4, 3, dtype=images.dtype, device=images.device)
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_generator)
        deceit = self.score(self.generator(noise), True)
        self.manual_backward(deceit)
        assert all(parameter.grad is None for parameter in self.critic.parameters())
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_critic)
        error = self.score(images, True) + self.score(self.generator(noise).detach(), False)
        self.manual_backward(error)
        self.clip_gradients(for_critic, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        for_critic.step()
        for_critic.zero_grad()
        self.untoggle_optimizer(for_critic)
        if self.trainer.is_last_batch:
            for schedule in self.lr_schedulers():
                schedule.step()
        self.log("train_loss", deceit + error, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.score(batch[0], True))

    def configure_optimizers(self) -> Any:
        made = [torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.5, 0.9)) for net in (self.generator, self.critic)]
        return made, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in made]


class AccumulatesByHand(Task):
    """Gradient accumulation in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch, "train_loss") / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")
            optimizer.step()
            optimizer.zero_grad()


class Skips(Task):
    """A step without a loss is skipped."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class Late(Task):
    """Layers are made in ``configure_model``, which the Trainer calls more than once."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.body, self.head = body(), nn.Linear(6, 3)


class ChannelsLast(Task):
    """Without dropout: plain PyTorch draws the mask of such a map in the order of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body[7].p = 0.0  # type: ignore[assignment]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].contiguous(memory_format=torch.channels_last), batch[1]], batch_idx)


class Backbone(Task):
    """`BackboneFinetuning` freezes ``backbone`` and thaws it later."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.body

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


FEATURES: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "nothing": (Task, dict),
    "accumulation": (Task, lambda: {"accumulate_grad_batches": 3}),
    "accumulation by a schedule": (Task, lambda: {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}),
    "clipping by norm": (Task, lambda: {"gradient_clip_val": 0.05}),
    "clipping by value": (Task, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulation and clipping": (Task, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    "manual optimization": (AccumulatesByHand, dict),
    "several optimizers": (Adversarial, dict),
    "LBFGS": (Lbfgs, dict),
    "steps without a loss": (Skips, dict),
    "configure_model": (Late, dict),
    "channels last": (ChannelsLast, dict),
    "stochastic weight averaging": (
        Task,
        lambda: {
            "max_epochs": 3,
            "callbacks": [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
        },
    ),
    "backbone finetuning": (
        Backbone,
        lambda: {"max_epochs": 3, "callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]},
    ),
    "overfitting": (Task, lambda: {"overfit_batches": 2}),
    "sanity validation": (Task, lambda: {"num_sanity_val_steps": 2}),
    "no sanity validation": (Task, lambda: {"num_sanity_val_steps": 0}),
    "validation within an epoch": (Task, lambda: {"val_check_interval": 2}),
    "one batch": (Task, lambda: {"fast_dev_run": True}),
    "anomaly detection": (Task, lambda: {"detect_anomaly": True}),
    "deterministic operations": (Task, lambda: {"deterministic": True}),
    "no inference mode": (Task, lambda: {"inference_mode": False}),
    "bare steps": (Task, lambda: {"barebones": True}),
}


@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
@pytest.mark.parametrize("feature", FEATURES)
def test_training_with_a_feature_equals_plain_training(feature: str, index: int, tmp_path: Path) -> None:
    task, options = FEATURES[feature]
    extra = {name: None for name in QUIET} | {"accelerator": "cpu"} if feature == "bare steps" else {}
    plain, _ = fit("auto", task, **extra, **options())
    ours, module = fit(rows(index), task, **extra, **options())
    torch.use_deterministic_algorithms(False)
    if feature in ("bare steps", "one batch"):  # neither logs nor saves checkpoints
        assert_same(plain.lightning_module.state_dict(), module.state_dict(), RELATIVE, feature)
    else:
        assert_same_run(plain, ours, RELATIVE, tmp_path)
    assert {plan.mode for plan in ours.strategy.plans.values()} == {ROWS[index]["mode"]}
    assert patched(module) == []


class WithExample(Task):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 3, 16, 12)


# Precisions.  Whoever computes with fewer digits is off; by rows it is off no further than plainly.


class Gradients(Callback):
    """The gradients of every step, as the optimizer is about to take them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.detach().clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())


class Smooth(Task):
    """Without dropout and kinks: a rounded value on the other side of a kink is another gradient, not a rounded one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            nn.SiLU(),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.GELU(),
        )


def observed(strategy: Any, precision: Any, task: Any = Smooth, **options: Any) -> tuple[Gradients, Any, Any]:
    seen = Gradients()
    short = {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer, module = fit(strategy, task, **{**short, "precision": precision, "callbacks": [seen], **options})
    return seen, trainer, module


def assert_no_further(exact: dict[str, Tensor], plain: dict[str, Tensor], ours: dict[str, Tensor], eps: float) -> None:
    """Tensor by tensor: the distance from the exact one is about that of plain training.

    Where plain PyTorch rounds the gradient of a normalisation once, by rows it is rounded twice: what comes from the
    map and what comes from the statistics are two slabs. Sums over rows are taken in another order.
    """
    assert list(exact) == list(plain) == list(ours)
    for name, want in exact.items():
        assert plain[name].dtype == ours[name].dtype, name
        if not want.is_floating_point():
            assert torch.equal(plain[name], ours[name]), name
            continue
        theirs, mine = ((made[name].double() - want.double()).abs().max() for made in (plain, ours))
        assert mine <= 4 * (theirs + eps * want.abs().max()), f"{name}: {mine} plainly {theirs}"


@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"])
def test_precisions(precision: Any, index: int) -> None:
    exact, _, reference = observed("auto", "64-true")
    again, _, other = observed(rows(index), "64-true")
    assert_same(exact.steps, again.steps, RELATIVE, "gradients")
    assert_same(reference.state_dict(), other.state_dict(), RELATIVE, "weights")
    plain, _, theirs = observed("auto", precision)
    ours, trainer, module = observed(rows(index), precision)
    assert trainer.strategy.plans["body"].mode == ROWS[index]["mode"]
    # Lightning replaces 16-mixed by bf16-mixed on the CPU.
    kind = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
    eps = torch.finfo(torch.bfloat16 if precision == "16-mixed" else kind[precision.partition("-")[0]]).eps
    assert_no_further(exact.steps[0], plain.steps[0], ours.steps[0], eps)
    # After the step: the running statistics, too.
    assert_no_further(reference.state_dict(), theirs.state_dict(), module.state_dict(), eps)


def half_precision(scale: float) -> MixedPrecision:
    """``16-mixed`` on the CPU: Lightning makes it from the name on a GPU only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, backoff_factor=2.0**-8)  # type: ignore[attr-defined]
    return MixedPrecision("16-mixed", "cpu", scaler)


class Scales(Callback):
    """The scale, the weights and their optimizer's state after each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
def test_half_precision_with_a_scaler_skips_the_steps_that_overflow(index: int) -> None:
    runs = []
    for strategy in ("auto", rows(index)):
        seen = Scales()
        options = {"precision": None, "plugins": half_precision(2.0**32), "callbacks": [seen]}
        trainer, module = fit(strategy, Smooth, gradient_clip_val=0.5, **options)
        runs.append((seen, trainer, module))
    (plain, theirs, _), (ours, trainer, module) = runs
    assert trainer.strategy.plans["body"].mode == ROWS[index]["mode"]
    # Gradients of 2 ** 32 are beyond 65504; the scale falls until they fit, and grows after three steps that do.
    assert ours.scales == plain.scales
    changes = [after / before for before, after in zip([2.0**32, *ours.scales], ours.scales, strict=False)]
    assert changes.count(2.0**-8) >= 2 and changes.count(2.0) == 1 and changes.count(1.0) >= 2
    before = {name: p.detach() for name, p in fit_nothing(Smooth).named_parameters()}
    for change, weights in zip(changes, ours.weights, strict=True):
        if change == 2.0**-8:
            assert_same(before, weights, 0, "a step that overflows is skipped")
        else:
            assert all(not torch.equal(before[name], weights[name]) for name in before)
        before = weights
    states = [made.optimizers[0].state_dict()["state"] for made in (theirs, trainer)]
    assert states[0].keys() == states[1].keys() and states[0]
    assert trainer.precision_plugin.state_dict() == theirs.precision_plugin.state_dict()


def fit_nothing(task: Any) -> Any:
    """The module as `fit` makes it, before any step."""
    seed_everything(1, verbose=False)
    return task()


@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
def test_half_precision_gradients(index: int) -> None:
    exact, _, _ = observed("auto", "64-true")
    plain, _, _ = observed("auto", None, plugins=half_precision(2.0**10))
    ours, _, _ = observed(rows(index), None, plugins=half_precision(2.0**10))
    assert_no_further(exact.steps[0], plain.steps[0], ours.steps[0], torch.finfo(torch.float16).eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu(precision: Any) -> None:
    options = {"accelerator": "gpu", "devices": 1}
    exact, _, _ = observed("auto", "64-true", **options)
    plain, _, _ = observed("auto", precision, **options)
    ours, _, _ = observed(rows(), precision, **options)
    eps = torch.finfo(torch.float16 if precision == "16-mixed" else torch.bfloat16).eps
    assert_no_further(exact.steps[0], plain.steps[0], ours.steps[0], eps)


# Weight averaging


AVERAGES: dict[str, dict[str, Any]] = {
    "WeightAveraging": {},  # the mean of all steps
    "EMAWeightAveraging": {"decay": 0.7},
    "EMAWeightAveraging, now and then": {"decay": 0.7, "update_every_n_steps": 2, "update_starting_at_step": 2},
    "EMAWeightAveraging, parameters only": {"decay": 0.7, "use_buffers": False},
}


def averaging(name: str) -> Any:
    library = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="since Lightning 2.6")
    return getattr(library, name.partition(",")[0])(**AVERAGES[name])


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
def test_weight_averaging(name: str, index: int, tmp_path: Path) -> None:
    """It copies the module, validates with the averages in its place, and ends with them in it."""
    runs = []
    for strategy in ("auto", rows(index)):
        callback = averaging(name)
        trainer, module = fit(strategy, callbacks=[callback])
        average = callback._average_model
        assert patched(average) == [] and patched(module) == []
        assert all(torch.equal(p, q) for p, q in zip(average.module.parameters(), module.parameters(), strict=True))
        assert int(average.n_averaged) > 1
        runs.append((trainer, module, average))
    (plain, _, theirs), (ours, _, average) = runs
    assert ours.strategy.plans["body"].mode == ROWS[index]["mode"]
    assert_same(dict(theirs.state_dict()), dict(average.state_dict()), RELATIVE, "averages")
    assert_same_run(plain, ours, RELATIVE, tmp_path)
    # An average is not what was trained last: else the comparison would say nothing of averages.
    trained, _ = fit("auto")
    last, means = trained.lightning_module.state_dict(), ours.lightning_module.state_dict()
    assert all(not torch.equal(last[key], means[key]) for key, _ in ours.lightning_module.named_parameters())


@pytest.mark.parametrize("first, second", [(None, 0), (1, None), (0, 1)], ids=["to rows", "from rows", "between"])
def test_weight_averaging_goes_on_from_a_checkpoint(first: int | None, second: int | None, tmp_path: Path) -> None:
    """The file holds the averages as ``state_dict``, the trained weights beside them, and both go on."""
    runs, files = [], []
    for name, before, after in (("plain", None, None), ("ours", first, second)):
        saver = ModelCheckpoint(tmp_path / name, "broken_off", every_n_train_steps=3)
        callbacks = [averaging("EMAWeightAveraging"), saver]
        strategy = "auto" if before is None else rows(before)
        fit(strategy, callbacks=callbacks, max_steps=3, enable_checkpointing=True)
        file = tmp_path / name / "broken_off.ckpt"
        files.append(torch.load(file, weights_only=False))
        strategy = "auto" if after is None else rows(after)
        runs.append(fit(strategy, callbacks=[averaging("EMAWeightAveraging")], ckpt_path=str(file))[0])
        assert runs[-1].global_step == 8
        loaded = Task.load_from_checkpoint(file, map_location="cpu")
        assert_same(dict(files[-1]["state_dict"]), dict(loaded.state_dict()), 0, "averages of the file")
    plain, ours = files
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(dict(plain[part]), dict(ours[part]), RELATIVE, part)
    assert not torch.equal(ours["state_dict"]["head.weight"], ours["current_model_state"]["head.weight"])
    assert_same_run(*runs, RELATIVE, tmp_path)


# Searches


class Sized(Task):
    """A module with a batch size of its own, for `BatchSizeFinder`."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1
        self.learning_rate = 1e-3
        self.sizes: list[int] = []
        self.rows: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return loader(16, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(4, self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder(mode: str, tmp_path: Path) -> None:
    """It tells a batch that is too large by the type and the text of the error."""
    runs = []
    for strategy in ("auto", rows()):
        seed_everything(1, verbose=False)
        module = Sized()
        finder = BatchSizeFinder(mode=mode, steps_per_trial=2, max_trials=8)
        options: dict[str, Any] = {**QUIET, "max_epochs": 1, "precision": "64-true", "default_root_dir": tmp_path}
        trainer = Trainer(strategy=strategy, callbacks=[finder], **{**options, "enable_checkpointing": True})
        trainer.fit(module)
        assert max(module.sizes) > 4, "no batch was too large"
        assert patched(module) == []
        runs.append((finder.optimal_batch_size, module.batch_size, module.sizes, module.state_dict()))
        assert strategy == "auto" or trainer.strategy.plans["body"].mode == "two_phase"  # type: ignore[attr-defined]
    assert runs[0][:3] == runs[1][:3] and runs[1][0] in (3, 4)
    assert_same(runs[0][3], runs[1][3], RELATIVE, "weights")


def test_the_learning_rate_finder(tmp_path: Path) -> None:
    runs = []
    for strategy in ("auto", rows()):
        seed_everything(1, verbose=False)
        module = Sized()
        module.batch_size = 2
        finder = LearningRateFinder(num_training_steps=16, min_lr=1e-3, max_lr=0.5, early_stop_threshold=None)
        options: dict[str, Any] = {**QUIET, "max_epochs": 3, "precision": "64-true", "default_root_dir": tmp_path}
        Trainer(strategy=strategy, callbacks=[finder], **{**options, "enable_checkpointing": True}).fit(module)
        found = finder.optimal_lr
        assert found is not None and len(found.results["loss"]) > 12
        runs.append((found.results, found.suggestion(), module.learning_rate, module.state_dict()))
    assert runs[0][1] is not None
    assert_same(runs[0], runs[1], RELATIVE, "learning rate finder")


# Checkpoints


class Adam(Task):
    """An optimizer with much state, and a schedule that steps with every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body[7].p = 0.0  # type: ignore[assignment]  # the state of the random numbers is in no checkpoint

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, amsgrad=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("steps", [3, 4, 6])
@pytest.mark.parametrize("before, after", [("auto", 0), (0, "auto"), (1, 0), ("auto", 1)])
def test_a_checkpoint_is_resumed_under_another_strategy(before: Any, after: Any, steps: int, tmp_path: Path) -> None:
    """In the middle of an epoch, too: weights, optimizer, schedule and loops end as plain training resumed plainly."""

    def strategy(choice: Any) -> Any:
        return choice if isinstance(choice, str) else rows(choice)

    runs = []
    for name, first, second in (("plain", "auto", "auto"), ("ours", strategy(before), strategy(after))):
        folder = tmp_path / name
        saver = ModelCheckpoint(folder, "broken_off", every_n_train_steps=steps)
        fit(first, Adam, callbacks=[saver], max_steps=steps, enable_checkpointing=True)
        assert torch.load(folder / "broken_off.ckpt", weights_only=False)["global_step"] == steps
        resumed, module = fit(second, Adam, ckpt_path=str(folder / "broken_off.ckpt"))
        # Lightning 2.4 goes through the batch of the checkpoint once more.
        assert resumed.global_step in (8, 9) and len(resumed.optimizers[0].state_dict()["state"]) == 8
        runs.append(resumed)
        loaded = Adam.load_from_checkpoint(folder / "broken_off.ckpt", map_location="cpu")
        assert list(loaded.state_dict()) == list(module.state_dict())
    assert_same_run(*runs, RELATIVE, tmp_path)


# Evaluation


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("index", range(len(ROWS)), ids=["two_phase", "overlap"])
def test_evaluation_before_training(index: int, inference_mode: bool) -> None:
    """Stand-alone evaluation runs in inference mode, whose tensors autograd must not meet in the training after it."""
    runs = []
    for strategy in ("auto", rows(index)):
        seed_everything(1, verbose=False)
        module = Task()
        options: dict[str, Any] = {**QUIET, "max_epochs": 1, "precision": "64-true"}
        trainer = Trainer(strategy=strategy, inference_mode=inference_mode, **options)
        results = [trainer.validate(module, loader(), verbose=False), trainer.predict(module, loader())]
        seed_everything(2, verbose=False)
        trainer.fit(module, loader(), loader(4))
        results.append(trainer.test(module, loader(), verbose=False))
        runs.append([results, module.state_dict(), dict(trainer.callback_metrics)])
    assert_same(runs[0], runs[1], RELATIVE, "results")


# A step that is broken off


PROGRESS = SimpleNamespace(where="", count=0)
"""Where the step is to be broken off, and how often it was there; a capture that fails takes back what modules hold."""


class BrokenOff(Task):
    """Is interrupted once, at some point of a step."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        super().__init__()
        PROGRESS.where, PROGRESS.count = where, 0
        self.error = error
        self.body.append(Interrupt(self))
        self.head.weight.register_hook(self.on_head)
        self.body[0].weight.register_hook(self.on_rows)

    def strike(self, where: str) -> None:
        if PROGRESS.where == where:
            PROGRESS.count += 1
            if PROGRESS.count == 3:
                PROGRESS.where = "past"
                raise self.error("broken off")

    def on_head(self, _: Tensor) -> None:
        self.strike("in the backward pass")

    def on_rows(self, _: Tensor) -> None:
        self.strike("after the rows of the backward pass")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.strike("after the rows")
        return loss


class InTheRows(TorchDispatchMode):
    """Breaks off a step at one of the many calls of an operation that its rows make."""

    def __init__(self, module: BrokenOff) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        wanted = {
            "in the rows": aten.convolution.default,
            "in the rows of the backward pass": aten.convolution_backward.default,
        }
        if func is wanted.get(PROGRESS.where) and type(args[0]) is Tensor:
            self.calls += 1
            if self.calls == 5:
                PROGRESS.count = 2
                self.module.strike(PROGRESS.where)
        return func(*args, **(kwargs or {}))


class Interrupt(nn.Module):
    """Runs while the module is traced, in the middle of the capture."""

    def __init__(self, owner: BrokenOff) -> None:
        super().__init__()
        self.owner = (owner,)  # no submodule

    def forward(self, maps: Tensor) -> Tensor:
        owner = self.owner[0]
        if PROGRESS.where == "in the capture":
            PROGRESS.count = 2
            owner.strike("in the capture")
        return maps


@pytest.mark.parametrize(
    "where, error",
    [
        ("in the capture", KeyboardInterrupt),
        *itertools.product(
            [
                "in the rows",
                "after the rows",
                "in the backward pass",
                "in the rows of the backward pass",
                "after the rows of the backward pass",
            ],
            [KeyError, KeyboardInterrupt],
        ),
    ],
)
def test_a_step_that_is_broken_off_leaves_the_module_clean(where: str, error: type[BaseException]) -> None:
    seed_everything(1, verbose=False)
    module = BrokenOff(where, error)
    before = {name: set(vars(child)) for name, child in module.named_children()}
    hooks = {name: [len(getattr(child, table)) for table in HOOKS] for name, child in module.named_modules()}
    trainer = Trainer(strategy=rows(), max_epochs=1, precision="64-true", num_sanity_val_steps=0, **QUIET)
    # Lightning ends the process when the user interrupts it.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error), InTheRows(module):
        trainer.fit(module, loader(), loader(4))
    assert PROGRESS.where == "past", "the step was not broken off"
    assert patched(module) == []
    assert {name: set(vars(child)) for name, child in module.named_children()} == before
    assert {name: [len(getattr(child, table)) for table in HOOKS] for name, child in module.named_modules()} == hooks
    tensors = [*module.parameters(), *module.buffers()]
    assert all(type(tensor) in (nn.Parameter, Tensor) for tensor in tensors), "tensors without data are left"
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    # Plain training goes on from here as from a module that nothing ever happened to.
    runs = []
    for start in (Task(), module):
        if start is not module:
            start.body.append(nn.Identity())
            start.double()
            start.load_state_dict(module.state_dict())
        start.zero_grad()
        seed_everything(2, verbose=False)
        Trainer(max_epochs=1, precision="64-true", **QUIET).fit(start, loader())
        runs.append(start.state_dict())
    assert_same(*runs, 0, "weights")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# One module, several Trainers; copies


@pytest.mark.parametrize("second", [0, 1, "auto"], ids=["two_phase", "overlap", "plain"])
def test_two_trainers_one_after_the_other(second: Any) -> None:
    runs = []
    for strategies in (("auto", "auto"), (rows(0), second if isinstance(second, str) else rows(second))):
        seed_everything(1, verbose=False)
        module = Task()
        for strategy in strategies:
            trainer = Trainer(strategy=strategy, max_epochs=1, precision="64-true", **QUIET)
            trainer.fit(module, loader(), loader(4))
            assert patched(module) == []
        runs.append(trainer)
    assert_same(*(made.lightning_module.state_dict() for made in runs), RELATIVE, "weights")
    assert_same(*(dict(made.callback_metrics) for made in runs), RELATIVE, "metrics")


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_made_in_a_step_is_a_plain_module(how: Callable[[Any], Any]) -> None:
    """Such as a teacher that is made in the first step: rows end with the step, for its copies as well."""
    copies: list[Any] = []

    class Copying(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert isinstance(vars(self.body)["forward"], RowwiseForward)
            made = how(self.body)
            torch.manual_seed(batch_idx)
            mine = self.body(batch[0])
            torch.manual_seed(batch_idx)
            assert_same(mine.detach(), made(batch[0]).detach(), RELATIVE, "copy")
            copies.append(made)
            return super().training_step(batch, batch_idx)

    _, module = fit(rows(), Copying, max_epochs=1)
    assert len(copies) == 4
    for made in copies:
        assert not any(isinstance(vars(child).get("forward"), RowwiseForward) for child in made.modules())
    weights = copies[0][0].weight
    before = weights.detach().clone()
    copies[0](torch.randn(2, 3, 16, 12, dtype=torch.float64)).sum().backward()
    assert weights.grad is not None and torch.equal(before, weights)
    assert module.body[0].weight.grad is None or module.body[0].weight.grad is not weights.grad


# Profilers and summaries


class Reporting(Callback):
    """Reads the profiler's table before it is closed."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(trainer.profiler.summary())


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_profilers(profiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reports = []
    for strategy in ("auto", rows()):
        seen: list[str] = []
        trainer, module = fit(strategy, profiler=profiler, callbacks=[Reporting(seen)])
        name = type(trainer.strategy).__name__
        steps = "ProfilerStep*" if profiler == "pytorch" else f"[Strategy]{name}.training_step"
        assert steps in seen[0] and "backward" in seen[0].lower()
        assert patched(module) == []
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
        reports.append(trainer)
    assert_same(*(made.lightning_module.state_dict() for made in reports), RELATIVE, "weights")


class Table(callbacks.ModelSummary):
    """Keeps what it would print."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__(max_depth=-1)
        self.seen = seen

    def summarize(self, *table: Any, **rest: Any) -> None:  # type: ignore[override]
        self.seen.append((table, rest))


def test_the_summary_of_a_model() -> None:
    """The Trainer calls the module with ``example_input_array`` outside of the steps, where it runs plainly."""
    tables: list[Any] = []
    runs = []
    for strategy in ("auto", rows()):
        options = {"precision": "32-true", "callbacks": [Table(tables)]}
        runs.append(fit(strategy, WithExample, enable_model_summary=True, **options)[0])
    assert len(tables) == 2 and tables[0] == tables[1]
    columns = dict(tables[0][0][0])
    assert "[1, 6, 8, 6]" in map(str, columns["Out sizes"])
    expected, actual = (str(ModelSummary(made.lightning_module, max_depth=-1)) for made in runs)
    assert expected == actual
