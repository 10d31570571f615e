"""Activation memory as exact numbers: what a step takes, and what it may not take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning.models import resnet50, vgg16, vgg16_bn
from lrcnn_lightning.monitor import measure_fake, measure_module
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from tests.oracle import requires_grad_leaves, row_graph

# VGG-16's convolutions and global pooling; the measure runs on fake tensors, so the full width and size cost nothing.
PLANS = {
    "two_phase": {"mode": "two_phase", "rows": 16, "segments": 1},
    "two_phase hybrid": {"mode": "two_phase", "rows": 16, "segments": 2},
    "overlap hybrid": {"mode": "overlap", "rows": 8, "segments": 4},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS.keys())
def test_vgg16_takes_a_quarter_at_most(options: dict[str, object]) -> None:
    module = vgg16()
    image = torch.empty(1, 3, 1024, 1024, device="meta")
    plain = measure_fake(module, image).peak_bytes
    assert plain == pytest.approx(1456 * 2**20, rel=0.01)  # two maps of 256 MiB at the top, and so on down
    rowwise = measure_fake(lrcnn_lightning.rowwise(module, **options), image).peak_bytes
    assert rowwise <= plain / 4


def test_real_and_fake_measures_agree() -> None:
    module = vgg16(width=0.125, num_classes=3)
    image = torch.randn(1, 3, 128, 96)
    lrcnn_lightning.rowwise(module, mode="two_phase", rows=4, segments=2)
    assert measure_module(module, image).peak_bytes == measure_fake(module, image).peak_bytes


@pytest.mark.parametrize(
    ("build", "options", "share"),
    [
        (vgg16_bn, {"mode": "two_phase", "rows": 16, "segments": 4}, 0.6),
        (resnet50, {"mode": "two_phase", "rows": 8, "segments": 4}, 0.4),
    ],
    ids=["vgg16_bn", "resnet50"],
)
def test_batch_norm_in_training_mode(build: type[nn.Module], options: dict[str, object], share: float) -> None:
    module = build()
    image = torch.empty(1, 3, 1024, 1024, device="meta")
    plain = measure_fake(module, image).peak_bytes
    rowwise = measure_fake(lrcnn_lightning.rowwise(module, **options), image).peak_bytes
    assert rowwise <= share * plain


def test_nothing_of_a_step_is_left() -> None:
    module = vgg16_bn(width=0.125, num_classes=3)
    lrcnn_lightning.rowwise(module, mode="two_phase", rows=4, segments=2)
    step = measure_module(module, torch.randn(2, 3, 64, 64))
    assert step.end_bytes == 0


@pytest.mark.parametrize("mode", ["two_phase", "overlap"])
def test_evaluation_streams(mode: str) -> None:
    """Without gradients nothing is kept: far less than the largest pair of maps that plain evaluation holds."""
    module = vgg16().eval()
    image = torch.empty(1, 3, 1024, 1024, device="meta")
    plain = measure_fake(module, image, grad=False).peak_bytes
    rowwise = measure_fake(lrcnn_lightning.rowwise(module, mode=mode, rows=16), image, grad=False).peak_bytes
    assert rowwise <= plain / 4


def test_carries_are_two_rows_a_convolution() -> None:
    """2PS on two 3 x 3 convolutions: what row r hands to row r + 1 is two rows of the map between them, no more."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    images = torch.randn(1, 1, 64, 16)
    graph = row_graph(module, [images])
    problem = Problem(graph, requires_grad_leaves(graph.graph, module, [images]), True)
    plan = Planner(problem).plan(Choices("two_phase", rows=4))
    (loop,) = plan.loops()
    first, second = loop.nodes
    assert [row.spans[second].computed for row in loop.rows] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert [tuple(row.spans[first]) for row in loop.rows] == [(0, 0, 17), (15, 17, 33), (31, 33, 49), (47, 49, 64)]


def test_frozen_prefix_keeps_nothing_and_is_not_run_again() -> None:
    module = vgg16(num_classes=3)
    image = torch.empty(1, 3, 512, 512, device="meta")
    options = {"mode": "two_phase", "rows": 8}
    trained = measure_fake(lrcnn_lightning.rowwise(copy.deepcopy(module), **options), image).peak_bytes
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    for child in convolutions[:10]:
        child.requires_grad_(False)
    plan = lrcnn_lightning.plan(module, image, **options)
    *frozen, rest = (segment for segment in plan.segments if not segment.plain)
    assert frozen and not any(segment.backward or segment.kept for segment in frozen) and rest.backward
    assert measure_fake(lrcnn_lightning.rowwise(module, **options), image).peak_bytes < 0.6 * trained
