"""The nominal machine whose time is the unit of work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

_BLOCK, _SEGMENT, _OWN_SEGMENT, _REST = 512, 2 * 2**20, 10 * 2**20, 2**20

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
    crawling_elements: float = float("inf")
    seconds_a_crawling_element: float = 0.0
    """Of the gradient of a convolution's weight, in float32, from maps of more than ``crawling_elements``: cuDNN has
    only a slow kernel for these. On an H200 (cuDNN 9, 8 channels) 2**28 elements took 0.05 s, and twice as many 14 s.
    """
    most_elements: int = MOST_ELEMENTS
    """Of a tensor that an operation reads or writes (`limit`)."""
    caching: bool = False
    """Whether memory comes in blocks of a caching allocator, and kernels take workspaces: a GPU."""
    device: torch.device | None = None
    """Where operations are tried for their workspaces; where they are not, bounds hold (`workspace`)."""
    interpolates: bool = True
    """Whether workspaces are tried at some heights of rows alone, and lie in between at others."""

    def rounded(self, size: float) -> int:
        """The bytes that count for a tensor of ``size`` bytes.

        PyTorch's caching allocator gives out multiples of 512 B. Large tensors get segments of their own, multiples of
        2 MiB, of which a rest is cut off only if it is larger than 1 MiB.
        """
        if not self.caching or size <= 0:
            return int(size)
        block = -(-int(size) // _BLOCK) * _BLOCK
        segment = -(-block // _SEGMENT) * _SEGMENT
        return segment if block >= _OWN_SEGMENT and segment - block <= _REST else block

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The nominal machine of a device: on a GPU all memory is equally near, and a call costs relatively more.

        The speeds are those of an H200 (PyTorch 2.11), between those of bfloat16 and of float32 with TF32. There the
        launches of a step of ResNet-50 take as long as its arithmetic, and those of many rows fifty times as long; a
        call takes what it took beside a slow processor.

        Planning on the ``meta`` device is for the GPU, if there is one.
        """
        if device.type == "cpu" or (device.type == "meta" and not torch.cuda.is_available()):
            return CPU
        tried_on = device if device.type == "cuda" and torch.cuda.is_available() else None
        gpu = Machine(300e12, 3e12, 3e12, 3e12, 3e12, float("inf"), 3e12, 15e-6, 130e-6)
        gpu = replace(gpu, crawling_elements=2.0**28, seconds_a_crawling_element=28e-9)
        return replace(gpu, caching=True, device=tried_on)


CPU = Machine()
