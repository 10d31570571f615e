"""What a run says: the paragraph at its start, its warnings, each once, and errors that are the module's own."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import lrcnn_lightning
from lrcnn_lightning import CaptureError, ConfigError, InputError, LRCNNStrategy, RowConfig
from lrcnn_lightning.config import format_size
from lrcnn_lightning.messages import needless_rows, summary
from lrcnn_lightning.monitor import measure_fake
from lrcnn_lightning.rowwise import RowwiseForward
from lrcnn_lightning.session import RowwiseSession
from tests.tasks import QUIET

IMAGES = torch.randn(2, 3, 16, 12)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 2, 3)
    )


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.body(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def data(count: int = 4, batch: int = 2, side: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(count, 3, side, side)), batch_size=batch)


def fit(strategy: Any, module: LightningModule | None = None, loader: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(strategy=strategy, **{"max_epochs": 1, **QUIET, **options})
    trainer.fit(module or Task(), loader or data())
    return trainer


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What strategies warn of, through Lightning, which says it in the first process alone."""
    return logged(monkeypatch, "rank_zero_warn")


def logged(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(f"lightning.pytorch.utilities.rank_zero.{name}", lambda text, **_: messages.append(text))
    return messages


def of(messages: list[str], words: str) -> list[str]:
    return [message for message in messages if words in message]


def said(call: Any) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------------------------ the paragraph


class Mixed(nn.Module):
    """Normalises, which has no rule, and takes a softmax along the rows, whose rule does not hold there."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.renorm(2, 1, 1.0).softmax(2)


def test_the_paragraph_says_what_runs_whole_and_why() -> None:
    module = nn.Sequential(network(), *(Mixed() for _ in range(5)))
    plan = lrcnn_lightning.plan(module, torch.empty(1, 3, 64, 64, device="meta"), mode="two_phase", rows=2)
    text = summary("net", module, plan)
    assert "aten.renorm.default at net.1, net.2, net.3 and 2 more (7.66 KiB; it has no row rule)" in text
    assert (
        "aten.softmax.int at net.1, net.2, net.3 and 2 more (7.66 KiB; its row rule does not hold for what arrives)"
        in text
    )


def test_the_paragraph_comes_at_the_first_step_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = logged(monkeypatch, "rank_zero_info")
    module = Task()
    trainer = fit("lrcnn_two_phase", module, max_epochs=2)
    assert len(of(messages, "row-wise training")) == 1
    trainer.validate(module, data(), verbose=False)
    assert len(of(messages, "row-wise training")) == 2
    assert "body (Sequential) without gradients: two_phase" in messages[-1]


class InParts(Task):
    """Calls the layers of its network, and another network from the second epoch on."""

    later = False

    def __init__(self) -> None:
        super().__init__()
        self.other = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        maps = batch[0]
        for layer in self.body:
            maps = layer(maps)
        loss = maps.square().mean()
        return loss + self.other(batch[0]).mean() if self.later and self.current_epoch else loss


def test_a_module_whose_forward_is_never_called(warned: list[str]) -> None:
    """Everything ran plainly, and the log said nothing at all."""
    fit("lrcnn_two_phase", InParts(), max_epochs=2)
    (warning,) = of(warned, "has not called")
    assert warning == (
        "the first step has not called body, other, so nothing ran row by row: a module does where it is called "
        "itself, as in `self.body(x)`, and not where other methods of it or its parts are. Name in `modules` what the "
        "step calls, for example modules=['body.0', 'body.4', 'other.0']"
    )
    by_layers = fit(LRCNNStrategy(mode="two_phase", modules=["body.0", "body.4"]), InParts())
    assert sorted(by_layers.strategy.plans) == ["body.0", "body.4"] and len(of(warned, "has not called")) == 1


def test_the_paragraph_of_a_module_that_is_called_later(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = logged(monkeypatch, "rank_zero_info")
    module = InParts()
    module.later = True
    fit("lrcnn_two_phase", module, max_epochs=3)
    (paragraph,) = of(messages, "row-wise training")
    assert "other (Sequential): two_phase" in paragraph


class Talking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, images: Tensor) -> Tensor:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        result: Tensor = self.body(images)
        return result


def test_what_a_forward_prints_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """It was swallowed, with whatever other threads wrote while a module was captured."""
    lrcnn_lightning.rowwise(Talking(), mode="two_phase", rows=2)(IMAGES)
    output = capfd.readouterr()
    assert "to stdout" in output.out and "to stderr" in output.err


# ------------------------------------------------------------------------------------------------ hooks


def test_a_hook_that_changes_a_result_changes_it_from_the_next_call_on() -> None:
    """A graph was used again after a hook had come or gone; so was it after pruning, which is a hook."""
    net = lrcnn_lightning.rowwise(network().eval(), mode="two_phase", rows=2)
    plain = copy.deepcopy(lrcnn_lightning.restore(copy.deepcopy(net)))
    assert torch.allclose(net(IMAGES), plain(IMAGES), atol=1e-6)
    handles = [module[2].register_forward_hook(lambda m, i, output: 2 * output) for module in (net, plain)]
    assert torch.allclose(net(IMAGES), plain(IMAGES), atol=1e-6)
    for handle in handles:
        handle.remove()
    assert torch.allclose(net(IMAGES), plain(IMAGES), atol=1e-6)
    for module in (net, plain):
        prune.l1_unstructured(module[0], "weight", 0.5)
    assert torch.allclose(net(IMAGES), plain(IMAGES), atol=1e-6)


# ------------------------------------------------------------------------------------------------ outside calls


class Calls(Callback):
    """Calls the network between the steps, in one of three ways."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.row_wise: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.way == "fake":
            measure_fake(pl_module.body, IMAGES, grad=False)
        elif self.way == "row by row":
            with trainer.strategy.row_by_row():
                pl_module.body(IMAGES)
                self.row_wise.append(isinstance(pl_module.body.forward, RowwiseForward))
            assert "forward" not in vars(pl_module.body)
        else:
            pl_module.body(IMAGES)
            copy.deepcopy(pl_module.body)(IMAGES)


def test_a_call_outside_of_the_steps_is_warned_of_once(warned: list[str]) -> None:
    fit("lrcnn_two_phase", callbacks=[Calls("plainly")])
    (message,) = of(warned, "outside of the Trainer's steps")
    assert message.startswith("body was called outside")
    assert "row_by_row()" in message


@pytest.mark.parametrize("way", ["fake", "row by row"])
def test_calls_that_take_no_memory_or_rows_are_not_warned_of(way: str, warned: list[str]) -> None:
    calls = Calls(way)
    fit("lrcnn_two_phase", callbacks=[calls])
    assert not of(warned, "outside of the Trainer's steps")
    assert calls.row_wise == ([True, True] if way == "row by row" else [])


def test_a_module_that_runs_plainly_anyway_is_not_warned_of(warned: list[str]) -> None:
    trainer = fit("lrcnn", callbacks=[Calls("plainly")])
    assert trainer.strategy.plans["body"].mode == "plain"
    assert not warned


def test_the_example_input_is_warned_of(warned: list[str]) -> None:
    class WithExample(Task):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = IMAGES

        def forward(self, maps: Tensor) -> Tensor:
            return self.body(maps)

    fit("lrcnn_two_phase", WithExample(), enable_model_summary=True)
    assert len(of(warned, "for `example_input_array`")) == 1


def test_nothing_is_watched_after_the_run_nor_during_a_step(warned: list[str]) -> None:
    hooks = torch_module._global_forward_pre_hooks
    before, during = len(hooks), []

    class Looks(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            during.append(len(hooks))
            if batch_idx == 1:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, *_: Any) -> None:
            between.append(len(hooks))

    between: list[int] = []
    module = Looks()
    with pytest.raises(RuntimeError, match="stop"):
        fit("lrcnn_two_phase", module)
    assert (set(between), set(during), len(hooks)) == ({before + 1}, {before}, before)
    module.body(IMAGES)
    assert not of(warned, "outside")
    assert not module.body._forward_pre_hooks
    pickle.dumps(module.body)


def test_a_session_that_is_forgotten_is_no_longer_called(warned: list[str]) -> None:
    hooks = torch_module._global_forward_pre_hooks
    before = len(hooks)
    root = Task()
    session = RowwiseSession(root, RowConfig())
    session.outside.start()
    assert len(hooks) == before + 1
    del session
    gc.collect()
    assert not of(said(lambda: root.body(IMAGES)), "outside")
    assert len(hooks) == before


def test_row_by_row_outside_of_a_run() -> None:
    context = LRCNNStrategy().row_by_row()
    with pytest.raises(ConfigError, match=r"row_by_row\(\) was entered while no Trainer runs.*rowwise\(module\)"):
        context.__enter__()


# ------------------------------------------------------------------------------------------------ needless rows


def test_forced_rows_of_a_batch_that_fits_plainly_are_warned_of_once(warned: list[str]) -> None:
    trainer = fit(LRCNNStrategy(mode="overlap", rows=2), max_epochs=2)
    (message,) = of(warned, "fits without rows")
    plain = trainer.strategy.plans["body"].plain_peak_bytes
    assert f"is predicted to take {format_size(plain)}" in message
    assert "mode='overlap', rows=2 costs +" in message


@pytest.mark.parametrize("options", [{}, {"memory_budget": None}, {"mode": "overlap", "memory_budget": "1GiB"}])
def test_rows_that_nobody_forced_are_not_warned_of(options: dict[str, Any], warned: list[str]) -> None:
    fit(LRCNNStrategy(**options))
    assert not of(warned, "fits without rows")


def test_rows_that_are_needed_are_not_warned_of() -> None:
    plan = lrcnn_lightning.plan(network(), torch.empty(1, 3, 256, 256, device="meta"), mode="overlap", rows=4)
    config = RowConfig(mode="overlap", rows=4)
    assert plan.overhead > 0
    assert needless_rows(config, {"body": plan}, plan.plain_peak_bytes - 1) is None
    assert needless_rows(config, {"body": plan}, plan.plain_peak_bytes) is not None
    assert needless_rows(config, {"one": plan, "two": plan}, plan.plain_peak_bytes) is None


# ------------------------------------------------------------------------------------------------ plans not as asked


def test_more_segments_than_there_are_places_to_cut() -> None:
    net = network()
    plan = lrcnn_lightning.plan(net, torch.empty(1, 3, 64, 64, device="meta"), mode="two_phase", segments=99)
    used = sum(not segment.plain for segment in plan.segments)
    words = f"segments=99 is more than there are places to cut: {used} "
    assert 1 <= used < 99
    assert words in str(plan)
    lrcnn_lightning.rowwise(net, mode="two_phase", segments=99)
    assert len(of(said(lambda: net(IMAGES)), words)) == 1
    assert not of(said(lambda: net(IMAGES[:1])), "segments=99")
    fitting = lrcnn_lightning.plan(network(), IMAGES, mode="two_phase", segments=used)
    assert "segments" not in [note.option for note in fitting.notes]


def test_a_batch_that_is_smaller_than_its_chunks() -> None:
    net = network()
    plan = lrcnn_lightning.plan(net, IMAGES[:1], mode="two_phase", batch_chunks=2)
    assert "batch_chunks=2 is more than the batch can be divided into (it has 1): 1 is used" in str(plan)
    lrcnn_lightning.rowwise(net, mode="two_phase", batch_chunks=2)
    assert len(of(said(lambda: net(IMAGES[:1])), "batch_chunks=2 is more than")) == 1
    assert not of(said(lambda: net(IMAGES[:1, :, 1:])), "batch_chunks")


def test_the_short_batch_at_the_end_is_nothing_to_warn_of(warned: list[str]) -> None:
    fit(LRCNNStrategy(mode="two_phase", batch_chunks=2), loader=data(count=3, batch=2), num_sanity_val_steps=0)
    assert not of(warned, "batch_chunks=2 is more")


def test_samples_that_cannot_be_divided() -> None:
    class Across(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps + maps.flip(0)

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Across())
    plan = lrcnn_lightning.plan(module, IMAGES, mode="two_phase", batch_chunks=2)
    assert plan.chunks == 1
    assert "more than the batch can be divided into (an operation mixes its samples): 1 is used" in str(plan)
    more, less = plan.peak_bytes / plan.plain_peak_bytes, plan.plain_peak_bytes / plan.peak_bytes
    assert (f"({more:.1f} times more)" if more > 1 else f"({less:.1f} times less)") in str(plan)


def test_more_work_than_is_allowed_is_warned_of_with_figures(warned: list[str]) -> None:
    trainer = fit(LRCNNStrategy(mode="overlap", rows=4, max_overhead=0.1), max_epochs=2)
    plan = trainer.strategy.plans["body"]
    (message,) = of(warned, "max_overhead=0.1;")
    assert message.startswith("row-wise module 'body' (Sequential): no plan was found whose extra work is within")
    assert f"{100 * plan.overhead:+.0f} % predicted" in message
    assert f"plain PyTorch {format_size(plan.plain_peak_bytes)}" in message
    assert "too small for rows to pay" in message and "max_overhead=0.1;" in message  # of maps of 16 x 16


def test_what_helps_against_more_work_than_is_allowed() -> None:
    """The advice once was max_overhead=170 for maps of a few kilobytes."""
    large = torch.empty(2, 3, 256, 256, device="meta")
    options: dict[str, Any] = {"mode": "overlap", "rows": 16}
    (note,) = lrcnn_lightning.plan(network(), large, max_overhead=0.01, **options).notes
    assert "leave out mode='overlap' or rows=16" in note.text and "too small" not in note.text
    advised = float(note.text.rpartition("max_overhead=")[2])
    again = lrcnn_lightning.plan(network(), large, max_overhead=advised, **options)
    assert "max_overhead" not in [note.option for note in again.notes]


@pytest.mark.parametrize("options", [{"max_overhead": 1e9}, {"memory_budget": "1GiB"}])
def test_work_that_is_allowed_is_not_warned_of(options: dict[str, Any]) -> None:
    notes = lrcnn_lightning.plan(network(), IMAGES, mode="overlap", rows=4, **options).notes
    assert "max_overhead" not in [note.option for note in notes]


def test_rows_that_save_nothing_are_warned_of() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))  # its one map is its result
    plan = lrcnn_lightning.plan(net, IMAGES, mode="overlap", rows=4, max_overhead=1e9)
    assert plan.peak_bytes >= plan.plain_peak_bytes
    assert f"rows save no memory here: activation peak {format_size(plan.peak_bytes)} predicted" in str(plan)
    lrcnn_lightning.rowwise(net, mode="overlap", rows=4, max_overhead=1e9)
    assert len(of(said(lambda: [net(IMAGES), net(IMAGES[:1])]), "rows save no memory here")) == 1
    large = torch.empty(1, 3, 512, 512, device="meta")
    saving = lrcnn_lightning.plan(network(), large, mode="two_phase", max_overhead=1e9)
    assert saving.peak_bytes < saving.plain_peak_bytes and not saving.notes


# ------------------------------------------------------------------------------------------------ the module's errors

WRONG_INPUTS = {
    "too small": torch.randn(1, 3, 8, 8),
    "channels": torch.randn(1, 5, 32, 32),
    "dtype": torch.randn(1, 3, 32, 32, dtype=torch.float64),
    "integers": torch.ones(1, 3, 32, 32, dtype=torch.int64),
    "dimensions": torch.randn(3),
    "one value a channel": torch.randn(1, 3, 1, 1),
}


@pytest.mark.parametrize("options", [{"mode": "two_phase"}, {"on_unsupported": "warn"}], ids=str)
@pytest.mark.parametrize("given", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_an_input_that_the_module_does_not_take_gets_its_own_error(given: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r".") as plain:
        network()(given)
    net = lrcnn_lightning.rowwise(network(), **options)
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))) as ours:
        net(given)
    assert type(ours.value) is type(plain.value)
    assert ours.value.__context__ is None
    assert net(IMAGES.repeat(1, 1, 2, 2)).shape[:2] == (2, 2), "the next call runs row-wise"
    assert net.forward.plan is not None
    with pytest.raises(InputError, match=r"^row-wise module Sequential does not take this input.*plainly: \w+Error: "):
        lrcnn_lightning.plan(network(), given)


def test_its_own_error_under_inference_mode_and_on_the_meta_device() -> None:
    given = WRONG_INPUTS["channels"]
    net = lrcnn_lightning.rowwise(network(), mode="two_phase")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="to have 3 channels, but got 5 channels instead"):
        net(given.clone())
    with torch.device("meta"), pytest.raises(InputError, match="but got 5 channels"):
        lrcnn_lightning.plan(network(), torch.empty(given.shape))
    with torch.device("meta"):
        assert lrcnn_lightning.plan(network(), torch.empty(1, 3, 64, 64), mode="overlap", rows=2).rows == 2


def test_in_a_strategy_the_parts_of_a_module_are_not_tried_one_by_one(warned: list[str]) -> None:
    strategy = LRCNNStrategy()
    loader = DataLoader(TensorDataset(torch.randn(2, 5, 16, 16)))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5 channels instead"):
        fit(strategy, loader=loader)
    assert not warned


class NeedsValues(nn.Module):
    """Fails on tensors without data, with an error that cannot be told from one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), 0

    def forward(self, maps: Tensor) -> Tensor:
        self.calls += 1
        if type(maps).__name__ != "Tensor":
            raise RuntimeError("no data")
        return self.norm(self.conv(maps))


def test_a_module_that_fails_only_in_the_capture_runs_once() -> None:
    module = NeedsValues()
    with pytest.raises(CaptureError, match=r"NeedsValues cannot run row by row: .*`raise .*` at test_me.*: no data"):
        lrcnn_lightning.rowwise(module, mode="two_phase")(IMAGES)
    module = NeedsValues()
    with pytest.warns(UserWarning, match="runs plainly"):
        lrcnn_lightning.rowwise(module, on_unsupported="warn")(IMAGES)
    assert module.norm.num_batches_tracked == 1


@pytest.mark.parametrize("given", [(1, 3, 64, 64), [1, 3, 64, 64], torch.Size([1, 3, 64, 64])], ids=str)
def test_a_shape_where_a_tensor_is_expected(given: Any) -> None:
    with pytest.raises(InputError, match=r"Conv2d: the example has no tensor .*1, 3, 64, 64.*") as raised:
        lrcnn_lightning.plan(nn.Conv2d(3, 4, 3), given)
    advice = 'torch.empty(1, 3, 64, 64, device="meta")'
    assert advice in str(raised.value)
    assert lrcnn_lightning.plan(nn.Conv2d(3, 4, 3), eval(advice)).plain_peak_bytes > 0
    with pytest.raises(InputError, match=r"given: None.*torch\.empty\(1, 3, 512, 512"):
        lrcnn_lightning.frontier(nn.Conv2d(3, 4, 3), None)


# ------------------------------------------------------------------------------------------------ autocast


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_map_that_autocast_has_made_goes_into_the_next_module(dtype: torch.dtype) -> None:
    """Its dtype is not that of the parameters, and the capture, which runs without autocast, failed."""
    first, second = network(), nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
    plain = [copy.deepcopy(first), copy.deepcopy(second)]
    ours = [lrcnn_lightning.rowwise(module, mode="two_phase", rows=2) for module in (first, second)]
    results = []
    for one, other in (plain, ours):
        with torch.autocast("cpu", dtype=dtype):
            made = other(one(IMAGES.repeat(1, 1, 2, 2)))
        made.float().square().mean().backward()
        results.append((made, one[4].weight.grad, other[0].weight.grad))
    assert results[1][0].dtype is dtype
    assert ours[1].forward.plan.mode == "two_phase"
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert (mine - theirs).abs().max() <= 0.05 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_two_networks_one_after_the_other_in_mixed_precision() -> None:
    class Two(Task):
        def __init__(self) -> None:
            super().__init__()
            self.after = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.after(self.body(batch[0])).square().mean()

    trainer = fit("lrcnn_two_phase", Two(), loader=data(side=32), precision="bf16-mixed")
    assert {name: plan.mode for name, plan in trainer.strategy.plans.items()} == {
        "body": "two_phase",
        "after": "two_phase",
    }


@pytest.mark.filterwarnings("ignore")
def test_maps_of_autocast_and_of_the_batch_go_into_one_module() -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, made: Tensor, given: Tensor, factor: Tensor) -> Tensor:
            return self.norm(self.conv(torch.cat([made, given], 1))) * factor

    torch.manual_seed(0)
    module = Joins()
    plain = copy.deepcopy(module)
    lrcnn_lightning.rowwise(module, mode="two_phase", rows=4)
    made, factor = torch.randn(2, 2, 16, 12), torch.tensor(0.5)
    results = []
    for each in (plain, module):
        source = made.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = each(source.bfloat16(), IMAGES, factor)
        output.float().sigmoid().square().sum().backward()  # a sum of squares behind BatchNorm has no gradient
        results.append((output, source.grad, each.conv.weight.grad, each.norm.running_var))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine.dtype is theirs.dtype
        assert (mine - theirs).abs().max() <= 0.05 * theirs.abs().max()
