"""How Triton's kernels are launched: sizes of blocks, warps, and the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

_SIZES = (1024, 512, 256)  # columns that one program handles at a time; an arange must be a power of 2
_ELEMENTS_PER_WARP = 256  # 16 bytes of bfloat16 per lane and load
_LARGEST_TILE = 2048


def block(width: int) -> int:
    """Return columns per program: the size that wastes the fewest lanes (768 = 3 x 256, 1536 = 3 x 512)."""
    if width <= _SIZES[-1]:
        return triton.next_power_of_2(width)
    return min(_SIZES, key=lambda size: -(-width // size) * size)


def warps(elements: int) -> int:
    """Return the warps of a program that handles so many elements at a time."""
    return max(1, min(8, elements // _ELEMENTS_PER_WARP))


def rows_per_tile(width: int) -> int:
    """Return how many rows of a small width (a power of 2) one program takes."""
    return max(1, _LARGEST_TILE // width)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, where Triton launches."""
    return nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)
