"""Work as exact numbers: which operations a row-wise step runs, and how often each row is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrcnn_lightning
from lrcnn_lightning import RowConfig
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.models import vgg16
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.planner import Planner, carried_nodes
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.search import choose_plan
from lrcnn_lightning.planning.work import PRODUCTS, Work
from lrcnn_lightning.rules import family_of, moments, normalisation, registered
from tests.networks import Call
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
    problem = Problem(graph, requires_grad_leaves(graph.graph, net, [images]), True)
    plan = Planner(problem).plan(Choices("two_phase", rows=4, keeping="narrow"))
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


C, MATRIX = 4, torch.randn(4, 6)
PRICED: dict[str, tuple[nn.Module, int]] = {
    "conv2d": (nn.Conv2d(C, 6, 3, padding=1, groups=2), 2 * 8 * 8 * 6 * 2 * 9),
    "conv_transpose2d": (nn.ConvTranspose2d(C, 6, 2, 2), 2 * 8 * 8 * C * 6 * 4),
    "linear": (Call(lambda x, linear: linear(x.movedim(1, -1)), linear=nn.Linear(C, 6)), 2 * 8 * 8 * C * 6),
    "matmul": (Call(lambda x: x.movedim(1, -1) @ MATRIX), 2 * 8 * 8 * C * 6),
    "einsum": (Call(lambda x: torch.einsum("nchw,cd->ndhw", x, MATRIX)), 2 * 8 * 8 * C * 6),
    "bmm": (Call(lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT)), 2 * C * C * 64),
    "addmm": (Call(lambda x: torch.addmm(x.mean(), x.flatten(1), x.flatten(1).t())), 2 * 2 * C * 64),
    "attention": (
        Call(lambda x: functional.scaled_dot_product_attention(*[x.flatten(2).mT[None]] * 3)),
        2 * 2 * 64 * 64 * C,
    ),
    # Their names have the word "linear" in them, and they were priced as matrix products.
    "upsample_bilinear2d": (nn.Upsample(scale_factor=2, mode="bilinear"), 0),
    "upsample_linear1d": (Call(lambda x: functional.interpolate(x.flatten(2), scale_factor=2.0, mode="linear")), 0),
    "relu": (nn.ReLU(), 0),
}


@pytest.mark.parametrize("name", PRICED)
def test_multiplications_are_those_of_products(name: str) -> None:
    module, expected = PRICED[name]
    graph = row_graph(module, [torch.randn(2, C, 8, 8)])
    work = Work(graph, CPU, 0.0)
    counts = {str(node.op): work.operations(position) / 2 for position, node in enumerate(graph.nodes)}
    assert sum(counts.values()) == expected
    (mine,) = (op for op in counts if name in op)
    assert counts[mine] == expected


def test_a_bilinear_resize_takes_the_time_of_the_bytes_that_it_moves() -> None:
    graph = row_graph(nn.Upsample(scale_factor=2, mode="bilinear"), [torch.randn(2, C, 8, 8)])
    moved = 4 * (2 * C * 8 * 8 + 2 * C * 16 * 16)
    assert Work(graph, CPU, 0.0).forward(0) == pytest.approx(moved / CPU.pooled_bytes_a_second)


def test_products_are_of_two_families() -> None:
    for operation, family in registered().items():
        assert (operation in PRODUCTS) == (family in ("convolution", "contraction")), operation
    assert {family_of(operation) for operation in PRODUCTS} == {"convolution", "contraction", None}


def test_halos_of_products_are_carried() -> None:
    """One of ``matmul`` was computed again, row by row, while that of ``linear`` was carried."""
    layers = {"first": nn.Conv2d(3, C, 3, padding=1), "linear": nn.Linear(C, C), "last": nn.Conv2d(6, 3, 3, padding=1)}
    net = Call(
        lambda x, first, linear, last: last(torch.relu(linear(first(x).movedim(1, -1)) @ MATRIX).movedim(-1, 1)),
        **layers,
    )
    graph = row_graph(net, [IMAGES])
    carried = {str(graph.nodes[position].op) for position in carried_nodes(graph, "two_phase")}
    assert carried == {"aten.conv2d.default", "aten.linear.default", "aten.matmul.default"}
    assert not carried_nodes(graph, "overlap")


def test_rows_stay_below_what_a_gpu_has_fast_kernels_for() -> None:
    """The gradient of a weight in float32 from maps of 2^29 elements took an H200 14 s, from half of that 0.05."""
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)).to("meta")
    x = torch.empty(1, 1, 20000, 16384, device="meta")
    graph = row_graph(network, [x])
    machine = Machine.of(torch.device("cuda"))
    problem = Problem(graph, requires_grad_leaves(graph.graph, network, [x]), True, replace(machine, device=None))
    chosen = choose_plan(problem, RowConfig(mode="two_phase", memory_budget="30GiB"), x.device)
    assert math.ceil(20000 / chosen.rows) * 16384 * 8 <= 2**28 < 20000 * 16384 * 8


class Vectors(TorchDispatchMode):
    """Counts the operations on vectors alone: what kernels are called for, and hardly do."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest, self.calls = longest, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and tensors and max(tensor.numel() for tensor in tensors) <= self.longest:
            self.calls[str(func)] += 1
        return result


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4)], ids=["batch", "group"])
def test_what_a_normalisation_does_with_vectors_is_done_once(
    norm: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another row has two more gradients to add for each normalisation, and no vectors of its own to make: there were
    some thirty, most of a step's calls.
    """
    monkeypatch.setattr(normalisation, "_gradients_on_cpu", normalisation.gradients_on_gpu)
    monkeypatch.setattr(moments, "_PIECE", 1)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(2, 3, 24, 8)
    graph = row_graph(module, [x])
    problem = Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True)
    calls = []
    for rows in (3, 4):
        execution = Execution(Planner(problem).plan(Choices("overlap", rows, 1)))
        execution(module, [x]).square().sum().backward()
        with Vectors(16) as vectors:
            execution(module, [x]).square().sum().backward()
        calls.append(vectors.calls)
    more = calls[1] - calls[0]
    assert more["aten.add_.Tensor"] == 4, "scale and shift, and the biases of two convolutions"
    assert sum(more.values()) <= 10, more


def test_a_row_of_a_plain_network_is_differentiated_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions, relu and poolings have formulas; each operation without one costs a graph of its own."""
    module = vgg16(width=0.0625, num_classes=3).get_submodule("features")
    x = torch.randn(1, 3, 64, 64)
    graph = row_graph(module, [x])
    problem = Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True)
    execution = Execution(Planner(problem).plan(Choices("two_phase", 4, 2)))
    calls: list[int] = []
    differentiate = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return differentiate(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    execution(module, [x]).sum().backward()
    assert not calls


def test_relu_comes_after_the_pooling_that_reads_it() -> None:
    """Not where somebody else reads it, or gets it."""
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    after = row_graph(nn.Sequential(*body), [torch.randn(1, 3, 16, 16)])
    assert [str(node.op) for node in after.nodes][1:] == ["aten.max_pool2d.default", "aten.relu.default"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.pool = body

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.relu(self.first(x))
            return y, self.pool(y)

    graph = row_graph(Twice(), [torch.randn(1, 3, 16, 16)])
    assert [str(node.op) for node in graph.nodes][1:] == ["aten.relu.default", "aten.max_pool2d.default"]
