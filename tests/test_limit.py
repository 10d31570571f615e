"""The limit on the elements of a tensor that one operation reads or writes: proved of plans, and measured in steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcnn_lightning
from lrcnn_lightning import PlanError, RowConfig
from lrcnn_lightning.engine import maps
from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.models import UNet, vgg16
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.machine import CPU, MOST_ELEMENTS
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.saved import SavedPlan
from lrcnn_lightning.planning.search import choose_plan
from tests.networks import Network, Recipe
from tests.oracle import assert_exact, row_graph
from tests.test_random_networks import COMMON, choices, recipes


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation is given or returns, views and bare allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func._schema.name or func.namespace == "prim"):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                    self.elements, self.operation = tensor.numel(), str(func)
        return result


def measured(plan: Plan, module: nn.Module, x: Tensor, most: int) -> Largest:
    """A step of a plan, in which maps of more than ``most`` elements are copied by parts."""
    with mock.patch.object(maps, "MOST_ELEMENTS", most):
        return _measured(plan, module, x)


def _measured(plan: Plan, module: nn.Module, x: Tensor) -> Largest:
    x = x.detach().requires_grad_(x.requires_grad)
    execution = Execution(plan)
    with Largest() as largest:
        outputs = execution(module, [x])
    outputs = [o for o in torch.utils._pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
    seeds = [torch.randn_like(output) for output in outputs]
    wanted = [leaf for leaf in (x, *module.parameters()) if leaf.requires_grad]
    if outputs and wanted:
        with largest:
            torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    return largest


def chosen(module: nn.Module, x: Tensor, most: int, **options: Any) -> Plan:
    """The plan for a limit of ``most`` elements."""
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    config = RowConfig.from_options(**options)
    problem = Problem(graph, leaves, True, replace(CPU, most_elements=most))
    return choose_plan(problem, config, torch.device("cpu"))


def stack(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)]
    layers += [nn.BatchNorm2d(6), nn.Tanh()] if norm else [nn.Tanh()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1)).double()


MODELS = {
    "convolutions": lambda: stack(),
    "BatchNorm": lambda: stack(norm=True),
    "U-Net": lambda: UNet(in_channels=2, base_channels=2, depth=2).double(),
}


@pytest.mark.parametrize("options", [{}, {"mode": "overlap"}, {"memory_budget": "1GiB"}, {"segments": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_grow_until_slabs_are_below(name: str, options: dict[str, Any]) -> None:
    module, x = MODELS[name](), torch.randn(1, 2, 64, 32, dtype=torch.float64)
    most = max(value.elements for value in row_graph(module, [x]).values) // 4
    plan = chosen(module, x, most, **options)
    assert plan.mode != "plain" and plan.rows > 4 and plan.oversized is None
    largest = measured(plan, module, x, most)
    assert largest.elements <= most, largest.operation
    assert_exact(module, x, choices=[plan.explicit])
    assert any(plan.graph.values[v].elements > most for s in plan.segments for v in (*s.inputs, *s.outputs))


def test_chunks_of_a_batch_help_too() -> None:
    module, x = stack(), torch.randn(8, 2, 8, 8, dtype=torch.float64)
    plan = chosen(module, x, 6 * 8 * 8, rows=1)
    assert plan.chunks == 8 and measured(plan, module, x, 6 * 8 * 8).elements <= 6 * 8 * 8
    with pytest.raises(PlanError, match=r"slab of shape \[8, 6, 8, 8\].*rows=1 and batch_chunks=1.*more batch_chunks"):
        chosen(module, x, 6 * 8 * 8, rows=1, batch_chunks=1)


def test_too_few_rows_are_an_error_that_says_how_many() -> None:
    module, x = stack(), torch.randn(1, 2, 64, 16, dtype=torch.float64)
    with pytest.raises(PlanError) as caught:
        chosen(module, x, 1000, rows=4, mode="overlap")
    message = str(caught.value)
    assert "aten.conv2d.default at 0 has a slab of shape [1, 6, 22, 16], 2,112 elements, with rows=4" in message
    assert "allowed are 1,000 elements" in message and "rows=9 or more, rows='auto'" in message
    assert chosen(module, x, 1000, rows=16, mode="overlap").rows == 16


def test_what_runs_whole_is_named() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flip(2))

    x = torch.randn(1, 2, 64, 16, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"aten.flip.default at the top has a tensor of shape \[1, 2, 64, 16\]"):
        chosen(Flipped(), x, 2000)
    assert chosen(Flipped(), x, 2048).oversized is None


def test_a_mask_as_large_as_the_map_is_named() -> None:
    module, x = nn.Sequential(stack(), nn.Dropout(0.1)), torch.randn(1, 2, 64, 16, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"draw_mask at 1 has a tensor of shape \[1, 4, 32, 8\]"):
        chosen(module, x, 1000)


def test_a_plan_that_was_saved_keeps_the_limit() -> None:
    module, x = stack(), torch.randn(1, 2, 64, 16, dtype=torch.float64)
    graph = row_graph(module, [x])
    leaves = requires_grad_leaves(graph.graph, module, [x])
    data = Planner(Problem(graph, leaves, True)).plan(Choices("overlap", 2)).to_dict()
    assert Planner(Problem(graph, leaves, True)).saved(SavedPlan(data)).oversized is None
    with pytest.raises(PlanError, match="elements, with rows=2 and batch_chunks=1; allowed are 1,000"):
        Planner(Problem(graph, leaves, True, replace(CPU, most_elements=1000))).saved(SavedPlan(data))


@pytest.mark.parametrize("side", [16384, 32768, 65536])
def test_a_gigapixel_has_a_plan(side: int) -> None:
    with torch.device("meta"):
        module = vgg16()
    plan = lrcnn_lightning.plan(module, torch.empty(1, 3, side, side, device="meta"), memory_budget=None)
    assert plan.machine.most_elements == MOST_ELEMENTS == 2**31 - 1
    assert plan.oversized is None and plan.rows * MOST_ELEMENTS > 64 * side * side
    counted = plan.on(replace(plan.machine, most_elements=0)).oversized
    assert counted is not None and counted.elements <= MOST_ELEMENTS


@settings(COMMON, max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(recipes(), choices())
def test_no_tensor_of_a_step_is_larger_than_is_counted(recipe: Recipe, chosen: list[Choices]) -> None:
    torch.manual_seed(0)
    network = Network(recipe).prepared()
    x = torch.randn(recipe.shape, dtype=torch.float64, requires_grad=recipe.input_gradient)
    graph = row_graph(network, [x])
    leaves = requires_grad_leaves(graph.graph, network, [x])
    for choice in chosen:
        plan = Planner(Problem(graph, leaves, True)).plan(choice)
        counted = plan.on(replace(CPU, most_elements=0)).oversized
        largest = measured(plan, network, x, 1)
        parameters = max((p.numel() for p in network.parameters()), default=0)
        bound = max(0 if counted is None else counted.elements, parameters, 64)
        assert largest.elements <= bound, f"{choice}: {largest.operation} has {largest.elements} of {bound}"


def test_a_gradient_that_others_have_is_copied_by_parts() -> None:
    """The gradient of a border map belongs to autograd; before anything is added to it, it is copied, by rows."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(y.tanh())

    module, x = Twice().double(), torch.randn(1, 2, 24, 8, dtype=torch.float64)
    graph = row_graph(module, [x])
    problem = Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True)
    plan = Planner(problem).plan(Choices("overlap", 6))
    assert measured(plan, module, x, MOST_ELEMENTS).elements == 4 * 24 * 8
    assert measured(plan, module, x, 4 * 12 * 8).elements <= 4 * 12 * 8
    with mock.patch.object(maps, "MOST_ELEMENTS", 4 * 5 * 8):
        assert_exact(module, x, choices=[Choices("overlap", 6)])
