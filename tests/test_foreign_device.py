"""Every rule on a device that is not the CPU, without data, in a process of its own: it keeps the device for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this release of PyTorch has no device without kernels",
)

ROOT = Path(__file__).parents[1]


def run(every: int) -> None:
    command = [sys.executable, "-m", "tests.foreign_device", str(every)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-3000:]


def test_steps_stay_on_the_device() -> None:
    run(11)


@pytest.mark.slow
def test_steps_of_all_rules_stay_on_the_device() -> None:
    run(1)
