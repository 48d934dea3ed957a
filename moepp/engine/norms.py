"""Sums of squares that are right at any size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moepp.distributed import comm

_PART_ELEMENTS = 2**15  # its float64 copy, 256 KB, stays in a core's second-level cache
_ROW_ELEMENTS = 256  # a vector lane adds few enough of them


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of the squares of all elements, accumulated in float64.

    torch's float32 norm adds along vector lanes one after the other: once a lane holds large squares, the small ones
    that follow are rounded away, by up to 1e-3 of the sum for gradients of an embedding. On the CPU, where float64
    inside the reduction is four times as slow, parts are widened and multiplied instead.

    Args:
        tensor: any shape, strides and floating dtype.

    Returns:
        float64, 0-dim, on the tensor's device.
    """
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    total = torch.zeros((), dtype=torch.float64)
    for part in tensor.detach().reshape(-1).split(_PART_ELEMENTS):
        wide = part.double()
        total += torch.dot(wide, wide)
    return total


def squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return :func:`squared_norm` of each tensor, float64 [N]: on an accelerator in a few launches for all of them.

    Args:
        tensors: any shapes, one dtype; perhaps none.
        device: of the tensors.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu":
        return torch.stack([squared_norm(tensor) for tensor in tensors])
    return squared_norms_at_once(tensors)


def squared_norms_at_once(tensors: Sequence[Tensor]) -> Tensor:
    """Return what :func:`squared_norms` does, as it does on an accelerator; slow on the CPU."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors], 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square()


def rough_squared_norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return :func:`squared_norms` to 1e-6, in a quarter of the time on the CPU: for what is only looked at.

    Rows are short enough for float32, whatever stands beside what, and float64 adds them. Elements below 1e-19 may
    count as 0; where a square is beyond float32 the exact sum is taken.

    Args:
        tensors: any shapes, one dtype; perhaps none.
        device: of the tensors.
    """
    if device.type != "cpu" or not tensors:
        return squared_norms(tensors, device)
    squares = torch.stack([_rough_squared_norm(tensor.detach().reshape(-1)) for tensor in tensors])
    if squares.isfinite().all():
        return squares
    finite = squares.isfinite().tolist()
    return torch.stack([squares[i] if finite[i] else squared_norm(tensor) for i, tensor in enumerate(tensors)])


def _rough_squared_norm(flat: Tensor) -> Tensor:
    whole = flat.numel() // _ROW_ELEMENTS * _ROW_ELEMENTS
    rows = flat[:whole].view(-1, _ROW_ELEMENTS)
    total = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum()
    return total + squared_norm(flat[whole:])


def global_norm(squares: Iterable[tuple[Tensor, int]], world: comm.Group, device: torch.device) -> float:
    """Norm of a gradient that is spread over all ranks, every element counted once; the same on every rank.

    Args:
        squares: sum of squares of what this rank holds, and how many ranks hold the same: ``Σ |g|² / copies`` over the
            world is exact in every layout.
        world: all ranks.
        device: of the sums.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for square, copies in squares:
        total += square / copies
    return float(comm.all_reduce_sum(total, world).sqrt())
