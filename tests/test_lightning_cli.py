"""LightningCLI: the strategies by name and by class, with options, from arguments, files and the environment."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from torch import nn

from lrcnn_lightning import LRCNNDDPStrategy, LRCNNStrategy, RowConfig
from lrcnn_lightning.config import strategy_defaults
from lrcnn_lightning.strategy import NAMES
from tests.tasks import NAMESPACES, QUIET, Steps, Task, assert_same, body, fit, loader

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")

SINGLE, DDP = "lrcnn_lightning.LRCNNStrategy", "lrcnn_lightning.LRCNNDDPStrategy"


def by_default(**options: Any) -> RowConfig:
    """The options of a strategy, where others are not given."""
    return RowConfig(**{**strategy_defaults(), **options})


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


def cli(*arguments: str, namespace: str = "lightning.pytorch", **options: Any) -> Any:
    """A LightningCLI that has parsed, and made the Trainer, but runs nothing."""
    library = importlib.import_module(f"{namespace}.cli")
    module: Any = Task
    if namespace != "lightning.pytorch":
        base = importlib.import_module(namespace).LightningModule

        class Other(Steps, base):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = body(), nn.Linear(6, 3)

        module = Other
    defaults: dict[str, Any] = {"run": False, "save_config_callback": None, "trainer_defaults": dict(QUIET)}
    return library.LightningCLI(module, args=list(arguments), **{**defaults, **options})


def strategy(*arguments: str, **options: Any) -> Any:
    return cli(*arguments, **options).trainer.strategy


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", NAMES)
def test_a_name(name: str, namespace: str) -> None:
    made = strategy(f"--trainer.strategy={name}", namespace=namespace)
    kind, options = NAMES[name]
    assert type(made).__name__ == kind and made.config == by_default(**options)


# What is written -> what the option is.
OPTIONS: list[tuple[str, str, Any]] = [
    ("mode", "overlap", "overlap"),
    ("rows", "4", 4),
    ("rows", "auto", "auto"),
    ("segments", "3", 3),
    ("batch_chunks", "2", 2),
    ("memory_budget", "2GiB", "2GiB"),
    ("memory_budget", "1073741824", 1073741824),
    ("memory_budget", "null", None),
    ("memory_budget", "auto", "auto"),
    ("max_overhead", "1", 1.0),
    ("max_overhead", ".inf", float("inf")),
    ("axis", "3", 3),
    ("axis", "-1", -1),
    ("modules", "body", ("body",)),
    ("modules", "[body, head]", ("body", "head")),
    ("on_unsupported", "error", "error"),
]


def test_every_option_is_tried() -> None:
    assert {name for name, _, _ in OPTIONS} == {field.name for field in fields(RowConfig)}


@pytest.mark.parametrize("kind", [SINGLE, DDP])
@pytest.mark.parametrize("option, text, value", OPTIONS, ids=str)
def test_a_dotted_option(kind: str, option: str, text: str, value: Any) -> None:
    made = strategy(f"--trainer.strategy={kind}", f"--trainer.strategy.{option}={text}")
    assert type(made) is (LRCNNStrategy if kind == SINGLE else LRCNNDDPStrategy)
    assert getattr(made.config, option) == value
    assert made.config == by_default(**{option: value})


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_options_one_after_the_other(namespace: str) -> None:
    arguments = ["--trainer.strategy.rows=4", "--trainer.strategy.modules+=body", "--trainer.strategy.modules+=head"]
    made = strategy(f"--trainer.strategy={SINGLE}", *arguments, namespace=namespace)
    assert made.config == by_default(rows=4, modules=["body", "head"])
    assert isinstance(made, importlib.import_module(f"{namespace}.strategies").SingleDeviceStrategy)


def test_a_class_without_its_package() -> None:
    made = strategy("--trainer.strategy=LRCNNStrategy", "--trainer.strategy.mode=overlap")
    assert made.config == by_default(mode="overlap")


@pytest.mark.parametrize("form", ["a file", "an argument", "a file and an argument", "a file of the Trainer"])
def test_class_path_and_init_args(form: str, tmp_path: Path) -> None:
    written = {"class_path": DDP, "init_args": {"mode": "two_phase", "rows": 4, "find_unused_parameters": True}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"strategy": written}}), "utf-8")
    arguments = {
        "a file": ["--config", str(file)],
        "an argument": [f"--trainer.strategy={json.dumps(written)}"],
        "a file and an argument": ["--config", str(file), "--trainer.strategy.rows=4"],
        "a file of the Trainer": [f"--trainer={tmp_path / 'trainer.yaml'}"],
    }
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({**QUIET, "strategy": written}), "utf-8")
    made = strategy(*arguments[form])
    assert type(made) is LRCNNDDPStrategy and made.config == by_default(mode="two_phase", rows=4)
    assert made._ddp_kwargs["find_unused_parameters"] is True


def test_a_name_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  strategy: lrcnn_overlap\n", "utf-8")
    assert strategy("--config", str(tmp_path / "config.yaml")).config == by_default(mode="overlap")


@pytest.mark.parametrize(
    "variables, config",
    [
        ({"PL_TRAINER__STRATEGY": "lrcnn_overlap"}, by_default(mode="overlap")),
        (
            {"PL_TRAINER__STRATEGY": json.dumps({"class_path": SINGLE, "init_args": {"rows": 3}})},
            by_default(rows=3),
        ),
    ],
    ids=["name", "class and options"],
)
def test_environment_variables(variables: dict[str, str], config: RowConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = strategy(parser_kwargs={"default_env": True})
    assert type(made) is LRCNNStrategy and made.config == config
    changed = strategy("--trainer.strategy=lrcnn_two_phase", parser_kwargs={"default_env": True})
    assert changed.config == by_default(mode="two_phase"), "arguments are stronger than the environment"


def test_a_configuration_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer: {{strategy: {{class_path: {SINGLE}}}}}\n", "utf-8")
    monkeypatch.setenv("PL_CONFIG", str(tmp_path / "config.yaml"))
    assert type(strategy(parser_kwargs={"default_env": True})) is LRCNNStrategy


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--trainer.strategy.rows=few"], "few"),
        (["--trainer.strategy.rows=0"], 'rows must be "auto" or a positive int (given: 0)'),
        (["--trainer.strategy.mode=2ps"], "two_phase"),
        (["--trainer.strategy.memory_budget=6G"], "write GiB (1024) or GB (1000)"),
        (["--trainer.strategy.row=4"], "row"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Either the parser or the package says what is allowed; never is there a traceback of another library."""
    with pytest.raises((SystemExit, ValueError)) as caught:
        strategy(f"--trainer.strategy={SINGLE}", *arguments)
    assert text in capsys.readouterr().err + str(caught.value)


def help_of(kind: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Option -> what ``--help`` says of it, on one line."""
    with pytest.raises(SystemExit):
        cli(f"--trainer.strategy.help={kind}")
    entries: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --trainer.strategy."):
            name = line.split()[0].removeprefix("--trainer.strategy.").rstrip(",")
            entries[name] = line.partition("  ")[2].partition("  ")[2]
        elif name:
            entries[name] += " " + line.strip()
    return {name: " ".join(text.split()) for name, text in entries.items()}


@pytest.mark.parametrize("kind", [SINGLE, DDP])
def test_help_explains_every_option(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    entries = help_of(kind, capsys)
    documented = inspect.cleandoc(RowConfig.__doc__ or "")
    for field in fields(RowConfig):
        said = " ".join(documented.partition(f"\n    {field.name}: ")[2].split())[:60]
        assert said and said in entries[field.name], field.name
        assert f"default: {strategy_defaults()[field.name]}" in entries[field.name], field.name
    assert "'two_phase', 'overlap'" in entries["mode"]
    others = {"plan": "instead of planning"}
    others |= {"device": "cuda:1"} if kind == SINGLE else {"find_unused_parameters": "autograd graph"}
    for name, text in others.items():
        assert text in entries[name], f"{name}: {entries[name]}"


def test_a_saved_configuration_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SaveConfigCallback` writes what was parsed; a run from that file is the same run."""
    library = importlib.import_module("lightning.pytorch.cli")
    arguments = ["fit", "--seed_everything=1", f"--trainer.strategy={SINGLE}", "--trainer.strategy.rows=3"]
    arguments += ["--trainer.max_epochs=2", "--trainer.precision=64-true", f"--trainer.default_root_dir={tmp_path}"]
    options: dict[str, Any] = {**QUIET, "logger": True}
    monkeypatch.chdir(tmp_path)
    runs = [library.LightningCLI(Task, Data, args=arguments, trainer_defaults=options)]
    (saved,) = tmp_path.rglob("config.yaml")
    written = yaml.safe_load(saved.read_text("utf-8"))["trainer"]["strategy"]
    assert written["class_path"] == SINGLE and written["init_args"]["rows"] == 3
    kept = tmp_path / "kept.yaml"
    kept.write_text(saved.read_text("utf-8"), "utf-8")
    again = ["fit", f"--config={kept}"]
    runs.append(library.LightningCLI(Task, Data, args=again, save_config_callback=None, trainer_defaults=options))
    assert runs[1].trainer.strategy.config == by_default(rows=3)
    assert runs[1].trainer.strategy.plans["body"].rows == 3
    assert_same(runs[0].model.state_dict(), runs[1].model.state_dict(), 0, "weights")
    plain, _ = fit("auto", limit_val_batches=0, num_sanity_val_steps=0)
    assert_same(plain.lightning_module.state_dict(), runs[0].model.state_dict(), 1e-9, "weights")
