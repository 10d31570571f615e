"""The frontier: what is left out of it, what it calls its plans, and its picture."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning.planning.choices import Choices, Part
from lrcnn_lightning.planning.frontier import Frontier, Point, _thinned, _words
from lrcnn_lightning.planning.residency import KEEP


def small() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def test_no_plan_takes_more_memory_and_more_time_than_plain_pytorch() -> None:
    """On small maps many plans do: calls on slabs have a fixed price, and a row of the whole map saves nothing."""
    for side in (16, 64):
        frontier = lrcnn_lightning.frontier(small(), torch.empty(2, 3, side, side, device="meta"))
        plain = frontier.plain
        assert all(point.peak_bytes < plain.peak_bytes or point.overhead < 0 for point in frontier.points)
        for before, after in itertools.pairwise(frontier.points):
            assert (1 + before.overhead) / (1 + after.overhead) >= 1.05
        assert "plain PyTorch" in str(frontier)
        assert " 1 rows" not in str(frontier) and " 1 segments" not in str(frontier)


def test_plans_that_are_hardly_faster_are_left_out() -> None:
    points = [Point(10, 1.0, "a"), Point(11, 0.99, "b"), Point(12, 0.97, "c"), Point(13, 0.9, "d")]
    assert [point.plan for point in _thinned(points)] == ["a", "d"]
    assert _thinned([]) == []


def test_plans_are_told_apart_by_the_rows_of_their_segments() -> None:
    parts = tuple(Part(first, "overlap", rows, "lean") for first, rows in ((0, 8), (5, 2), (9, 4)))
    assert _words(Choices("overlap", 8, 3, 2, parts=parts)) == (
        "overlap, 8/2/4 rows, 3 segments, keeping lean, 2 batch chunks"
    )
    assert _words(Choices("two_phase", 1, 1)) == "two_phase, 1 row, 1 segment, keeping lean"
    excepted = Choices("two_phase", 4, 2, exceptions=((3, KEEP),))
    assert _words(excepted) == "two_phase, 4 rows, 2 segments, keeping lean but for 1 map"


def test_the_picture(tmp_path: Path) -> None:
    point = Point(3 * 2**20, 0.5, "overlap")
    for points in ((point,), ()):
        frontier = Frontier(points, (), Point(40 * 2**20, 0.0, "plain PyTorch"))
        frontier.plot(tmp_path / "frontier.png", "Sequential, input [1, 3, 64, 64]")
        assert (tmp_path / "frontier.png").stat().st_size > 10_000
