"""Work as exact numbers: which operations a row-wise step runs, and how often each row is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcnn_lightning
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.plan.plan import Choices, build_plan
from tests.oracle import row_graph

aten = torch.ops.aten


class Convolutions(TorchDispatchMode):
    """Counts output rows of convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self.rows["forward"] += result.shape[2]
            self.calls["forward"] += 1
        elif func is aten.convolution_backward.default:
            self.rows["backward"] += args[0].shape[2]
            self.calls["backward"] += 1
        return result


def _count(module: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Convolutions:
    module(images)  # captured and planned here: the trace runs every operation once, on no data
    counter = Convolutions()
    with torch.autograd.set_multithreading_enabled(False), counter:
        module(images).sum().backward()
    return counter


def _net(layers: int = 3) -> nn.Module:
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts)


IMAGES = torch.randn(1, 3, 64, 8)


def test_two_phase_computes_each_row_twice_forward_and_once_backward() -> None:
    """Once in the forward pass, once more in the backward pass, whatever the number of rows; a first and a last row
    have symmetric padding and therefore one output row too many, which is cut off."""
    counted = _count(lrcnn_lightning.rowwise(_net(), mode="two_phase", rows=4), IMAGES)
    border_rows = 2 * 3  # two border rows a layer, one extra output row each
    assert counted.rows["forward"] == 2 * (3 * 64 + border_rows)
    assert counted.rows["backward"] == 3 * 64 + border_rows
    assert counted.calls["backward"] == 3 * 4


def test_overlap_computes_the_halos_again() -> None:
    """OverL: rows of 16, three layers: layer 3 has no halo, layer 2 one row a side, layer 1 two."""
    counted = _count(lrcnn_lightning.rowwise(_net(), mode="overlap", rows=4), IMAGES)
    halos = (3 * 2) * 1 + (3 * 2) * 2
    border_rows = 2 * 3
    assert counted.rows["forward"] == 2 * (3 * 64 + halos + border_rows)
    assert counted.rows["backward"] == 3 * 64 + halos + border_rows


def test_last_convolution_is_not_recomputed() -> None:
    """Its gradient does not need its result."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    counted = _count(lrcnn_lightning.rowwise(net, mode="two_phase", rows=2), IMAGES)
    assert counted.calls["forward"] == 2 * 2 + 2
    assert counted.calls["backward"] == 2 * 2


def test_kept_inputs_of_batch_norm_are_not_computed_again() -> None:
    """Convolutions of equal width under BatchNorm in training mode: all kept, none recomputed."""
    parts: list[nn.Module] = []
    for _ in range(3):
        parts += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    net, images = nn.Sequential(*parts), torch.randn(2, 4, 64, 8)
    graph = row_graph(net, [images])
    plan = build_plan(
        graph, requires_grad_leaves(graph.graph, net, [images]), True, Choices("two_phase", rows=4, keeping="narrow")
    )
    counted = _count(lambda x: Execution(plan)(net, [x]), images)
    assert counted.calls["forward"] == 3 * 4
    assert counted.calls["backward"] == 3 * 4


def test_frozen_layers_cost_no_backward() -> None:
    net = _net()
    assert isinstance(net, nn.Sequential)
    net[0].requires_grad_(False)
    counted = _count(lrcnn_lightning.rowwise(net, mode="two_phase", rows=4), IMAGES)
    assert counted.calls["forward"] == 3 * 4 + 2 * 4
    assert counted.calls["backward"] == 2 * 4
