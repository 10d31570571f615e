"""The schedule of a plan: its text parses back, it is sound, and a broken one is found out; saved plans."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcnn_lightning
from lrcnn_lightning import ConfigError, PlanError
from lrcnn_lightning.models import resnet50, unet
from lrcnn_lightning.planning.choices import Choices
from lrcnn_lightning.planning.keeping import KEEPINGS
from lrcnn_lightning.planning.load import load_plans
from lrcnn_lightning.planning.plan import Plan
from lrcnn_lightning.planning.planner import Planner
from lrcnn_lightning.planning.problem import Problem
from lrcnn_lightning.planning.residency import KEEP
from lrcnn_lightning.planning.schedule import Instruction, parse, validate
from tests.exact import assert_same_step
from tests.oracle import requires_grad_leaves, row_graph


class Mixed(nn.Module):
    """Residual, normalised, with a whole operation in its middle and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = torch.relu(x + self.block(x))
        z = y + torch.softmax(y.flatten(2), -1).view_as(y)
        return self.head(z), z.mean((2, 3))


def plans() -> list[tuple[str, Plan]]:
    found = []
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (Mixed(), (2, 3, 24, 20)),
        (unet(base_channels=4), (1, 3, 32, 32)),
    ]
    for module, shape in cases:
        x = torch.randn(shape)
        graph = row_graph(module, [x], "auto")
        leaves = requires_grad_leaves(graph.graph, module, [x])
        for mode in ("two_phase", "overlap"):
            for keeping in KEEPINGS:
                for segments in (1, 3):
                    choices = Choices(mode, 4, segments, 1, keeping)
                    found.append(
                        (f"{type(module).__name__} {choices}", Planner(Problem(graph, leaves, True)).plan(choices))
                    )
    return found


def test_every_schedule_is_sound_and_its_text_parses_back() -> None:
    for name, plan in plans():
        text = "\n".join(str(line) for line in plan.schedule)
        assert parse(text) == plan.schedule, name
        validate(plan.schedule)
        assert any(line.direction == "backward" for line in plan.schedule)


def test_a_plan_without_backward_is_sound() -> None:
    module = Mixed().eval()
    graph = row_graph(module, [torch.randn(1, 3, 24, 20)], "auto")
    validate(Planner(Problem(graph, frozenset(), False)).plan(Choices("two_phase", 4)).schedule)


def without(verb: str, direction: str = "backward") -> Callable[[list[Instruction]], list[Instruction]]:
    """Leave out the first instruction of a kind."""

    def change(lines: list[Instruction]) -> list[Instruction]:
        place = next(i for i, line in enumerate(lines) if line.verb == verb and line.direction == direction)
        return [*lines[:place], *lines[place + 1 :]]

    return change


def free_twice(lines: list[Instruction]) -> list[Instruction]:
    place = next(i for i, line in enumerate(lines) if line.verb == "free")
    return [*lines[: place + 1], *lines[place:]]


def free_early(lines: list[Instruction]) -> list[Instruction]:
    place = next(i for i, line in enumerate(lines) if line.verb == "free" and line.direction == "backward")
    start = next(i for i, line in enumerate(lines) if line.direction == "backward")
    return [*lines[:start], lines[place], *lines[start:place], *lines[place + 1 :]]


def passes_swapped(lines: list[Instruction]) -> list[Instruction]:
    """A pass that collects a gradient runs after the pass that reads it."""
    pairs = [
        (i, j)
        for i, first in enumerate(lines)
        for j, second in enumerate(lines)
        if i < j and first.direction == second.direction == "backward" and {*first.into} & {*second.gradients}
    ]
    i, j = pairs[0]
    return [*lines[:i], *lines[i + 1 : j + 1], lines[i], *lines[j + 1 :]]


def carries_lost(lines: list[Instruction]) -> list[Instruction]:
    return [replace(line, keeps="") for line in lines]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (free_twice, "is not there"),
        (free_early, "is not there|was freed"),
        (without("rows", "forward"), "is not there"),
        (passes_swapped, "before it is complete|is dropped and read later"),
        (carries_lost, "carries of .* are not there"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_a_broken_schedule_is_found_out(change: Callable[..., list[Instruction]], message: str) -> None:
    module: nn.Module = (
        Mixed() if change is not carries_lost else nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)))
    )
    x = torch.randn(2, 3, 24, 20)
    graph = row_graph(module, [x], "auto")
    leaves = requires_grad_leaves(graph.graph, module, [x])
    plan = Planner(Problem(graph, leaves, True)).plan(Choices("two_phase", 4, 1, 1, "lean"))
    with pytest.raises(PlanError, match=rf"line \d+ of the schedule.*({message})"):
        validate(change(list(plan.schedule)))


@pytest.mark.parametrize("text", ["s0 forward", "s0 forward rows s0.f0 reads:x", "s0 forward rows s0.f0 wants=x"])
def test_text_that_is_no_schedule(text: str) -> None:
    with pytest.raises(PlanError, match="line 1 of the schedule"):
        parse(text)


# ---------------------------------------------------------------------------------------------------- saved plans


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    module, example = resnet50(width=0.125), torch.randn(1, 3, 64, 64)
    plan = lrcnn_lightning.plan(module, example, memory_budget=None, max_overhead=10.0)
    saved = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert saved.to_dict() == plan.to_dict()
    assert (saved.mode, saved.peak_bytes, saved.plain_peak_bytes) == (plan.mode, plan.peak_bytes, plan.plain_peak_bytes)
    assert saved.overhead == plan.overhead and "saved plan" in str(saved)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(saved.to_dict()))
    for given in (plan, saved, saved.to_dict(), path, str(path)):
        ours = lrcnn_lightning.rowwise(copy.deepcopy(module), plan=given)
        ours(example).sum().backward()
        used = ours.__dict__["forward"].training_plan
        assert used.to_dict() == plan.to_dict()


def test_an_edited_plan_is_used_as_edited() -> None:
    module, x = Mixed().double(), torch.randn(2, 3, 24, 20, dtype=torch.float64)
    data = lrcnn_lightning.plan(module, x, mode="two_phase", rows=2, segments=2).to_dict()
    first, second = data["segments"]
    first |= {"rows": 5, "keeping": "demand"}
    second |= {"mode": "overlap", "rows": 3}
    data["batch_chunks"] = 2
    streamed = [name for name, residency in data["residency"].items() if residency == "stream"]
    data["exceptions"] = {streamed[1]: "keep", streamed[-2]: "transient/stream"}
    assert_same_step(module, x, plan=data)
    ours = lrcnn_lightning.rowwise(module, plan=data)
    ours(x)[0].sum().backward()
    used = ours.__dict__["forward"].training_plan.to_dict()
    assert used["segments"] == [first, second] and used["exceptions"] == data["exceptions"]
    assert {name: used["residency"][name] for name in used["exceptions"]} == used["exceptions"]


def test_a_saved_plan_has_its_axis() -> None:
    """It was left out, and the plan was then made again along the longest axis."""
    module, x = Mixed().double(), torch.randn(2, 3, 20, 24, dtype=torch.float64)
    data = lrcnn_lightning.plan(module, x, axis=2, mode="two_phase", rows=5).to_dict()
    ours = lrcnn_lightning.rowwise(copy.deepcopy(module), plan=data)
    ours(x)
    assert ours.__dict__["forward"].training_plan.to_dict() == data
    lrcnn_lightning.rowwise(copy.deepcopy(module), plan=data, axis=-2)(x)
    with pytest.raises(PlanError, match="cuts dimension 2 of the input into rows, and here it is dimension 3"):
        lrcnn_lightning.rowwise(copy.deepcopy(module), plan=data, axis=3)(x)
    del data["axis"]  # of an older version
    ours = lrcnn_lightning.rowwise(copy.deepcopy(module), plan=data, axis=2)
    ours(x)
    assert ours.__dict__["forward"].training_plan.to_dict() == data | {"axis": 2}


class InPlace(nn.Module):
    """Its maps are written over, so that several values have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.first(x)) * 1.0
        z[:, ::2] *= 0.5
        z = z * 2.0
        z[:, 1] += 1.0
        result: Tensor = self.last(z)
        return result


def test_a_saved_plan_tells_maps_of_one_name_apart() -> None:
    """Exceptions went by a name that several maps had, and came back as those of the last one."""
    module, x = InPlace(), torch.randn(2, 3, 24, 20)
    graph = row_graph(module, [x], "auto")
    leaves = requires_grad_leaves(graph.graph, module, [x])
    names = [value.name for value in graph.values]
    alike = [value for value, name in enumerate(names) if names.count(name) > 1 and graph.is_map(value)]
    assert alike
    for value in alike:
        plan = Planner(Problem(graph, leaves, True)).plan(
            Choices("two_phase", 4, 1, 1, "lean", exceptions=((value, KEEP),))
        )
        again = Planner(Problem(graph, leaves, True)).saved(Plan.from_dict(plan.to_dict()))
        assert again.choices.exceptions == ((value, KEEP),) and again.to_dict() == plan.to_dict()


def test_wrong_plans(tmp_path: Path) -> None:
    module, x = Mixed(), torch.randn(2, 3, 24, 20)
    data = lrcnn_lightning.plan(module, x, mode="two_phase", rows=2).to_dict()
    wrong: list[tuple[Any, str]] = [
        ({"mode": "two_phase"}, "not the data of a plan: rows"),
        (data | {"axis": "height"}, "the axis of the plan is 'height'; allowed is a dimension"),
        (3, "a plan is a Plan, its data or a JSON file"),
        (tmp_path / "none.json", "cannot be read: No such file"),
        (data | {"segments": [data["segments"][0] | {"first": "elsewhere"}]}, "has no operation of that name"),
        (data | {"segments": [data["segments"][0] | {"rows": 0}]}, "rows 0; allowed are"),
        (data | {"segments": [data["segments"][0] | {"keeping": "all"}]}, "keeping 'all'; allowed are borders"),
        (data | {"exceptions": {"nowhere": "keep"}}, "no map 'nowhere'"),
        (data | {"exceptions": {"x": "kept"}}, "'x' is 'kept'; allowed are 'keep', 'transient', 'stream'"),
    ]
    for given, message in wrong:
        with pytest.raises(PlanError, match=message):
            lrcnn_lightning.rowwise(copy.deepcopy(module), plan=given)(x)
    with pytest.raises(ConfigError, match="rows=4 is for planning, and a plan was given"):
        lrcnn_lightning.rowwise(module, plan=data, rows=4)
    with pytest.raises(PlanError, match="this is one plan; here plans go by module name"):
        load_plans(data)
