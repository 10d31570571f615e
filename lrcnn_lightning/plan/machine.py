"""The nominal machine whose time is the unit of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CPU", "MOST_ELEMENTS", "Machine"]

MOST_ELEMENTS = 2**31 - 1
"""Elements of a tensor that kernels can count in 32 bits."""


@dataclass(frozen=True)
class Machine:
    """Nominal speeds. Only their ratios matter, since work is compared with plain work.

    The default is a CPU with two cores. The speeds of single operations are measured one by one, and the others fitted
    to the times of networks under several plans each. What a large result costs there is less to move it than to have
    its memory: that comes fresh from the operating system, page by page, where a slab has that of the slab before.
    """

    operations_a_second: float = 450e9
    """Multiplications and additions of convolutions and matrix products."""
    bytes_a_second: float = 20e9
    """Read and written by pointwise operations, copies and sums."""
    convolved_bytes_a_second: float = 50e9
    """Of the maps that a convolution reads and writes."""
    weight_bytes_a_second: float = 16e9
    """Of a convolution's weights, which are laid out anew in every call, and of their gradients."""
    pooled_bytes_a_second: float = 2.3e9
    """Of the maps that poolings and resizings read and write."""
    large_bytes: float = 32 * 2**20
    """From this size on a result is fresh memory."""
    fresh_bytes_a_second: float = 5e9
    seconds_a_call: float = 5e-6
    seconds_a_slab: float = 80e-6
    """Of a call on a slab, with the cutting, carrying and dropping around it."""
    most_elements: int = MOST_ELEMENTS
    """Of a tensor that an operation reads or writes (`limit`)."""

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The nominal machine of a device: on a GPU all memory is equally near, and a call costs relatively more.

        Planning on the ``meta`` device is for the GPU, if there is one.
        """
        if device.type == "cpu" or (device.type == "meta" and not torch.cuda.is_available()):
            return CPU
        return Machine(40e12, 2e12, 2e12, 2e12, 2e12, float("inf"), 2e12, 8e-6, 60e-6)


CPU = Machine()
