"""Values that carry the way they are reduced over ranks, and the one place that reduces them.

Whoever makes a value says how it adds up (a weighted mean, a sum, a maximum, one entry for each rank);
:func:`reduce_values` packs all of them in one tensor, so a log interval costs one small collective and one host
synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moepp.distributed.device import to_device

Reduce = Callable[[Tensor], Tensor]
"""Takes a tensor of this rank, returns it summed over all ranks (for example a bound ``comm.all_reduce_sum``)."""


@dataclass(frozen=True)
class Value:
    """A scalar or a tensor with its reduction; make it with :meth:`mean`, :meth:`sum`, :meth:`max` or :meth:`ranks`."""

    reduction: Literal["mean", "sum", "max", "ranks"]
    data: Tensor  # mean: the weighted sum
    weight: Tensor | None = None  # mean only: the sum of the weights, 0-dim

    @classmethod
    def mean(cls, weighted_sum: Tensor, weight: Tensor) -> Value:
        """Return the mean over ranks: sum of ``weighted_sum`` over sum of ``weight`` (0-dim)."""
        return cls("mean", weighted_sum, weight)

    @classmethod
    def sum(cls, data: Tensor) -> Value:
        """Sum over ranks, element by element."""
        return cls("sum", data)

    @classmethod
    def max(cls, data: Tensor) -> Value:
        """Return the maximum over ranks, element by element; keep it small: it is sent for each rank."""
        return cls("max", data)

    @classmethod
    def ranks(cls, data: Tensor) -> Value:
        """Return what each rank has, [P, ...]; keep it small: it is sent for each rank."""
        return cls("ranks", data)


def reduce_values(values: Mapping[str, Value], sum_reduce: Reduce, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Reduce ``values`` over ranks with one call of ``sum_reduce``; none where there is nothing.

    Every rank passes the same names with the same shapes; their order does not matter. The sums are fp64, so that
    byte and token counts stay exact. Where some values are on an accelerator, that is where they are summed.

    Args:
        values: of this rank.
        sum_reduce: the collective.
        rank: number of this rank.
        size: P, how many there are.

    Returns:
        name -> fp64 tensor on the CPU, with the shape of ``Value.data`` ([P, ...] for one entry for each rank). A mean
        whose weight is 0 over all ranks is undefined and left out.
    """
    if not values:
        return {}
    names = sorted(values)
    parts = [part for name in names for part in _parts(values[name], rank, size)]
    summed = sum_reduce(_joined(parts)).cpu()
    found, at = {}, 0
    for name in names:
        value = values[name]
        shape = value.data.shape if value.reduction in ("mean", "sum") else (size, *value.data.shape)
        end = at + int(torch.Size(shape).numel())
        data, at = summed[at:end].reshape(shape), end
        if value.weight is not None:
            weight, at = summed[at], at + 1
            if weight == 0:
                continue
            data = data / weight
        found[name] = data.amax(dim=0) if value.reduction == "max" else data
    return found


def _parts(value: Value, rank: int, size: int) -> list[Tensor]:
    """Return what is summed of a value, flat: for one entry for each rank zeros but for this one's."""
    flat = value.data.detach().to(torch.float64).reshape(-1)
    if value.weight is not None:
        return [flat, value.weight.detach().to(torch.float64).reshape(1)]
    if value.reduction == "sum" or size == 1:
        return [flat]
    by_rank = flat.new_zeros(size, flat.numel())
    by_rank[rank] = flat
    return [by_rank.reshape(-1)]


def _joined(parts: list[Tensor]) -> Tensor:
    """Put all parts into one tensor, on the accelerator if one of them is there: those of the host in one copy."""
    device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
    own = [index for index, part in enumerate(parts) if part.device.type == "cpu"]
    if device.type != "cpu" and own:
        moved = to_device(torch.cat([parts[index] for index in own]), device)
        for index, part in zip(own, moved.split([parts[index].numel() for index in own]), strict=True):
            parts[index] = part
    return torch.cat(parts)
