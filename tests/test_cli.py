"""The applications: what they compose, what they refuse and how, and that they run from any directory."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import lrcnn_lightning
from lrcnn_lightning.cli import summary as summary_module
from lrcnn_lightning.cli import train as train_module
from lrcnn_lightning.cli.build import CommandError, build, strategy_options, user_errors
from lrcnn_lightning.cli.progress import progress
from lrcnn_lightning.config import RowConfig, strategy_defaults
from lrcnn_lightning.errors import ConfigError

QUICK = ("experiment=quick", "data.size=96", "data.scale=2", "data.batch_size=2")
PLAIN = (*QUICK, "strategy=plain")


@pytest.fixture(autouse=True)
def _hydra_is_left_clean() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_module("lrcnn_lightning.conf", version_base="1.3"):
        return compose(name, overrides=list(overrides))


def in_process(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, module: Any = train_module
) -> dict[str, Any]:
    """Run an application's ``main`` as if from the command line; returns its ``summary.json`` if it wrote one."""
    monkeypatch.chdir(folder)
    output = folder / "output"
    monkeypatch.setattr(
        sys, "argv", ["program", *overrides, f"hydra.run.dir={output}", f"hydra.sweep.dir={folder / 'sweep'}"]
    )
    GlobalHydra.instance().clear()
    module.main()
    file = output / "summary.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """Run ``lrcnn-train``, which must fail; returns what it wrote to the standard error."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, folder, *overrides)
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_strategy_group_has_the_fields_of_row_config() -> None:
    for mode in ("auto", "two_phase", "overlap"):
        node = composed(f"strategy={mode}").strategy
        assert node._target_ == "lrcnn_lightning.LRCNNStrategy"
        options = {name: value for name, value in node.items() if not str(name).startswith("_")}
        assert RowConfig(**options) == RowConfig(**{**strategy_defaults(), "mode": mode})


def test_strategy_options_are_set_one_by_one() -> None:
    node = composed(
        "strategy=two_phase", "strategy.rows=8", "strategy.memory_budget=2GiB", "strategy.modules=[model]"
    ).strategy
    assert (node.rows, node.segments, node.memory_budget, node.modules) == (8, "auto", "2GiB", ["model"])


@pytest.mark.parametrize("model", ["vgg16", "vgg16_bn", "resnet18", "resnet50", "unet", "lean_resnet"])
def test_models_follow_the_data(model: str) -> None:
    config = composed(f"model={model}", "model.width=0.0625", "data.classes=4", "data.channels=1")
    scores = build(config.model)(torch.randn(1, 1, 64, 64))
    assert scores.shape[:2] == (1, 4)


def test_model_of_another_library_by_name() -> None:
    pytest.importorskip("monai")
    config = composed("model=monai", "model.name=DenseNet121", "data.channels=1")
    assert type(build(config.model)).__name__ == "DenseNet121"
    with pytest.raises(CommandError, match="has no 'NoSuchNet'"), user_errors():
        build(composed("model=monai", "model.name=NoSuchNet").model)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("strategy=schema",), ("Could not find 'strategy/schema'",)),  # what checks options is none itself
        (("strategy=rows",), ("Could not find 'strategy/rows'", "Available options", "two_phase", "overlap", "plain")),
        (
            ("model=vgg",),
            ("Could not find 'model/vgg'", "vgg16", "resnet50", "lean_resnet", "torchvision", "timm", "monai"),
        ),
        (("data.size=abc",), ("error: data.size: 'abc' is not the size of a page", "512x768")),
        (("data.sizes=512",), ("sizes", "not in struct")),
        (("strategy.row=8",), ("row", "not in 'StrategySchema'")),
        (("strategy.max_overhead=much",), ("much", "could not be converted to Float")),
        (("trainer.accelerator=toaster",), ("toaster",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and "=" in value[0] else "",
)
def test_a_mistake_gets_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: Sequence[str],
    words: Sequence[str],
) -> None:
    message = failure(monkeypatch, capsys, tmp_path, "strategy=two_phase", *QUICK, *overrides)
    for word in words:
        assert word in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("rows=abc", 'rows must be "auto" or a positive int'),
        ("mode=2ps", 'did you mean "two_phase"?'),
        ("memory_budget=6G", "6G"),
    ],
)
def test_a_wrong_strategy_option_gets_the_message_of_row_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, words: str
) -> None:
    message = failure(monkeypatch, capsys, tmp_path, *QUICK, "strategy=auto", f"strategy.{option}")
    assert "error: " in message
    assert words in message
    assert "Traceback" not in message


def test_a_missing_library_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)  # what Python does for a module that must not be imported
        name = {"timm": "resnet18", "torchvision": "resnet18"}[library]
        message = failure(monkeypatch, capsys, tmp_path, *PLAIN, f"model={library}", f"model.name={name}")
        assert f"'{library}' is not installed" in message
        assert "pip install 'lrcnn-lightning[models]'" in message
        assert "Traceback" not in message


def test_a_network_without_a_name_gets_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = failure(monkeypatch, capsys, tmp_path, *PLAIN, "model=timm")
    assert "error: model.name is not given" in message and "model=timm model.name=convnext_tiny" in message
    assert "Traceback" not in message and "MissingMandatoryValue" not in message


def test_a_network_that_does_not_classify_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = failure(monkeypatch, capsys, tmp_path, *PLAIN, "model=unet")
    assert "error: model UNet maps images (2, 3, 96, 96) to (2, 10, 96, 96)" in message


def test_the_whole_error_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(CommandError, match=r"data\.size") as caught:
        in_process(monkeypatch, tmp_path, *PLAIN, "data.size=abc")
    assert caught.value.__cause__ is not None


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        _ = 1 / 0
    with pytest.raises(CommandError, match="error: rows"), user_errors():
        raise RuntimeError("wrapped") from ConfigError("rows")


def test_plain_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = in_process(
        monkeypatch, tmp_path, *PLAIN, "logger=csv", "callbacks=default", "test=true", "measure_steps=2"
    )
    assert summary["strategy"] == "plain"
    assert summary["steps"] == 4
    assert 0 <= summary["value"] <= 1
    assert summary["plain"]["peak_bytes"] > 0
    assert summary["plain"]["seconds"] > 0
    assert summary["rowwise"] is None
    printed = capsys.readouterr().out
    for words in ("activation memory", "seconds a step", "val/accuracy", "output:"):
        assert words in printed
    assert (tmp_path / "output" / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / "output" / "csv" / "version_0" / "metrics.csv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


def test_measured_steps_have_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = []
    for precision in ("32-true", "64-true", "bf16-mixed"):
        folder = tmp_path / precision
        folder.mkdir()
        summary = in_process(monkeypatch, folder, *PLAIN, f"trainer.precision={precision}", "trainer.max_steps=1")
        peaks.append(summary["plain"]["peak_bytes"])
    assert peaks[2] < peaks[0] < peaks[1]


@pytest.mark.parametrize("mode", ["two_phase", "overlap", "auto"])
def test_rowwise_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, mode: str
) -> None:
    summary = in_process(monkeypatch, tmp_path, *QUICK, f"strategy={mode}", "strategy.rows=2")
    assert summary["strategy"] == mode
    assert summary["steps"] == 4
    assert summary["rowwise"]["peak_bytes"] > 0
    assert summary["plain"]["seconds"] > 0
    printed = capsys.readouterr().out
    for words in ("plan in force: model", "row-wise", "plain PyTorch", "x the time", "val/accuracy"):
        assert words in printed
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [".hydra", "summary.json"]


def test_the_quick_experiment_cuts_rows_and_saves_memory() -> None:
    config = composed("experiment=quick")
    shape = (config.data.batch_size, config.data.channels, config.data.size, config.data.size)
    with torch.device("meta"):
        plan = lrcnn_lightning.plan(build(config.model).train(), torch.empty(shape), **strategy_options(config))
    assert plan.rows > 1 and not plan.notes
    assert 4 * plan.peak_bytes < plan.plain_peak_bytes


@pytest.mark.parametrize(
    ("plain", "rowwise", "text"),
    [
        (300, 100, "3.0 x less"),
        (100, 100, "about the same"),
        (100, 103, "about the same"),
        (100, 150, "1.5 x more"),
        (None, 100, ""),
    ],
)
def test_the_summary_says_less_only_where_it_is_less(plain: int | None, rowwise: int | None, text: str) -> None:
    assert summary_module._less(plain, rowwise) == text


def test_callbacks_and_loggers_are_chosen_independently(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A monitor of the learning rate refuses a Trainer without a logger; without callbacks nothing is written."""
    in_process(monkeypatch, tmp_path, *PLAIN, "callbacks=memory", "trainer.max_steps=1", "measure_steps=0")
    assert (tmp_path / "output" / "checkpoints" / "last.ckpt").exists()
    (tmp_path / "none").mkdir()
    in_process(monkeypatch, tmp_path / "none", *PLAIN, "logger=csv", "trainer.max_steps=1", "measure_steps=0")
    assert not list((tmp_path / "none").rglob("*.ckpt"))


def test_activation_memory_is_logged_and_drawn_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overrides = ("strategy=two_phase", "strategy.rows=2", "callbacks=memory", "logger=csv", "measure_steps=0")
    in_process(monkeypatch, tmp_path, *QUICK, *overrides)
    assert (tmp_path / "output" / "activation_memory.png").stat().st_size > 10_000
    (line,) = [
        row
        for row in csv.DictReader((tmp_path / "output" / "csv" / "version_0" / "metrics.csv").open())
        if row["activation_memory_peak"]
    ]
    assert float(line["activation_memory_predicted"]) == pytest.approx(float(line["activation_memory_peak"]), rel=0.5)


def test_rowwise_run_learns_what_plain_training_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    states = []
    for strategy in ("plain", "two_phase"):
        folder = tmp_path / strategy
        folder.mkdir()
        overrides = (*QUICK, f"strategy={strategy}", "callbacks=checkpoint", "measure_steps=0")
        rows = () if strategy == "plain" else ("strategy.rows=3",)
        in_process(monkeypatch, folder, *overrides, *rows, "trainer.precision=64-true")
        checkpoint = torch.load(folder / "output" / "checkpoints" / "last.ckpt", weights_only=False)
        states.append(checkpoint["state_dict"])
    plain, rowwise = states
    assert list(plain) == list(rowwise)
    for name, value in plain.items():
        torch.testing.assert_close(rowwise[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)


def test_sweep_goes_on_after_an_out_of_memory_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values: list[float | None] = []

    def training(config: DictConfig) -> float:
        if config.data.size == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return float(config.data.size)

    original = train_module.train
    assert callable(original)
    monkeypatch.setattr(train_module, "train", training)
    task = train_module.main.__wrapped__  # type: ignore[attr-defined]

    def recording(config: DictConfig) -> float | None:
        values.append(task(config))
        return values[-1]

    import hydra

    program = hydra.main(version_base="1.3", config_path="pkg://lrcnn_lightning.conf", config_name="train")(recording)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "-m", "data.size=64,128,96", f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    program()
    assert values[0] == 64
    assert values[1] is not None and math.isnan(values[1])
    assert values[2] == 96


def test_out_of_memory_outside_of_a_sweep_is_not_reworded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def training(config: DictConfig) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_module, "train", training)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        in_process(monkeypatch, tmp_path, *PLAIN)


def test_sweep_runs_every_job_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_process(monkeypatch, tmp_path, "-m", *PLAIN, "data.size=64,96", "measure_steps=0")
    for job in ("0", "1"):
        assert (tmp_path / "sweep" / job / "summary.json").exists()


@pytest.mark.parametrize("strategy", ["two_phase", "overlap"])
def test_plan_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, strategy: str
) -> None:
    from lrcnn_lightning.cli import plan as plan_module

    overrides = (f"strategy={strategy}", "strategy.rows=4", "shape=[1,3,256,256]")
    in_process(monkeypatch, tmp_path, *overrides, module=plan_module)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("is_terminal", "seconds", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_what_takes_long_shows_a_bar(
    is_terminal: bool, seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, after a moment; an error passes through, and nothing goes on afterwards."""
    monkeypatch.setattr("lrcnn_lightning.cli.progress.SECONDS", seconds)
    stream, others = io.StringIO(), set(threading.enumerate())
    with pytest.raises(ConfigError), progress("planning", Console(file=stream, force_terminal=is_terminal)):
        waited = threading.Event()
        waited.wait(0.5 if shown else 0.0)
        raise ConfigError("wrong")
    assert ("planning" in stream.getvalue()) == shown
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
        assert not thread.is_alive()


def test_plain_pytorch_has_no_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from lrcnn_lightning.cli import plan as plan_module

    with pytest.raises(SystemExit):
        in_process(monkeypatch, tmp_path, "strategy=plain", module=plan_module)
    assert "strategy=plain has no plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("frontier=maybe", "frontier must be true or false (given: 'maybe')"),
        ("strategy.modules=[nope]", "modules='nope': Task has no submodule of that name; its submodules are model"),
        ("strategy.modules=[features]", 'did you mean "model.features"?'),
        ("strategy.modules=[model.features]", "lrcnn-plan plans the whole network (given: model.features; allowed:"),
    ],
)
def test_what_a_plan_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, words: str
) -> None:
    from lrcnn_lightning.cli import plan as plan_module

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit):
        in_process(monkeypatch, tmp_path, "data.size=64", override, module=plan_module)
    assert words in capsys.readouterr().err


def test_a_plan_of_the_whole_network_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from lrcnn_lightning.cli import plan as plan_module

    in_process(monkeypatch, tmp_path, "data.size=64", "strategy.modules=[model]", module=plan_module)
    assert "plan: plain" in capsys.readouterr().out


APPLICATION = """
import hydra
import lightning.pytorch
import lrcnn_lightning

@hydra.main(version_base="1.3", config_path="theirs", config_name="theirs")
def main(config):
    strategy = hydra.utils.instantiate(config.trainer).strategy
    options = getattr(strategy, "config", None)
    print(type(strategy).__name__, *(() if options is None else (options.mode, options.rows, options.modules)))

main()
"""
THEIRS: dict[str, Any] = {
    "defaults": ["_self_"],
    "trainer": {
        "_target_": "lightning.pytorch.Trainer",
        "strategy": "${oc.select:strategy,auto}",
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    },
    "hydra": {"searchpath": ["pkg://lrcnn_lightning.conf"], "run": {"dir": "out"}},
}


def in_another_application(
    folder: Path, *overrides: str, defaults: Sequence[Any] = ("_self_",)
) -> subprocess.CompletedProcess[str]:
    """Run an application of somebody else's, in its own folder, that makes its Trainer from its own configuration."""
    (folder / "app.py").write_text(APPLICATION)
    (folder / "theirs").mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create({**THEIRS, "defaults": list(defaults)}), folder / "theirs" / "theirs.yaml")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "app.py", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("+strategy=overlap", "strategy.rows=4"), ["LRCNNStrategy", "overlap", "4", "auto"]),
        (("+strategy=two_phase", "strategy.modules=[body]"), ["LRCNNStrategy", "two_phase", "auto", "('body',)"]),
        (("+strategy@trainer.strategy=auto",), ["LRCNNStrategy", "auto", "auto", "auto"]),
        (("+strategy=plain",), ["SingleDeviceStrategy"]),
        (("+strategy@trainer.strategy=plain",), ["SingleDeviceStrategy"]),
        ((), ["SingleDeviceStrategy"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_other_applications_make_a_trainer_with_the_groups_on_their_search_path(
    tmp_path: Path, overrides: Sequence[str], words: Sequence[str]
) -> None:
    result = in_another_application(tmp_path, *overrides)
    assert result.stdout.split() == list(words), result.stderr


def test_other_applications_have_the_schema(tmp_path: Path) -> None:
    named = ["_self_", {"strategy": "two_phase"}]  # in their list of defaults, it needs no plus
    result = in_another_application(tmp_path, "strategy=overlap", defaults=named)
    assert result.stdout.split()[:2] == ["LRCNNStrategy", "overlap"], result.stderr
    for override, words in (
        ("strategy.max_overhead=abc", "could not be converted to Float"),
        ("strategy.row=4", "not in 'StrategySchema'"),
        ("strategy.rows=many", 'rows must be "auto" or a positive int'),
    ):
        result = in_another_application(tmp_path, override, defaults=named)
        assert result.returncode == 1
        assert words in result.stderr
