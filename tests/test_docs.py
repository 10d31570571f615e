"""The documents say what is true: their code runs, their links lead somewhere, their error texts are those raised."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from packaging.requirements import Requirement
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrcnn_lightning import LRCNNStrategy, RowwiseError, plan, rowwise

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESTRICTIONS = (REPOSITORY / "docs" / "restrictions.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def load(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end with."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors(text)
        elif "://" not in target:
            page, _, heading = target.partition("#")
            assert (document.parent / page).exists(), target
            if heading:
                other = (document.parent / page).read_text(encoding="utf-8")
                assert heading in anchors(other), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_code_compiles(document: Path) -> None:
    for number, code in enumerate(blocks(document.read_text(encoding="utf-8"), "python")):
        compile(code, f"{document.name}, block {number}", "exec")


def test_the_source_distribution_has_what_the_readme_links_to() -> None:
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]
    # The build itself adds the readme, the licence and its own file.
    included = {*build["sdist"]["only-include"], "README.md", "LICENSE", "pyproject.toml"}
    targets = {target for target in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in target}
    assert {"CHANGELOG.md", "CONTRIBUTING.md"} <= targets
    assert len(README.splitlines()) <= 200
    assert {target.partition("/")[0] for target in targets} <= included


def test_python_code_of_the_readme_and_its_pages_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [
        README,
        RESTRICTIONS,
        *((REPOSITORY / "docs" / f"{name}.md").read_text("utf-8") for name in ("callback", "options")),
    ]
    code = [block for page in pages for block in blocks(page, "python")]
    assert len(code) == 5
    for block in code:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "plan: two_phase" in printed and "lrcnn_lightning.check of Sequential in training mode: exact" in printed


def test_the_test_command_is_that_of_the_continuous_integration() -> None:
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert command in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("version", ["3.10", "3.11"])
def test_every_python_has_one_release_of_each_package(version: str) -> None:
    """Packages leave old Pythons behind, so that one list of releases would fit the latest alone."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": version})]
    names = [pin.name.lower() for pin in held]
    assert {"torch", "numpy", "matplotlib", "networkx"} <= set(names) and len(names) == len(set(names))
    numpy = next(pin for pin in held if pin.name == "numpy")
    assert numpy.specifier.contains("2.2.6") == (version == "3.10")  # the last one for Python 3.10


def test_list_of_operations_is_current() -> None:
    written = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert written == load("docs/generate_operations.py").operations(), "run python docs/generate_operations.py"


def test_plain_script_trains_the_same_weights_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    train = load("examples/plain_script.py").train
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's on the number of workers
            plain = train("auto", images=16, size=32).state_dict()
            for strategy in ("lrcnn_two_phase", "lrcnn_overlap"):
                ours = train(strategy, images=16, size=32).state_dict()
                assert list(ours) == list(plain)
                for name, tensor in plain.items():
                    torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    finally:
        torch.set_default_dtype(default)


def test_plain_script_checks_its_network(capsys: pytest.CaptureFixture[str]) -> None:
    report = load("examples/plain_script.py").check(32)
    assert report.exact and report.by_rows and capsys.readouterr().out == f"{report}\n"


def test_python_code_of_the_page_on_checks_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The report that it shows is the one that is printed, but for the numbers."""
    text = (REPOSITORY / "docs" / "check.md").read_text(encoding="utf-8")
    (code,), (shown,) = blocks(text, "python"), blocks(text, "text")
    exec(compile(code, "check.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    for line in shown.splitlines()[:-1]:
        assert any(re.split(r"[\d.]", line)[0] == re.split(r"[\d.]", other)[0] for other in printed), line


# ------------------------------------------------------------------------------------------------ error texts


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)


class Branch(Part):
    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y if y.mean() > 0 else -y


class Masked(Part):
    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y[y > 0]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


class Task(LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(8, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0]).mean((2, 3))).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def call(module: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32), **options: Any) -> Callable[[], Any]:
    return lambda: rowwise(module, **options)(torch.randn(shape))


def fit(
    backbone: nn.Module, strategy: Any = "lrcnn_two_phase", task: type[Task] = Task, **options: Any
) -> Callable[[], None]:
    def run() -> None:
        trainer = Trainer(
            accelerator="cpu",
            strategy=strategy() if callable(strategy) else strategy,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"devices": 1, **options},
        )
        trainer.fit(task(backbone), DataLoader(TensorDataset(torch.randn(1, 3, 32, 32))))

    return run


def changing() -> nn.Module:
    class Changing(nn.Sequential):
        pass

    module = Changing(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
    module[0].register_forward_hook(lambda *_: None)
    return module


class Waves(nn.Conv2d):
    """Takes vectors, and has no parts."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 3, 32, 32))


class OfVectors(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0].flatten(1)], batch_idx)


class Narrow(nn.Module):
    """No convolution: a map of eight channels all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 8, -1, -1)


class Calls(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.backbone(torch.randn(1, 3, 32, 32))


RAISED = {
    "row-wise module Branch": call(Branch(), mode="two_phase"),
    "row-wise module Masked": call(Masked(), mode="two_phase"),
    "row-wise module Changing": call(changing(), mode="two_phase"),
    "row-wise module Linear": call(nn.Linear(8, 8), (4, 8), mode="two_phase"),
    "row-wise module Sequential: rows=64": call(network(), rows=64),
    "row-wise module Sequential: no plan fits": call(network(), (1, 3, 256, 256), memory_budget="64KiB"),
    "Conv2d: the example has no tensor": lambda: plan(nn.Conv2d(3, 8, 3), (1, 3, 64, 64)),
    "Trainer(devices=2)": fit(network(), "lrcnn", devices=2),
    "Trainer(sync_batchnorm=True)": fit(network(), "lrcnn", sync_batchnorm=True),
    "backbone is compiled": fit(torch.compile(network())),
    "modules='bakbone'": fit(network(), lambda: LRCNNStrategy(modules=["bakbone"])),
}
WARNED = {
    "row-wise module 'backbone' (Branch)": fit(Branch()),
    "row-wise module 'backbone' (Waves)": fit(Waves(), task=OfVectors),
    "backbone was called outside": fit(network(), callbacks=[Calls()]),
    "this batch fits without rows": fit(network()),
    "row-wise module 'backbone' (Sequential): no plan was found": fit(network()),
    "row-wise module 'backbone' (Sequential): segments=99": fit(network(), lambda: LRCNNStrategy(segments=99)),
    "strategy LRCNNStrategy: no submodule": fit(Narrow(), "lrcnn"),
}
ELSEWHERE = ("row-wise module RecursiveScriptModule",)
"""TorchScript is deprecated and warns; what needs two processes is tested with the strategies."""


def documented(beginning: str) -> str:
    """The documented text of an error, as a pattern; three dots stand for anything."""
    found = [" ".join(text.split()) for text in blocks(RESTRICTIONS, "text") if text.startswith(beginning)]
    assert len(found) == 1, beginning
    return ".*".join(re.escape(part.strip()) for part in found[0].split("..."))


@pytest.mark.parametrize("beginning", RAISED)
def test_documented_error(beginning: str) -> None:
    with pytest.raises(RowwiseError) as raised:
        RAISED[beginning]()
    assert re.fullmatch(documented(beginning), " ".join(str(raised.value).split()))


@pytest.mark.parametrize("beginning", WARNED)
def test_documented_warning(beginning: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNED[beginning]()
    assert any(re.fullmatch(documented(beginning), " ".join(str(w.message).split())) for w in caught)


def test_every_documented_text_is_checked() -> None:
    checked = (*RAISED, *WARNED, *ELSEWHERE)
    assert all(text.startswith(checked) for text in blocks(RESTRICTIONS, "text"))
    assert len(blocks(RESTRICTIONS, "text")) == len(checked)
