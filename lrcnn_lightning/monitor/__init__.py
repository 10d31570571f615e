r"""Activation memory, measured to the byte, on any device and on none.

Asking an allocator how much it holds mixes in parameters, its own rounding, whatever it caches, and on a CPU the whole
process.  :class:`MemoryMeter` instead watches each operation: a storage that comes out of one is live from then until
it is released, and counts its bytes once, however many tensors view it.  The same run gives the same number every
time, so a test can assert it exactly, and because a fake tensor has a storage with a size but no bytes, the same meter
tells what an image of any size would take (:func:`measure_fake`).

*Activation memory* is the peak of all live tensor bytes during one training step, less parameters, buffers, parameter
gradients, optimizer state and the input batch::

    bytes
      |            ____                  peak_bytes
      |        ___/    \\__                              counted: born in an operation inside the meter
      |    ___/           \\___
      |___/                   \\__       end_bytes        not counted: all that existed before, and every
      +---------------------------> operations                       storage that is ever a .grad
        forward  |  backward

Which storage becomes a parameter's gradient is known only when autograd has put it there, and it may keep the tensor it
was given or copy it.  So the meter records each birth and each release as an event and adds them up at the end, leaving
out the storages that turned out to be gradients over their whole life.

Not seen: workspaces inside one operation, bytes that never belong to a tensor, and the rounding of the allocator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrcnn_lightning.monitor.measure import measure_fake, measure_module, measure_step
from lrcnn_lightning.monitor.meter import MemoryMeter, StepMemory

if TYPE_CHECKING:
    ActivationMemory: type[Any]

__all__ = [
    "ActivationMemory",
    "MemoryMeter",
    "StepMemory",
    "measure_fake",
    "measure_module",
    "measure_step",
]


def __getattr__(name: str) -> Any:
    """Build ``ActivationMemory`` when it is first asked for; importing this package must not import Lightning."""
    if name == "ActivationMemory":
        from lrcnn_lightning.monitor.callback import activation_memory_class

        globals()[name] = activation_memory_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
