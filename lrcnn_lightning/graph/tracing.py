"""A trace: a module's own code, run once on stand-ins, and every operation of it recorded.

    arguments      stand-ins from the start                       placeholders
    live tensors   stand-ins once an operation takes them (`live`)  attributes of the trace, one each
    operations     as the code calls them, before autograd takes them apart, with the switches that are set in between

Nothing is computed and nothing changes; what the code does beside tensor operations is noted by `Observation`.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lrcnn_lightning.errors import CaptureError
from lrcnn_lightning.fake import current_mode, new_mode
from lrcnn_lightning.graph.custom_functions import recorded_functions
from lrcnn_lightning.graph.grad_mode import GradMode
from lrcnn_lightning.graph.hooks import recorded_hooks
from lrcnn_lightning.graph.leaks import Leaks
from lrcnn_lightning.graph.live import LiveTensor, LiveTensors, stand_in
from lrcnn_lightning.graph.marks import copy_marks, refuse_marks
from lrcnn_lightning.graph.observation import Observation
from lrcnn_lightning.graph.recorder import forget, record_attribute, recorded, recorded_graph, root
from lrcnn_lightning.graph.structure import Structure, refuse_unknown, take_apart
from lrcnn_lightning.graph.surroundings import balanced

__all__ = ["MODULE", "Trace"]

MODULE = "lrcnn_module"
"""The key in the ``meta`` of a recorded node of the path of the submodule whose code called it."""


class Trace:
    """One run of a module's code on stand-ins for ``leaves``, the flat arguments nested in ``structure``.

    After `run`: ``leaves`` and ``structure`` are those of what the module returned, with the leaves of attributes that
    it sets behind, and then ``memos`` tensors that it remembers.
    """

    def __init__(self, module: nn.Module, leaves: Sequence[Any], structure: Structure, leaks: Leaks) -> None:
        self.module, self._leaks = module, leaks
        self._arguments, self._nesting = leaves, structure
        self.arguments = len(leaves)
        self.mode = current_mode() or new_mode()
        self.live = LiveTensors(module, self.mode, self._introduce)
        self.observation = Observation(module, self.live)
        self.attributes: dict[str, LiveTensor] = {}
        """Live tensors by the name of their attribute of the trace."""
        self.leaves: list[Any] = []
        self.structure = structure
        self.memos = 0
        self._paths = {child: path for path, child in module.named_modules()}
        self._program: GraphModule | None = None
        self._stderr = sys.stderr

    def run(self, widened: Sequence[bool]) -> GraphModule:
        """The operations as recorded. ``widened``: which of the tensors are taken as float32."""
        tensors = [leaf for leaf in self._arguments if isinstance(leaf, Tensor)]
        with _quietly(), self.mode:
            examples = [
                stand_in(tensor, self.mode, torch.float32 if wide else None)
                for tensor, wide in zip(tensors, widened, strict=True)
            ]
            program = self._program = recorded(self._code, *examples)
        kept = [live for live in self.live if live.fake.requires_grad != live.tensor.requires_grad]
        if kept:
            raise CaptureError(
                f"its forward writes a value with a gradient into {kept[0].source!r}, which keeps it for later calls; "
                "write what is detached, or do so under torch.no_grad()"
            )
        return program

    def forget(self) -> None:
        """Let go of all tensors without data, when the recorded operations have been read."""
        self.live.forget()
        self.attributes.clear()
        self.observation.forget()
        self.leaves.clear()
        if self._program is not None:
            forget(self._program, self.observation.recorder)
            self._program = None

    def _code(self, *tensors: Tensor) -> list[Tensor]:
        """The module as a function of its tensor arguments that returns a list of tensors.

        Other arguments are as given, and containers of any kind stay outside of the trace.
        """
        marks = []
        for tensor, leaf in zip(tensors, (leaf for leaf in self._arguments if isinstance(leaf, Tensor)), strict=True):
            self._leaks.note_of_data(tensor)
            marks.append((tensor, copy_marks(leaf, tensor)))
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._arguments]
        args, kwargs = self._nesting.put_together(filled)
        self.observation.recorder = root()
        with (
            contextlib.redirect_stderr(self._stderr),
            self.observation.observed((args, kwargs)),
            balanced(self.module),
            recorded_hooks(self.module),
            self._paths_noted(),
            GradMode(),
            _Watch(self.live, self._leaks),
            recorded_functions(self.live.replaced),
        ):
            returned = self.module(*args, **kwargs)
        self.leaves, self.structure = take_apart(returned)
        refuse_unknown(self.leaves, "it returns")
        refuse_marks(self.leaves, marks)
        self.leaves += [*self.observation.written, *self.observation.memos]
        self.memos = len(self.observation.memos)
        return [self.live.replaced(leaf) for leaf in self.leaves if isinstance(leaf, Tensor)]

    def _introduce(self, live: LiveTensor) -> None:
        """Make the stand-in of a live tensor an attribute of the trace."""
        name = f"live_{len(self.attributes)}"
        self.attributes[name] = live
        record_attribute(name, live.fake)
        self._leaks.note_stand_in(live.fake, live.tensor)

    @contextlib.contextmanager
    def _paths_noted(self) -> Iterator[None]:
        """Note on each recorded node which submodule's code it comes from."""
        nodes = recorded_graph().nodes
        thread, stack = threading.get_ident(), [""]
        last = next(iter(reversed(nodes)))

        def note() -> None:
            nonlocal last
            while last.next.op != "root":
                last = last.next
                last.meta[MODULE] = stack[-1]

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                note()
                stack.append(self._paths.get(module, stack[-1]))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() == thread:
                note()
                stack.pop()

        handles = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
            note()
        finally:
            for handle in handles:
                handle.remove()


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(torch.Tensor, name).__set__


_REFUSED: dict[Any, str] = {
    torch.Tensor.register_hook: "calls register_hook() on a tensor",
    torch.Tensor.retain_grad: "calls retain_grad() on a tensor",
    torch.Tensor.register_post_accumulate_grad_hook: "calls register_post_accumulate_grad_hook() on a tensor",
    torch.Tensor.requires_grad_: "calls requires_grad_() on a tensor",
    torch.Tensor.backward: "calls backward()",
    torch.autograd.grad: "calls torch.autograd.grad()",
    torch.autograd.backward: "calls torch.autograd.backward()",
    _setter("requires_grad"): "sets requires_grad of a tensor",
    _getter("grad"): "reads the gradient of a tensor",
    _setter("grad"): "sets the gradient of a tensor",
}
_DATA, _SET_DATA = _getter("data"), _setter("data")
_VIEWS = {_DATA, *map(_getter, ("T", "mT", "H", "mH", "real", "imag"))}
"""Properties that are tensors themselves; of the others a live tensor is asked itself."""


_CONTIGUOUS = {torch.nn.functional.rrelu, torch.rrelu}
"""Functions whose kernel on the CPU makes a contiguous result in training, where the rule for tensors without data says
the layout of the input. Random numbers that are drawn for what comes after go to elements by their layout.
"""


class _Watch(TorchFunctionMode):
    """Sees every operation that the code calls, before it is recorded."""

    def __init__(self, live: LiveTensors, leaks: Leaks) -> None:
        super().__init__()
        self._live, self._leaks = live, leaks

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _REFUSED:
            if (
                function is torch.Tensor.requires_grad_
                and args[0].requires_grad == (*args[1:], *kwargs.values(), True)[0]
            ):
                return args[0]
            raise CaptureError(f"its forward {_REFUSED[function]}, which a captured graph would not do again")
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CaptureError("its forward uses a transform of torch.func (vmap, grad, jvp, ...)")
        if getattr(function, "__name__", "") == "__get__" and function not in _VIEWS:
            return function(*args, **kwargs)
        args, kwargs = self._live.replaced(args), self._live.replaced(kwargs)
        if function == _DATA:
            function = torch.Tensor.detach  # the same memory, and like an operation it is recorded
        elif function == _SET_DATA:
            return _set_data(*args)
        of_data = self._leaks.depends_on_data((args, kwargs))
        result = function(*args, **kwargs)
        if function in _CONTIGUOUS and kwargs.get("training", (*args, False, False, False)[3]):
            result = result.contiguous() if result is not args[0] and result.device.type == "cpu" else result
        for item in result if isinstance(result, (tuple, list)) else (result,):
            self._leaks.note(item)
            if of_data:
                self._leaks.note_of_data(item)
        return result


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``, where the value fits: what the tensor holds is another value from now on."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        raise CaptureError(
            f"its forward sets the data of a tensor of shape {list(tensor.shape)} to one of shape {list(value.shape)}"
        )
    with torch.no_grad():
        tensor.detach().copy_(value)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what a failing trace prints to ``stderr``; the error says what is wrong."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
