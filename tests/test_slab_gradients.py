"""Gradients of the slabs of a row: summed where they lie, unless somebody else has that memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcnn_lightning.engine.slab_gradients import SlabGradients
from lrcnn_lightning.engine.slabs import Part


def given(slabs: SlabGradients, value: int, gradient: Tensor, part: Part | None = None) -> Tensor:
    """Add a gradient that an operation has made."""
    slabs.hold(gradient)
    slabs.add(value, gradient, part)
    slabs.let_go(gradient)
    return gradient


def test_a_gradient_of_its_own_is_added_to() -> None:
    slabs = SlabGradients()
    first = given(slabs, 0, torch.ones(1, 2, 6))
    given(slabs, 0, torch.full((1, 2, 3), 2.0), Part(2, 1, 3, 6))
    taken = slabs.take(0)
    assert taken is first and taken[0, 0].tolist() == [1, 3, 3, 3, 1, 1]
    assert slabs.take(0) is None


def test_a_part_alone_comes_in_zeros() -> None:
    slabs = SlabGradients()
    given(slabs, 0, torch.ones(1, 1, 2), Part(2, 3, 2, 6))
    given(slabs, 0, torch.ones(1, 1, 6))
    taken = slabs.take(0)
    assert taken is not None and taken.flatten().tolist() == [1, 1, 1, 2, 2, 1]


def test_that_of_a_map_is_copied_first() -> None:
    full = torch.ones(1, 2, 8)
    slabs = SlabGradients()
    slabs.add(0, full[:, :, 2:6], None, elsewhere=True)
    given(slabs, 0, torch.ones(1, 2, 4))
    taken = slabs.take(0)
    assert taken is not None and bool((taken == 2).all()) and bool((full == 1).all())


def test_a_whole_map_that_is_passed_on_stays_the_map() -> None:
    """The gradient of a sum is that of both its operands; the row of a loop with one row has all of the map."""
    full = torch.ones(1, 2, 4)
    slabs = SlabGradients()
    slabs.add(0, full, None, elsewhere=True)
    passed = slabs.take(0)
    assert passed is not None
    slabs.hold(passed)
    for value in (1, 2):
        slabs.add(value, passed, None)
    slabs.let_go(passed)
    given(slabs, 1, torch.ones(1, 2, 4))
    assert bool((full == 1).all())


def test_one_of_two_is_copied_and_the_last_is_not() -> None:
    slabs = SlabGradients()
    shared = torch.ones(1, 2, 4)
    slabs.hold(shared)
    slabs.hold(shared)
    for value in (0, 1):
        slabs.add(value, shared, None)
        slabs.let_go(shared)
    given(slabs, 0, torch.ones(1, 2, 4))
    first = slabs.take(0)
    assert first is not None and first is not shared and bool((first == 2).all()) and bool((shared == 1).all())
    given(slabs, 1, torch.ones(1, 2, 4))
    assert slabs.take(1) is shared and bool((shared == 2).all())


def test_what_an_operation_makes_of_one_tensor_twice_is_not_added_to_itself() -> None:
    """``made`` for three operands, two of them the same value: the third must not see what was added to the first."""
    slabs = SlabGradients()
    made, other = torch.ones(1, 1, 3), torch.full((1, 1, 3), 5.0)
    for gradient in (made, other, made):
        slabs.hold(gradient)
    for value, gradient in ((0, made), (0, other), (1, made)):
        slabs.add(value, gradient, None)
        slabs.let_go(gradient)
    first, second = slabs.take(0), slabs.take(1)
    assert first is not None and second is not None
    assert bool((first == 6).all()) and bool((second == 1).all())


def test_an_expanded_gradient_is_not_written_to() -> None:
    slabs = SlabGradients()
    one = torch.ones(1, 1, 1)
    given(slabs, 0, one.expand(1, 2, 4))
    given(slabs, 0, torch.ones(1, 2, 4))
    taken = slabs.take(0)
    assert taken is not None and bool((taken == 2).all()) and float(one) == 1
