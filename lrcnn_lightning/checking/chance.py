"""The random generators of the process: set to a number, read, and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

__all__ = ["generator_states", "seed_all", "unchanged_generators"]


def _cuda_devices() -> range:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return range(torch.cuda.device_count() if in_use else 0)


def seed_all(seed: int) -> None:
    """Set every generator: PyTorch's on the CPU and on the GPUs that are in use, Python's, and NumPy's."""
    torch.default_generator.manual_seed(seed)
    for device in _cuda_devices():
        torch.cuda.default_generators[device].manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def generator_states() -> dict[str, bytes]:
    """The state of each generator by its name."""
    states = {"PyTorch, cpu": torch.get_rng_state().numpy().tobytes()}
    states.update({f"PyTorch, cuda:{i}": torch.cuda.get_rng_state(i).numpy().tobytes() for i in _cuda_devices()})
    states["Python"] = repr(random.getstate()).encode()
    numbers: Any = numpy.random.get_state(legacy=True)
    states["NumPy"] = numbers[1].tobytes() + repr(numbers[2:]).encode()
    return states


@contextlib.contextmanager
def unchanged_generators() -> Iterator[None]:
    """Every generator is afterwards in the state in which it was before."""
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=_cuda_devices()):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
