"""The oracle applied to the public function: one step of ``rowwise(module)`` against one plain step."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

import lrcnn_lightning
from tests.oracle import difference, differences, observe


def assert_same_step(
    module: nn.Module, *inputs: Any, tolerance: str = "float64", seed: int = 0, **options: Any
) -> None:
    """Outputs, the inputs' gradients, each parameter's gradient and each buffer agree to 1e-9 in float64.

    ``tolerance="float32"``: the error against the float64 step is at most ten times that of the plain float32 step
    (and what a few roundings give), tensor by tensor.
    """
    given = [x.detach().clone().requires_grad_() for x in inputs]
    plain, ours = copy.deepcopy(module), copy.deepcopy(module)
    want = observe(plain, plain, given, seed)
    got = observe(lrcnn_lightning.rowwise(ours, **options), ours, given, seed)
    if tolerance == "float64":
        assert not differences(got, want), "\n".join(differences(got, want))
        return
    double = copy.deepcopy(module).double()
    truth = observe(double, double, [x.detach().double().requires_grad_() for x in given], seed)
    assert got.tensors.keys() == want.tensors.keys()
    for name, exact in truth.tensors.items():
        mine, theirs = got.tensors[name], want.tensors[name]
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None and exact is not None:
            error, plain_error = (difference(t.to(exact.dtype), exact) for t in (mine, theirs))
            assert error <= max(10 * plain_error, 2e-5), f"{name}: error {error:.2e}, plain {plain_error:.2e}"
