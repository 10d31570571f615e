"""Memory formats: what is channels last stays so, forward and backward, and maps are laid out as plainly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.graph.lines import lines
from lrcnn_lightning.models import UNet, resnet18, vgg16
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.rules import normalisation
from tests.oracle import row_graph

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VGG": lambda: vgg16(width=0.0625).get_submodule("features"),
    "ResNet": lambda: resnet18(width=0.125),
    "U-Net": lambda: UNet(base_channels=4, depth=2),
}
CHOICES = [Choices("two_phase", 4, 1), Choices("overlap", 4, 2), Choices("two_phase", 3, 2, keeping="borders")]


class Others(TorchDispatchMode):
    """Counts the operations whose results are maps in another format than channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(item, Tensor) or item.dim() != 4:
                continue
            many = item.numel() and min(item.shape[1], item.shape[2] * item.shape[3]) > 1
            if many and item.stride(1) != 1 and 0 not in item.stride():  # an expanded number is in no format
                self.operations[str(func)] += 1
        return result


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_stays_channels_last(name: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where another format is converted in every convolution, which took a third of VGG-16's time.

    Slabs that were joined to a carry of one sample became NCHW, since views by shape had given it other strides; and so
    did all gradients of parts, which ATen puts into contiguous zeros.
    """
    monkeypatch.setattr(normalisation, "_gradients_on_cpu", normalisation.gradients_on_gpu)
    torch.manual_seed(0)
    module = NETWORKS[name]().to(memory_format=torch.channels_last)
    x = torch.randn(samples, 3, 128, 96).to(memory_format=torch.channels_last)
    graph = row_graph(module, [x])
    problem = Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True)
    for choices in CHOICES:
        execution = Execution(Planner(problem).plan(choices))
        with Others() as others:
            execution(module, [x]).square().sum().backward()
        assert not others.operations, choices


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_lines(axis: int, layout: torch.memory_format) -> None:
    x = torch.randn(1, 6, 5, 4).to(memory_format=layout).requires_grad_()
    part = lines(x, axis, 1, 2)
    assert torch.equal(part, x.narrow(axis, 1, 2)) and part.stride() == x.stride()
    seed = torch.randn(part.shape).to(memory_format=layout)
    (got,) = torch.autograd.grad(part, x, seed)
    (want,) = torch.autograd.grad(x.narrow(axis, 1, 2), x, seed)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=layout)


class Alternate(nn.Module):
    """Every second channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)[:, ::2].tanh()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (1, 0, 3, 2)], ids=str)
@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: choices.mode)
def test_returned_maps_are_laid_out_as_plainly(order: tuple[int, ...], choices: Choices) -> None:
    """Dropout behind a row-wise module draws in the order of memory: another layout is another mask."""
    module = Alternate()
    shape = (2, 3, 24, 16)
    x = torch.randn([shape[place] for place in order]).permute([order.index(place) for place in range(4)])
    graph = row_graph(module, [x])
    plan = Planner(Problem(graph, requires_grad_leaves(graph.graph, module, [x]), True)).plan(choices)
    assert Execution(plan)(module, [x]).stride() == module(x).stride()
