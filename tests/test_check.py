"""``lrcnn_lightning.check``: what it compares, what it finds, what it says, and that it leaves everything as it was."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import lrcnn_lightning
from lrcnn_lightning import CheckReport, ConfigError, InputError
from lrcnn_lightning.checking import baseline
from lrcnn_lightning.checking.check import examine
from lrcnn_lightning.checking.comparison import Distance, compare
from lrcnn_lightning.checking.subject import twin
from lrcnn_lightning.rules import Tile
from lrcnn_lightning.rules.convolution import Convolution

ONE: dict[str, Any] = {"mode": "two_phase", "rows": 3}
"""One run, so that a test takes half as long."""


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 12), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution, normalisation, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.relu(self.n(self.a(x))))


# ------------------------------------------------------------------------------------------------ what is exact


class Dropping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3)


class Named(Net):
    """A dict, with a number in it."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = super().forward(x)
        return {"logits": y, "pyramid": [y, F.avg_pool2d(y, 2)], "height": y.shape[2]}


@dataclass
class Detection:
    boxes: Tensor
    scores: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Detection


class Nested(Net):
    def forward(self, x: Tensor) -> Pair:
        y = super().forward(x)
        return Pair(y, Detection(y.tanh()))


class Keeps(Net):
    """An attribute that every step sets, and a buffer that the next step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.feature: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.feature = y = super().forward(x)
        with torch.no_grad():
            self.seen.lerp_(y.mean((0, 2, 3)), 0.5)
        return y - self.seen[:, None, None]


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)
        self.n.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [Net, Dropping, Named, Nested, Keeps, Frozen])
def test_exact(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    report = examine(kind(), image().requires_grad_())
    assert report.exact and report.by_rows, str(report)
    assert [run.name for run in report.runs] == ["two_phase", "overlap"]
    assert [run.plan.mode for run in report.runs if run.plan] == ["two_phase", "overlap"]
    assert (report.dtype, report.precision, report.notices) == ("float64", "float64", ())
    assert all(max(item.error, item.largest) < 1e-12 for item in report.comparisons)
    names = {item.what for item in report.comparisons}
    wanted = {f"gradient {name}" for name, p in kind().named_parameters() if p.requires_grad}
    assert wanted | {"input gradient x", "loss", "buffer n.running_var", "random numbers PyTorch, cpu"} <= names
    assert ("gradient a.weight" in names) == (kind is not Frozen)


def test_results_are_named_by_where_they_are() -> None:
    def outputs(kind: type[nn.Module]) -> set[str]:
        return {item.name for item in examine(kind(), image(), **ONE).comparisons if item.kind == "output"}

    assert outputs(Named) == {"output['logits']", "output['pyramid'][0]", "output['pyramid'][1]", "output['height']"}
    assert outputs(Nested) == {"output.first", "output.second.boxes", "output.second.scores"}


def test_a_gradient_that_is_zero_but_for_rounding_is_held_against_the_others() -> None:
    """The bias before a BatchNorm has no gradient, and what rounding makes of it has no digits."""
    report = examine(Net(), image(), **ONE)
    bias = next(item for item in report.comparisons if item.name == "a.bias")
    assert bias.exact and "zero but for rounding" in bias.detail and bias.error < 1e-14


def test_options_choose_what_is_run() -> None:
    assert [run.name for run in examine(Net(), image(), rows=2).runs] == ["two_phase", "overlap"]
    (run,) = examine(Net(), image(), mode="overlap", rows=2, segments=2, batch_chunks=1).runs
    assert run.plan is not None and (run.plan.mode, run.plan.rows, run.plan.chunks) == ("overlap", 2, 1)
    plan = lrcnn_lightning.plan(Net(), image(), mode="overlap", rows=3)
    (run,) = examine(Net(), image(), plan=plan).runs
    assert run.plan is not None and (run.name, run.plan.mode, run.plan.rows) == ("plan", "overlap", 3)


def test_arguments_by_name_and_data_for_tensors_without() -> None:
    class Two(Net):
        def forward(self, x: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale + self.b.bias[index].mean()

    x, index = torch.empty(1, 3, 12, 9, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    report = examine(Two(), {"x": x, "index": index, "scale": 2.0}, **ONE)
    assert report.exact and report.example == "x: 1 x 3 x 12 x 9 float32, index: 5 int64", str(report)
    assert examine(Two(), (image(), torch.zeros(3, dtype=torch.long)), **ONE).exact


def test_without_gradients_the_rest_is_compared() -> None:
    report = examine(Net().requires_grad_(False), image(), **ONE)
    assert report.exact and report.notices == ("nothing requires a gradient, so there is none to compare",)
    assert {item.kind for item in report.comparisons} == {"random numbers", "form", "output", "loss", "buffer"}


def test_a_loss_that_is_given() -> None:
    losses = []

    def loss(output: Tensor) -> Tensor:
        losses.append(F.cross_entropy(output, torch.zeros(output.shape[0], *output.shape[2:], dtype=torch.long)))
        return losses[-1]

    report = examine(Net(), image(), loss, **ONE)
    assert report.exact and report.loss == "as given"
    assert len(losses) == 2 * 5 and losses[0].dtype is torch.float64  # plain, repeated, rounded twice, by rows


# ------------------------------------------------------------------------------------------------ what is not


class Cheats(Net):
    """Does something else when it is captured, as a wrong graph would."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(4))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        captured = isinstance(x, FakeTensor)
        how = self.how if captured else ""
        y = self.n(self.a(x))
        bias = self.b.bias.detach() if how == "gradient" else self.b.bias
        if self.how == "extra gradient" and not captured:
            bias = bias.detach()
        y = F.conv2d(torch.relu(y), self.b.weight, bias, padding=1) - self.mean[:, None, None]
        if how != "buffer":
            with torch.no_grad():
                self.mean.lerp_(y.mean((0, 2, 3)), 0.5)
        if how != "attribute":
            self.state = y.detach().amax()
        if how == "output":
            return y * (1 + 1e-8)
        if how == "backward":
            return y + 1e-8 * (y - y.detach())
        if how == "shape":
            return y[:, :3]
        if how == "dtype":
            return y.float()
        return y.detach() if how == "form" else y


CHEATS = {
    "output": ("output", "off", 1),
    "backward": ("gradient", "off", 1),
    "gradient": ("gradient b.bias", "missing", 1),
    "extra gradient": ("gradient b.bias", "extra", 1),
    "buffer": ("buffer mean", "off", 1),
    "attribute": ("attribute state", "missing", 1),
    "shape": ("output", "other shape", 1),
    "dtype": ("output", "other dtype", 1),
    "form": ("gradient", "missing", 1),
}


@pytest.mark.parametrize("how", CHEATS)
def test_wrong(how: str) -> None:
    torch.manual_seed(0)
    report = examine(Cheats(how), image(), **ONE)
    worst = report.worst
    assert worst is not None and not report.exact
    what, verdict, step = CHEATS[how]
    assert worst.what.startswith(what) and (worst.verdict, worst.step) == (verdict, step), str(report)
    right = {"output": 1e-8, "backward": 1e-8}.get(how)
    if right is not None:
        assert worst.error == pytest.approx(right, rel=1e-3)
    if how == "backward":
        assert {item.kind for item in report.wrong} == {"gradient"}
    if how == "buffer":  # which the second step reads
        assert {item.what: item.step for item in report.wrong}["output"] == 2
    if how == "form":
        assert any(item.what == "form requires_grad of output" for item in report.wrong)


def test_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows but the first are off."""
    prepare = Convolution.prepare

    def wrong(self: Convolution, tile: Tile) -> Callable[..., Any]:
        call, factor = prepare(self, tile), 1 + 1e-6 * (tile.rows.lo > 0)
        return lambda args, kwargs: call(args, kwargs) * factor

    monkeypatch.setattr(Convolution, "prepare", wrong)
    report = examine(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), image(), **ONE)
    assert report.worst is not None and report.worst.what == "output" and report.worst.verdict == "off"
    assert 1e-7 < report.worst.error < 1e-5
    assert "NOT EXACT" in str(report).splitlines()[0]


COUNT = [0]


class Counted(Net):
    def forward(self, x: Tensor) -> Tensor:
        COUNT[0] += 1
        return super().forward(x) * COUNT[0]


def test_a_global_variable() -> None:
    report = examine(Counted(), image(), **ONE)
    assert report.worst is not None and (report.worst.what, report.worst.verdict) == ("output", "off")
    assert any("plain runs do not agree with each other (output, loss" in text for text in report.notices)


class Chaotic(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(super().forward(x))
        for _ in range(70):
            y = 4 * y * (1 - y)
        return y


def test_where_rounding_decides_nothing_is_said() -> None:
    report = examine(Chaotic(), image(), **ONE)
    output = next(item for item in report.comparisons if item.what == "output")
    assert output.verdict == "not compared" and "rounding alone changes it by" in output.detail
    assert not report.exact


def test_an_error_by_rows_alone() -> None:
    report = examine(Net(), image(2, 3, 64, 64), memory_budget="2KiB", mode="two_phase")
    assert not report.exact and not report.comparisons
    assert report.runs[0].error is not None and report.runs[0].error.startswith("BudgetError: row-wise module Net: no")
    assert str(report).startswith("lrcnn_lightning.check of Net in training mode: FAILS (two_phase)")
    assert "run        two_phase: raises BudgetError" in str(report)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.mean() > 0 else -y


def test_what_cannot_run_by_rows_says_why() -> None:
    report = examine(Branches(), image(), **ONE)
    assert report.exact and report.by_rows
    assert "run        two_phase: ran by its parts: a, b" in str(report)
    assert "note       two_phase: row-wise module Branches cannot run row by row as a whole: " in str(report)
    report = examine(nn.Linear(12, 4), image(), **ONE)
    assert report.exact and report.by_rows
    report = examine(nn.Linear(12, 4), torch.randn(8, 12), **ONE)
    assert report.exact and not report.by_rows
    assert "exact, nothing ran row by row (two_phase)" in str(report)
    report = examine(Branches(), image(), **ONE, on_unsupported="error")
    assert report.runs[0].error is not None and report.runs[0].error.startswith("CaptureError")


def test_numbers_from_python_and_numpy_are_the_same_in_every_run() -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random() + numpy.random.rand()

    report = examine(Draws(), image(), **ONE)
    assert report.exact, str(report)


# ------------------------------------------------------------------------------------------------ errors


def test_errors_of_the_module_and_of_the_loss_are_the_callers() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        examine(Net(), image(2, 4, 16, 12))
    with pytest.raises(ZeroDivisionError):
        examine(Net(), image(), lambda output: output.sum() / (1 // 0))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="unknown option 'row'"):
        examine(Net(), image(), row=3)
    with pytest.raises(ConfigError, match="rows=99 is more than the 16 rows"):
        examine(Net(), image(), rows=99, on_unsupported="error")
    with pytest.raises(ConfigError, match=r"check\(\) takes a torch\.nn\.Module, given was function"):
        examine(F.relu, image())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the example has no tensor"):
        examine(Net(), (1, 3, 64, 64))
    with pytest.raises(InputError, match="is on the meta device"):
        examine(Net().to("meta"), image())


# ------------------------------------------------------------------------------------------------ precision


class Single(Net):
    """Only takes float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class SingleInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(super().forward(x).float(), 1).to(x.dtype)


class SingleGrid(Net):
    """A grid of places in float32, of which nothing is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, x.shape[2], dtype=torch.float32)[:, None] ** 2
        return super().forward(x) * grid


def test_precision() -> None:
    report = examine(Single(), image(), **ONE)
    assert (report.dtype, report.precision, report.exact) == ("float32", "float32", True), str(report)
    assert any("float64 is not possible (RuntimeError: Input type" in text for text in report.notices)
    report = examine(SingleInside(), image(), **ONE)
    assert (report.dtype, report.precision, report.exact) == ("float64", "float32", True), str(report)
    assert "in float64, computed in float32 in part" in str(report)
    report = examine(SingleGrid(), image(), **ONE)
    assert (report.dtype, report.precision, report.exact) == ("float64", "float64", True), str(report)


def test_precision_of_a_wrong_one() -> None:
    class Wrong(Single):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 1e-4 * isinstance(x, FakeTensor))

    report = examine(Wrong(), image(), **ONE)
    assert report.worst is not None and (report.worst.what, report.worst.verdict) == ("output", "off")


def test_half_precision_is_checked_in_float64() -> None:
    report = examine(Net().to(torch.bfloat16), image().to(torch.bfloat16), **ONE)
    assert report.exact and report.dtype == report.precision == "float64", str(report)
    assert report.example == "x: 2 x 3 x 16 x 12 bfloat16"


def test_under_autocast_it_runs_in_the_types_of_autocast() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        report = examine(module, image(), **ONE)
    assert (report.dtype, report.precision) == ("float32", "bfloat16") and report.exact, str(report)


# ------------------------------------------------------------------------------------------------ the caller's own


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that a check must leave alone."""
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state.update({f"{name} grad": None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()})
    state.update({f"{name} wants": p.requires_grad for name, p in module.named_parameters()})
    for name, child in module.named_modules():
        state[f"{name} training"] = child.training
        state[f"{name} forward"] = vars(child).get("forward")
        state[f"{name} hooks"] = list(child._forward_hooks.items())
        state[f"{name} attributes"] = {k: v for k, v in vars(child).items() if isinstance(v, (int, str, list))}
    if isinstance(module, Rich):
        state["array"] = module.array.copy()
        state["state"] = str(module.state)
    state["generators"] = torch.get_rng_state(), numpy.random.get_state()[1], str(random.getstate())
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, numpy.ndarray)):
        return bool((a == b).all())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Rich(Keeps):
    """Has whatever can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.array = 0, ["begun"], numpy.zeros(2)
        self.state: Any = {"of": SimpleNamespace(calls=0, log=[])}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.array += 1
        self.state["of"].calls += 1
        self.state["of"].log.append(self.calls)
        x = F.dropout(x, 0.1)
        return super().forward(x)


def lambda_of_its_own(module: Rich) -> None:
    module.scaled = lambda y: y * module.a.bias.mean()  # type: ignore[assignment]
    module.b.register_forward_hook(lambda _m, _a, y: module.scaled(y))  # type: ignore[operator]


def lock(module: Rich) -> None:
    module.lock = threading.Lock()  # type: ignore[assignment]


PREPARED: dict[str, tuple[Callable[[Rich], object], str]] = {
    "copied": (lambda module: None, ""),
    "row-wise": (lambda module: lrcnn_lightning.rowwise(module, mode="overlap", rows=2), ""),
    "inside row-wise": (lambda module: lrcnn_lightning.rowwise(module.a, mode="overlap", rows=2), ""),
    "not copied": (lock, "it cannot be copied (TypeError"),
    "closes over its own parameters": (lambda_of_its_own, "a function inside of it holds parameters of its own"),
}


@pytest.mark.parametrize("how", PREPARED)
def test_nothing_of_the_callers_is_changed(how: str) -> None:
    torch.manual_seed(0)
    module, x = Rich(), image().requires_grad_()
    module(x).sum().backward()
    module.b.eval()
    module.n.weight.requires_grad_(False)
    module.a.register_forward_hook(lambda *_: None)
    prepare, notice = PREPARED[how]
    prepare(module)
    x_before, grad_before = x.detach().clone(), x.grad
    before = snapshot(module)
    tensors = {name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    report = examine(module, x, **ONE)
    assert report.exact, str(report)
    assert any(notice in text for text in report.notices) == bool(notice)
    after = snapshot(module)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert same(value, after[name]), name
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert tensor is tensors[name]
    assert torch.equal(x, x_before) and x.grad is grad_before


def test_a_module_that_ran_itself_is_as_it_was_after_an_error_too() -> None:
    class Fails(Rich):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("mine")

    module = Fails()
    lock(module)
    before = snapshot(module)
    with pytest.raises(KeyError, match="mine"):
        examine(module, image())
    assert all(same(value, snapshot(module)[name]) for name, value in before.items())


class SharesMemory(Net):
    """Two names of one memory: a buffer that is also in a list, and a half of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.zeros(8))
        self.register_buffer("first", self.both[:4])
        self.table = [self.both]

    def forward(self, x: Tensor) -> Tensor:
        self.table[0].add_(1)
        return super().forward(x) + self.first[:, None, None]


def test_copies_share_memory_as_the_original_does() -> None:
    module = SharesMemory()
    for wide in (False, True):
        copied: Any = twin(module, wide)
        assert copied.table[0] is copied.both
        copied.both.fill_(3)
        assert copied.first.tolist() == [3] * 4 and module.both.tolist() == [0] * 8
        assert copied.first.dtype is (torch.float64 if wide else torch.float32)


# ------------------------------------------------------------------------------------------------ smaller examples


class Flexible(nn.Module):
    """Takes images of which both sides are multiples of a number, and a mask of the same size."""

    def __init__(self, multiple: int = 1, exactly: int | None = None) -> None:
        super().__init__()
        self.a, self.multiple, self.exactly = nn.Conv2d(3, 4, 3, padding=1), multiple, exactly

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple or self.exactly not in (None, x.shape[2]):
            raise ValueError(f"not a size: {list(x.shape)}")
        return self.a(x) * mask[:, None]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (4, 32, 64)),
        ({"multiple": 32}, (4, 32, 64)),
        ({"multiple": 64}, (4, 64, 64)),
        ({"exactly": 256}, (2, 256, 384)),
        ({"exactly": 256, "multiple": 128}, (2, 256, 384)),
    ],
)
def test_an_example_that_is_too_large_is_cut(
    options: dict[str, Any], size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, height, width = size
    monkeypatch.setattr(baseline, "_LARGE", 2**20)
    x, mask = torch.empty(4, 3, 256, 384, device="meta"), torch.ones(4, 256, 384)
    report = examine(Flexible(**options), (x, mask), **ONE)
    assert report.exact, str(report)
    assert report.example == (
        f"x: {samples} x 3 x {height} x {width} float32, mask: {samples} x {height} x {width} float32"
    )
    (notice,) = report.notices
    assert notice.startswith("the example was cut: at its own size (x: 4 x 3 x 256 x 384 float32, mask")
    assert "plain PyTorch would take 24.00 MiB" in notice


def test_an_example_that_cannot_be_cut_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_LARGE", 2**20)
    x, mask = image(2, 3, 256, 384), torch.ones(2, 256, 384)
    report = examine(Flexible(exactly=256), (x, mask), **ONE)
    assert report.exact and not report.notices and report.example.startswith("x: 2 x 3 x 256 x 384")
    with pytest.raises(ValueError, match=r"not a size: \[2, 3, 256, 384\]"):
        examine(Flexible(exactly=7), (x, mask), **ONE)


def test_what_cannot_be_measured_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_LARGE", 2**24)
    report = examine(Branches(), image(1, 3, 256, 256), **ONE)
    assert report.exact and report.example == "x: 1 x 3 x 32 x 32 float32"
    assert any("plain PyTorch would take 384.00 MiB" in text for text in report.notices)


# ------------------------------------------------------------------------------------------------ the report


def test_report() -> None:
    torch.manual_seed(0)
    report = examine(Cheats("buffer"), image(), **ONE)
    lines = str(report).splitlines()
    assert lines[0] == (
        f"lrcnn_lightning.check of Cheats in training mode: NOT EXACT ({len(report.wrong)} of "
        f"{len(report.comparisons)} values)"
    )
    assert lines[1] == "  example    x: 2 x 3 x 16 x 12 float32"
    assert lines[2] == (
        "  compared   2 training steps in float64; loss: a random weighted sum of every output plus half its squares"
    )
    assert lines[3].startswith(
        f"  versions   lrcnn_lightning {lrcnn_lightning.__version__}, torch {torch.__version__}, "
    )
    assert lines[4].startswith("  run        two_phase: two_phase, 3 rows, ")
    assert lines[5:7] == ["", f"  not exact: {len(report.wrong)} of {len(report.comparisons)}, the worst first."]
    assert lines[7].split() == ["run", "step", "what", "verdict", "error", "largest", "noise"]
    assert lines[8].split()[:5] == ["two_phase", "1", "buffer", "mean", "off"]
    head = next(i for i, line in enumerate(lines) if "of the worst" in line)
    kinds = {line.split("  ")[2].strip(): line for line in lines[head + 1 :]}
    assert "2 of 3" not in str(kinds["buffers"]) and "3 of 4" in kinds["buffers"] and kinds["buffers"].endswith("mean")
    assert all(line == line.rstrip() and line.isascii() for line in lines)


def test_report_of_many() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(12)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * (1 + 1e-6 * isinstance(x, FakeTensor))

    text = str(examine(Many(), image(), **ONE))
    assert "the worst first. 20 of them, the others are in `comparisons`:" in text
    assert sum(" off " in line for line in text.splitlines()) == 20


def test_report_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    report = lrcnn_lightning.check(Named(), image())
    assert isinstance(report, CheckReport) and capsys.readouterr().out == f"{report}\n"
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["exact"] is True and data["by_rows"] is True and data["versions"]["torch"] == torch.__version__
    assert len(data["comparisons"]) == len(report.comparisons)
    assert data["comparisons"][0].keys() == vars(report.comparisons[0]).keys()
    assert [run["plan"]["mode"] for run in data["runs"]] == ["two_phase", "overlap"]
    assert data["runs"][0]["options"]["max_overhead"] == "inf"


# ------------------------------------------------------------------------------------------------ the verdict

ONES = torch.ones(4, dtype=torch.float64)
SMALL = 1e-12 * torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
NAN, INF = float("nan"), float("inf")

VERDICTS: list[tuple[Any, Any, tuple[float, float, float] | None, str]] = [
    # got, want, (noise by the norm, noise by the element, largest of the kind), verdict
    (ONES * (1 + 9e-10), ONES, (0, 0, 1), "exact"),
    (ONES * (1 + 2e-9), ONES, (0, 0, 1), "off"),
    (ONES * (1 + 2e-9), ONES, (1e-9, 1e-9, 1), "exact"),  # ill-conditioned: noise is 1e-9, too
    (ONES * (1 + 2e-8), ONES, (1e-9, 1e-9, 1), "off"),
    (ONES * (1 + 2e-9), ONES, None, "off"),
    (ONES * 1.5, ONES, (0.5, 0.5, 1), "not compared"),
    (torch.cat([ONES, ONES * 1e-3]) + 3e-10, torch.cat([ONES, ONES * 1e-3]), (0, 0, 1), "exact"),
    (torch.cat([ONES * 0, ONES * 0, ONES]) + 8e-10, torch.cat([ONES * 0, ONES * 0, ONES]), (0, 0, 1), "off"),  # norm
    (ONES + torch.tensor([1.5e-9, 0, 0, 0]), ONES, (0, 0, 1), "off"),  # element
    (-SMALL, SMALL, (1e-12, 1e-12, 1e3), "exact"),  # zero but for rounding
    (-SMALL, SMALL, (1e-12, 1e-12, 1e-3), "not compared"),
    (-SMALL, SMALL, (1e-25, 1e-25, 1e3), "off"),  # small, and it has digits
    (SMALL * 1e6, SMALL, (1e-12, 1e-12, 1e3), "off"),
    (ONES * 0, ONES * 0, (0, 0, 0), "exact"),
    (ONES * 1e-300, ONES * 0, (0, 0, 0), "off"),
    (torch.tensor([NAN, INF, 1.0]), torch.tensor([NAN, INF, 1.0]), (0, 0, 1), "exact"),
    (torch.tensor([NAN, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]), (0, 0, 1), "off"),
    (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), (0, 0, 1), "off"),
    (torch.tensor([1 + 1e-8j]).to(torch.complex128), torch.tensor([1 + 0j]).to(torch.complex128), (0, 0, 1), "off"),
    (
        torch.tensor([1 + 1e-8j]).to(torch.complex128),
        torch.tensor([1 + 1e-8j]).to(torch.complex128),
        (0, 0, 1),
        "exact",
    ),
    (torch.tensor([3]), torch.tensor([3]), (0, 0, 0), "exact"),
    (torch.tensor([3]), torch.tensor([4]), (5, 5, 0), "off"),
    (torch.tensor([True]), torch.tensor([False]), None, "off"),
    (torch.zeros(0), torch.zeros(0), (0, 0, 0), "exact"),
    (torch.zeros(2), torch.zeros(3), (0, 0, 0), "other shape"),
    (torch.zeros(2), torch.zeros(2).double(), (0, 0, 0), "other dtype"),
    (torch.zeros(2, device="meta"), torch.zeros(2), (0, 0, 0), "off"),
    (3, 3, (0, 0, 0), "exact"),
    (3, 4, (0, 0, 0), "off"),
    (3, 3.0, (0, 0, 0), "off"),
    (1.0 + 1e-15, 1.0, (0, 0, 1), "exact"),
    (1.1, 1.0, (0, 0, 1), "off"),
    (NAN, NAN, (0, 0, 1), "exact"),
    ("a", "a", (0, 0, 0), "exact"),
    (None, "a", (0, 0, 0), "off"),
]


@pytest.mark.parametrize("case", VERDICTS, ids=str)
def test_verdict(case: tuple[Any, Any, tuple[float, float, float] | None, str]) -> None:
    got, want, noise, verdict = case
    key = ("buffer", "it")
    measured = None if noise is None else Distance(*noise[:2])
    found = compare(key, {key: got}, {key: want}, measured, 0.0 if noise is None else noise[2])
    assert found.verdict == verdict, str(found)


def test_verdict_on_what_is_there_on_one_side() -> None:
    key = ("gradient", "it")
    assert compare(key, {}, {key: ONES}).verdict == "missing"
    assert compare(key, {key: ONES}, {}).verdict == "extra"


def test_verdict_in_a_narrow_type() -> None:
    key, want = ("output", "output"), torch.ones(4)
    for factor, noise, dtype, verdict in (
        (1 + 3e-7, 0.0, torch.float32, "exact"),
        (1 + 1e-6, 0.0, torch.float32, "off"),
        (1 + 5e-3, 9e-4, torch.float32, "exact"),  # less than ten times the noise
        (1 + 5e-3, 2e-3, torch.float32, "not compared"),
        (1.02, 1e-2, torch.bfloat16, "exact"),
        (1.2, 1e-1, torch.bfloat16, "exact"),
        (1.4, 1e-1, torch.bfloat16, "off"),  # more than three times the noise
        (1.4, 3.5e-1, torch.bfloat16, "not compared"),
    ):
        found = compare(key, {key: want * factor}, {key: want}, Distance(2 * noise, noise), 1.0, dtype)
        assert found.verdict == verdict, (factor, noise, dtype)
