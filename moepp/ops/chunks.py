"""Chunks of rows that are computed at a time, and weight gradients summed over chunks.

Shapes: R rows ordered by expert, M and N the two sides of a weight, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp.ops.matmul import mm


@dataclass(frozen=True)
class Chunk:
    """Some rows of one expert; ``first`` and ``last`` among that expert's chunks."""

    expert: int
    rows: slice
    first: bool
    last: bool

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def chunks(rows_per_expert: list[int], chunk_rows: int | None) -> Iterator[Chunk]:
    """Expert after expert in chunks of at most ``chunk_rows`` (``None``: whole); experts without rows are left out."""
    end = 0
    for expert, count in enumerate(rows_per_expert):
        start, end = end, end + count
        step = chunk_rows or max(count, 1)
        for first in range(start, end, step):
            yield Chunk(expert, slice(first, min(first + step, end)), first == start, first + step >= end)


def largest_chunk(rows_per_expert: list[int], chunk_rows: int | None) -> int:
    """Return rows of the longest chunk."""
    largest = max(rows_per_expert, default=0)
    return largest if chunk_rows is None else min(largest, chunk_rows)


class WeightGradients:
    """Gradients [E, M, N] of the experts' weights, filled chunk by chunk; zeros for an expert without rows.

    An expert of several chunks is summed in float32 (one expert at a time) and rounded once.
    """

    def __init__(self, weight_EMN: Tensor, rows_per_expert: list[int]) -> None:
        self.value_EMN = torch.empty_like(weight_EMN)
        self._sum_MN: Tensor | None = None
        for expert, count in enumerate(rows_per_expert):
            if count == 0:
                self.value_EMN[expert].zero_()

    @contextmanager
    def open(self, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (output, accumulator): write the chunk's gradient to output, or add it to accumulator if not None."""
        target_MN = self.value_EMN[chunk.expert]
        if chunk.first and chunk.last:
            yield target_MN, None
            return
        if chunk.first:
            dtype = torch.promote_types(target_MN.dtype, torch.float32)
            self._sum_MN = torch.zeros_like(target_MN, dtype=dtype)
        assert self._sum_MN is not None
        yield target_MN, self._sum_MN
        if chunk.last:
            target_MN.copy_(self._sum_MN)
            self._sum_MN = None

    def add(self, chunk: Chunk, left_MC: Tensor, right_CN: Tensor) -> None:
        """Add ``left @ right`` to the gradient of the chunk's expert."""
        with self.open(chunk) as (target_MN, sum_MN):
            if sum_MN is None:
                mm(left_MC, right_CN, target_MN)
            else:
                product_MN = torch.empty_like(target_MN)
                mm(left_MC, right_CN, product_MN)
                sum_MN += product_MN
