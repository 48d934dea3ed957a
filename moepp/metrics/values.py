"""Values that carry the way they are reduced over ranks, and the one place that reduces them.

Whoever makes a value says how it adds up (a weighted mean, a sum, a maximum); :func:`reduce_values` packs all of
them in one tensor, so a log interval costs one or two small collectives and one host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Takes a tensor of this rank, returns it reduced over all ranks (for example a bound ``comm.all_reduce``)."""


@dataclass(frozen=True)
class Value:
    """A scalar or a vector with its reduction; make it with :meth:`mean`, :meth:`sum` or :meth:`max`."""

    reduction: Literal["mean", "sum", "max"]
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
        """Return the maximum over ranks, element by element."""
        return cls("max", data)


def reduce_values(values: Mapping[str, Value], sum_reduce: Reduce, max_reduce: Reduce) -> dict[str, Tensor]:
    """Reduce ``values`` over ranks: one ``sum_reduce`` call, and one ``max_reduce`` call if there is a maximum.

    Every rank passes the same names with the same shapes; their order does not matter. The sums are fp64, so that
    byte and token counts stay exact.

    Returns:
        name -> fp64 tensor on the CPU with the shape of ``Value.data``. A mean whose weight is 0 over all ranks is
        undefined and left out.
    """
    names = sorted(values)
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for name in names:
        value = values[name]
        parts[value.reduction == "max"].append(value.data.reshape(-1))
        if value.weight is not None:
            parts[False].append(value.weight.reshape(1))
    flat = {is_max: _reduce_packed(parts[is_max], max_reduce if is_max else sum_reduce) for is_max in parts}

    out, offset = {}, {False: 0, True: 0}
    for name in names:
        value = values[name]
        is_max = value.reduction == "max"
        end = offset[is_max] + value.data.numel()
        data = flat[is_max][offset[is_max] : end].reshape(value.data.shape)
        offset[is_max] = end
        if value.weight is not None:
            weight = flat[False][end]
            offset[False] += 1
            if weight == 0:
                continue
            data = data / weight
        out[name] = data
    return out


def _reduce_packed(parts: list[Tensor], reduce: Reduce) -> Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    return reduce(torch.cat([part.detach().to(torch.float64) for part in parts])).cpu()
