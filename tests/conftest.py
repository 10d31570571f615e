from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

# pytest listens to every logger at every level, which makes torch write a trace of each capture.
logging.getLogger("torch.__trace").disabled = True


OF_PLANS = ("cli", "examples", "forward_only", "frontier", "limit", "many_sizes", "memory", "planner", "room", "work")
OF_PLANS += ("workspace",)
"""The tests that look at how good plans are. For the others any plan will do, and fewer are tried."""


@pytest.fixture(autouse=True)
def few_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition("test_")[2] not in OF_PLANS:
        monkeypatch.setattr("lrcnn_lightning.planning.search._REFINEMENTS", 24)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: Any) -> None:
    """One process for each core, where pytest-xdist is there and nothing else is asked for; a few share a GPU."""
    option, is_worker = config.option, "PYTEST_XDIST_WORKER" in os.environ
    if not is_worker and getattr(option, "numprocesses", 0) is None and option.dist == "no":
        on_gpu = option.markexpr == "cuda"
        option.numprocesses, option.dist = min(4, os.cpu_count() or 1) if on_gpu else "auto", "worksteal"


def pytest_ignore_collect(collection_path: Path, config: Any) -> bool | None:
    """Tests for a GPU are in one folder; others need packages that are not asked for there."""
    others = collection_path.parent == Path(__file__).parent and collection_path.name.startswith("test_")
    return True if config.option.markexpr == "cuda" and others else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many networks of the zoo were found exact."""
    found = {
        outcome: sum("test_zoo[" in report.nodeid for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed")
    }
    if any(found.values()):
        terminalreporter.write_line(f"zoo: {found['passed']} of {sum(found.values())} networks are exact")
