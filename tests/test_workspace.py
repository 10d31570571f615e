"""What counts on a GPU beside tensors: workspaces of convolutions, and the blocks of the caching allocator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcnn_lightning import RowConfig
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.models import UNet
from lrcnn_lightning.monitor.meter import MemoryMeter
from lrcnn_lightning.planning import workspace
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.machine import CPU, Machine
from lrcnn_lightning.planning.planner import Planner, plain_plan
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.search import choose_plan
from lrcnn_lightning.planning.workspace import Call, NotOnALine, Operand, Workspaces, between, kernel_call
from lrcnn_lightning.rules import normalisation
from tests.oracle import row_graph

KIB, MIB = 2**10, 2**20
GPU = replace(CPU, caching=True)
"""Counts as on a GPU that is not there: bounds hold in place of trials."""


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, KIB),
        (5 * MIB + 1, 5 * MIB + 512),
        (10 * MIB, 10 * MIB),
        (11 * MIB - 512, 12 * MIB - MIB - 512),  # a rest of more than 1 MiB is cut off
        (11 * MIB, 12 * MIB),  # one of 1 MiB is not
        (12 * MIB + 1, 12 * MIB + 512),
    ],
)
def test_blocks_of_the_caching_allocator(size: int, counted: int) -> None:
    assert GPU.rounded(size) == counted
    assert GPU.rounded(GPU.rounded(size)) == counted
    assert CPU.rounded(size) == size


def calls(run: Callable[[], Any]) -> list[Call]:
    """The convolutions and matrix products that are called."""
    found: list[Call] = []

    def note(operation: Any, args: tuple[Any, ...], kwargs: Any) -> int:
        call = kernel_call(operation, args, kwargs)
        found.extend(() if call is None else (call,))
        return 0

    with MemoryMeter(passing=note):
        run()
    return found


def convolved(dtype: torch.dtype, layout: torch.memory_format, groups: int = 1) -> list[Call]:
    """Forward and backward."""
    x = torch.randn(2, 8, 16, 12, dtype=dtype).to(memory_format=layout).requires_grad_()
    weight = torch.randn(8, 8 // groups, 3, 3, dtype=dtype).to(memory_format=layout).requires_grad_()

    def run() -> None:
        y = torch.conv2d(x, weight, None, 1, 1, 1, groups)
        y.backward(torch.randn_like(y))

    return calls(run)


MAP, WEIGHT = 2 * 8 * 16 * 12, 8 * 8 * 9


@pytest.mark.parametrize(
    ("dtype", "layout", "groups", "forward", "backward"),
    [
        (torch.float32, torch.contiguous_format, 1, 8 * MAP + 4 * WEIGHT, 8 * MAP + 20 * WEIGHT),
        (torch.bfloat16, torch.contiguous_format, 1, 4 * MAP + 2 * WEIGHT, 4 * MAP + 18 * WEIGHT),
        (torch.float32, torch.channels_last, 1, 8 * MAP, 8 * MAP + 16 * WEIGHT),
        (torch.float64, torch.contiguous_format, 1, 0, 0),
        (torch.float32, torch.contiguous_format, 8, 0, 0),
    ],
)
def test_bounds(dtype: torch.dtype, layout: torch.memory_format, groups: int, forward: int, backward: int) -> None:
    first, second = convolved(dtype, layout, groups)
    workspaces = Workspaces(GPU, {})
    assert (workspaces.of(first), workspaces.of(second)) == (forward, backward)


def test_a_gradient_in_the_other_format_is_copied() -> None:
    call = convolved(torch.float32, torch.channels_last)[1]
    gradient = call.arguments[0]
    plain = gradient._replace(strides=(8 * 16 * 12, 16 * 12, 12, 1))
    workspaces = Workspaces(GPU, {})
    other = Call(call.operation, (plain, *call.arguments[1:]))
    assert workspaces.of(other) - workspaces.of(call) == gradient.bytes


def test_a_product_of_matrices_takes_nothing() -> None:
    (call,) = calls(lambda: torch.randn(3, 4) @ torch.randn(4, 5))
    assert Workspaces(GPU, {}).of(call) == 0


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_variance_of_channels_takes_a_buffer(keepdim: bool) -> None:
    for layout, expected in ((torch.contiguous_format, 0), (torch.channels_last, 32 * 2 * 8 * 16 * 12)):
        x = torch.randn(2, 8, 16, 12).to(memory_format=layout)
        (call,) = calls(partial(torch.var_mean, x, [0, 2, 3], correction=0, keepdim=keepdim))
        assert {"correction": 0, "keepdim": False, **dict(call.options)} == {"correction": 0, "keepdim": keepdim}
        assert Workspaces(GPU, {}).of(call) == expected


@pytest.mark.parametrize("size", [(192, 160), (2000, 12)], ids=str)
def test_what_is_tried_on_a_device_is_what_rows_do(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls at other heights than those that were traced are no calls in between: the input and the gradient of a
    transposed convolution are of different heights, and half of an odd one is no height. Nor are maps tried of more
    elements than kernels can count, or nearly: a GPU may take seconds for one call of them, or not come back.
    """
    tried: list[Call] = []
    impossible: list[str] = []

    def without_data(workspaces: Workspaces, call: Call, device: torch.device) -> int:
        """A run on no device, which checks shapes."""

        def tensors(tree: Any) -> Any:
            if isinstance(tree, Operand):
                return torch.empty_strided(tree.shape, tree.strides, dtype=tree.dtype, device="meta")
            return [tensors(item) for item in tree] if isinstance(tree, tuple) else tree

        tried.append(call)
        try:
            call.operation(*tensors(call.arguments))
        except RuntimeError as error:
            impossible.append(f"{call}: {error}")
        return 0

    monkeypatch.setattr(workspace, "_MOST_TRIED", 100_000)
    monkeypatch.setattr(workspace, "_fits", lambda call, device: True)
    monkeypatch.setattr(Workspaces, "_tried", without_data)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(8, 4, 3, stride=2)
    )
    x = torch.randn(1, 3, *size)
    graph = row_graph(network, [x])
    machine = replace(GPU, device=torch.device("cuda", 0))
    problem = Problem(graph, requires_grad_leaves(graph.graph, network, [x]), True, machine)
    for rows in (3, 5, 7):
        for mode in ("two_phase", "overlap"):
            assert Planner(problem).plan(Choices(mode, rows, 1)).peak_bytes > 0
    plain_plan(problem)
    assert not impossible
    operations = {call.operation for call in tried}
    assert operations == {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
    largest = max(math.prod(a.shape) for call in tried for a in call.arguments if isinstance(a, Operand))
    assert largest <= 100_000 < 8 * math.prod(size)


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((1, 3, 4, 5), (600, 1, 15, 3), True),
        ((2, 3, 4, 5), (120, 40, 5, 1), False),
        ((2, 3, 4, 5), (0, 0, 0, 0), False),
        ((2, 0, 4, 5), (0, 20, 5, 1), True),
    ],
)
def test_dense_operands(shape: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    assert Operand(shape, strides, torch.float32).dense == dense


def test_calls_on_a_line() -> None:
    def call(rows: int, per: int = 1) -> Call:
        shape = (1, 8, rows // per + 2, 12)
        operand = Operand(shape, (8 * shape[2] * 12, shape[2] * 12, 12, 1), torch.float32)
        return Call(torch.ops.aten.convolution.default, (operand, None, (1, 1), False))

    for rows in (1, 5, 8, 100):
        assert between(call(4), call(12), Fraction(rows - 4, 8)) == call(rows)
    assert between(call(4, 2), call(12, 2), Fraction(1, 2)) == call(8, 2)
    for rows in (5, 7):
        with pytest.raises(NotOnALine):
            between(call(4, 2), call(12, 2), Fraction(rows - 4, 8))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.ReLU()
    ),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    "U-Net": lambda: UNet(base_channels=8, depth=2),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_and_measured_peaks_agree(
    name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the CPU, with what would count on a GPU."""
    if name == "U-Net" and layout is torch.channels_last:
        pytest.skip("transposed convolution on the CPU does not keep the format")
    monkeypatch.setattr(normalisation, "_gradients_on_cpu", normalisation.gradients_on_gpu)
    torch.manual_seed(0)
    module = NETWORKS[name]().to(memory_format=layout)
    x = torch.randn(1, 3, 192, 160).to(memory_format=layout)
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    for choices in (Choices("two_phase", 4, 1), Choices("overlap", 6, 2), Choices("overlap", 1, 1)):
        plan = Planner(Problem(graph, leaves, True, GPU)).plan(choices)
        without = plan.on(CPU)
        execution = Execution(plan)
        measured(execution, module, x, CPU)
        counted, bare = (measured(execution, module, x, machine) for machine in (GPU, CPU))
        assert without.peak_bytes < plan.peak_bytes
        assert abs(plan.peak_bytes - counted) <= abs(without.peak_bytes - bare) + 0.08 * counted, choices


def measured(execution: Execution, module: nn.Module, x: Tensor, machine: Machine) -> int:
    counted: dict[str, Any] = {}
    if machine.caching:
        counted = {"rounded": machine.rounded, "passing": Workspaces(machine, {}).taken}
    for parameter in module.parameters():
        parameter.grad = None
    with torch.no_grad():
        seed = torch.randn_like(execution(module, [x]))
    with MemoryMeter(module, exclude=[seed], **counted) as meter:
        execution(module, [x]).backward(seed)
    return meter.peak_bytes


def convolution(channels: int, made: int) -> nn.Module:
    return nn.Conv2d(channels, made, 3, padding=1)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "pooling": lambda: nn.Sequential(convolution(3, 16), nn.MaxPool2d(3, 1, 1), nn.Tanh()),
    "pooling first": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), convolution(3, 16), nn.Tanh()),
    "convolutions": lambda: nn.Sequential(
        convolution(3, 24), nn.Tanh(), convolution(24, 24), nn.Tanh(), convolution(24, 4)
    ),
}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_maps_are_copied_by_kernels(name: str, samples: int) -> None:
    """Rows of a map in NCHW have gaps, and so has what was computed of a row and then cut, or joined to a carry and
    differentiated. Convolutions and poolings copy it first; a U-Net took 3 % more than predicted on a GPU.
    """
    torch.manual_seed(0)
    module, x = PARTS[name](), torch.randn(samples, 3, 96, 80)
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    for choices in (Choices("two_phase", 4, 1), Choices("two_phase", 3, 2), Choices("overlap", 4, 2)):
        plan = Planner(Problem(graph, leaves, True, GPU)).plan(choices)
        execution = Execution(plan)
        for parameter in module.parameters():
            parameter.grad = None
        with MemoryMeter(module, rounded=GPU.rounded, passing=Workspaces(GPU, {}).taken) as meter:
            total = execution(module, [x]).sum()
            total.backward()
        assert plan.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.02), choices


def test_plain_execution_counts_them_too() -> None:
    module, x = NETWORKS["convolutions"](), torch.randn(1, 3, 192, 160)
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    plain = plain_plan(Problem(graph, leaves, True, GPU))
    with MemoryMeter(module, rounded=GPU.rounded, passing=Workspaces(GPU, {}).taken) as meter:
        module(x).sum().backward()
    assert plain_plan(Problem(graph, leaves, True, CPU)).peak_bytes < plain.peak_bytes
    assert plain.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.01)


def test_a_search_aims_lower_where_exact_workspaces_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces are tried at a few heights; those of the plan that is chosen are tried as they are."""
    module, x = NETWORKS["convolutions"](), torch.randn(1, 3, 384, 160)
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    device = torch.device("cuda", 0)

    def found(self: Workspaces, call: Call) -> int:
        rows = call.arguments[0].shape[2]
        grid = rows - 2 if call.operation is torch.ops.aten.convolution.default else rows
        odd = grid & (grid - 1) and (2 * grid // 3) & (2 * grid // 3 - 1)
        return call.arguments[0].bytes * (2 if odd else 1)

    monkeypatch.setattr(Workspaces, "_found", found)
    machine = replace(GPU, device=device)
    plan = choose_plan(Problem(graph, leaves, True, machine), RowConfig(memory_budget=4 * MIB), torch.device("cpu"))
    assert not plan.machine.interpolates and plan.peak_bytes <= 4 * MIB
    assert plan.on(machine).peak_bytes < plan.peak_bytes
