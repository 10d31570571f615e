"""A step of every rule's network on a device that is not the CPU, without data: what `test_foreign_device` runs.

python -m tests.foreign_device 9        every ninth case of the tables of `test_rules`

PyTorch's own device for others to fill (``privateuseone``) stands for a GPU: tensors without data say they are there,
and an operation on tensors of two devices is refused. A step may copy nothing between the devices and ask for no value
of a tensor; the first one may, for constants. What kernels themselves ask for is not checked: none runs.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lrcnn_lightning.engine.execute import Execution, requires_grad_leaves
from lrcnn_lightning.graph import capture
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.rules import lower
from tests import test_rules

DEVICE = "gpu"
READS_BACK = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "new_tensor")


class Mixing(TorchDispatchMode):
    """Notes operations that have tensors of two devices, numbers of no dimension aside, or wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
            self.faults.add(f"{func} has tensors of two devices")
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.faults.add(f"{func} waits for a value")
        return result


class ReadingBack(TorchFunctionMode):
    """Notes calls of Python that move numbers between the devices."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS_BACK or (name in ("tensor", "as_tensor") and "cpu" not in str((kwargs or {}).get("device"))):
            self.faults.add(f"torch's {name} is called")
        return func(*args, **(kwargs or {}))


def moved(module: nn.Module, mode: FakeTensorMode) -> None:
    """Exchange all tensors of a module for ones without data on the device."""
    made: dict[int, Tensor] = {}

    def on_device(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
        return made[id(tensor)]

    for child in module.modules():
        for table in (child._parameters, child._buffers, vars(child)):
            for name, value in list(table.items()):
                if isinstance(value, Tensor):
                    table[name] = on_device(value)


def faults(case: test_rules.Case) -> set[str]:
    """What a second step of a case does that it may not."""
    module = test_rules.Around(case).double().train(case.train)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    moved(module, mode)
    found: set[str] = set()
    with mode:
        x = torch.empty(case.shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        graph = lower(capture(module, (x,)), case.axis)
        leaves = requires_grad_leaves(graph.graph, module, [x])
        for choices in (Choices("two_phase", 2), Choices("overlap", 5, 2, 2, "borders")):
            execution = Execution(Planner(Problem(graph, leaves, True)).plan(choices))
            for step in range(2):
                with Mixing() as mixing, ReadingBack() as reading_back:
                    outputs = [leaf for leaf in tree_leaves(execution(module, [x])) if isinstance(leaf, Tensor)]
                    roots = [output for output in outputs if output.requires_grad]
                    torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
                if step:
                    found |= mixing.faults | reading_back.faults
    return found


def cases() -> list[test_rules.Case]:
    """Of all tables, without those whose own code makes tensors on the CPU."""
    tables = [
        mark.args[1]
        for test in vars(test_rules).values()
        for mark in getattr(test, "pytestmark", ())
        if mark.name == "parametrize" and mark.args[0] == "case"
    ]
    return [case for table in tables for case in table if case.name not in ("index select", "reordered channels")]


def main(every: int) -> int:
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.gpu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]  # type: ignore[attr-defined]
    torch.autograd.set_multithreading_enabled(False)
    logging.disable(logging.ERROR)
    wrong, tried = 0, cases()[::every]
    for case in tried:
        try:
            found: Any = faults(case)
        except Exception:
            found = traceback.format_exc()
        if found:
            wrong += 1
            print(f"{case.name}: {found}")
    print(f"{len(tried) - wrong} of {len(tried)} cases")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
