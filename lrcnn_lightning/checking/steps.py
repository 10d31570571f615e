"""A few training steps of a module, and every value that they show.

    before each step   the same random numbers; from the second on, parameters and inputs moved a little, as by training
    the step           forward, loss, backward
    after it           outputs, loss, gradients, buffers, attributes, the states of the generators, and whatever of the
                       parameters and inputs the step itself has changed

Two modules that are equal show the same in all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lrcnn_lightning.checking.chance import generator_states, seed_all
from lrcnn_lightning.checking.comparison import Key, Shown
from lrcnn_lightning.checking.example import Example
from lrcnn_lightning.checking.state import held, named_leaves
from lrcnn_lightning.fake import is_fake
from lrcnn_lightning.graph import take_apart
from lrcnn_lightning.graph.state import PLAIN

__all__ = ["Loss", "Shown", "Watch", "run_steps", "show", "weighted"]

Loss: TypeAlias = Callable[[Any], Tensor]
_SHRINK = 0.999
"""By what parameters and inputs are multiplied at least between steps. They keep their signs, and stay in their range.
"""


def run_steps(
    module: nn.Module,
    example: Example,
    loss: Loss | None = None,
    *,
    count: int = 2,
    seed: int = 0,
    wide: bool = False,
    rounded: tuple[torch.dtype, int] | None = None,
) -> list[Shown]:
    """Run training steps of a module, plain or row-wise, which is changed by them.

    Args:
        module: The module.
        example: The arguments; every step has copies of them.
        loss: Of the module's output; None for `weighted`.
        count: The number of steps.
        seed: Of everything random.
        wide: Whether floating arguments are made float64.
        rounded: A type, and a seed: all parameters and arguments are moved by up to one unit in the last place of that
            type, which is what rounding does.
    """
    shown = []
    if rounded is not None:
        _multiply(module.parameters(), rounded[1], _last_place(rounded[0]))
    for step in range(count):
        changes: list[tuple[int, tuple[float, float]]] = []
        if rounded is not None:
            changes.append((rounded[1] + step, _last_place(rounded[0])))
        if step:
            changes.append((seed + step, (_SHRINK, 1.0)))
            _multiply(module.parameters(), *changes[-1])

        def move(tensor: Tensor, changes: list[tuple[int, tuple[float, float]]] = changes) -> None:
            for change in changes:
                _multiply([tensor], *change)

        leaves, given = example.fresh(wide, move)
        shown.append(show(module, module, leaves, given, loss or weighted(seed + step), seed + step))
    return shown


def _last_place(dtype: torch.dtype) -> tuple[float, float]:
    eps = torch.finfo(dtype).eps
    return 1 - eps, 1 + eps


def _multiply(tensors: Iterable[Tensor], seed: int, between: tuple[float, float]) -> None:
    """Multiply every element by a number of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if not is_lazy(tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                factors = torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(
                    *between, generator=generator
                )
                tensor.mul_(factors.to(tensor.device, tensor.dtype.to_real()))


def weighted(seed: int) -> Loss:
    """A loss that no error can hide from: a random weighted sum of every output, plus half its squares.

    Of a plain sum the gradient is the same everywhere, and errors of opposite signs cancel.
    """

    def loss(result: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for leaf in take_apart(result)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                values = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).double()
                weights = torch.randn(values.shape, generator=generator, dtype=torch.float64, device="cpu").to(
                    values.device
                )
                total = total.to(values.device) + (weights * values).sum() + values.square().sum() / 2
        return total

    return loss


def show(
    call: Callable[..., Any],
    module: nn.Module,
    leaves: Example,
    given: Example,
    loss: Loss | None,
    seed: int,
) -> Shown:
    """Run one step, ``call`` on what is ``given``, and show the values of ``module`` and ``leaves`` after it.

    Without a loss it runs under ``no_grad``. Errors of the module and of the loss are those of the caller.
    """
    before: dict[Key, Any] = {}
    for key, value in held(module):
        if isinstance(value, Tensor) and value.is_leaf:
            value.grad = None
        if key[0] != "buffer":
            before[key] = _kept(value)
    inputs = [_kept(leaf) for leaf in given.leaves]
    seed_all(seed)
    with torch.inference_mode(False), torch.set_grad_enabled(loss is not None):
        args, kwargs = given.arguments()
        result = call(*args, **kwargs)
        shown = _of_outputs(result)
        if loss is not None:
            total = loss(result)
            shown["loss", "loss"] = total.detach().clone()
            if total.requires_grad:
                torch.autograd.backward(total)
    del result
    shown.update({("random numbers", name): state for name, state in generator_states().items()})
    for key, value in held(module):
        if isinstance(value, Tensor) and value.is_leaf and value.grad is not None:
            shown["gradient", key[1]] = value.grad
        if not (key in before and _same(value, before.pop(key))):
            shown[key] = _kept(value)
        elif key[0] == "attribute" and isinstance(value, Tensor):
            shown.unchanged[key] = _kept(value)
    shown.update(dict.fromkeys(before, _GONE))
    for name, leaf, passed, was in zip(leaves.names, leaves.leaves, given.leaves, inputs, strict=True):
        if isinstance(leaf, Tensor):
            if leaf.grad is not None:
                shown["input gradient", name] = leaf.grad
            if not _same(passed, was):
                shown["input", name] = _kept(passed)
    return shown


_GONE = "no longer there"


def _of_outputs(result: Any) -> Shown:
    shown = Shown({("form", "structure of the output"): str(take_apart(result)[1])})
    for name, leaf in named_leaves(result, "output"):
        known = isinstance(leaf, (Tensor, *PLAIN))
        shown["output", name] = _kept(leaf) if known else f"an object of type {type(leaf).__name__}"
        if isinstance(leaf, Tensor):
            shown["form", f"requires_grad of {name}"] = leaf.requires_grad
    return shown


def _kept(value: Any) -> Any:
    """The value as it is now."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(value: Any, before: Any) -> bool:
    """Whether a value is what it was."""
    if is_fake(value):
        return False
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return type(value) is type(before) and (value == before or (value != value and before != before))
    if value.shape != before.shape or value.dtype != before.dtype:
        return False
    return bool(((value == before) | (value != value) & (before != before)).all())


class Watch(TorchFunctionMode):
    """Sees the operations of a step: in which types they compute what depends on certain tensors, and whether they read
    certain others.

    Args:
        tensors: Parameters and arguments. What is made of none of them, a grid of places, has no rounding of its own.
        foreign: Tensors that a copy must not read.
    """

    def __init__(self, tensors: Iterable[Tensor], foreign: Iterable[Tensor]) -> None:
        super().__init__()
        self._dependent, self._foreign = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for known, items in ((self._dependent, tensors), (self._foreign, foreign)):
            known.update((tensor, True) for tensor in items)
        self.reads_foreign = False
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [*_tensors((*args, *(kwargs or {}).values()))]
        self.reads_foreign = self.reads_foreign or any(tensor in self._foreign for tensor in read)
        result = function(*args, **(kwargs or {}))
        if any(tensor in self._dependent for tensor in read):
            for made in (*_tensors((result,)), *(read[:1] if result is None else ())):
                self._dependent[made] = True
                if made.is_floating_point() or made.is_complex():
                    self.dtypes.add(made.dtype.to_real())
        return result

    @property
    def narrowest(self) -> torch.dtype:
        """The type with the fewest digits; float64 if nothing was computed."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor):
                yield item
