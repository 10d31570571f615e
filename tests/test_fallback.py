"""What cannot run row by row: by its parts, then plainly, with one warning; errors that are the user's stay his."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrcnn_lightning
from lrcnn_lightning import CaptureError, InputError, LRCNNStrategy, PlanError
from lrcnn_lightning.config import format_size
from lrcnn_lightning.errors import BudgetError, InternalError, is_out_of_memory
from lrcnn_lightning.forward import RowwiseForward
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.planning import search
from tests.oracle import difference

IMAGES = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROWS: dict[str, Any] = {"mode": "two_phase", "rows": 3}

pytestmark = pytest.mark.filterwarnings("ignore:.*no plan was", "ignore:.*rows save no", "ignore:.*does not have many")


def said(call: Callable[[], Any], words: str = "cannot run row by row") -> list[str]:
    """The warnings of a call that have these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if words in str(warning.message)]


def served(net: nn.Module) -> dict[str, int]:
    """The modules that have run by rows, and in how many."""
    forwards = {name: vars(m).get("forward") for name, m in net.named_modules()}
    plans = {name: f.plan for name, f in forwards.items() if isinstance(f, RowwiseForward) and f.plan is not None}
    return {name: plan.rows for name, plan in plans.items() if plan.mode != "plain"}


def agree(plain: nn.Module, ours: nn.Module, *inputs: Any, seed: int = 0) -> None:
    """The same results, gradients and buffers."""
    seen = []
    for net in (plain, ours):
        torch.manual_seed(seed)
        net.zero_grad()
        out = net(*inputs)
        out.square().mean().backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        seen.append([out.detach(), *gradients, *net.buffers(), torch.rand(2)])
    for want, got in zip(*seen, strict=True):
        assert difference(got, want) < 1e-9


# ------------------------------------------------------------------------------------------- inputs that are no maps


class Generator(nn.Module):
    """That of Lightning's own example, but convolutional."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 8 * 8 * 8)
        self.net = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.linear(z).view(-1, 8, 8, 8))


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 16, 16, 8), nn.ConvTranspose1d(16, 1, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(x.unsqueeze(1)))).squeeze(1)


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(5, 4), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, labels: Tensor) -> Tensor:
        return self.conv(self.embedding(labels).permute(0, 3, 1, 2))


class Tokens(nn.Conv1d):
    """Has no parts."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(nn.functional.one_hot(tokens, 7).to(self.weight.dtype).mT)


class Task(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(net: nn.Module, data: Tensor, strategy: Any) -> tuple[nn.Module, Trainer]:
    trainer = Trainer(
        strategy=strategy,
        max_steps=2,
        accelerator="cpu",
        devices=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Task(copy.deepcopy(net))
    trainer.fit(task, DataLoader(TensorDataset(data), batch_size=4))
    return task.net, trainer


NO_MAPS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "vectors": (Generator, torch.randn(8, 10), ["net.net"]),
    "waveforms": (Wave, torch.randn(8, 801), ["net.encoder", "net.decoder"]),
    "labels": (Labels, torch.randint(0, 5, (8, 24, 24)), ["net.conv"]),
    "tokens": (lambda: Tokens(7, 3, 3), torch.randint(0, 7, (8, 40)), []),
}


@pytest.mark.parametrize("strategy", ["lrcnn", "lrcnn_two_phase", LRCNNStrategy])
@pytest.mark.parametrize("kind", NO_MAPS)
def test_a_strategy_trains_what_takes_no_maps(kind: str, strategy: Any) -> None:
    """Lightning's own example of a GAN ended with an error, where all of it would have run plainly."""
    make, data, parts = NO_MAPS[kind]
    torch.manual_seed(0)
    net = make()
    plain, _ = fit(net, data, "auto")
    options = {"modules": ["net"], "memory_budget": None}
    given = strategy if isinstance(strategy, str) else strategy(**options)
    results: list[Any] = []
    (warning,) = said(lambda: results.append(fit(net, data, given)))
    ours, trainer = results[0]
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert difference(mine.detach(), theirs.detach()) < 1e-9
    assert list(trainer.strategy.plans) == parts
    assert warning.startswith(f"row-wise module 'net' ({type(net).__name__}) cannot run row by row")
    assert "no input has a spatial axis: the shapes are [[4, " in warning
    batch = data[:4].double() if data.is_floating_point() else data[:4]
    peak = format_size(measure_fake(net.double(), batch).peak_bytes)
    if parts:
        assert f"Its parts do, each by itself: {', '.join(parts)}. What is left of it runs plainly" in warning
        assert f"all of it plainly takes {peak} of activation memory" in warning
    else:
        assert f"It runs plainly, which takes {peak} of activation memory for this input" in warning


def test_a_strategy_may_be_strict() -> None:
    with pytest.raises(InputError, match=r"'net' \(Wave\) cannot run row by row: no input has a spatial axis"):
        fit(Wave(), torch.randn(8, 801), LRCNNStrategy(on_unsupported="error"))


def test_an_axis_that_one_of_the_modules_does_not_have() -> None:
    net = nn.Sequential(nn.Conv1d(24, 4, 3), nn.ReLU()).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), axis=3, on_unsupported="warn")
    (warning,) = said(lambda: agree(net, ours, IMAGES[0]))
    assert "axis=3 is no spatial axis of an input of shape [3, 24, 20]" in warning


# ---------------------------------------------------------------------------------------------------------- parts


class Block(nn.Module):
    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.branches = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), branches

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.branches and y.mean() > 100:
            y = -y
        return torch.relu(y)


class Opaque(nn.Conv2d):
    """Has no parts, and looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.max() > -1e9 else -y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.3))
        self.one, self.two, self.three = Block(False), Block(True), Opaque(4, 2, 3)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(self.stem(x)))
        scale = 2 if y.mean() > 100 else 1
        return self.head(scale * self.three(y).mean((2, 3)))


def test_one_warning_for_a_module_and_its_parts() -> None:
    torch.manual_seed(0)
    net = Net().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported="warn")
    (warning,) = said(lambda: agree(net, ours, IMAGES))
    assert served(ours) == {"stem": 3, "one": 3, "two.conv": 3}
    lines = [kind.forward.__code__.co_firstlineno + 2 for kind in (Block, Opaque)]
    assert warning == (
        "row-wise module Net cannot run row by row as a whole: `if self.branches and y.mean() > 100:` at "
        f"test_fallback.py:{lines[0]} depends on the values of a tensor. Its parts do, each by itself: stem, one, "
        "two.conv. three (Opaque) cannot either: `return y if y.max() > -1e9 else -y` at "
        f"test_fallback.py:{lines[1]} depends on the values of a tensor. What is left of it runs plainly "
        "(on_unsupported='error' raises an error instead)"
    )
    assert not said(lambda: agree(net, ours, IMAGES, seed=1)), "once"
    assert not said(lambda: agree(net.eval(), ours.eval(), IMAGES)), "also in evaluation"
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not said(lambda other=other: agree(net, other, IMAGES[:1]))
        assert other.stem.forward.module is other.stem
    lrcnn_lightning.restore(ours)
    assert not any("forward" in vars(module) for module in ours.modules())


class InEvaluation(Block):
    """Looks at values in evaluation alone, as networks do that sort out what they have detected."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return -y if not self.training and y.mean() > 100 else y


@pytest.mark.filterwarnings("ignore:.*cannot run row by row")
def test_evaluation_does_not_decide_for_training() -> None:
    """A check of the validation comes before training."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), InEvaluation(False)).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported="warn")
    agree(net.eval(), ours.eval(), IMAGES)
    assert served(ours) == {"0": 3, "1.conv": 3, "1.norm": 3} or served(ours) == {"0": 3, "1.conv": 3}
    before = {name: part.forward.plan for name, part in ours.named_modules() if name in served(ours)}
    agree(net.train(), ours.train(), IMAGES)
    assert served(ours)[""] == 3
    assert {name: part.forward.plan for name, part in ours.named_modules() if name in before} == before


@pytest.mark.filterwarnings("ignore:.*cannot run row by row")
def test_the_parts_of_a_module_that_runs_plainly_run_plainly_in_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), InEvaluation(False)).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), on_unsupported="warn")
    agree(net.eval(), ours.eval(), IMAGES)
    assert ours[0].forward.plan.mode == "plain"
    ours[0].forward.plan = None
    agree(net.train(), ours.train(), IMAGES)
    assert ours.forward.plan.mode == "plain" and ours[0].forward.plan is None


@pytest.mark.filterwarnings("ignore:.*cannot run row by row")
def test_plans_of_parts_are_given_back() -> None:
    _, trainer = fit(Generator(), torch.randn(8, 10), "lrcnn_two_phase")
    plans = {name: plan.to_dict() for name, plan in trainer.strategy.plans.items()}
    assert list(plans) == ["net.net"]
    _, again = fit(Generator(), torch.randn(8, 10), LRCNNStrategy(plan=plans))
    assert again.strategy.plans["net.net"].to_dict() == plans["net.net"]


# --------------------------------------------------------------------------------------------------- the user's errors


class Checks(Block):
    """Looks at values and raises an error of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 50:
            raise ValueError(f"too large: {x.max().item():.0f}")
        return super().forward(x)


def test_an_error_of_the_modules_own_is_the_one_that_plain_pytorch_raises() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Checks(False)).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported="warn")

    def fails() -> None:
        with pytest.raises(ValueError, match=r"^too large: \d+$") as raised:
            ours(torch.full_like(IMAGES, 60))
        assert raised.value.__context__ is None

    assert not said(fails), "nothing is known of the module yet"
    assert len(said(lambda: agree(net, ours, IMAGES))) == 1
    assert not said(fails)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(4, 8), nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.conv(x) + self.table(index)[:, :, None, None]


@pytest.mark.parametrize("on_unsupported", ["warn", "error"])
def test_an_error_that_only_the_values_tell_of(on_unsupported: str) -> None:
    net = Looks().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported=on_unsupported)

    def fails() -> None:
        with pytest.raises(IndexError, match="index out of range"):
            ours(IMAGES, torch.tensor([0, 9]))

    assert not said(fails)
    assert not said(lambda: agree(net, ours, IMAGES, torch.tensor([0, 3])))
    assert list(served(ours)) == [""]


@pytest.mark.parametrize("on_unsupported", ["warn", "error"])
def test_a_hook_that_rows_cannot_follow(on_unsupported: Any) -> None:
    """What it returns is known when it runs. Plainly everything goes on with another shape."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    net[0].register_forward_hook(lambda module, args, result: result[:, :, 1:])
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported=on_unsupported)
    if on_unsupported == "warn":
        (warning,) = said(lambda: agree(net, ours, IMAGES))
        assert "a hook of '0' returns something of another shape" in warning and "please report" not in warning
    else:
        with pytest.raises(CaptureError, match="Sequential cannot run row by row: a hook of '0' returns something"):
            ours(IMAGES)
        assert ours[1].num_batches_tracked == 0


class Exhausts(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(x) if x.mean() > 0 else x


def test_out_of_memory_is_raised_as_it_is_and_the_user_knows_why() -> None:
    ours = lrcnn_lightning.rowwise(Exhausts(3, 4, 3).double(), **ROWS, on_unsupported="warn")

    def fails() -> None:
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 20.00 GiB$"):
            ours(IMAGES)

    assert len(said(fails)) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_in_a_capture_is_raised_as_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(error)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("lrcnn_lightning.graph.recorder.make_fx", fails)
    with pytest.raises(type(error)) as raised:
        lrcnn_lightning.rowwise(nn.Conv2d(3, 4, 3).double(), **ROWS, on_unsupported="warn")(IMAGES)
    assert raised.value is error


# -------------------------------------------------------------------------------------------------- faults of our own

PLACES = {
    "trace": "lrcnn_lightning.graph.recorder.make_fx",
    "lowering": "lrcnn_lightning.forward.lower",
    "planning": "lrcnn_lightning.forward.choose_plan",
    "execution": "lrcnn_lightning.engine.execute.run_segment",
}
FAULTS = ["KeyError('key')", "AssertionError()", "RecursionError('too deep')", "IndexError('index')", "TypeError('f')"]


def failing(fault: str) -> Callable[..., Any]:
    """A function of the package that raises an error."""
    names: dict[str, Any] = {}
    exec(compile(f"def fails(*args, **kwargs): raise {fault}", lrcnn_lightning.__file__, "exec"), names)
    function: Callable[..., Any] = names["fails"]
    return function


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_our_own_does_not_end_a_training(
    place: str, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU()).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported="warn")
    strict = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS)
    monkeypatch.setattr(PLACES[place], failing(fault))
    with caplog.at_level(logging.DEBUG, logger="lrcnn_lightning"):
        (warning,) = said(lambda: agree(net, ours, IMAGES))
    kind = fault.partition("(")[0]
    assert kind in warning and "please report it" in warning
    assert any("Traceback" in record.exc_text for record in caplog.records if record.exc_text)
    assert len(said(lambda: agree(net, ours, IMAGES, seed=1))) == (place == "execution"), (
        "its part, which fails as well"
    )
    assert not said(lambda: agree(net, ours, IMAGES, seed=2))
    with pytest.raises(InternalError if place != "execution" else eval(kind)) as raised:
        strict(IMAGES)
    assert place == "execution" or "please report it" in str(raised.value)
    assert strict[1].num_batches_tracked == 0


def test_a_fault_in_a_later_call_that_has_changed_something_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be taken back: of running statistics there are copies in the first call alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **ROWS, on_unsupported="warn")
    agree(net, ours, IMAGES)

    monkeypatch.setattr("lrcnn_lightning.engine.execute.run_segment", failing("KeyError('key')"))
    with pytest.raises(KeyError):
        ours(IMAGES)
    evaluated = lrcnn_lightning.rowwise(copy.deepcopy(net).eval(), **ROWS, on_unsupported="warn")
    with pytest.warns(UserWarning, match="please report it"):
        assert difference(evaluated(IMAGES).detach(), net.eval()(IMAGES).detach()) < 1e-9


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "usable_bytes", lambda device: 1000)


@pytest.mark.usefixtures("little")
def test_nothing_fits_what_the_device_has_free() -> None:
    """Nobody has asked for a limit: the plan of least memory is tried."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net))
    (warning,) = said(lambda: agree(net, ours, IMAGES), "no plan fits")
    plan = ours.forward.plan
    assert plan.peak_bytes < plan.plain_peak_bytes
    assert "no plan fits the 1000 B that can be used: the one of least memory is used, with an activation" in warning
    assert f"peak of {format_size(plan.peak_bytes)} predicted" in warning
    images = IMAGES.float().repeat(2, 1, 1, 1)
    _, trainer = fit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), images, "lrcnn")
    assert trainer.strategy.plans["net"].mode != "plain"


@pytest.mark.parametrize("on_unsupported", ["warn", "error"])
def test_a_limit_that_was_asked_for_is_an_error(on_unsupported: Any) -> None:
    ours = lrcnn_lightning.rowwise(nn.Conv2d(3, 8, 3).double(), memory_budget="1KiB", on_unsupported=on_unsupported)
    with pytest.raises(PlanError, match=r"no plan fits memory_budget=1.00 KiB") as raised:
        ours(IMAGES)
    assert isinstance(raised.value, BudgetError)


def test_fewer_rows_than_were_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), mode="overlap", rows=40, on_unsupported="warn")
    (warning,) = said(lambda: agree(net, ours, IMAGES), "rows=40")
    assert "rows=40 is more than the 24 rows of this input" in warning
    assert 1 < ours.forward.plan.rows <= 24


# -------------------------------------------------------------------------------------------------------- lazy layers


def lazy() -> nn.Sequential:
    return nn.Sequential(
        nn.LazyConv2d(6, 3, padding=1), nn.LazyBatchNorm2d(), nn.Dropout(0.3), nn.ReLU(), nn.LazyConv2d(3, 1)
    )


@pytest.mark.parametrize("on_unsupported", ["warn", "error"])
def test_lazy_layers_are_initialised_by_the_first_call(on_unsupported: Any) -> None:
    """PyTorch's error on shapes of uninitialised parameters came out."""
    plain, ours = lazy(), lrcnn_lightning.rowwise(lazy(), **ROWS, on_unsupported=on_unsupported)
    images = IMAGES.float()
    for net in (plain, ours):
        torch.manual_seed(0)
        net(images)
    assert not served(ours)
    for net in (plain, ours):
        net.double()
    agree(plain, ours, IMAGES)
    assert served(ours) == {"": 3}


def test_a_plan_for_lazy_layers() -> None:
    with pytest.raises(CaptureError, match=r"Sequential: its lazy layers have no shapes yet \(0.weight, 0.bias, "):
        lrcnn_lightning.plan(lazy(), IMAGES.float(), **ROWS)


# ------------------------------------------------------------------------------------------------------------ reasons


def branches(y: Tensor) -> Tensor:
    while y.max() > 100:
        y = y / 2
    return y


LINE = r"at test_fallback.py:\d+"
REASONS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "branch": (branches, rf"`while y.max\(\) > 100:` {LINE} depends on the values of a tensor"),
    "number": (lambda y: y * int(y.sum().item()), f"`.*item.*` {LINE} depends on the values of a tensor"),
    "array": (lambda y: torch.from_numpy(y.detach().numpy()), f"cannot run `.*numpy.*` {LINE} without the values"),
    "text": (lambda y: (f"{y.mean():.3f}", y)[1], f"PyTorch cannot run `.*` {LINE} without the values of tensors"),
    "shape": (lambda y: y[y > 0], r"the shape of 'index' depends on data"),
    "transform": (lambda y: torch.vmap(lambda image: image.sum())(y), "a transform of torch.func"),
}


class Does(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3), [what]

    def forward(self, x: Tensor) -> Any:
        return self.what[0](self.conv(x))


@pytest.mark.parametrize("kind", REASONS)
def test_a_refusal_speaks_of_the_users_code(kind: str) -> None:
    what, reason = REASONS[kind]
    with pytest.raises(CaptureError, match=reason) as raised:
        lrcnn_lightning.rowwise(Does(what).double(), **ROWS)(IMAGES)
    words = r"github|https?:|TORCH_LOGS|torch\.export\.export|__torch_function__|please report"
    assert not re.search(words, str(raised.value)), raised.value
