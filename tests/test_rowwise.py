"""rowwise(), restore() and plan(), without Lightning; and every error that a user can meet there."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import lrcnn_lightning
from lrcnn_lightning import CaptureError, ConfigError, InputError, PlanError
from lrcnn_lightning.rowwise import RowwiseForward
from lrcnn_lightning.session import select_modules


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))


IMAGES = torch.randn(2, 3, 16, 12)


def test_in_place_and_back() -> None:
    net = _net()
    keys, ids = list(net.state_dict()), [id(p) for p in net.parameters()]
    assert lrcnn_lightning.rowwise(net, mode="two_phase", rows=4) is net
    assert type(net) is nn.Sequential and list(net.state_dict()) == keys
    assert [id(p) for p in net.parameters()] == ids
    assert isinstance(net.forward, RowwiseForward)
    net(IMAGES)
    assert lrcnn_lightning.restore(net) is net
    assert "forward" not in net.__dict__


def test_rowwise_twice_takes_the_last_options() -> None:
    net = lrcnn_lightning.rowwise(lrcnn_lightning.rowwise(_net(), rows=2), mode="overlap", rows=3)
    net(IMAGES)
    assert net.forward.plan.mode == "overlap" and net.forward.plan.rows == 3
    lrcnn_lightning.restore(net)
    assert "forward" not in net.__dict__


def test_a_forward_that_was_there_before_comes_back() -> None:
    net = _net()
    mine = lambda x: x  # noqa: E731
    net.forward = mine
    lrcnn_lightning.restore(lrcnn_lightning.rowwise(net, rows=2))
    assert net.forward is mine


def test_copies_are_independent() -> None:
    net = lrcnn_lightning.rowwise(_net(), mode="two_phase", rows=4)
    net(IMAGES)
    other = copy.deepcopy(net)
    assert other.forward.module is other and other.forward is not net.forward
    with torch.no_grad():
        other[0].weight.zero_()
    assert not torch.equal(net(IMAGES), other(IMAGES))
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(IMAGES), net(IMAGES))


def test_hooks_on_the_module_and_on_parameters_fire() -> None:
    net = lrcnn_lightning.rowwise(_net(), mode="two_phase", rows=4)
    seen: list[str] = []
    net.register_forward_hook(lambda *_: seen.append("forward"))
    net[0].weight.register_hook(lambda g: seen.append("gradient"))
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    net(IMAGES).sum().backward()
    assert seen == ["forward", "gradient", "accumulated"]


def test_plans_follow_shapes_state_and_gradients() -> None:
    net = lrcnn_lightning.rowwise(_net(), mode="two_phase", rows=4)
    net(IMAGES)
    first = net.forward.plan
    net(IMAGES)
    assert net.forward.plan is first
    net(torch.randn(1, 3, 20, 12))
    assert net.forward.plan is not first
    net[0].requires_grad_(False)
    net(IMAGES)
    assert net.forward.plan is not first
    net[0].requires_grad_(True)
    net(IMAGES)
    assert net.forward.plan is first
    with torch.no_grad():
        net(IMAGES)
    assert not net.forward.plan.training


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operations of all graphs together: small ones may be many."""
    monkeypatch.setattr("lrcnn_lightning.forward._MOST_CALLS", 4 * 18)  # in two rows, forward and backward
    monkeypatch.setattr("lrcnn_lightning.captures.MOST_NODES", 18)
    net = lrcnn_lightning.rowwise(nn.Conv2d(1, 1, 3), mode="two_phase", rows=2)
    for height in range(8, 30):
        net(torch.randn(1, 1, height, 5))
    assert len(net.forward._graphs) == len(net.forward._plans) == 18
    large = lrcnn_lightning.rowwise(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), mode="two_phase", rows=2)
    for height in range(8, 30):
        large(torch.randn(1, 1, height, 5))
    assert len(large.forward._graphs) == len(large.forward._plans) == 16


def test_inference_mode_and_no_grad() -> None:
    net = _net().eval()
    wanted = net(IMAGES)
    lrcnn_lightning.rowwise(net, mode="two_phase", rows=4)
    with torch.inference_mode():
        assert torch.allclose(net(IMAGES.clone()), wanted, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(net(IMAGES), wanted, atol=1e-6)


def test_gradients_accumulate_over_calls() -> None:
    net, other = _net().double(), _net().double()
    other.load_state_dict(net.state_dict())
    lrcnn_lightning.rowwise(net, mode="two_phase", rows=4)
    for module in (net, other):
        for _ in range(2):
            module(IMAGES.double()).square().sum().backward()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_backward_twice_with_retain_graph() -> None:
    net = lrcnn_lightning.rowwise(_net().double(), mode="two_phase", rows=4)
    loss = net(IMAGES.double()).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_autocast_is_that_of_the_forward_pass() -> None:
    """Backward runs after autocast has ended; the recomputation must run as the forward pass did."""
    net, other = _net(), _net()
    # A bias before BatchNorm has no gradient but rounding errors, which are not comparable in bfloat16.
    net[0], other[0] = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    other.load_state_dict(net.state_dict())
    lrcnn_lightning.rowwise(net, mode="two_phase", rows=4)
    for module in (net, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(IMAGES)
        assert output.dtype is torch.bfloat16
        output.float().square().sum().backward()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert mine.grad.dtype is torch.float32
        scale = theirs.grad.abs().max()
        assert (mine.grad - theirs.grad).abs().max() <= 0.05 * scale


def test_memory_format_is_kept() -> None:
    net = lrcnn_lightning.rowwise(_net().to(memory_format=torch.channels_last), mode="two_phase", rows=4)
    output = net(IMAGES.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_plan_without_running() -> None:
    net = _net()
    plan = lrcnn_lightning.plan(net, torch.empty(1, 3, 4096, 4096, device="meta"), mode="two_phase", rows=8)
    assert plan.mode == "two_phase" and plan.rows == 8
    assert 0 < plan.peak_bytes < plan.plain_peak_bytes
    assert "two-phase sharing" in str(plan)
    assert json.loads(json.dumps(plan.to_dict()))["mode"] == "two_phase"
    assert "forward" not in net.__dict__


def test_the_plan_of_a_module() -> None:
    """It is that of the latest training call; a validation in between does not hide it."""
    net = lrcnn_lightning.rowwise(_net(), mode="overlap", rows=4)
    assert lrcnn_lightning.plan_of(net) is None
    net(IMAGES).sum().backward()
    plan = lrcnn_lightning.plan_of(net)
    assert plan is not None and plan.training and plan.mode == "overlap" and plan.rows == 4
    with torch.no_grad():
        net(IMAGES)
    assert lrcnn_lightning.plan_of(net) is plan
    with pytest.raises(ConfigError, match=r"plan_of.*Sequential.*rowwise\(module\)"):
        lrcnn_lightning.plan_of(lrcnn_lightning.restore(net))


def test_a_budget_is_kept() -> None:
    net = _net()
    image = torch.empty(1, 3, 1024, 1024, device="meta")
    plain = lrcnn_lightning.plan(net, image).plain_peak_bytes
    plan = lrcnn_lightning.plan(net, image, memory_budget=int(plain * 0.7))
    assert plan.peak_bytes <= plain * 0.7 and plan.mode != "plain"
    assert lrcnn_lightning.plan(net, image, memory_budget=2 * plain).mode == "plain"


# ------------------------------------------------------------------- errors


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else x


def _call(module: nn.Module, x: torch.Tensor, **options: Any) -> None:
    lrcnn_lightning.rowwise(module, **options)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "two_phases"}, r"mode.*two_phases.*two_phase"),
        ({"rows": 0}, r"rows.*0"),
        ({"rows": 2.5}, r"rows.*2\.5"),
        ({"row": 4}, r"row.*rows"),
        ({"memory_budget": "six"}, r"six.*6GiB"),
        ({"modules": ["backbone"]}, r"modules=.*strategies"),
    ],
    ids=lambda o: str(o) if isinstance(o, dict) else "",
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    net = _net()
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        lrcnn_lightning.rowwise(net, **options)
    assert "forward" not in net.__dict__
    for rehearse in (lrcnn_lightning.plan, lrcnn_lightning.frontier):
        with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
            rehearse(net, IMAGES, **options)


def test_more_rows_than_the_input_has() -> None:
    with pytest.raises(ConfigError, match=r"Sequential.*rows=17.*16 rows.*1 to 16"):
        _call(_net(), IMAGES, rows=17)


def test_a_stage_of_lower_maps_has_fewer_rows() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
    lrcnn_lightning.rowwise(net, mode="two_phase", rows=16)(IMAGES)
    assert [len(loop.rows) for loop in net.forward.plan.loops()] == [4, 4]


def test_input_without_a_spatial_axis() -> None:
    net = nn.Sequential(nn.Unflatten(1, (3, 4, 4)), nn.Conv2d(3, 2, 3))
    with pytest.raises(InputError, match=r"no input has a spatial axis.*\[2, 48\].*N C H W"):
        _call(net, torch.randn(2, 48), rows=2)


def test_axis_that_is_not_spatial() -> None:
    with pytest.raises(InputError, match=r"axis=4.*\[2, 3, 16, 12\].*2, 3"):
        _call(_net(), IMAGES, axis=4)


def test_control_flow_that_depends_on_data() -> None:
    net = _Branches()
    with pytest.raises(CaptureError, match=r"_Branches.*cannot run row by row.*`return .*` at test_rowwise.py.*'warn'"):
        _call(net, IMAGES, rows=2)
    with pytest.warns(UserWarning, match="runs plainly"):
        _call(net, IMAGES, rows=2, on_unsupported="warn")


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"memory_budget=1.00 KiB.*least peak.*What helps"):
        lrcnn_lightning.plan(_net(), torch.empty(1, 3, 256, 256, device="meta"), memory_budget="1KiB")


def test_module_names() -> None:
    root = nn.ModuleDict({"backbone": _net(), "head": nn.Linear(2, 2)})
    assert list(select_modules(root)) == ["backbone"]
    assert list(select_modules(root, ["backbone.0"])) == ["backbone.0"]
    with pytest.raises(ConfigError, match=r"modules='backbon'.*backbone"):
        select_modules(root, ["backbon"])
    with pytest.raises(ConfigError, match=r"'backbone.0' is inside 'backbone'"):
        select_modules(root, ["backbone", "backbone.0"])


def test_a_failing_step_leaves_no_trace() -> None:
    """An error in the module's own code passes through unchanged, and the next call works."""
    net = lrcnn_lightning.rowwise(_net(), mode="two_phase", rows=4)
    with pytest.raises(Exception, match=r"channels|size"):
        net(torch.randn(2, 5, 16, 12))
    assert net(IMAGES).shape == (2, 2, 16, 12)


def test_settings_of_submodules_that_change_are_seen() -> None:
    """A graph was cached by shapes and train or eval alone, so a scheduled dropout, or statistics switched on again
    (`BaseFinetuning.freeze(train_bn=False)` and unfreezing), ran the old graph without a word.
    """
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    plain = copy.deepcopy(net)
    lrcnn_lightning.rowwise(net, mode="two_phase", rows=4)
    x = torch.randn(2, 3, 12, 12)
    for module in (plain, net):
        module[1].track_running_stats = False
        module(x)
        module[1].track_running_stats = True
        module[3].p = 0.0
    assert torch.allclose(net(x), plain(x), atol=1e-5)
    assert net[1].num_batches_tracked == plain[1].num_batches_tracked == 1
    assert torch.allclose(net[1].running_mean, plain[1].running_mean, atol=1e-6)
