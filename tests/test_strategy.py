"""The strategies against Lightning's own on the same seeds: nothing that a user can see may differ but the memory."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import ConfigError, LRCNNDDPStrategy, LRCNNStrategy, RowConfig
from lrcnn_lightning.config import format_size, strategy_defaults
from lrcnn_lightning.rowwise import RowwiseForward
from lrcnn_lightning.strategy import NAMES, register
from tests.tasks import (
    NAMESPACES,
    QUIET,
    ROWWISE,
    Direct,
    Manual,
    Several,
    Steps,
    Task,
    assert_same,
    assert_same_run,
    body,
    fit,
    loader,
    patched,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*is smaller than the logging interval"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> Any:
    """Plain training, once for the tests that compare with the same run."""
    return fit("auto")


# Names, classes and options


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_a_class_with_its_arguments(namespace: str, name: str) -> None:
    registry = importlib.import_module(f"{namespace}.strategies").StrategyRegistry
    kind, options = NAMES[name]
    assert registry[name]["init_params"] == options
    assert registry[name]["description"]
    strategy = registry.get(name)
    assert type(strategy) is registry[name]["strategy"]
    assert type(strategy).__name__ == kind
    assert isinstance(strategy, getattr(lrcnn_lightning, kind))
    assert isinstance(strategy, importlib.import_module(f"{namespace}.strategies").Strategy)
    assert strategy.config == RowConfig(**options, on_unsupported="warn")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_registering_again_changes_nothing(namespace: str) -> None:
    registry = importlib.import_module(f"{namespace}.strategies").StrategyRegistry
    before = dict(registry)
    register()
    importlib.reload(lrcnn_lightning)
    assert dict(registry) == before


@pytest.mark.parametrize("kind", [LRCNNStrategy, LRCNNDDPStrategy])
def test_the_options_are_those_of_the_configuration(kind: Any) -> None:
    base = next(cls for cls in kind.__mro__ if cls.__name__ == "RowwiseSteps")
    parameters = inspect.signature(base.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("self", "plan", "kwargs")}
    assert defaults == strategy_defaults()
    options = {"mode": "overlap", "rows": 2, "segments": 3, "batch_chunks": 4, "memory_budget": "2GiB"}
    options |= {"max_overhead": 0.5, "axis": 3, "modules": ["body"], "on_unsupported": "error"}
    assert kind(**options).config == RowConfig(**options)  # type: ignore[arg-type]
    for name in options:
        assert f"        {name}: " in kind.__doc__


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows must be"):
        LRCNNStrategy(rows="four")
    with pytest.raises(ConfigError, match=r"LRCNNStrategy has no option 'row' .*SingleDeviceStrategy\); did you mean"):
        LRCNNStrategy(row=4)
    with pytest.raises(ConfigError, match=r"LRCNNDDPStrategy has no option 'find_unused_parameter'.*did you mean"):
        LRCNNDDPStrategy(find_unused_parameter=True)
    for kind, given, advice in (
        (LRCNNStrategy, "two_phase", r"LRCNNStrategy\(mode='two_phase'\)"),
        (LRCNNDDPStrategy, 4, r"LRCNNDDPStrategy\(rows=4\)"),
        (LRCNNStrategy, torch.device("cpu"), r"LRCNNStrategy\(device=device\(type='cpu'\)\)"),
    ):
        with pytest.raises(ConfigError, match=rf"^{kind.__name__} takes options by name only .*write .*{advice}$"):
            kind(given)
    assert LRCNNDDPStrategy(find_unused_parameters=True, rows=2)._ddp_kwargs == {"find_unused_parameters": True}


# Training


@pytest.mark.parametrize(
    "strategy",
    ["lrcnn", "lrcnn_two_phase", "lrcnn_overlap", *ROWWISE, {"rows": 5}, {"memory_budget": None}],
    ids=str,
)
def test_training_equals_plain_training(plain: Any, strategy: Any, tmp_path: Path) -> None:
    trainer, module = fit(LRCNNStrategy(**strategy) if isinstance(strategy, dict) else strategy)
    assert_same_run(plain[0], trainer, 1e-9, tmp_path)
    assert list(trainer.strategy.plans) == ["body"]
    chosen = trainer.strategy.plans["body"]
    assert chosen.training
    # The smallest networks fit any device, so the planner leaves them alone unless it is told otherwise.
    wanted = strategy["mode"] if isinstance(strategy, dict) and "mode" in strategy else str(strategy)[6:]
    assert chosen.mode == (wanted if wanted in ("two_phase", "overlap") else chosen.mode)
    assert (chosen.mode == "plain") == (strategy == "lrcnn")
    assert patched(module) == []


@pytest.mark.parametrize("options", ROWWISE, ids=str)
@pytest.mark.parametrize("precision, tolerance", [("32-true", 2e-4), ("bf16-mixed", 0.2)])
def test_other_precisions(options: Any, precision: Any, tolerance: float, tmp_path: Path) -> None:
    short = {"precision": precision, "max_epochs": 1, "limit_train_batches": 2}
    plain, _ = fit("auto", **short)
    ours, _ = fit(LRCNNStrategy(**options), **short)
    assert_same_run(plain, ours, tolerance, tmp_path)


@pytest.mark.parametrize("task", [Several, Direct, Manual])
@pytest.mark.parametrize("options", ROWWISE, ids=str)
def test_other_modules(task: Any, options: Any, tmp_path: Path) -> None:
    plain, _ = fit("auto", task)
    ours, module = fit(LRCNNStrategy(**options), task)
    assert_same_run(plain, ours, 1e-9, tmp_path)
    # "": through self(x), in Several only when it is validated
    expected = {"Several": {"", "stem.0", "stem.1", "body", "decoder"}, "Direct": {""}, "Manual": {"", "generator"}}
    assert set(ours.strategy.plans) == expected[task.__name__]
    assert {plan.mode for plan in ours.strategy.plans.values()} == {options["mode"]}
    assert patched(module) == []


@pytest.mark.parametrize(
    "trainer_options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_accumulation_and_clipping(trainer_options: Any, tmp_path: Path) -> None:
    plain, _ = fit("auto", **trainer_options)
    ours, _ = fit(LRCNNStrategy(**ROWWISE[0]), **trainer_options)
    assert_same_run(plain, ours, 1e-9, tmp_path)


def test_only_the_named_modules_run_row_wise(tmp_path: Path) -> None:
    plain, _ = fit("auto", Several)
    ours, _ = fit(LRCNNStrategy(mode="overlap", rows=2, modules=["decoder", "stem.1"]), Several)
    assert_same_run(plain, ours, 1e-9, tmp_path)
    assert set(ours.strategy.plans) == {"decoder", "stem.1"}


@pytest.mark.parametrize("options", ROWWISE, ids=str)
def test_validate_test_and_predict(plain: Any, options: Any) -> None:
    module = copy.deepcopy(plain[1])
    before = copy.deepcopy(module.state_dict())
    results = []
    for strategy in ("auto", LRCNNStrategy(**options)):
        trainer = Trainer(strategy=strategy, precision="64-true", **QUIET)
        results.append(
            [
                trainer.validate(module, loader(), verbose=False),
                trainer.test(module, loader(), verbose=False),
                trainer.predict(module, loader()),
            ]
        )
        assert_same(before, module.state_dict(), 0, "weights")
    assert_same(results[0], results[1], 1e-9, "results")
    used = trainer.strategy.plans["body"]  # type: ignore[attr-defined]
    assert (used.mode, used.training) == (options["mode"], False)


def test_evaluation_after_training_leaves_the_training_plan() -> None:
    trainer, module = fit(LRCNNStrategy(**ROWWISE[0]))
    before = copy.deepcopy(module.state_dict())
    trainer.test(module, loader(), verbose=False)
    assert trainer.strategy.plans["body"].training
    assert_same(before, module.state_dict(), 0, "weights")


@pytest.mark.parametrize("first, second", [("auto", "lrcnn_two_phase"), ("lrcnn_overlap", "auto")])
def test_a_checkpoint_moves_between_strategies(first: str, second: str, tmp_path: Path) -> None:
    runs = []
    for before, after in (("auto", "auto"), (first, second)):
        half, _ = fit(before, max_epochs=1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        runs.append(fit(after, ckpt_path=str(tmp_path / "half.ckpt"))[0])
        assert runs[-1].global_step == 8
    assert_same_run(*runs, 1e-9, tmp_path)


# What a Trainer does around the steps


class Look(Callback):
    """Runs a function at every hook between the steps."""

    def __init__(self, look: Callable[[Any, Any], None]) -> None:
        self.look = look

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)


@pytest.mark.parametrize("task", [Task, Direct])
def test_the_module_is_patched_only_while_a_step_runs(task: Any) -> None:
    copies = []

    def look(trainer: Any, module: Any) -> None:
        assert patched(module) == []
        copies.append(copy.deepcopy(module))

    class Inside(task):  # type: ignore[misc,valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found = [child for child in self.modules() if isinstance(vars(child).get("forward"), RowwiseForward)]
            assert found
            return super().training_step(batch, batch_idx)

    fit(LRCNNStrategy(**ROWWISE[0]), Inside, callbacks=[Look(look)], max_epochs=1)
    assert copies and all(patched(made) == [] for made in copies)


def test_an_exception_in_a_step_leaves_the_module_as_it_was() -> None:
    class Failing(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise KeyError("in the step")

    seed_everything(1, verbose=False)
    module = Failing()
    module.head.forward = module.head.forward  # type: ignore[method-assign]  # a patch of the user's own stays
    trainer = Trainer(strategy="lrcnn_two_phase", max_epochs=1, **QUIET)
    with pytest.raises(KeyError, match="in the step"):
        trainer.fit(module, loader())
    assert patched(module) == ["head"]
    assert trainer.strategy.plans["body"].mode == "two_phase"  # type: ignore[attr-defined]


def test_an_out_of_memory_error_is_not_reworded() -> None:
    class Full(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.body(batch[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        fit("lrcnn_two_phase", Full)


def test_memory_is_released_after_the_run() -> None:
    kept: list[Any] = []

    class Watched(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            kept.append(weakref.ref(batch[0]))
            return super().training_step(batch, batch_idx)

    trainer, module = fit(LRCNNStrategy(**ROWWISE[0]), Watched, max_epochs=1)
    strategy = trainer.strategy
    plans, watched = strategy.plans, weakref.ref(module.body)
    assert strategy._session is None and plans["body"].peak_bytes > 0
    del trainer, module, strategy
    gc.collect()
    assert watched() is None, "a plan must not hold the module"
    assert all(reference() is None for reference in kept)
    assert plans["body"].graph.whole_nodes() == []


@pytest.mark.parametrize("kind", [LRCNNStrategy, LRCNNDDPStrategy])
def test_strategies_are_pickled_and_copied(kind: Any) -> None:
    strategy = kind(mode="two_phase", rows=4, modules=["body"])
    for made in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert type(made) is kind and made.config == strategy.config and made.plans == {}


def test_a_used_strategy_is_pickled_and_copied_without_its_plans() -> None:
    trainer, _ = fit(LRCNNStrategy(**ROWWISE[0]), max_epochs=1)
    assert trainer.strategy.plans
    for made in (pickle.loads(pickle.dumps(trainer.strategy)), copy.deepcopy(trainer.strategy)):
        assert made.config == trainer.strategy.config and made.plans == {}


def test_modules_made_in_configure_model(plain: Any) -> None:
    class Late(Steps, LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "body"):
                self.body, self.head = body(), nn.Linear(6, 3)

        forward = Task.forward

    trainer, module = fit("lrcnn_two_phase", Late)
    assert set(trainer.strategy.plans) == {"body"}
    assert set(module.state_dict()) == set(plain[1].state_dict())


@pytest.mark.parametrize("read", ["current_epoch", "global_step", "hparams", "trainer"])
def test_what_the_own_forward_reads_of_the_run(read: str, tmp_path: Path) -> None:
    """A weight by the epoch once stayed for ever what it was in the first; `self.trainer` has too much inside of it,
    and the parts run row by row instead.
    """

    class Weighted(Direct):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"weight": 2.0})

        def forward(self, images: Tensor) -> Tensor:
            known = {"hparams": lambda: self.hparams.weight, "trainer": lambda: 2.0 - self.trainer.validating}
            value = known[read]() if read in known else 1 + 0.1 * getattr(self, read)
            return super().forward(images) * value

    plain, _ = fit("auto", Weighted)
    ours, _ = fit(LRCNNStrategy(mode="two_phase", rows=4), Weighted)
    assert_same_run(plain, ours, 1e-9, tmp_path)
    names = set(ours.strategy.plans)
    # Before the first step there is less inside of it, so an evaluation may run as a whole.
    assert names - {""} == {"first", "second"} if read == "trainer" else names == {""}


def test_one_strategy_object_serves_several_runs() -> None:
    # Lightning takes a strategy that has been used to have an accelerator of its own, so the Trainer names none.
    strategy = LRCNNStrategy(**ROWWISE[0])
    _, first = fit(strategy, max_epochs=1, accelerator="auto")
    _, second = fit(strategy, max_epochs=1, accelerator="auto")
    assert_same(first.state_dict(), second.state_dict(), 0, "weights")
    with pytest.raises(ConfigError, match="lrcnn_ddp"):
        Trainer(strategy=strategy, **{**QUIET, "accelerator": "auto", "devices": 2})


# Reports and refusals


def logged(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(f"lightning.pytorch.utilities.rank_zero.{name}", lambda text, **_: messages.append(text))
    return messages


class Whole(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.flip(2).cumsum(2)


def test_the_first_step_reports_what_runs_row_wise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Partly(Task):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(Whole())

    messages = logged(monkeypatch, "rank_zero_info")
    trainer, _ = fit(LRCNNStrategy(**ROWWISE[0]), Partly)
    assert len(messages) == 1
    plan = trainer.strategy.plans["body"]
    segments = sum(not segment.plain for segment in plan.segments)
    assert f"body (Sequential): two_phase, 4 rows, {segments} segment" in messages[0]
    assert "1 batch chunk; activation peak" in messages[0]
    assert f"{format_size(plan.peak_bytes)} predicted" in messages[0]
    assert f"(plain PyTorch {format_size(plan.plain_peak_bytes)})" in messages[0]
    assert f"extra work {100 * plan.overhead:+.0f} % predicted" in messages[0]
    reason = "(4.50 KiB; its row rule does not hold for what arrives)"
    assert f"runs whole: aten.flip.default at body.8 {reason}, aten.cumsum.default at body.8 {reason}" in messages[0]

    messages.clear()
    fit(LRCNNStrategy(**ROWWISE[0]))
    assert messages[0].endswith("nothing runs whole")

    messages.clear()
    Trainer(strategy=LRCNNStrategy(**ROWWISE[0]), **QUIET).predict(Task(), loader())
    assert len(messages) == 1
    assert "body (Sequential) without gradients: two_phase, 4 rows" in messages[0]

    messages.clear()
    fit("lrcnn")
    assert "body (Sequential): plain PyTorch, which fits: activation peak" in messages[0]


def test_inner_hooks_run_once_a_step_and_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hooked(Task):
        def __init__(self) -> None:
            super().__init__()
            self.calls = self.inner = 0
            self.body.register_forward_hook(self.count)
            self.body[1].register_forward_hook(self.count_inner)
            torch.nn.utils.spectral_norm(self.body[0])  # a hook that computes a weight is part of the graph

        def count(self, *_: Any) -> None:
            self.calls += 1

        def count_inner(self, *_: Any) -> None:
            self.inner += 1

    messages = logged(monkeypatch, "rank_zero_info")
    _, module = fit(LRCNNStrategy(**ROWWISE[0]), Hooked, num_sanity_val_steps=0)
    assert module.calls == module.inner == 2 * (4 + 2)
    (report,) = (message for message in messages if "row-wise training" in message)
    assert "hooks at the exit of 1 at body.1" in report and "hooks see full maps" in report


def test_a_module_without_convolutions_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dense(Task):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()
            self.head = nn.Linear(3, 3)

    messages = logged(monkeypatch, "rank_zero_warn")
    plain, _ = fit("auto", Dense)
    ours, _ = fit("lrcnn_two_phase", Dense)
    assert any("no submodule of Dense contains a convolution" in message for message in messages)
    assert_same(plain.lightning_module.state_dict(), ours.lightning_module.state_dict(), 0, "weights")
    assert ours.strategy.plans == {}


def test_a_module_without_parameters() -> None:
    class Nothing(LightningModule):
        def predict_step(self, batch: Any) -> Tensor:
            return batch[0].sum()

    results = [Trainer(strategy=name, **QUIET).predict(Nothing(), loader()) for name in ("auto", "lrcnn")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"devices": 2}, r"devices=2.*allowed: devices=1.*lrcnn_ddp"),
        ({"num_nodes": 2}, r"num_nodes=2.*allowed: num_nodes=1.*lrcnn_ddp"),
        ({"sync_batchnorm": True}, r"sync_batchnorm=True.*lrcnn_ddp"),
    ],
)
def test_one_device_only(options: Any, text: str) -> None:
    for strategy in ("lrcnn_two_phase", LRCNNStrategy()):
        with pytest.raises(ConfigError, match=text):
            Trainer(strategy=strategy, **{**QUIET, **options})


def test_the_device_is_that_of_the_trainer_unless_given() -> None:
    strategy = LRCNNStrategy()
    assert strategy.root_device == torch.device("cpu") and strategy.parallel_devices == []
    strategy.parallel_devices = [torch.device("cuda", 3)]  # as the Trainer does
    assert strategy.root_device == torch.device("cuda", 3) and strategy.parallel_devices == []
    assert LRCNNStrategy(device="cuda").parallel_devices == [torch.device("cuda", 0)]
    trainer, module = fit(LRCNNStrategy(device="cpu", **ROWWISE[0]), accelerator="auto", max_epochs=1)
    assert trainer.strategy.root_device == module.device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", ["lrcnn_two_phase", "lrcnn_overlap"])
def test_a_name_runs_on_the_gpu_of_the_trainer(strategy: Any) -> None:
    seen = []
    options = {"accelerator": "gpu", "devices": 1, "max_epochs": 1}
    plain, _ = fit("auto", **options)
    _, module = fit(strategy, callbacks=[Look(lambda trainer, module: seen.append(module.device.type))], **options)
    assert set(seen) == {"cuda"}
    assert_same(plain.lightning_module.state_dict(), module.state_dict(), 1e-9, "weights")


def test_a_name_of_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"modules='bodi': Task has no submodule.*body"):
        fit(LRCNNStrategy(modules=["head", "bodi"]))


def test_compiled_modules_are_refused() -> None:
    class Compiled(Task):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(self.body)  # type: ignore[assignment]

    class InPlace(Task):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].compile()

    with pytest.raises(ConfigError, match=r"^body is compiled \(torch.compile\).*leave out torch.compile"):
        fit("lrcnn", Compiled)
    with pytest.raises(ConfigError, match=r"^body\.0 is compiled"):
        fit("lrcnn", InPlace)
    with pytest.raises(ConfigError, match=r"^Task is compiled"):
        Trainer(strategy="lrcnn", max_epochs=1, **QUIET).fit(torch.compile(Task()), loader())

    class CompiledHead(Task):
        def __init__(self) -> None:
            super().__init__()
            self.head.compile(backend="eager")

    trainer, _ = fit(LRCNNStrategy(**ROWWISE[0]), CompiledHead, max_epochs=1)
    assert trainer.strategy.plans["body"].mode == "two_phase"
