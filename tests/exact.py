"""The oracle applied to the public function: steps of ``rowwise(module)`` against plain steps."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning.checking.check import examine
from lrcnn_lightning.checking.comparison import RELATIVE
from tests.oracle import difference, observe


def assert_same_step(module: nn.Module, *inputs: Any, tolerance: str = "float64", **options: Any) -> None:
    """Whatever `lrcnn_lightning.check` compares agrees to 1e-9 in float64, and ran row by row.

    ``tolerance="float32"``: the error against the float64 step is at most ten times that of the plain float32 step
    (and what a few roundings give), tensor by tensor.
    """
    given = tuple(x.detach().clone().requires_grad_() for x in inputs)
    if tolerance == "float64":
        report = examine(module, given, **{"on_unsupported": "error", **options})
        assert report.exact and report.by_rows, str(report)
        assert (report.dtype, report.precision) == ("float64", "float64"), str(report)
        assert all(max(item.error, item.largest) < RELATIVE for item in report.comparisons), str(report)
        return
    plain, ours, double = copy.deepcopy(module), copy.deepcopy(module), copy.deepcopy(module).double()
    want = observe(plain, plain, given, 0)
    got = observe(lrcnn_lightning.rowwise(ours, **options), ours, given, 0)
    truth = observe(double, double, [x.detach().double().requires_grad_() for x in given], 0)
    assert got.keys() == want.keys() == truth.keys()
    for key, exact in truth.items():
        if isinstance(exact, Tensor):
            error, plain_error = (difference(t.to(exact.dtype), exact) for t in (got[key], want[key]))
            assert error <= max(10 * plain_error, 2e-5), f"{key}: error {error:.2e}, plain {plain_error:.2e}"
