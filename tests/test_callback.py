"""ActivationMemory: what it logs, what it predicts and draws, and that training does not notice it."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lrcnn_lightning import ActivationMemory, ConfigError, LRCNNStrategy
from lrcnn_lightning.monitor import StepMemory, callback, measure_module
from lrcnn_lightning.monitor.picture import draw
from tests.oracle import twin

KB = 1024  # bytes of a map of 1 x 4 x 8 x 8 in float32
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_mode_is_left_behind() -> Any:
    torch.manual_seed(0)
    yield
    assert _get_current_dispatch_mode_stack() == []


def chain(depth: int) -> nn.Sequential:
    """Convolutions whose outputs are 1 KB each, for an input of 1 x 3 x 8 x 8."""
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(depth)))


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs Lightning"):
        callback.activation_memory_class()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"steps": value}, "steps must be an int of at least 0") for value in (-1, True, 1.0, "1", None)),
        *(({"every_n_steps": value}, "every_n_steps must be an int of at least 1") for value in (0, 2.0)),
        *(({"picture": value}, "picture must be None or a file that ends in .png") for value in ("a.txt", "", 3, True)),
    ],
    ids=str,
)
def test_arguments_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ActivationMemory(**options)


def task(namespace: Any, fail_at: int = -1, skip_from: int = 10**6) -> Any:
    """A LightningModule of three convolutions, whose loss is that of ``measure_module``."""

    class Task(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(3)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx >= skip_from else None

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == fail_at:
                raise RuntimeError("stop")
            return self.net(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), foreach=False)

    return Task()


def fit(
    namespace: Any, module: Any, *callbacks: Any, tmp_path: Any, batches: int = 3, side: int = 8, **options: Any
) -> Any:
    images = torch.randn(batches, 3, side, side)
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    trainer = namespace.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **{**dict.fromkeys(quiet, False), **options},
    )
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=1))
    return trainer


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_callback_logs_the_first_steps(name: str, tmp_path: Any) -> None:
    namespace = pytest.importorskip(name)
    loggers = pytest.importorskip(f"{name}.loggers")
    logged: list[tuple[int | None, dict[str, float]]] = []

    class Recorder(loggers.CSVLogger):  # type: ignore[name-defined, misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step, dict(metrics)))

    memory = ActivationMemory(steps=2)
    assert isinstance(memory, namespace.Callback)
    trainer = fit(namespace, task(namespace), memory, tmp_path=tmp_path, logger=Recorder(tmp_path))

    # Adam works on one weight at a time, and its state is not counted: the peak is that of the three maps.  The loss
    # and its gradient are two numbers more, of which the first is still held when the peak is reached.
    assert len(memory.peaks) == 2
    assert all(3 * KB <= peak <= 3 * KB + 64 for peak in memory.peaks)
    measured = [(step, metrics) for step, metrics in logged if "activation_memory_peak" in metrics]
    assert [step for step, _ in measured] == [1, 2]
    assert [metrics["activation_memory_peak"] for _, metrics in measured] == memory.peaks
    assert all(metrics["process_memory_peak"] > 2**20 for _, metrics in measured)
    assert "cuda_memory_peak" not in measured[0][1]
    assert not any("activation_memory_predicted" in metrics for _, metrics in measured), "nothing runs row-wise"
    assert trainer.progress_bar_metrics["activation_MiB"] == pytest.approx(memory.peaks[-1] / 2**20)
    assert trainer.progress_bar_metrics["process_MiB"] > 1


class Net(nn.Module):
    """With all that a call moves on: statistics, random masks, weights that a hook computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            torch.nn.utils.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.4),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 2, 3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.body(maps)


def networks(namespace: Any, count: int = 1) -> Any:
    """A LightningModule that remembers the gradients and the random state of each step."""

    class Networks(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = Net()
            self.second = nn.Sequential(nn.Conv2d(2, 24, 3, padding=1), nn.ReLU()) if count > 1 else None
            self.seen: list[Any] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            maps = self.first(batch)
            if self.second is not None:
                maps = self.second(maps)
            return maps.square().mean() + 0 * random.random()

        def on_after_backward(self) -> None:
            self.seen += [parameter.grad.clone() for parameter in self.parameters()]

        def on_fit_end(self) -> None:
            self.seen += [torch.get_rng_state(), torch.tensor(random.random())]

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    return Networks()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "lrcnn_two_phase", "lrcnn"])
def test_training_does_not_notice_it(strategy: str, precision: str, tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    alone = networks(namespace, 2)
    measured = copy.deepcopy(alone)
    memory = ActivationMemory(steps=2)
    for module, callbacks in ((alone, ()), (measured, (memory,))):
        torch.manual_seed(1)
        random.seed(1)
        fit(namespace, module, *callbacks, tmp_path=tmp_path, strategy=strategy, precision=precision, side=16)
    assert memory.picture_path is not None
    assert len(measured.seen) == len(alone.seen) > 2
    for one, other in zip(alone.seen, measured.seen, strict=True):
        assert torch.equal(one, other)
    state = measured.state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert [name for name, _ in measured.named_modules()] == [name for name, _ in alone.named_modules()]
    for one, other in zip(alone.modules(), measured.modules(), strict=True):
        assert set(vars(one)) == set(vars(other))
        assert not any("Fake" in type(value).__name__ for value in vars(other).values())


# ------------------------------------------------------------------------------------------------ beside the plan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed to the picture: path, run, plain, predicted, batch."""
    seen: list[Any] = []
    monkeypatch.setattr(callback, "draw", lambda *args: (seen.append(args), draw(*args)))
    return seen


def test_the_prediction_and_plain_pytorch_stand_beside_the_measured_step(drawn: list[Any], tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    memory, module = ActivationMemory(steps=2), networks(namespace)
    strategy = LRCNNStrategy(mode="two_phase", rows=8)
    trainer = fit(namespace, module, memory, tmp_path=tmp_path, strategy=strategy, side=128)
    predicted = strategy.plans["first"].peak_bytes
    assert memory.predictions == [predicted, predicted]
    assert all(peak == pytest.approx(predicted, rel=0.25) for peak in memory.peaks)
    assert trainer.progress_bar_metrics["predicted_MiB"] == pytest.approx(predicted / 2**20)

    ((path, run, plain, given, batch),) = drawn
    assert (path, given, batch) == (tmp_path / "activation_memory.png", predicted, 2)
    expected = measure_module(twin(module.first), torch.randn(1, 3, 128, 128))
    # A step of the Trainer does not give a gradient to the batch; neither does this one.
    assert plain.peak_bytes == expected.peak_bytes
    assert run.peak_bytes == memory.peaks[-1] < plain.peak_bytes
    for step in (run, plain):
        assert len(step.timeline) == len(step.operations)
        assert max(step.timeline) == step.peak_bytes
        assert 0 < step.backward_start < len(step.timeline)
    assert "convolution_backward" not in " ".join(plain.operations[: plain.backward_start])
    assert "convolution_backward" in " ".join(plain.operations[plain.backward_start :])
    assert not any("addcdiv" in name for name in run.operations), "the optimizer is not in it"
    image = imread(path)
    assert image.shape[:2] == (676, 1300)  # height and width in pixels
    assert image[..., :3].std() > 0.05  # not an empty page


def test_networks_one_after_the_other_are_plain_together(drawn: list[Any], tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    memory, module = ActivationMemory(), networks(namespace, 2)
    strategy = LRCNNStrategy(mode="two_phase", rows=8)
    fit(namespace, module, memory, tmp_path=tmp_path, strategy=strategy, side=64)
    assert memory.predictions == [sum(plan.peak_bytes for plan in strategy.plans.values())]
    both = nn.Sequential(twin(module.first), twin(module.second))
    whole = measure_module(both, torch.randn(1, 3, 64, 64)).peak_bytes
    alone = measure_module(both[0], torch.randn(1, 3, 64, 64)).peak_bytes
    border = 2 * 64 * 64 * 4
    assert alone < drawn[0][2].peak_bytes <= whole <= drawn[0][2].peak_bytes + border


def test_a_run_of_plain_pytorch_is_drawn_alone(drawn: list[Any], tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    memory = ActivationMemory()
    fit(namespace, networks(namespace), memory, tmp_path=tmp_path)
    assert memory.predictions == [None]
    assert drawn[0][2:4] == (None, None)
    assert memory.picture_path == tmp_path / "activation_memory.png"


def test_the_picture_lies_beside_the_logs_or_where_it_is_told(tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path / "logs")
    beside, told = ActivationMemory(), ActivationMemory(picture=tmp_path / "new" / "memory.svg")
    for memory in (beside, told):
        fit(namespace, task(namespace), memory, tmp_path=tmp_path, logger=logger)
    assert beside.picture_path == Path(logger.log_dir) / "activation_memory.png"
    assert told.picture_path is not None and told.picture_path.read_text("utf-8").count("<path") > 10


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}], ids=str)
def test_no_picture(options: dict[str, Any], tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    memory = ActivationMemory(picture="activation_memory.png" if options else None)
    fit(namespace, task(namespace), memory, tmp_path=tmp_path, **options)
    assert len(memory.peaks) == 1
    assert memory.picture_path is None and not list(tmp_path.iterdir())


def test_every_so_many_steps(tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    measured: list[int] = []

    class Watched(ActivationMemory):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *args: Any) -> None:
            if self._running is not None:
                measured.append(args[-1])
            super().on_train_batch_end(*args)

    fit(namespace, task(namespace), Watched(steps=3, every_n_steps=4), tmp_path=tmp_path, batches=20)
    assert measured == [0, 4, 8]


def test_a_module_that_needs_values_is_not_drawn_plainly(drawn: list[Any], tmp_path: Path) -> None:
    namespace = pytest.importorskip("lightning.pytorch")

    class Values(nn.Sequential):
        def forward(self, maps: Tensor) -> Tensor:
            if type(maps).__name__ == "FakeTensor" and self.refuses:
                raise RuntimeError("no data")
            return super().forward(maps)

    module = networks(namespace)
    module.first.body = Values(*module.first.body)
    module.first.body.refuses = False

    class Refuses(namespace.Callback):
        def on_train_end(self, *_: Any) -> None:
            module.first.body.refuses = True

    memory = ActivationMemory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(namespace, module, Refuses(), memory, tmp_path=tmp_path, strategy="lrcnn_two_phase", side=16)
    assert any("draws no plain PyTorch" in str(w.message) and "no data" in str(w.message) for w in caught)
    assert drawn[0][2] is None and drawn[0][3] == memory.predictions[0]
    assert memory.picture_path is not None


def test_a_picture_of_nothing_and_of_a_run_that_takes_more(tmp_path: Path) -> None:
    draw(tmp_path / "nothing.png", StepMemory(0, 0), None, None, 1)
    run, plain = (StepMemory(peak, 0, (0, peak, 0), ("a", "b", "c"), 1) for peak in (2000, 1000))
    draw(tmp_path / "more.svg", run, plain, 1500, 1)
    # matplotlib keeps each text as a comment beside its outlines.
    assert "plain PyTorch takes less" in (tmp_path / "more.svg").read_text("utf-8")
    assert imread(tmp_path / "nothing.png").shape[:2] == (676, 1300)


def test_callback_stops_measuring_after_an_error_and_after_a_skipped_batch(tmp_path: Any) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    failing = ActivationMemory(steps=5)
    with pytest.raises(RuntimeError, match="stop"):
        fit(namespace, task(namespace, fail_at=1), failing, tmp_path=tmp_path)
    assert len(failing.peaks) == 1
    assert _get_current_dispatch_mode_stack() == []

    skipping = ActivationMemory(steps=5)
    fit(namespace, task(namespace, skip_from=2), skipping, tmp_path=tmp_path)
    assert len(skipping.peaks) == 2


def test_callback_measures_nothing_when_told_so_and_can_be_pickled(tmp_path: Any) -> None:
    namespace = pytest.importorskip("lightning.pytorch")
    memory = pickle.loads(pickle.dumps(ActivationMemory(steps=0)))
    trainer = fit(namespace, task(namespace), memory, tmp_path=tmp_path)
    assert (memory.steps, memory.peaks) == (0, [])
    assert "activation_MiB" not in trainer.progress_bar_metrics
    assert not list(tmp_path.iterdir())
