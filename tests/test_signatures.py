"""What a module may take and return: nested inputs and outputs, keywords, sharing, recursion, other dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from tests.oracle import difference

OPTIONS: list[dict[str, Any]] = [
    {"mode": "two_phase", "rows": 3},
    {"mode": "overlap", "rows": 2, "segments": 2},
    {"mode": "two_phase", "rows": 11, "batch_chunks": 2},
]


def image(*shape: int, seed: int = 0, gradient: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 4, 11, 9)), generator=generator, dtype=torch.float64).requires_grad_(gradient)


@dataclass
class Batch:
    image: Tensor
    shift: Tensor
    scale: float = 2.0


@dataclass
class Features:
    fine: Tensor
    coarse: Tensor
    note: str = "two scales"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Network(nn.Module):
    """A convolution with BatchNorm, and a function of both that a case brings."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.function = function

    def block(self, x: Tensor) -> Tensor:
        result: Tensor = torch.relu(self.norm(self.conv(x)))
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def in_dict(net: Network, given: dict[str, Any]) -> Any:
    x = net.block(given["image"])
    return {"maps": [x, x.mean((2, 3))], "none": None, "label": "a", "count": 3, "deep": ({"input": given["more"][0]},)}


def keywords(net: Network, x: Tensor, *, extra: Tensor | None = None, scale: float = 1.0) -> Tensor:
    x = net.block(x) * scale
    return x if extra is None else x + extra


def dataclasses_(net: Network, batch: Batch) -> Features:
    x = net.block(batch.image) * batch.scale + batch.shift
    return Features(x, nn.functional.max_pool2d(x, 2))


def named_tuples(net: Network, pair: Pair) -> Pair:
    return Pair(net.block(pair.first), net.block(pair.second))


def pyramid(net: Network, x: Tensor) -> dict[str, Tensor]:
    levels = {"p2": net.block(x)}
    levels["p3"] = nn.functional.max_pool2d(net.block(levels["p2"]), 2)
    levels["p4"] = nn.functional.avg_pool2d(net.conv(levels["p3"]), 2)
    levels["p3"] = levels["p3"] + nn.functional.interpolate(levels["p4"], levels["p3"].shape[2:])
    return levels


def ordinary_differential_equation(net: Network, x: Tensor) -> Tensor:
    for _ in range(4):  # explicit Euler steps with one block
        x = x + 0.25 * net.block(x)
    return x


def same_output_twice(net: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = net.block(x)
    return y, y, x


def integers(net: Network, x: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
    table = torch.arange(12, dtype=x.dtype).view(3, 4).sin()
    return net.block(x).masked_fill(mask, 0.0) + nn.functional.embedding(classes, table)[:, :, None, None]


def complex_side(net: Network, x: Tensor, wave: Tensor) -> tuple[Tensor, Tensor]:
    y = net.block(x)
    return y * wave.abs(), wave * 2


def complex_map(net: Network, x: Tensor) -> Tensor:
    y = net.block(x)
    return torch.view_as_real(torch.complex(y, 2 * y) * (1 + 2j)).sum(-1)


def two_images(net: Network, x: Tensor, low: Tensor) -> Tensor:
    y = nn.functional.max_pool2d(net.block(x), 2, ceil_mode=True)
    return y + net.conv(low)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "dict": (in_dict, ({"image": image(), "more": [image(2, 3, seed=1)]},), {}),
    "keywords": (keywords, (image(),), {"extra": image(seed=1), "scale": 3.0}),
    "keyword None": (keywords, (image(),), {"extra": None}),
    "dataclass": (dataclasses_, (Batch(image(), image(2, 4, 1, 1, seed=1)),), {}),
    "named tuple": (named_tuples, (Pair(image(), image(2, 4, 7, 5, seed=1)),), {}),
    "pyramid": (pyramid, (image(),), {}),
    "steps of an equation": (ordinary_differential_equation, (image(),), {}),
    "one output twice": (same_output_twice, (image(),), {}),
    "integer side inputs": (integers, (image(), torch.tensor([2, 0]), image(seed=1, gradient=False) > 0), {}),
    "complex side input": (complex_side, (image(), torch.complex(image(), image(seed=1)).detach()), {}),
    "complex map": (complex_map, (image(),), {}),
    "inputs of two sizes": (two_images, (image(), image(2, 4, 6, 5, seed=1)), {}),
    "input without gradient": (two_images, (image(gradient=False), image(2, 4, 6, 5, seed=1)), {}),
}


def fresh(tree: Any) -> tuple[Any, list[Tensor]]:
    """A copy of the arguments with gradients of their own, and the tensors among them that need one."""
    tree = copy.deepcopy(detached(tree))
    leaves = [leaf for leaf in flat(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return tree, leaves


def detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    if isinstance(tree, (Batch, Features)):
        return type(tree)(**{name: detached(item) for name, item in vars(tree).items()})
    if isinstance(tree, dict):
        return {name: detached(item) for name, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(detached, tree))
    return type(tree)(map(detached, tree)) if isinstance(tree, (list, tuple)) else tree


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, (Batch, Features)):
        return flat(list(vars(tree).values()))
    if isinstance(tree, dict):
        return flat(list(tree.values()))
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in flat(item)]
    return [tree]


def step(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor | None]]:
    (args, kwargs), leaves = fresh((args, kwargs))
    output = module(*args, **kwargs)
    tensors = [leaf for leaf in flat(output) if isinstance(leaf, Tensor)]
    total = sum((t.abs() ** 2 * (1 + i)).sum() for i, t in enumerate(tensors) if t.requires_grad)
    assert isinstance(total, Tensor)
    total.backward()
    found: dict[str, Tensor | None] = {f"output {i}": t.detach() for i, t in enumerate(tensors)}
    found |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return output, found | dict(module.named_buffers())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["mode"] + str(options["rows"]))
@pytest.mark.parametrize("name", CASES)
def test_signature(name: str, options: dict[str, Any]) -> None:
    function, args, kwargs = CASES[name]
    torch.manual_seed(0)
    plain = Network(function).double()
    ours = copy.deepcopy(plain)
    want, expected = step(plain, args, kwargs)
    got, found = step(lrcnn_lightning.rowwise(ours, **options), args, kwargs)
    assert ours.__dict__["forward"].plan.mode == options["mode"]
    assert type(got) is type(want)
    assert [leaf for leaf in flat(got) if not isinstance(leaf, Tensor)] == [
        leaf for leaf in flat(want) if not isinstance(leaf, Tensor)
    ]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        mine = found[key]
        assert (mine is None) == (tensor is None), key
        if tensor is not None and mine is not None:
            assert difference(mine, tensor) < 1e-9, key


class Twice(nn.Module):
    """One block under two names, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(self.first, nn.ReLU())
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.first[0].weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.tied(self.second(self.first(x)))
        return result


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["mode"] + str(options["rows"]))
def test_a_module_used_by_two_others(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = Twice().double()
    ours = copy.deepcopy(plain)
    _, expected = step(plain, (image(),), {})
    _, found = step(lrcnn_lightning.rowwise(ours, **options), (image(),), {})
    assert ours.tied.weight is ours.first[0].weight
    for key, tensor in expected.items():
        mine = found[key]
        assert mine is not None and tensor is not None and difference(mine, tensor) < 1e-9, key
