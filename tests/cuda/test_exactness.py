"""Every output, gradient and buffer in float64, on the device, in both modes and both memory formats."""

from __future__ import annotations

import pytest
import torch

from lrcnn_lightning.planning.choices import Choices
from tests.cuda.networks import NETWORKS
from tests.oracle import assert_exact

CHOICES = [
    Choices("two_phase", 3, 1, 1, "lean"),
    Choices("two_phase", 4, 2, 2, "borders"),
    Choices("overlap", 3, 2, 1, "narrow"),
    Choices("overlap", 5, 1, 1, "demand", heights="balanced"),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_float64(name: str, device: torch.device) -> None:
    module, x = NETWORKS[name].made(device)
    graph = assert_exact(module, x, train=None, choices=CHOICES)
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    module, x = module.to(memory_format=last), x.to(memory_format=last)
    assert_exact(module, x, train=None, choices=CHOICES[::2], graph=graph)
