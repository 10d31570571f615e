"""Those who look at a row-wise module, or run it, in ways of their own: exporters, compilers, tracers, threads."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import lrcnn_lightning
from lrcnn_lightning import CaptureError
from tests.oracle import difference

IMAGES = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no plan was",
    "ignore:.*rows save no",
    "ignore:.*deprecated",
    "ignore:.*TracerWarning",
    "ignore:.*LeafSpec",
)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*layers).double().eval()


def row_wise(called: bool = False) -> nn.Sequential:
    net = lrcnn_lightning.rowwise(network(), mode="two_phase", rows=3)
    if called:
        net(IMAGES)
    return net


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def dual(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            result: Tensor = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))).primal
        return result

    return call


READERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "export": lambda net: torch.export.export(net, (IMAGES,)).module(),
    "export, strict": lambda net: torch.export.export(net, (IMAGES,), strict=True).module(),
    "trace": lambda net: torch.jit.trace(net, (IMAGES,)),
    "freeze": lambda net: torch.jit.freeze(torch.jit.trace(Around(net).eval(), (IMAGES,))),
    "compile": lambda net: torch.compile(net, backend="eager", fullgraph=True),
    "compile around": lambda net: torch.compile(Around(net), backend="aot_eager"),
    "compile in place": in_place,
    "fx": torch.fx.symbolic_trace,
    "fx around": lambda net: torch.fx.symbolic_trace(Around(net)),
    "make_fx": lambda net: make_fx(net)(IMAGES),
    "vmap": lambda net: lambda x: torch.vmap(net)(x[:, None])[:, 0],
    "jvp": lambda net: lambda x: torch.func.jvp(net, (x,), (x,))[0],
    "dual numbers": dual,
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "save": saved,
    "functional_call": lambda net: lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
    "average": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("reader", READERS)
def test_what_others_make_of_a_row_wise_module(reader: str, called: bool) -> None:
    net = row_wise(called)
    want = network()(IMAGES)
    assert difference(READERS[reader](net)(IMAGES).detach(), want.detach()) < 1e-9
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", [lambda net: net, Around])
def test_torchscript_gets_a_clear_error(wrap: Any) -> None:
    net = row_wise()
    with pytest.raises(CaptureError, match=r"torch\.jit\.script compiles the source.*restore\(module\) before"):
        torch.jit.script(wrap(net))
    scripted = torch.jit.script(wrap(lrcnn_lightning.restore(net)))
    assert difference(scripted(IMAGES).detach(), network()(IMAGES).detach()) < 1e-9


def test_its_signature_is_that_of_the_module() -> None:
    assert inspect.signature(row_wise().forward) == inspect.signature(network().forward)
    assert row_wise().forward.__name__ == "forward"
    assert not hasattr(row_wise().forward, "__globals__")


@pytest.mark.parametrize("training", [False, True])
def test_threads_in_the_first_call(training: bool) -> None:
    """Of several threads one captures, and classes and flags of PyTorch are others meanwhile; the others wait."""
    nets = [row_wise(), row_wise()]
    plain = network()
    plain(IMAGES).sum().backward()
    want = [plain(IMAGES).detach(), *(p.grad for p in plain.parameters())]
    results: list[Any] = []

    def run(net: nn.Module) -> None:
        try:
            with torch.set_grad_enabled(training):
                out = net(IMAGES)
            gradients = torch.autograd.grad(out.sum(), list(net.parameters())) if training else want[1:]
            results.append([out.detach(), *gradients])
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(net,)) for net in (*nets, *nets, plain, *nets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    for got in results:
        assert not isinstance(got, Exception), got
        for mine, theirs in zip(got, want, strict=True):
            assert difference(mine, theirs) < 1e-9
    assert [net.forward.plan.rows for net in nets] == [3, 3]
    assert [len(net.forward._graphs) for net in nets] == [1, 1], "captured once each"
