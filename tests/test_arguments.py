"""What a module's code does to its arguments, its results, its class and its file beside computing with tensors.

All of it was done once, by the capture, or not at all, and nobody was told.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import CaptureError

IMAGES = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NUMBER = 1
FEATURES: list[Any] = []
BY_NAME: dict[str, Tensor] = {}
GRIDS: dict[int, Tensor] = {}
TOLD: set[str] = set()
FLAG = False


@dataclasses.dataclass
class Sample:
    image: Tensor
    number: int = 0


class Net(nn.Module):
    """Two convolutions; a subclass says what else there is to its code."""

    count: ClassVar[int] = 0
    log: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def run(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Appends(Net):
    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        features.append(F.relu(self.a(x)))
        return self.b(features[-1])


class SetsItem(Net):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        batch["feature"] = F.relu(self.a(batch["image"]))
        return self.b(batch["feature"])


class SetsConstant(Net):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        batch["scale"] = torch.full((3, 1, 1), 2.0, dtype=torch.float64)
        return self.run(batch["image"])


class Pops(Net):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.run(batch.pop("image"))


class Nested(Net):
    def forward(self, batch: list[Any]) -> Tensor:
        batch[1]["seen"].append(len(batch))
        return self.run(batch[0])


class Record(Net):
    def forward(self, sample: Sample) -> Tensor:
        sample.number += 1
        return self.run(sample.image) * sample.number


class Object(Net):
    def forward(self, x: Tensor, holder: Any) -> Tensor:
        holder.number += 1
        return self.run(x) * holder.number


class MarksInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.seen = True  # type: ignore[attr-defined]
        return self.run(x)


class MarksResult(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        y.scale = 2  # type: ignore[attr-defined]
        return y


class CountsOnClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        return self.run(x) * type(self).count


class LogsOnClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.log.append(3)
        return self.run(x) * len(self.log)


class CountsInFile(Net):
    def forward(self, x: Tensor) -> Tensor:
        global NUMBER
        NUMBER += 1
        return self.run(x) * NUMBER


class KeepsInFile(Net):
    def forward(self, x: Tensor) -> Tensor:
        feature = F.relu(self.a(x))
        FEATURES.append(feature)
        return self.b(feature)


class KeepsByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        BY_NAME["feature"] = feature = F.relu(self.a(x))
        return self.b(feature)


def _reset() -> None:
    global NUMBER
    NUMBER = 1
    FEATURES.clear()
    BY_NAME.clear()
    Net.log.clear()
    for kind in (Net, CountsOnClass):
        kind.count = 0


def _batch(**more: Any) -> dict[str, Any]:
    return {"image": IMAGES.clone(), **more}


def _features(features: list[Tensor]) -> Tensor:
    return sum((feature.sum() for feature in features), torch.zeros((), dtype=torch.float64))


def _appended(net: nn.Module) -> tuple[Any, ...]:
    features: list[Tensor] = []
    y = net(IMAGES, features)
    return y, _features(features), len(features)


def _of_batch(net: nn.Module) -> tuple[Any, ...]:
    batch = _batch(number=3)
    y = net(batch)
    return y, batch.get("feature", batch.get("scale", torch.zeros(()))).sum(), sorted(batch)


def _nested(net: nn.Module) -> tuple[Any, ...]:
    batch = [IMAGES, {"seen": [0]}]
    return net(batch), torch.zeros(()), batch[1]


def _record(net: nn.Module) -> tuple[Any, ...]:
    sample = Sample(IMAGES.clone())
    return net(sample), torch.zeros(()), sample.number


def _object(net: nn.Module) -> tuple[Any, ...]:
    holder = SimpleNamespace(number=0)
    return net(IMAGES, holder), torch.zeros(()), holder.number


def _marks(net: nn.Module) -> tuple[Any, ...]:
    x = IMAGES.clone()
    y = net(x)
    return y, torch.zeros(()), (vars(x), vars(y))


def _global(net: nn.Module) -> tuple[Any, ...]:
    FEATURES.clear()
    BY_NAME.clear()
    y = net(IMAGES)
    return y, _features([*FEATURES, *BY_NAME.values()]), (NUMBER, Net.log[:], CountsOnClass.count)


CASES: dict[type[Net], tuple[Callable[[nn.Module], tuple[Any, ...]], str]] = {
    Appends: (_appended, "changes the list inside of its arguments"),
    SetsItem: (_of_batch, "changes the dict inside of its arguments"),
    SetsConstant: (_of_batch, "changes the dict inside of its arguments"),
    Pops: (_of_batch, "changes the dict inside of its arguments"),
    Nested: (_nested, "changes the list"),
    Record: (_record, "changes the Sample"),
    Object: (_object, "takes an object of type SimpleNamespace"),
    MarksInput: (_marks, "sets seen of a tensor that it takes or returns"),
    MarksResult: (_marks, "sets scale of a tensor that it takes or returns"),
    CountsOnClass: (_global, "changes a number of the class CountsOnClass"),
    LogsOnClass: (_global, "changes the list 'log' of the class Net"),
    CountsInFile: (_global, "changes a number of the file"),
    KeepsInFile: (_global, "changes the list 'FEATURES' of the file"),
    KeepsByName: (_global, "remembers .*, which depends on the data"),
}


def _observed(net: Net, call: Callable[[nn.Module], tuple[Any, ...]]) -> list[Any]:
    _reset()
    seen: list[Any] = []
    for _ in range(3):
        net.zero_grad()
        y, beside, state = call(net)
        (y.square().sum() + beside).backward()
        seen += [y.detach(), torch.as_tensor(beside).detach(), copy.deepcopy(state)]
        seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return seen


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: str(kind.__name__))
def test_is_refused_and_done_by_each_call(kind: type[Net]) -> None:
    call, text = CASES[kind]
    torch.manual_seed(0)
    net = kind().double()
    options: dict[str, Any] = {"mode": "two_phase", "rows": 3, "max_overhead": float("inf")}
    _reset()
    with pytest.raises(CaptureError, match=text):
        call(lrcnn_lightning.rowwise(copy.deepcopy(net), **options))
    assert (NUMBER, FEATURES, BY_NAME, Net.log, CountsOnClass.count) == (1, [], {}, [], 0)
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), **options, on_unsupported="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, got = _observed(net, call), _observed(ours, call)
    assert len(want) == len(got)
    for one, other in zip(want, got, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
        else:
            assert other == one


# -------------------------------------------------------------------------------------------- nothing to refuse


class CachesInFile(Net):
    def forward(self, x: Tensor) -> Tensor:
        global FLAG
        FLAG = True
        TOLD.add("told")
        if x.shape[2] not in GRIDS:
            GRIDS[x.shape[2]] = torch.linspace(0, 1, x.shape[2], dtype=x.dtype)[:, None]
        return self.run(x * GRIDS[x.shape[2]])


class ReadsMark(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) * getattr(x, "scale", 1.0)


class ReadsClosure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scales = scales = [1.0]
        self.scaled = lambda y: y * scales[0]

    def __deepcopy__(self, memo: Any) -> ReadsClosure:
        made = ReadsClosure().double()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.run(x))


def test_caches_and_flags_of_a_file_run_by_rows() -> None:
    torch.manual_seed(0)
    net = CachesInFile().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), mode="two_phase", rows=3, max_overhead=float("inf"))
    for _ in range(2):
        torch.testing.assert_close(ours(IMAGES), net(IMAGES), rtol=1e-10, atol=1e-10)
    assert ours.forward.plan is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [ReadsMark, ReadsClosure])
def test_what_is_read_may_change(kind: type[Net]) -> None:
    """An attribute of an input was not there; a variable of a function's surroundings was what it had been at first."""
    torch.manual_seed(0)
    net = kind().double()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(net), mode="two_phase", rows=3, max_overhead=float("inf"))
    for scale in (1.0, 2.0, 5.0):
        x = IMAGES.clone()
        x.scale = scale  # type: ignore[attr-defined]
        for each in (net, ours):
            if isinstance(each, ReadsClosure):
                each.scales[0] = scale
        torch.testing.assert_close(ours(x), net(x), rtol=1e-10, atol=1e-10)
    assert ours.forward.plan is not None  # type: ignore[union-attr]


class Listed(nn.Module):
    """Has a parameter that is not registered, and takes no map."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.scales = [nn.Parameter(torch.ones((), dtype=torch.float64))]
        self.register_buffer("mean", torch.ones(()))
        self.means = (self.mean,)

    def forward(self, x: Tensor) -> Tensor:
        self.means[0].mul_(0.9)
        return self.convolution(x.reshape(2, 1, 6, 1)) * self.scales[0] + self.means[0]


def test_what_it_would_take_plainly_is_measured_without_a_trace() -> None:
    """The warning names the memory of a plain call; measuring it left a gradient without data on the parameter, and
    changed the buffer once more.
    """
    torch.manual_seed(0)
    x = torch.randn(2, 6, dtype=torch.float64)
    net = Listed()
    net.convolution.double()
    ours = copy.deepcopy(net)
    lrcnn_lightning.rowwise(ours, on_unsupported="warn")
    with pytest.warns(UserWarning, match="no input has a spatial axis"):
        for _ in range(2):
            ours(x).square().sum().backward()
    for _ in range(2):
        net(x).square().sum().backward()
    assert net.scales[0].grad is not None and ours.scales[0].grad is not None
    torch.testing.assert_close(ours.scales[0].grad, net.scales[0].grad, rtol=1e-10, atol=1e-10)
    assert ours.mean.item() == net.mean.item() == pytest.approx(0.81)
