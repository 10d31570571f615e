"""The examples run, and train what plain Lightning trains."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning import LRCNNStrategy

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In an empty folder, with modules and environment put back, and without Lightning's warnings on workers."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of an example as a module, under a name of its own: jsonargparse and dataclasses look modules up."""
    name = f"examples_{path.replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def assert_same_training(ours: nn.Module, plain: nn.Module) -> None:
    """Every parameter and buffer of two trained modules is equal, up to rounding in float64."""
    expected = plain.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def rows(**options: Any) -> LRCNNStrategy:
    return LRCNNStrategy(mode="two_phase", **options)


def two_phase_with(strategy: Any, module: str, count: int) -> bool:
    """Whether a strategy has trained a module in that many rows."""
    return strategy.plans[module].mode == "two_phase" and strategy.plans[module].rows == count


# ------------------------------------------------------------------------------------------------ plain


def test_before_and_after_differ_in_an_import_and_an_argument() -> None:
    before, after = (
        (EXAMPLES / "plain" / f"{name}.py").read_text("utf-8").splitlines() for name in ("before", "after")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:]]
    assert [change[0] for change in changes] == ["+", "-", "+"]
    imported, without, argument = (change[2:].strip() for change in changes)
    assert imported == "import lrcnn_lightning  # noqa: F401"
    assert argument.replace('strategy="lrcnn_two_phase", ', "") == without


@pytest.mark.usefixtures("_float64")
def test_before_and_after_train_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (load(f"plain/{name}.py", monkeypatch).main(count=16, size=32) for name in ("before", "after"))
    assert_same_training(after, before)


# ------------------------------------------------------------------------------------------------ LightningCLI

SMALL = ("fit", "--trainer.max_epochs=1", "--trainer.devices=1", "--trainer.logger=false")
SMALL_DATA = ("--data.size=48", "--data.count=4", "--trainer.enable_checkpointing=false")
ROWS = "--trainer.strategy=lrcnn_lightning.LRCNNStrategy"
CONFIGURATION = f"--config={EXAMPLES / 'lightning_cli' / 'config.yaml'}"


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip(
        "jsonargparse", reason='LightningCLI needs jsonargparse: pip install "jsonargparse[signatures]"'
    )
    main = load("lightning_cli/main.py", monkeypatch).main
    return lambda *arguments: main([*SMALL, *arguments, *SMALL_DATA])


def test_command_line_with_a_name_and_with_a_class(command_line: Any) -> None:
    plain = command_line("--trainer.strategy=auto", "--trainer.precision=64-true").model
    named = command_line("--trainer.strategy=lrcnn_overlap", "--trainer.precision=64-true")
    assert named.trainer.strategy.plans["network"].mode == "overlap"
    assert_same_training(named.model, plain)
    of_class = command_line(ROWS, "--trainer.strategy.rows=4", "--trainer.precision=64-true")
    assert of_class.trainer.strategy.plans["network"].rows == 4
    assert_same_training(of_class.model, plain)


def test_command_line_with_a_configuration_and_an_override(command_line: Any) -> None:
    strategy = command_line(CONFIGURATION, "--trainer.strategy.rows=3", "--trainer.max_epochs=1").trainer.strategy
    assert two_phase_with(strategy, "network", 3)
    assert strategy.config.memory_budget == "160MiB"  # as the file says


def test_command_line_with_environment_variables(command_line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__STRATEGY", "lrcnn_two_phase")
    strategy = command_line().trainer.strategy
    assert isinstance(strategy, LRCNNStrategy)
    assert strategy.plans["network"].mode == "two_phase"


# ------------------------------------------------------------------------------------------------ Hydra


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the script of the template with overrides; returns the Trainer that it has made."""
    from hydra.core.global_hydra import GlobalHydra
    from lightning.pytorch import Trainer

    script = EXAMPLES / "hydra_template" / "src" / "train.py"
    trainers: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, *args, **kwargs: (trainers.append(self), fit(self, *args, **kwargs))
    )
    small = ("data.size=32", "data.count=16", "data.batch_size=4", "trainer.max_epochs=1", "+trainer.precision=64-true")

    def run(*overrides: str) -> Trainer:
        monkeypatch.setattr(sys, "argv", ["train.py", *small, f"hydra.run.dir={tmp_path}", *overrides])
        GlobalHydra.instance().clear()
        runpy.run_path(str(script), run_name="__main__")  # Hydra asks whether it is the program
        return trainers[-1]

    yield run
    GlobalHydra.instance().clear()
    for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
        del sys.modules[name]


def test_template_without_rows_and_with_a_name(template: Any) -> None:
    plain = template()
    assert not isinstance(plain.strategy, LRCNNStrategy)
    named = template("trainer.strategy=lrcnn_two_phase")
    assert named.strategy.plans["net"].mode == "two_phase"
    assert_same_training(named.lightning_module, plain.lightning_module)
    assert type(template("+strategy=plain").strategy) is type(plain.strategy)


def test_template_with_the_group_of_the_search_path(template: Any) -> None:
    assert two_phase_with(template("+strategy=two_phase", "strategy.rows=4").strategy, "net", 4)
    inside = template("+strategy@trainer.strategy=overlap", "trainer.strategy.rows=2").strategy
    assert (inside.plans["net"].mode, inside.plans["net"].rows) == ("overlap", 2)


def test_template_with_an_experiment(template: Any) -> None:
    budget = 2 * 1024**2
    strategy = template("experiment=large", "data.size=64", f"strategy.memory_budget={budget}").strategy
    plan = strategy.plans["net"]
    assert plan.peak_bytes <= budget < plan.plain_peak_bytes


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.usefixtures("_float64")
def test_fine_tuning_changes_the_plan_when_layers_are_unfrozen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("fine_tuning/finetune.py", monkeypatch)
    plain = module.main("auto", size=32, count=16, channels=4)
    assert "MiB" not in capsys.readouterr().out
    ours = module.main(rows(rows=4), size=32, count=16, channels=4)
    assert_same_training(ours, plain)
    assert int(ours.network.first[0][1].num_batches_tracked) == 2 + 2 * 2  # none while they were frozen

    printed = capsys.readouterr().out
    assert re.findall(r"first layers (\w+)", printed) == ["frozen", "frozen", "trained", "trained"]
    plans = re.findall(r"network: (.*)", printed)
    assert plans[0] == plans[1] != plans[2] == plans[3]


# ------------------------------------------------------------------------------------------------ photographs


@pytest.mark.usefixtures("_float64")
def test_photograph_is_segmented_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load("photographs/segment.py", monkeypatch)
    photograph = module.flower()
    assert photograph.grey.shape == photograph.target.shape == (1, 427, 640)
    assert 0.1 < photograph.target.mean() < 0.3  # the share of the petals

    part = module.Photograph(photograph.grey[:, 100:196, 150:342], photograph.target[:, 100:196, 150:342], border=96)
    plain = module.main(part, "auto", steps=3, channels=4)
    ours = module.main(part, rows(rows=4), steps=3, channels=4, picture=tmp_path / "picture.png")
    assert_same_training(ours, plain)

    image = module.pyplot.imread(tmp_path / "picture.png")
    assert image.shape[:2] == (340, 1800)
    assert image[..., :3].std() > 0.1  # not an empty page


def test_targets_of_the_retina_are_vessels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="the photograph of the retina needs scikit-image")
    photograph = load("photographs/segment.py", monkeypatch).retina()
    assert photograph.grey.shape == photograph.target.shape == (1, 1411, 1411)
    assert 0.03 < photograph.target.mean() < 0.2
    vessels = photograph.grey[photograph.target > 0].mean()
    assert vessels < photograph.grey[photograph.grey > 0.2].mean()  # vessels are darker than what is around them


# ------------------------------------------------------------------------------------------------ volumes


@pytest.mark.parametrize("axis", [2, 4])
@pytest.mark.usefixtures("_float64")
def test_volumes_are_cut_along_a_spatial_axis(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("volumes/segment.py", monkeypatch)
    strategy = rows(rows=4, axis=axis)
    small = {"shape": (16, 16, 16), "count": 2, "epochs": 1, "channels": 3}
    plain = module.main("auto", **small)
    ours = module.main(strategy, **small)
    assert two_phase_with(strategy, "network", 4)
    assert_same_training(ours, plain)


# ------------------------------------------------------------------------------------------------ documents


def documented(example: str, *words: str) -> list[float]:
    """The sizes in MiB of the one line of an example's document that begins with such words."""
    lines = (EXAMPLES / example / "README.md").read_text("utf-8").splitlines()
    return [float(size) for line in lines if line.startswith(words) for size in re.findall(r"([\d.]+) MiB", line)]


def planned(module: nn.Module, *shape: int, **options: Any) -> list[float]:
    """Predicted peaks in MiB, row-wise and plain, of a plan that cuts rows and has nothing to warn of."""
    plan = lrcnn_lightning.plan(module, torch.empty(shape, device="meta"), **{"memory_budget": None, **options})
    assert plan.rows > 1 and not plan.notes
    return [plan.peak_bytes / 2**20, plan.plain_peak_bytes / 2**20]


def test_documented_memory_is_that_of_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what the loss adds to the measured figures, and to the rounding of those that are predicted."""
    network = load("fine_tuning/finetune.py", monkeypatch).DigitClassifier().network
    trained = planned(network, 8, 1, 256, 256, mode="two_phase", rows=8)
    network.first.requires_grad_(False).eval()
    frozen = planned(network, 8, 1, 256, 256, mode="two_phase", rows=8)
    assert documented("fine_tuning", "  network:") == pytest.approx([*frozen, *trained], rel=0.01)

    network = load("volumes/segment.py", monkeypatch).VolumeNetwork(8)
    for axis, name in ((2, "depth"), (4, "width")):
        ours, plain = planned(network, 1, 1, 128, 64, 64, mode="two_phase", axis=axis)
        assert documented("volumes", f"| along the {name} ") == pytest.approx([ours], rel=0.1)
        assert documented("volumes", "| plain ") == pytest.approx([plain], rel=0.1)

    network = load("photographs/segment.py", monkeypatch).Segmenter(320, 16).network
    ours, plain = planned(network, 1, 1, 427, 640)
    assert documented("photographs", "| row-wise") == pytest.approx([ours], rel=0.1)
    assert documented("photographs", "| plain ") == pytest.approx([plain], rel=0.1)


def test_examples_of_rows_save_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [
        planned(load("plain_script.py", monkeypatch).DigitClassifier().network, 8, 1, 256, 256, mode="two_phase"),
        planned(load("plain/after.py", monkeypatch).DigitClassifier().network, 8, 1, 512, 512, mode="two_phase"),
        planned(
            load("lightning_cli/main.py", monkeypatch).Denoiser().network,
            *(2, 3, 384, 384),
            mode="two_phase",
            memory_budget="160MiB",
        ),
    ]
    for ours, plain in plans:
        assert ours < 0.6 * plain


def test_every_example_is_listed() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    text = (EXAMPLES / "README.md").read_text("utf-8")
    assert folders == {name for name in re.findall(r"\]\((\w+)/README\.md\)", text)}
    for folder in folders:
        assert (EXAMPLES / folder / "README.md").exists()
    for document in EXAMPLES.rglob("README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text("utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command(command: str) -> None:
    """From the root of the repository, as written; what is written goes to an empty folder."""
    words = shlex.split(command)
    assert words[0] == "python"
    arguments = [word.replace("examples/", f"{EXAMPLES}/") for word in words[1:]]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
