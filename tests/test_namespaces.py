"""``lightning`` and ``pytorch_lightning``: installed alone, together, or not at all.

Each environment is a virtual environment of its own. Its packages are links to those of the environment that the tests
run in, without the ones that are not to be there; so it is made in no time, and Python, ``importlib.metadata`` and
everything that looks for an installed package finds what a user's would.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import nn

import lrcnn_lightning
from lrcnn_lightning import ConfigError, LRCNNStrategy, RowConfig
from tests.tasks import NAMESPACES, QUIET, Steps, Task, assert_same, body, fit

REPOSITORY = Path(lrcnn_lightning.__file__).parents[1]
DISTRIBUTIONS = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}

both = pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")


def environment(folder: Path, without: list[str]) -> Path:
    """A virtual environment with everything that is installed here but these distributions; returns its Python."""
    hidden = {"lrcnn_lightning", "__pycache__"}
    for name in without:
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        hidden |= {file.parts[0] for file in files}
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    made = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    for kind in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_paths()[kind]).iterdir():
            link = Path(made[kind]) / entry.name
            if entry.name not in hidden and not link.exists():
                link.symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTHON"))}
    done = subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="links need rights that Windows does not give")
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_alone(namespace: str, tmp_path: Path) -> None:
    others = [distribution for name, distribution in DISTRIBUTIONS.items() if name != namespace]
    python = environment(tmp_path / "environment", others)
    run(python, "-m", "tests.one_lightning", namespace)


@pytest.mark.skipif(os.name == "nt", reason="links need rights that Windows does not give")
def test_the_engine_works_without_lightning(tmp_path: Path) -> None:
    python = environment(tmp_path / "environment", list(DISTRIBUTIONS.values()))
    code = (
        "import torch, lrcnn_lightning as lr\n"
        "net = torch.nn.Conv2d(3, 4, 3)\n"
        "x = torch.randn(1, 3, 8, 8)\n"
        "assert torch.allclose(net(x), lr.rowwise(net, mode='overlap', rows=2)(x), atol=1e-5)\n"
        "try: lr.LRCNNStrategy\n"
        "except ImportError as error: print(error)\n"
    )
    assert "install lightning or pytorch-lightning" in run(python, "-c", code)


def test_importing_the_package_does_not_import_lightning_and_registers_when_it_is_imported() -> None:
    code = (
        "import sys, lrcnn_lightning\n"
        "assert not any(name.partition('.')[0].endswith('lightning') for name in sys.modules if name[:5] != 'lrcnn')\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "assert StrategyRegistry['lrcnn']['strategy'] is lrcnn_lightning.LRCNNStrategy\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
    )
    run(Path(sys.executable), "-c", code)


@pytest.fixture(scope="module")
def expected() -> Any:
    """Plain training, once."""
    return fit("auto")[1]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("strategy", ["lrcnn_two_phase", lambda: LRCNNStrategy(mode="overlap", rows=3)])
def test_one_class_serves_the_trainers_of_both_lightnings(expected: Any, namespace: str, strategy: Any) -> None:
    library = importlib.import_module(namespace)

    class Other(Steps, library.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), nn.Linear(6, 3)

        forward = Task.forward

    given = strategy if isinstance(strategy, str) else strategy()
    trainer, module = fit(given, Other, trainer=library.Trainer)
    assert_same(expected.state_dict(), module.state_dict(), 1e-9, "weights")
    assert isinstance(trainer.strategy, LRCNNStrategy)
    assert isinstance(trainer.strategy, library.strategies.SingleDeviceStrategy)
    assert type(trainer.strategy).__mro__[3].__module__.startswith(namespace)
    if not isinstance(strategy, str):
        assert trainer.strategy is given
        assert given.config == RowConfig(mode="overlap", rows=3, on_unsupported="warn")
        assert given.plans["body"].mode == "overlap"
    unused = library.Trainer(strategy=given if isinstance(strategy, str) else strategy(), **QUIET).strategy
    assert type(pickle.loads(pickle.dumps(unused))) is type(trainer.strategy)


@both
def test_a_subclass_serves_the_trainer_of_its_own_lightning() -> None:
    class Mine(LRCNNStrategy):  # type: ignore[misc,valid-type]
        pass

    assert type(Trainer(strategy=Mine(), **QUIET).strategy) is Mine
    other = importlib.import_module("pytorch_lightning")
    with pytest.raises(ConfigError, match=r"derive it from `lrcnn_lightning\.strategy\.PytorchLightningLRCNNStrategy`"):
        other.Trainer(strategy=Mine(), **QUIET)


@both
def test_a_given_plan_goes_along_to_the_other_lightning(tmp_path: Path) -> None:
    trainer, _ = fit(LRCNNStrategy(mode="overlap", rows=3), max_epochs=1)
    saved = {name: plan.to_dict() for name, plan in trainer.strategy.plans.items()}
    other = importlib.import_module("pytorch_lightning")

    class Other(Steps, other.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), nn.Linear(6, 3)

        forward = Task.forward

    (tmp_path / "plans.json").write_text(json.dumps(saved), "utf-8")
    for plan in (saved, str(tmp_path / "plans.json")):
        given = LRCNNStrategy(plan=plan)
        fit(given, Other, trainer=other.Trainer, max_epochs=1, limit_val_batches=0)
        assert given.plans["body"].mode == "overlap" and given.plans["body"].rows == 3
