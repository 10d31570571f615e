"""Random numbers are those of plain training: on the CPU every operation gets the same ones, in any order of any kinds.

The masks of dropout were drawn in front of all rows, and operations that read the data, as RReLU does, draw when they
run: a dropout behind an RReLU had another mask than in plain training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lrcnn_lightning
from lrcnn_lightning.graph import dense_strides
from lrcnn_lightning.rules import Role, RowGraph
from tests.networks import Call
from tests.oracle import difference, differences, observe, row_graph, twin

C = 4
IMAGES = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(x: Tensor) -> Tensor:
    """``N L C``."""
    return functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)


def added(x: Tensor, mixed: Tensor) -> Tensor:
    """A map, and tokens as a map of its size."""
    small = mixed.transpose(1, 2).reshape(*x.shape[:2], x.shape[2] // 4, x.shape[3] // 4)
    return x + functional.interpolate(small, scale_factor=4.0)


def attention(x: Tensor) -> Tensor:
    query = tokens(x)[:, None]
    return added(x, functional.scaled_dot_product_attention(query, query, query, dropout_p=0.3)[:, 0])


class Heads(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.heads, self.weights = nn.MultiheadAttention(C, 2, 0.3, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        query = tokens(x)
        return added(x, self.heads(query, query, query, need_weights=self.weights)[0])


def depth(x: Tensor) -> Tensor:
    noise = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.6)
    noise.div_(0.6)
    return x * noise


def fractional(x: Tensor) -> Tensor:
    small = functional.fractional_max_pool2d(x, 2, output_size=(x.shape[2] // 2, x.shape[3] // 2))
    return functional.interpolate(small, scale_factor=2.0)


def picked(x: Tensor) -> Tensor:
    return x * torch.multinomial(x.detach().abs().mean((2, 3)) + 0.1, 2).sum(1).to(x)[:, None, None, None]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout2d": lambda: nn.Dropout2d(0.4),
    "alpha dropout": lambda: nn.AlphaDropout(0.2),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.2),
    "rrelu": nn.RReLU,
    "attention": lambda: Call(attention),
    "multi-head attention": lambda: Heads(True),
    "multi-head attention without weights": lambda: Heads(False),
    "bernoulli": lambda: Call(lambda x: x * torch.bernoulli(x.detach().sigmoid())),
    "normal": lambda: Call(lambda x: x + torch.normal(x.detach().abs(), 0.1)),
    "poisson": lambda: Call(lambda x: x + torch.poisson(x.detach().abs() * 20)),
    "multinomial": lambda: Call(picked),
    "gumbel": lambda: Call(lambda x: functional.gumbel_softmax(x, dim=1)),
    "fractional pooling": lambda: Call(fractional),
    "stochastic depth": lambda: Call(depth),
    "rand": lambda: Call(lambda x: x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)),
    "rand_like": lambda: Call(lambda x: x * torch.rand_like(x)),
    "randn_like": lambda: Call(lambda x: x + torch.randn_like(x)),
    "normal_": lambda: Call(lambda x: x + torch.empty_like(x).normal_(0, 0.2)),
    "exponential_": lambda: Call(lambda x: x + torch.empty_like(x).exponential_(2.0)),
    "uniform_ of a copy": lambda: Call(lambda x: x + x.detach().clone().uniform_()),
}
READS_DATA = {
    *("rrelu", "attention", "multi-head attention without weights", "bernoulli", "normal", "poisson"),
    *("multinomial", "uniform_ of a copy"),
}


def network(*kinds: str) -> nn.Sequential:
    """A convolution before, between and behind operations of these kinds."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, C, 3, padding=1)]
    for kind in kinds:
        layers += [KINDS[kind](), nn.Conv2d(C, C, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv2d(C, 2, 1))


def verify(net: nn.Module, images: Tensor, **options: Any) -> None:
    """Two steps: everything is as in plain training, and the generator goes on from the same state."""
    ours = lrcnn_lightning.rowwise(twin(net), max_overhead=float("inf"), **options)
    for seed in (5, 6):
        states = []
        seen = []
        for module in (net, ours):
            module.zero_grad()
            seen.append(observe(module, module, [images], seed))
            states.append(torch.get_rng_state())
        assert not differences(seen[1], seen[0], 1e-9 if images.dtype is torch.float64 else 1e-4)
        assert torch.equal(*states)


@pytest.mark.parametrize("kind", KINDS)
def test_before_and_after_others(kind: str) -> None:
    verify(network("dropout", kind, "rrelu", "dropout").double(), IMAGES, mode="two_phase", rows=3, segments=1)
    verify(network("rrelu", "dropout2d", kind, "poisson").double(), IMAGES, mode="overlap", rows=2, segments=3)


class Branches(nn.Module):
    """A mask that comes behind an RReLU in the code, and does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = functional.rrelu(self.left(x), training=True)
        right = functional.dropout(self.right(x), 0.3)
        left = functional.dropout(left + torch.poisson(left.detach().abs()), 0.2)
        return self.last(left * right + torch.rand_like(left))


@pytest.mark.parametrize("options", [{"mode": "two_phase", "segments": 1}, {"mode": "overlap", "segments": 2}])
def test_in_branches(options: dict[str, Any]) -> None:
    verify(Branches().double(), IMAGES, rows=3, **options)


@pytest.mark.parametrize("kind", ["dropout", "alpha dropout", "bernoulli", "rand_like", "normal_", "exponential_"])
@pytest.mark.parametrize("of", ["images", "weights"])
def test_where_channels_lie_last(kind: str, of: str) -> None:
    """Numbers go to elements as these lie in memory, and a mask was laid out with its channels first."""
    net, images = network(kind, "poisson", kind).double(), IMAGES
    ours = network(kind, "poisson", kind).double()
    lrcnn_lightning.rowwise(ours, mode="two_phase", rows=3, max_overhead=float("inf"))
    ours(images)  # what is known of one layout is not taken for another
    if of == "images":
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        net.to(memory_format=torch.channels_last)
        ours.to(memory_format=torch.channels_last)
    torch.manual_seed(5)
    expected = net(images)
    torch.manual_seed(5)
    assert difference(ours(images), expected) < 1e-9


def test_in_single_precision() -> None:
    verify(network("dropout", "rrelu", "normal_", "poisson", "dropout"), IMAGES.float(), mode="two_phase", rows=3)


def drawn(graph: RowGraph) -> list[Role]:
    return [role for node, role in zip(graph.nodes, graph.roles, strict=True) if str(node.op) == "rowwise.draw_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_wait_for_what_reads_the_data_alone(kind: str) -> None:
    graph = row_graph(network("dropout", kind, "dropout").double(), [IMAGES])
    roles = drawn(graph)
    assert roles[0] is Role.PROLOGUE
    assert roles[-1] is (Role.WHOLE if kind in READS_DATA else Role.PROLOGUE)


@pytest.mark.parametrize(
    "silent",
    [
        nn.RReLU().eval(),
        Call(lambda x: added(x, functional.scaled_dot_product_attention(*[tokens(x)] * 3))),
        nn.Dropout(0.0),
        nn.Dropout(1.0),
        nn.Dropout(0.5).eval(),
    ],
    ids=["rrelu", "attention", "none dropped", "all dropped", "dropout"],
)
def test_what_draws_nothing_lets_nobody_wait(silent: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), silent, nn.Dropout(0.3), nn.Conv2d(C, C, 1))
    assert drawn(row_graph(net, [IMAGES.float()])) == [Role.PROLOGUE]


# ----------------------------------------------------------------------------------------------------- layouts


LAYOUTS: dict[str, Tensor] = {
    "contiguous": IMAGES,
    "channels_last": IMAGES.contiguous(memory_format=torch.channels_last),
    "transposed": IMAGES.transpose(2, 3).contiguous().transpose(2, 3),
    "rows first": IMAGES.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "expanded": IMAGES[:, :1].expand(2, 3, 24, 20),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["dropout", "rrelu", "rrelu, then dropout", "convolution, rrelu, dropout"])
def test_layouts(kind: str, layout: str) -> None:
    """Numbers go to elements as these lie in memory. RReLU makes a contiguous map of any, and its rule for tensors
    without data says otherwise; the channels of an expanded map were taken to lie innermost.
    """
    layers: dict[str, list[nn.Module]] = {
        "dropout": [nn.Dropout(0.4)],
        "rrelu": [nn.RReLU()],
        "rrelu, then dropout": [nn.RReLU(), nn.Dropout(0.4)],
        "convolution, rrelu, dropout": [nn.Conv2d(3, 3, 1), nn.RReLU(), nn.Dropout(0.4)],
    }
    torch.manual_seed(0)
    verify(nn.Sequential(*layers[kind], nn.Conv2d(3, 2, 1)).double(), LAYOUTS[layout], mode="two_phase", rows=3)


def test_a_new_tensor_lies_as_pytorch_lays_it() -> None:
    choose = random.Random(0)
    for _ in range(2000):
        shape = [choose.randint(1, 4) for _ in range(choose.randint(1, 5))]
        order = choose.sample(range(len(shape)), len(shape))
        tensor = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
        if choose.random() < 0.5:
            tensor = tensor.narrow(choose.randrange(len(shape)), 0, 1).expand(shape)
        if choose.random() < 0.3:
            tensor = tensor[..., ::2]
        want, got = torch.empty_like(tensor).stride(), dense_strides(tuple(tensor.shape), tensor.stride())
        assert [w for w, size in zip(want, tensor.shape, strict=True) if size > 1] == [
            g for g, size in zip(got, tensor.shape, strict=True) if size > 1
        ], f"{tuple(tensor.shape)}, {tensor.stride()}"
