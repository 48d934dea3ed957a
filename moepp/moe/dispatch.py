"""Dispatch: tokens to the ranks of their FFN experts, and the experts' outputs back.

Both dispatchers compute the same thing. With expert parallelism, for the tokens of one rank:

    1. permute:    assignments sorted by expert are already sorted by the rank that holds it
    2. all-to-all: one of counts, one of rows (assignments to FFN experts only; nothing is padded)
    3. regroup:    received rows, ordered by (source rank, expert), are reordered by (expert, source rank)
    ... experts ...
    3'. 2'. 1'.    the same way back, then each token sums its weighted outputs

Rows may be sent in several chunks, each for some of every rank's experts: while one is computed, the next is on its
way there and the one before on its way back. Zero-computation and dropped assignments never appear here. A rank that
sends or receives nothing still takes part.

Shapes: T tokens, D width, K experts per token, N rows of this rank (its assignments to FFN experts), R rows received in
a chunk, E FFN experts, P expert-parallel ranks, L = E/P local experts, G chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp import ops
from moepp.distributed import comm
from moepp.errors import ConfigError
from moepp.moe.parallel import ExpertParallel


@dataclass(frozen=True)
class Assignments:
    """(token, expert) pairs of this rank's tokens.

    Attributes:
        ids_TK: experts of every kind as chosen; where dropped the number of experts, which none has.
        weights_TK: their gate weights, differentiable.
        ffn: those that an FFN expert computes, sorted by expert (in the dispatcher's order); N is the sum of counts.
        load_E: choices of each expert of every kind, before drops.
        num_dropped: dropped assignments of any kind; None: capacity was not applied.
        max_rows: no more assignments than these have a row; the host knows it without asking the device.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    ffn: ops.SortedAssignments
    load_E: Tensor
    num_dropped: Tensor | None
    max_rows: int

    def row_order(self, num_rows: int, with_spare: bool = False) -> ops.RowOrder:
        """Return the rows in the order of experts; ``num_rows`` = N as the host knows it, and maybe a spare one."""
        assignments_A = self.ffn.assignments_A
        if with_spare and num_rows == len(assignments_A):
            assignments_A = F.pad(assignments_A, (0, 1))  # any assignment will do
        return ops.RowOrder(assignments_A[: num_rows + with_spare], self.ffn.positions_TK, with_spare)


@dataclass(frozen=True)
class Chunk:
    """Rows for some of every rank's experts, which are sent together."""

    rows: Tensor  # for the local experts; in flight until they are received
    counts_E: Tensor  # rows of each of these local experts, summing to R or, if the host does not know them, to less
    host_counts: list[int] | None  # the same where the host knows them
    received_PL: list[list[int]] = field(default_factory=list)  # rows from each rank for each of them
    send_splits: list[int] = field(default_factory=list)
    pending: comm.PendingExchange | None = None  # None: they have arrived

    @property
    def receive_splits(self) -> list[int]:
        """Rows from each rank."""
        return [sum(row) for row in self.received_PL]


@dataclass(frozen=True)
class DispatchMetadata:
    """What :meth:`combine` needs."""

    order: ops.RowOrder  # of this rank's own rows
    weights_TK: Tensor
    remote_assignments: int  # of this rank's rows, those whose expert lives on another rank


@dataclass(frozen=True)
class InFlight:
    """Outputs of a chunk on their way to their tokens' ranks."""

    rows: Tensor
    pending: comm.PendingExchange | None = None


class LocalDispatcher:
    """All FFN experts live on this rank: a gather and a scatter.

    Args:
        takes_device_counts: whether the experts compute rows like these without the host knowing their counts. Then
            nothing waits for the device, and the rows are as many as there could be.
    """

    def __init__(self, takes_device_counts: Callable[[Tensor], bool]) -> None:
        self.takes_device_counts = takes_device_counts

    def sort_keys(self, expert_TK: Tensor) -> Tensor:
        """Sort key of each assignment."""
        return expert_TK

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[list[Chunk], DispatchMetadata]:
        """Gather the rows in expert order: N, or if the host does not know N as many as there could be."""
        counts_E, host_counts = assignments.ffn.counts_E, None
        if self.takes_device_counts(x_TD):
            order = assignments.row_order(assignments.max_rows, with_spare=ops.wants_spare_row(x_TD))
        else:
            host_counts = counts_E.tolist()  # the one host synchronisation of the layer
            order = assignments.row_order(sum(host_counts))
        rows_ND = ops.gather_rows(x_TD, order)
        return [Chunk(rows_ND, counts_E, host_counts)], DispatchMetadata(order, assignments.weights_TK, 0)

    def receive(self, chunk: Chunk) -> Tensor:
        """Return the rows to compute, [R, D] sorted by local expert."""
        return chunk.rows

    def send_back(self, rows_RD: Tensor, chunk: Chunk) -> InFlight:
        """Start to return the outputs."""
        return InFlight(rows_RD)

    def combine(self, outputs: list[InFlight], metadata: DispatchMetadata, local_TD: Tensor | None) -> Tensor:
        """Sum of weighted expert outputs per token, and of what was computed locally: [T, D]."""
        return ops.combine_rows(outputs[0].rows, metadata.order, metadata.weights_TK, local_TD)


class AllToAllDispatcher:
    """FFN experts are sharded over the ranks of a group: rank r holds experts [r·L, (r+1)·L).

    Args:
        parallel: the group, the counter of bytes and the number of chunks G; chunk g carries local experts
            [g·L/G, (g+1)·L/G) of every rank.
        num_experts: E.

    Raises:
        ConfigError: the local experts cannot be divided into that many chunks.
    """

    def __init__(self, parallel: ExpertParallel, num_experts: int) -> None:
        assert parallel.group is not None
        self.group, self.stats, self.num_chunks = parallel.group, parallel.stats, parallel.num_chunks
        self.num_ranks, self.rank = comm.size(self.group), comm.rank(self.group)
        local = num_experts // self.num_ranks
        if self.num_chunks > 1 and (local == 0 or local % self.num_chunks):
            raise ConfigError(
                f"parallel.exchange_chunks={self.num_chunks} does not divide the {local} FFN experts of each rank; "
                "change it, so that every chunk carries the same number of experts"
            )
        self.experts_per_chunk = local // self.num_chunks

    def sort_keys(self, expert_TK: Tensor) -> Tensor:
        """Sort key of each assignment: expert (rank, chunk, l) becomes (chunk, rank, l); others keep theirs."""
        if self.num_chunks == 1:
            return expert_TK
        size, ranks, chunks = self.experts_per_chunk, self.num_ranks, self.num_chunks
        rank, chunk = expert_TK // (chunks * size), expert_TK // size % chunks
        moved_TK = (chunk * ranks + rank) * size + expert_TK % size
        return torch.where(expert_TK < ranks * chunks * size, moved_TK, expert_TK)

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[list[Chunk], DispatchMetadata]:
        """Start the all-to-all; each chunk is in flight until :meth:`receive`."""
        counts_GPL = assignments.ffn.counts_E.view(self.num_chunks, self.num_ranks, self.experts_per_chunk)
        counts_PL = counts_GPL.transpose(0, 1).flatten(1)
        # The one host synchronisation of the layer: split sizes must be known. The gather runs meanwhile; where the
        # host would wait even for the number of this rank's own rows, of as many as there could be.
        pending = comm.start_count_exchange(counts_PL, self.group, self.stats)
        order, gathered_BD = assignments.row_order(assignments.max_rows), None
        if not comm.host_reads_at_once(counts_PL):
            gathered_BD = ops.gather_ahead(x_TD, order)
        sent = pending.sent()
        order = order.first(sum(map(sum, sent)))
        rows_ND = ops.gather_rows(x_TD, order, gathered_BD)
        received = pending.received()
        splits = [(self._counts_of(chunk, sent), self._counts_of(chunk, received)) for chunk in range(self.num_chunks)]
        blocks = rows_ND.split([sum(map(sum, there)) for there, _ in splits]) if self.num_chunks > 1 else (rows_ND,)
        counts_GL = pending.received_PL.sum(dim=0).view(self.num_chunks, self.experts_per_chunk)
        chunks = [
            self._start(rows, counts_E, *split)
            for rows, counts_E, split in zip(blocks, counts_GL.unbind(), splits, strict=True)
        ]
        return chunks, DispatchMetadata(order, assignments.weights_TK, len(rows_ND) - sum(sent[self.rank]))

    def _counts_of(self, chunk: int, counts_PL: list[list[int]]) -> list[list[int]]:
        experts = slice(chunk * self.experts_per_chunk, (chunk + 1) * self.experts_per_chunk)
        return [row[experts] for row in counts_PL]

    def _start(
        self, rows_XD: Tensor, counts_E: Tensor, sent_PL: list[list[int]], received_PL: list[list[int]]
    ) -> Chunk:
        send_splits, receive_splits = [sum(row) for row in sent_PL], [sum(row) for row in received_PL]
        pending, in_flight_RD = comm.start_exchange(rows_XD, send_splits, receive_splits, self.group, self.stats)
        host_counts = [sum(column) for column in zip(*received_PL, strict=True)]
        return Chunk(in_flight_RD, counts_E, host_counts, received_PL, send_splits, pending)

    def receive(self, chunk: Chunk) -> Tensor:
        """Wait for a chunk; its rows to compute, [R, D] sorted by local expert."""
        rows_RD = chunk.rows if chunk.pending is None else comm.finish_exchange(chunk.rows, chunk.pending)
        return _transpose_blocks(rows_RD, chunk.received_PL)

    def send_back(self, rows_RD: Tensor, chunk: Chunk) -> InFlight:
        """Start to return the outputs to their tokens' ranks."""
        rows_RD = _transpose_blocks(rows_RD, [list(column) for column in zip(*chunk.received_PL, strict=True)])
        pending, in_flight_XD = comm.start_exchange(
            rows_RD, chunk.receive_splits, chunk.send_splits, self.group, self.stats
        )
        return InFlight(in_flight_XD, pending)

    def combine(self, outputs: list[InFlight], metadata: DispatchMetadata, local_TD: Tensor | None) -> Tensor:
        """Wait for the outputs; their weighted sum per token, and what was computed locally: [T, D]."""
        chunks = [comm.finish_exchange(out.rows, out.pending) for out in outputs if out.pending is not None]
        rows_ND = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return ops.combine_rows(rows_ND, metadata.order, metadata.weights_TK, local_TD)


def _transpose_blocks(rows_RD: Tensor, sizes_AB: list[list[int]]) -> Tensor:
    """Transpose a list of variable-size blocks of rows from (a, b) to (b, a) order."""
    if len(sizes_AB) <= 1 or len(sizes_AB[0]) <= 1:
        return rows_RD
    blocks = rows_RD.split([size for sizes_B in sizes_AB for size in sizes_B])
    num_b = len(sizes_AB[0])
    return torch.cat([block for b in range(num_b) for block in blocks[b::num_b]])
