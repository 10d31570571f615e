"""The memory meter against bytes counted by hand, and fake measurements against real ones."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from lrcnn_lightning.errors import ConfigError, InputError
from lrcnn_lightning.monitor import MemoryMeter, StepMemory, measure_fake, measure_module, measure_step

KB = 1024  # bytes of a map of 1 x 4 x 8 x 8 in float32


@pytest.fixture(autouse=True, scope="module")
def quick() -> Any:
    """Tiny operations are slower on several threads, and what was imported need not be searched for cycles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_mode_is_left_behind() -> Any:
    torch.manual_seed(0)
    yield
    assert _get_current_dispatch_mode_stack() == []


def kilobytes(count: int) -> Tensor:
    return torch.empty(count * KB, dtype=torch.uint8)


def chain(depth: int) -> nn.Sequential:
    """Convolutions whose outputs are 1 KB each, for an input of 1 x 3 x 8 x 8."""
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(depth)))


def vgg_like() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 16, 16):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, 5))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        stem = torch.nn.functional.silu(self.norm(self.first(x)))
        body = self.second(stem) + stem
        wide = torch.nn.functional.interpolate(body, scale_factor=2.0, mode="bilinear")
        return {"mask": torch.cat([self.up(body), wide], 1), "pooled": [body.mean((2, 3))], "shape": tuple(x.shape)}


# Counting


def test_a_storage_counts_from_its_operation_until_its_last_reference() -> None:
    with MemoryMeter() as meter:
        a = kilobytes(4)
        assert (meter.live_bytes, meter.peak_bytes) == (4 * KB, 4 * KB)
        b = kilobytes(2)
        assert (meter.live_bytes, meter.peak_bytes) == (6 * KB, 6 * KB)
        del a
        assert (meter.live_bytes, meter.peak_bytes) == (2 * KB, 6 * KB)
        del b
        assert (meter.live_bytes, meter.peak_bytes) == (0, 6 * KB)


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.view(2, -1),
        lambda t: t[1:],
        lambda t: t.view(4, -1).t(),
        lambda t: t.detach(),
        lambda t: t.view(4, -1).unbind(0),
        lambda t: t.chunk(3),
        lambda t: t.as_strided((2, 2), (1, 1)),
        lambda t: t.add_(1),
        lambda t: t.zero_(),
        lambda t: t.view(torch.int16),
        lambda t: torch.add(t, 1, out=t),
    ],
)
def test_views_and_in_place_results_count_nothing(look: Callable[[Tensor], Any]) -> None:
    before = kilobytes(4)
    with MemoryMeter() as meter:
        of_before = look(before)
        assert meter.live_bytes == 0
        inside = kilobytes(4)
        of_inside = look(inside)
        assert meter.peak_bytes == 4 * KB
        del inside
        assert meter.live_bytes == 4 * KB  # the view still holds it
        del of_inside
        assert meter.live_bytes == 0
    del of_before


@pytest.mark.parametrize(
    ("make", "nbytes"),
    [
        (lambda: torch.ones(4, 8), 128),
        (lambda: torch.ones(4, 8, dtype=torch.float64), 256),
        (lambda: torch.tensor([1.0, 2.0, 3.0]), 12),
        (lambda: torch.arange(5), 40),
        (lambda: torch.ones(1).expand(1000), 4),
        (lambda: torch.max(torch.arange(6.0).view(2, 3), 1), 8 + 16),
        (lambda: torch.eye(3).to_sparse(), 2 * 3 * 8 + 3 * 4),
    ],
)
def test_what_an_operation_leaves_behind(make: Callable[[], Any], nbytes: int) -> None:
    with MemoryMeter() as meter:
        held = make()
        assert meter.live_bytes == nbytes
        del held
        assert meter.live_bytes == 0


def test_a_tensor_made_of_tensors_counts_as_its_parts() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    before = two_tensor.TwoTensor(torch.ones(8), torch.ones(8))
    with MemoryMeter() as meter:
        after = before * 2
        assert meter.live_bytes == 2 * 8 * 4
        del after
        assert meter.live_bytes == 0


@pytest.mark.parametrize(
    ("resize", "live", "peak"),
    [
        (lambda t: t.untyped_storage().resize_(0), 0, 4),
        (lambda t: t.untyped_storage().resize_(6 * KB), 6, 6),
        (lambda t: t.resize_(8 * KB), 8, 8),
    ],
)
def test_resized_storages(resize: Callable[[Tensor], Any], live: int, peak: int) -> None:
    with MemoryMeter() as meter:
        tensor = kilobytes(4)
        resize(tensor)
        assert (meter.live_bytes, meter.peak_bytes) == (live * KB, peak * KB)
        del tensor
        assert meter.live_bytes == 0


def test_an_address_used_again_is_another_storage() -> None:
    with MemoryMeter() as meter:
        for _ in range(50):
            held = kilobytes(1)
            held = held.clone()
        assert (meter.live_bytes, meter.peak_bytes) == (KB, 2 * KB)
        del held
        assert meter.live_bytes == 0


def test_reset_peak_starts_from_what_is_live() -> None:
    with MemoryMeter(record=True) as meter:
        a, b = kilobytes(4), kilobytes(2)
        del a
        meter.reset_peak()
        assert (meter.live_bytes, meter.peak_bytes, meter.timeline) == (2 * KB, 2 * KB, [])
        c = kilobytes(1)
        assert (meter.peak_bytes, meter.timeline) == (3 * KB, [3 * KB])
        del b, c
    assert (meter.live_bytes, meter.peak_bytes) == (0, 3 * KB)


def test_timeline_and_operations() -> None:
    with MemoryMeter(record=True) as meter:
        a = kilobytes(4)
        b = a.clone()
        del a
        b.zero_()
    assert meter.timeline == [4 * KB, 8 * KB, 4 * KB]
    assert meter.operations == ["aten.empty.memory_format", "aten.clone.default", "aten.zero_.default"]
    with MemoryMeter() as silent:
        kilobytes(1)
    assert (silent.timeline, silent.operations) == ([], [])


def test_figures_stand_after_leaving() -> None:
    with MemoryMeter() as meter:
        a = kilobytes(4)
    del a
    b = kilobytes(9)
    assert (meter.live_bytes, meter.peak_bytes) == (4 * KB, 4 * KB)
    del b
    meter.reset_peak()
    assert (meter.live_bytes, meter.peak_bytes) == (4 * KB, 4 * KB)


def test_nested_meters_and_entering_again() -> None:
    with MemoryMeter() as outer:
        a = kilobytes(1)
        with MemoryMeter() as inner:
            b = kilobytes(2)
            view = a[1:]
        assert (outer.live_bytes, inner.live_bytes) == (3 * KB, 2 * KB)
        with pytest.raises(ConfigError, match="active already"), outer:
            pass
    del a, b, view
    with outer:
        assert (outer.live_bytes, outer.peak_bytes) == (0, 0)


def test_excluded_tensors() -> None:
    with MemoryMeter() as meter:
        a, b = kilobytes(4), kilobytes(2)
        meter.exclude(a, kilobytes(0))
        assert (meter.live_bytes, meter.peak_bytes) == (2 * KB, 2 * KB)
        del a, b
    assert (meter.live_bytes, meter.peak_bytes) == (0, 2 * KB)


def test_an_operation_that_returns_a_tensor_from_elsewhere() -> None:
    cached = kilobytes(4)
    library = torch.library.Library("lrcnn_monitor_test", "DEF")
    library.define("cached(int size) -> Tensor")
    library.impl("cached", lambda size: cached, "CompositeExplicitAutograd")
    with MemoryMeter() as unknown, MemoryMeter(exclude=[cached]) as known:
        assert torch.ops.lrcnn_monitor_test.cached(1) is not None
    assert (unknown.peak_bytes, known.peak_bytes) == (4 * KB, 0)


def test_an_error_inside_leaves_nothing_active() -> None:
    net = chain(1)
    with pytest.raises(RuntimeError, match="stop"), MemoryMeter(net) as meter:
        held = kilobytes(3)
        raise RuntimeError("stop")
    assert meter.live_bytes == 3 * KB
    del held
    assert all(not parameter._post_accumulate_grad_hooks for parameter in net.parameters())


# What is not memory


def test_fake_and_meta_tensors_do_not_count_in_a_real_measurement() -> None:
    with MemoryMeter() as meter:
        on_meta = torch.empty(KB, device="meta") + 1
        with FakeTensorMode():
            fake = torch.empty(KB) + 1
        real = kilobytes(1)
        assert meter.peak_bytes == KB
    del on_meta, fake, real


def test_real_tensors_do_not_count_in_a_fake_measurement() -> None:
    real = torch.ones(KB)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter() as meter:
        with FakeTensorMode():
            other = torch.empty(KB)
        fake = torch.empty(4, KB)
        assert meter.live_bytes == 16 * KB
    del other, fake, real


@pytest.mark.parametrize("fake", [False, True])
def test_capturing_a_graph_counts_nothing(fake: bool) -> None:
    net, image = chain(2), torch.randn(1, 3, 8, 8)
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            image = mode.from_tensor(image)
            with MemoryMeter() as meter:
                torch.export.export(net, (image,), strict=False)
    else:
        with MemoryMeter() as meter:
            torch.export.export(net, (image,), strict=False)
    assert (meter.peak_bytes, meter.live_bytes) == (0, 0)


# Training steps, to the byte


def test_chain_of_convolutions() -> None:
    """Two maps wait for the backward pass; there, the gradients of two maps meet the last of them."""
    memory = measure_module(chain(3), torch.randn(1, 3, 8, 8), record=True)
    steps = [
        (name.split(".")[1], nbytes // KB) for name, nbytes in zip(memory.operations, memory.timeline, strict=True)
    ]
    assert [step for step in steps if step[0] in ("convolution", "convolution_backward")] == [
        ("convolution", 1),
        ("convolution", 2),
        ("convolution", 3),
        ("convolution_backward", 3),  # the output is gone; c1, c2, gradient of c2
        ("convolution_backward", 3),  # c1, gradients of c2 and c1
        ("convolution_backward", 1),  # gradient of c1; the image needs none
    ]
    assert (memory.peak_bytes, memory.end_bytes) == (3 * KB, 0)
    assert str(memory) == "activation memory: peak 3.00 KiB, at the end 0 B"


@pytest.mark.parametrize(
    ("layers", "grad", "peak"),
    [
        # A convolution saves its input: the image, which is not counted; its gradient is one number, expanded.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1)], True, 1 * KB),
        # The relu in place keeps one map, and its backward pass makes another.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)], True, 2 * KB),
        # Out of place there are two maps while it runs, of which the first is freed at once.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()], True, 2 * KB),
        # The pool saves the map, a quarter of indices of twice the width; backward adds the gradient of the map.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)], True, KB + KB // 2 + KB),
        # Batch normalisation saves its input and mean and deviation of four channels, and makes an input gradient.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)], True, 2 * KB + 2 * 16),
        # Without gradients only the input and the output of one layer are alive.
        (lambda: [nn.Conv2d(3, 4, 3, padding=1), *[nn.Conv2d(4, 4, 3, padding=1) for _ in range(9)]], False, 2 * KB),
    ],
)
@pytest.mark.parametrize("measure", [measure_module, measure_fake])
def test_known_networks(
    layers: Callable[[], list[nn.Module]], grad: bool, peak: int, measure: Callable[..., StepMemory]
) -> None:
    memory = measure(nn.Sequential(*layers()), torch.randn(1, 3, 8, 8), grad=grad)
    assert (memory.peak_bytes, memory.end_bytes) == (peak, 0)


def test_input_gradient_counts_and_is_the_end() -> None:
    image = torch.randn(1, 3, 8, 8, requires_grad=True)
    image.grad = torch.ones_like(image)
    memory = measure_module(chain(1), image)
    assert (memory.peak_bytes, memory.end_bytes) == (KB, 3 * 8 * 8 * 4)


def test_frozen_module_has_no_backward_pass() -> None:
    net = chain(2).requires_grad_(False)
    assert measure_module(net, torch.randn(1, 3, 8, 8)).peak_bytes == 2 * KB


def test_double_precision_takes_twice_as_much() -> None:
    single = measure_module(chain(3), torch.randn(1, 3, 8, 8)).peak_bytes
    assert measure_module(chain(3).double(), torch.randn(1, 3, 8, 8).double()).peak_bytes == 2 * single


def test_operations_inside_a_function_are_seen_in_both_directions() -> None:
    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kilobytes(5)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            kilobytes(7)
            return gradient * 2

    x = torch.ones(KB, requires_grad=True)
    with MemoryMeter() as meter:
        total = Doubling.apply(x).sum()
        assert meter.peak_bytes == 5 * KB
        meter.reset_peak()
        total.backward()
    assert meter.peak_bytes == 7 * KB + 4 + 4  # the sum and the gradient that it starts with


def test_checkpointing_keeps_only_the_borders() -> None:
    net, image = chain(8), torch.randn(1, 3, 8, 8)

    def step() -> None:
        border = checkpoint(net[:4], image, use_reentrant=False)
        checkpoint(net[4:], border, use_reentrant=False).sum().backward()

    assert measure_module(net, image).peak_bytes == 8 * KB
    memory = measure_step(step, net)
    # In the first half: the border c4 is held by the step, c1 to c3 are back, and the gradients of c4 and c3 meet.  Two
    # numbers more are the sum and the gradient that it starts with.
    assert (memory.peak_bytes, memory.end_bytes) == (6 * KB + 8, 0)


def test_backward_runs_in_the_calling_thread() -> None:
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(threading.get_ident()))
    was = torch._C._is_multithreading_enabled()
    with MemoryMeter():
        (x * 2).sum().backward()
    assert seen == [threading.get_ident()]
    assert torch._C._is_multithreading_enabled() == was


def test_same_figures_in_every_run_with_reference_cycles() -> None:
    class Cycle:
        def __init__(self, held: Tensor) -> None:
            self.held, self.me = held, self

    def step() -> None:
        for _ in range(20):
            Cycle(kilobytes(1))

    runs = {measure_step(step, ()) for _ in range(3)}
    assert runs == {StepMemory(20 * KB, 20 * KB)}
    assert gc.isenabled()


# Parameter gradients


def wide() -> nn.Linear:
    return nn.Linear(64, 64)  # a weight of 16 KB and a bias of 256 bytes


def test_gradients_are_left_out_over_their_whole_life() -> None:
    net = wide()
    memory = measure_module(net, torch.randn(1, 64))
    assert (memory.peak_bytes, memory.end_bytes) == (256, 0)
    assert net.weight.grad is not None


def test_gradients_dropped_within_the_step_are_left_out() -> None:
    net, x = wide(), torch.randn(1, 64)

    def step() -> None:
        net(x).sum().backward()
        net.zero_grad(set_to_none=True)

    assert measure_step(step, net) == StepMemory(256 + 4, 0)  # the output, and its sum


def test_gradients_assigned_by_hand_are_left_out() -> None:
    net = wide()

    def step() -> None:
        net.weight.grad = torch.ones_like(net.weight)

    assert measure_step(step, net) == StepMemory(0, 0)


def test_a_gradient_that_is_added_to_another_is_activation_memory_while_it_lives() -> None:
    net, x = wide(), torch.randn(1, 64)

    def step() -> None:
        for _ in range(2):
            net(x).sum().backward()

    memory = measure_step(step, net)
    assert 16 * KB <= memory.peak_bytes < 16 * KB + 2 * 256
    assert memory.end_bytes == 0


def test_a_gradient_that_autograd_copies_is_left_out_but_not_its_source() -> None:
    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            held.append(torch.ones(64, 64))
            return held[-1]  # somebody else holds it, so autograd copies

    held: list[Tensor] = []
    net = wide()
    memory = measure_step(lambda: Given.apply(net.weight).backward(), net)
    assert memory.end_bytes == 16 * KB
    assert net.weight.grad is not None and net.weight.grad.data_ptr() != held[0].data_ptr()


def test_gradients_of_nobody_count() -> None:
    net = wide()
    with MemoryMeter() as meter:
        net(torch.randn(1, 64)).sum().backward()
    assert meter.live_bytes >= 16 * KB


def test_parameters_and_buffers_made_inside_belong_to_the_module() -> None:
    net = wide()
    net.register_buffer("average", torch.zeros(KB))
    with MemoryMeter(net) as meter:
        net.average = net.average * 0.9
        net.weight = nn.Parameter(net.weight.detach() * 2)
        assert meter.live_bytes == 0


def test_parameters_may_be_given_instead_of_a_module() -> None:
    net, x = wide(), torch.randn(1, 64)
    memory = measure_step(lambda: net(x).sum().backward(), net.parameters())
    assert memory == measure_step(lambda: net(x).sum().backward(), net)


# Without computing


@pytest.mark.parametrize("make", [vgg_like, Residual, lambda: vgg_like().eval()])
@pytest.mark.parametrize(
    ("grad", "layout"),
    [(True, torch.contiguous_format), (False, torch.contiguous_format), (True, torch.channels_last)],
)
def test_fake_equals_real(make: Callable[[], nn.Module], grad: bool, layout: torch.memory_format) -> None:
    net = make().to(memory_format=layout)
    image = torch.randn(2, 3, 16, 16).to(memory_format=layout)
    fake = measure_fake(net, image, grad=grad, record=True)
    real = measure_module(net, image, grad=grad, record=True)
    assert fake.peak_bytes == real.peak_bytes > 0
    assert fake.end_bytes == real.end_bytes == 0
    assert fake == real  # operation by operation


def test_fake_equals_real_for_an_input_that_needs_a_gradient() -> None:
    net, image = Residual(), torch.randn(2, 3, 16, 16, requires_grad=True)
    fake = measure_fake(net, image)
    assert fake == measure_module(net, image)
    assert fake.end_bytes == image.nbytes


def test_fake_changes_nothing() -> None:
    net = vgg_like()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[3].weight.requires_grad_(False)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    image = torch.randn(2, 3, 16, 16, requires_grad=True)
    measure_fake(net, image)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert image.grad is None
    assert not net[3].weight.requires_grad


def test_fake_puts_everything_back_after_an_error() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("stop")

    net = Failing()
    weight = net.conv.weight
    with pytest.raises(RuntimeError, match="stop"):
        measure_fake(net, torch.randn(1, 3, 8, 8))
    assert net.conv.weight is weight


def test_fake_runs_a_patched_forward_with_fake_parameters() -> None:
    net = chain(2)
    seen: list[str] = []

    def patched(x: Tensor) -> Tensor:
        seen.append(type(net[0].weight.data).__name__)
        return net[0](x)

    net.forward = patched
    memory = measure_fake(net, torch.randn(1, 3, 8, 8))
    assert seen == ["FakeTensor"]
    assert memory.peak_bytes == KB


def test_fake_of_tied_weights_and_plain_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.offset = torch.ones(64)

        def forward(self, x: Tensor, *, scale: Tensor, times: int = 1) -> Tensor:
            assert self.second.weight is self.first.weight
            return self.second(torch.relu(self.first(x) + self.offset)) * scale * times

    net, x, scale = Tied(), torch.randn(8, 64), torch.ones(64)
    assert measure_fake(net, x, scale=scale, times=3) == measure_module(net, x, scale=scale, times=3)


def test_fake_of_one_tensor_given_twice() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 if x is y else x + 2 * y

    x = torch.randn(64)
    assert measure_fake(Same(), x, x, grad=False) == measure_module(Same(), x, x, grad=False)


def test_inputs_too_large_for_any_machine() -> None:
    side = 2**17
    memory = measure_fake(chain(3), torch.empty(1, 3, side, side, device="meta"))
    assert memory.peak_bytes == 3 * 4 * side**2 * 4  # 768 GiB
    expanded = torch.zeros(1).expand(1, 3, side, side)
    assert measure_fake(chain(3), expanded).peak_bytes == memory.peak_bytes


def test_fake_inputs_bring_their_mode() -> None:
    net, mode = chain(3), FakeTensorMode(allow_non_fake_inputs=True)
    image = mode.from_tensor(torch.randn(1, 3, 8, 8))
    assert measure_fake(net, image).peak_bytes == 3 * KB


def test_fake_inputs_of_two_modes() -> None:
    images = [FakeTensorMode().from_tensor(torch.randn(1, 3, 8, 8)) for _ in range(2)]
    with pytest.raises(InputError, match="2 fake modes"):
        measure_fake(chain(1), *images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_as_the_processor_does() -> None:
    net, image = vgg_like().eval(), torch.randn(2, 3, 32, 32)
    expected = measure_module(net, image)
    measured = measure_module(net.cuda(), image.cuda())
    assert measured.end_bytes == expected.end_bytes == 0
    assert measured.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.01)  # normalisation saves a little more


def test_in_a_new_process() -> None:
    """Lightning is not imported, and the first measurement, during which torch imports itself, is like the second."""
    script = (
        "import sys, lrcnn_lightning.monitor as monitor\n"
        "assert not {'lightning', 'pytorch_lightning', 'hydra'} & set(sys.modules), 'imported too early'\n"
        "import torch\n"
        "net, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)\n"
        "first, second = (monitor.measure_module(net, x, x, x) for _ in range(2))\n"
        "assert first == second and first.end_bytes == 0, (first, second)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_names() -> None:
    from lrcnn_lightning import monitor

    with pytest.raises(AttributeError, match="no attribute 'Activation'"):
        monitor.Activation  # noqa: B018
