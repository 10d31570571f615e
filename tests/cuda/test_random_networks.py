"""Random networks on the device: those of `tests.test_random_networks`, 200 of them on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lrcnn_lightning.planning.choices import Choices
from tests.cuda.conftest import NO_GPU
from tests.networks import Network, Recipe
from tests.oracle import assert_exact, no_gradient
from tests.test_random_networks import COMMON, STORIES, choices, recipes


def verify(recipe: Recipe, chosen: list[Choices], device: torch.device) -> None:
    torch.manual_seed(0)
    network = Network(recipe).prepared()
    x: Tensor = torch.randn(recipe.shape, dtype=torch.float64).to(device)
    if any(step.kind == "dropout" for step in recipe.steps):
        network.eval()  # a GPU draws the masks of plain training in a way of its own (`test_randomness`)
    assert_exact(network.to(device), x if recipe.input_gradient else no_gradient(x), train=None, choices=chosen)


@settings(COMMON, max_examples=8)
@given(recipes(6), choices())
def test_a_few_on_the_cpu(recipe: Recipe, chosen: list[Choices]) -> None:
    verify(recipe, chosen, torch.device("cpu"))


@pytest.mark.cuda
@NO_GPU
@settings(COMMON, max_examples=200)
@given(recipes(7), choices())
def test_many_on_a_gpu(recipe: Recipe, chosen: list[Choices]) -> None:
    verify(recipe, chosen[:1] if recipe.shape[1] % 2 else chosen[1:], torch.device("cuda", 0))


@pytest.mark.parametrize("story", STORIES)
def test_stories(story: str, device: torch.device) -> None:
    verify(STORIES[story], [Choices("two_phase", 3), Choices("overlap", 2, 2)], device)
