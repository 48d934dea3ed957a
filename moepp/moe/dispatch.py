"""Bringing FFN slots to the rank that holds their expert, and their outputs back.

Both dispatchers compute the same thing. With expert parallelism, for the tokens of one rank:

    1. permute:  slots sorted by expert are already sorted by the rank that holds it
    2. exchange: one all-to-all of counts, one of rows (only FFN slots; nothing is padded)
    3. regroup:  received rows, ordered by (source rank, expert), are reordered by (expert, source rank)
    ... experts ...
    3'. 2'. 1'.  the same way back, then each token sums its weighted outputs

Zero-computation and dropped slots never appear here. A rank that sends or receives nothing still takes part.

Shapes: T tokens, D width, K experts per token, S = T·K slots, N FFN slots of this rank, R rows received,
E FFN experts, P expert-parallel ranks, L = E/P local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepp import comm
from moepp.moe.kernels import Affine, RowOrder, SlotOrder, combine_rows, gather_rows


@dataclass(frozen=True)
class FFNSlots:
    """The slots of this rank's tokens that an FFN expert will compute.

    Attributes:
        order: these slots sorted by expert; N is the sum of its counts.
        weights_TK: gate weight of every slot, differentiable.
    """

    order: SlotOrder
    weights_TK: Tensor

    def rows(self, num_slots: int) -> RowOrder:
        """The rows to compute in the order of experts; ``num_slots`` = N as the host knows it."""
        return RowOrder(self.order.slots_S[:num_slots], self.order.positions_TK)


@dataclass(frozen=True)
class Receipt:
    """What :meth:`combine` needs to bring the outputs home."""

    order: RowOrder  # of this rank's own FFN slots
    weights_TK: Tensor
    rows_per_expert: list[int]  # rows of each local expert, summing to R
    remote_slots: int  # of this rank's FFN slots, those whose expert lives on another rank
    send_splits: list[int]
    receive_splits: list[int]
    received_PL: list[list[int]]  # rows from each rank for each local expert
    pending: comm.PendingExchange | None = None


class LocalDispatcher:
    """All FFN experts live on this rank: a gather and a scatter."""

    num_ranks = 1

    def dispatch(self, x_TD: Tensor, slots: FFNSlots) -> tuple[Receipt, Tensor, Tensor]:
        """Gather the rows [N, D] in expert order; x comes back for its next use."""
        counts = slots.order.counts_E.tolist()
        order = slots.rows(sum(counts))
        rows_ND, x_TD = gather_rows(x_TD, order)
        return Receipt(order, slots.weights_TK, counts, 0, [], [], []), rows_ND, x_TD

    def receive(self, rows_ND: Tensor, receipt: Receipt) -> Tensor:
        """The rows to compute, [R, D] ordered by local expert."""
        return rows_ND

    def combine(self, rows_RD: Tensor, receipt: Receipt, affine: Affine | None) -> Tensor:
        """Sum of weighted expert outputs per token and of the zero-computation experts' affine part, [T, D]."""
        return combine_rows(rows_RD, receipt.order, receipt.weights_TK, affine)


class AllToAllDispatcher:
    """FFN experts are sharded over the ranks of ``group``: rank r holds experts [r·L, (r+1)·L)."""

    def __init__(self, group: comm.Group, traffic: comm.Traffic) -> None:
        self.group = group
        self.traffic = traffic
        self.num_ranks = comm.size(group)
        self.rank = comm.rank(group)

    def dispatch(self, x_TD: Tensor, slots: FFNSlots) -> tuple[Receipt, Tensor, Tensor]:
        """Start the exchange; the rows are in flight until :meth:`receive`; x comes back for its next use."""
        counts_PL = slots.order.counts_E.view(self.num_ranks, -1)
        received_counts_PL = comm.exchange_counts(counts_PL, self.group, self.traffic)
        # The one host synchronisation of the layer: split sizes must be known here.
        sent, received = torch.stack((counts_PL, received_counts_PL)).tolist()
        send_splits, receive_splits = [sum(row) for row in sent], [sum(row) for row in received]
        order = slots.rows(sum(send_splits))
        rows_ND, x_TD = gather_rows(x_TD, order)
        pending, in_flight_RD = comm.start_exchange(rows_ND, send_splits, receive_splits, self.group, self.traffic)
        receipt = Receipt(
            order,
            slots.weights_TK,
            rows_per_expert=[sum(column) for column in zip(*received, strict=True)],
            remote_slots=sum(send_splits) - send_splits[self.rank],
            send_splits=send_splits,
            receive_splits=receive_splits,
            received_PL=received,
            pending=pending,
        )
        return receipt, in_flight_RD, x_TD

    def receive(self, rows_RD: Tensor, receipt: Receipt) -> Tensor:
        """Wait for the exchange; the rows to compute, [R, D] ordered by local expert."""
        assert receipt.pending is not None
        return self.regroup(comm.finish_exchange(rows_RD, receipt.pending), receipt)

    def regroup(self, rows_RD: Tensor, receipt: Receipt) -> Tensor:
        """From the order (source rank, expert) to (expert, source rank)."""
        return _reorder_blocks(rows_RD, receipt.received_PL)

    def combine(self, rows_RD: Tensor, receipt: Receipt, affine: Affine | None) -> Tensor:
        """Send outputs back to their tokens' ranks; their weighted sum per token plus the affine part, [T, D]."""
        rows_RD = _reorder_blocks(rows_RD, [list(column) for column in zip(*receipt.received_PL, strict=True)])
        pending, in_flight_ND = comm.start_exchange(
            rows_RD, receipt.receive_splits, receipt.send_splits, self.group, self.traffic
        )
        rows_ND = comm.finish_exchange(in_flight_ND, pending)
        return combine_rows(rows_ND, receipt.order, receipt.weights_TK, affine)


def _reorder_blocks(rows_RD: Tensor, sizes_AB: list[list[int]]) -> Tensor:
    """Blocks of rows in the order (a, b), so many rows each, brought to the order (b, a)."""
    if len(sizes_AB) <= 1 or len(sizes_AB[0]) <= 1:
        return rows_RD
    blocks = rows_RD.split([size for sizes_B in sizes_AB for size in sizes_B])
    num_b = len(sizes_AB[0])
    return torch.cat([block for b in range(num_b) for block in blocks[b::num_b]])
