"""Processes that work together, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import lrcnn_lightning


def run_together(
    module: str, arguments: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path
) -> None:
    """Run ``python -m module`` once for each list of arguments, at the same time, and wait for all to succeed.

    Each of two processes leaves a file ``done0`` or ``done1`` in the folder at its end.
    """
    root = str(Path(lrcnn_lightning.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *given],
            env={**environment, "PYTHONPATH": root},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for given, environment in zip(arguments, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
    assert (folder / "done0").exists() and (folder / "done1").exists(), outputs[0][-6000:]
