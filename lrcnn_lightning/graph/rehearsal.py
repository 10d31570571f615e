"""A rehearsal: the module's own code, run plainly on tensors without data.

A module that cannot be captured may be one whose code cannot be traced, or one that does not take such an input at all:
a map smaller than its kernels, another number of channels, another dtype. The second is no matter of rows, and its own
error says best what is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrcnn_lightning.errors import CaptureError, is_out_of_memory
from lrcnn_lightning.fake import OnlyFakes, current_mode, is_fake, new_mode
from lrcnn_lightning.graph.leaks import Leaks
from lrcnn_lightning.graph.state import PythonState
from lrcnn_lightning.graph.structure import take_apart
from lrcnn_lightning.graph.surroundings import undisturbed

__all__ = ["fake_run", "own_error"]

_OF_THE_REHEARSAL = ("torch._subclasses", "torch._dynamo", "torch.fx", "torch.export")
"""Where the errors come from that only say that a tensor has no data."""


@contextlib.contextmanager
def fake_run(module: nn.Module, arguments: Any = ()) -> Iterator[None]:
    """A context for running a module's code on tensors without data, after which everything is as it was.

    Raises `CaptureError` where it would not be, because of an iterator among the attributes or the arguments.
    """
    leaks, state = Leaks(), PythonState(module, arguments)
    if state.for_good is not None:
        raise CaptureError(f"{state.for_good.name} goes on with each call")
    try:
        with undisturbed(module), state, leaks:
            yield
    finally:
        leaks.undo()


def own_error(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """The error that ``module(*args, **kwargs)`` raises whether it runs row by row or not, if it raises one.

    Nothing is computed; parameters, buffers and random state stay as they are. Code that needs the values of tensors
    raises errors of its own here, of which some cannot be told from the module's, so a plain run has the last word.
    """
    mode = current_mode() or new_mode()

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or is_fake(tensor):
            return tensor
        if tensor.is_inference():  # no fake can be made of it; only its metadata matters
            with mode:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return mode.from_tensor(tensor.detach(), static_shapes=True)

    leaves, structure = take_apart((tuple(args), dict(kwargs)))
    try:
        with torch.inference_mode(False), torch.no_grad():
            held = {name: fake(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
            given, named = structure.put_together([fake(leaf) for leaf in leaves])
            with mode, fake_run(module, (given, named)), OnlyFakes(mode):
                torch.func.functional_call(module, held, tuple(given), dict(named))
    except CaptureError:
        return None
    except Exception as error:
        of_the_module = not type(error).__module__.startswith(_OF_THE_REHEARSAL)
        return error if of_the_module and not is_out_of_memory(error) else None
    return None
