"""The oracle: one step of plain autograd on a copy of the module, compared with one row-wise step, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import lrcnn_lightning

RELATIVE = 1e-9
"""Allowed error of any tensor in float64, relative to its largest element."""


@dataclass
class Step:
    """What one training step leaves behind."""

    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for i, tensor in enumerate(self.outputs):
            yield f"output {i}", tensor
        for i, gradient in enumerate(self.input_gradients):
            yield f"gradient of input {i}", gradient
        for name, gradient in self.gradients.items():
            yield f"gradient of {name}", gradient
        for name, tensor in self.buffers.items():
            yield f"buffer {name}", tensor


def run_step(module: nn.Module, *inputs: Any, seed: int = 0, input_gradient: bool = True) -> Step:
    """A forward pass, a loss with a random weight for every output element, a backward pass."""
    module.zero_grad(set_to_none=True)
    given = [
        tensor.detach().clone().requires_grad_(input_gradient)
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
        else tensor
        for tensor in inputs
    ]
    torch.manual_seed(seed)
    outputs = [leaf for leaf in tree_flatten(module(*given))[0] if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(seed + 1)
    loss = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)).sum()
        for output in outputs
        if output.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()
    return Step(
        [output.detach() for output in outputs],
        [tensor.grad for tensor in given if isinstance(tensor, Tensor) and tensor.is_floating_point()],
        {name: parameter.grad for name, parameter in module.named_parameters()},
        {name: buffer.clone() for name, buffer in module.named_buffers()},
    )


def error(given: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    """The largest difference, relative to the largest wanted element (or to one, where all are near nothing)."""
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    difference = (given.double() - wanted.double()).abs().max().item()
    largest = wanted.double().abs().max().item() if scale is None else scale
    return difference / largest if largest > 1e-12 else difference


def compare(given: Step, wanted: Step, allowed: float = RELATIVE) -> None:
    """Every tensor, one by one; a gradient that is missing in one must be missing in the other."""
    pairs = list(zip(given.tensors(), wanted.tensors(), strict=True))
    for (name, tensor), (other, expected) in pairs:
        assert name == other
        assert (tensor is None) == (expected is None), f"{name}: given {tensor is not None}, wanted {expected is not None}"
        if tensor is not None and expected is not None:
            found = error(tensor, expected)
            assert found <= allowed, f"{name}: relative error {found:.2e}, allowed {allowed:.0e}"


def assert_same_step(module: nn.Module, *inputs: Any, tolerance: str = "float64", seed: int = 0, **options: Any) -> None:
    """One step of ``rowwise(module, **options)`` equals one plain step.

    ``tolerance="float32"``: the error against the float64 step is at most ten times that of the plain float32 step
    (and what a few roundings give), tensor by tensor.
    """
    plain, ours = copy.deepcopy(module), copy.deepcopy(module)
    wanted = run_step(plain, *inputs, seed=seed)
    given = run_step(lrcnn_lightning.rowwise(ours, **options), *inputs, seed=seed)
    if tolerance == "float64":
        compare(given, wanted)
        return
    exact = run_step(copy.deepcopy(module).double(), *(i.double() for i in inputs), seed=seed)
    for (name, tensor), (_, expected), (_, truth) in zip(
        given.tensors(), wanted.tensors(), exact.tensors(), strict=True
    ):
        assert (tensor is None) == (expected is None), name
        if tensor is None or expected is None or truth is None:
            continue
        found = error(tensor.double(), truth.double())
        plainly = error(expected.double(), truth.double())
        assert found <= max(10 * plainly, 2e-5), f"{name}: error {found:.2e}, plain {plainly:.2e}"
