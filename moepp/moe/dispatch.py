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
    regroup_R: Tensor | None  # (expert, source) position -> (source, expert) position; None: same order
    pending: comm.PendingExchange | None = None


class LocalDispatcher:
    """All FFN experts live on this rank: a gather and a scatter."""

    num_ranks = 1

    def dispatch(self, x_TD: Tensor, slots: FFNSlots) -> tuple[Receipt, Tensor, Tensor]:
        """Gather the rows [N, D] in expert order; x comes back for its next use."""
        counts = slots.order.counts_E.tolist()
        order = slots.rows(sum(counts))
        rows_ND, x_TD = gather_rows(x_TD, order)
        return Receipt(order, slots.weights_TK, counts, 0, [], [], None), rows_ND, x_TD

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
        received_PL = comm.exchange_counts(counts_PL, self.group, self.traffic)
        # The one host synchronisation of the layer: split sizes must be known here.
        sent, received = torch.stack((counts_PL, received_PL)).tolist()
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
            regroup_R=_regroup(received_PL, sum(receive_splits)),
            pending=pending,
        )
        return receipt, in_flight_RD, x_TD

    def receive(self, rows_RD: Tensor, receipt: Receipt) -> Tensor:
        """Wait for the exchange; the rows to compute, [R, D] ordered by local expert."""
        assert receipt.pending is not None
        rows_RD = comm.finish_exchange(rows_RD, receipt.pending)
        return rows_RD if receipt.regroup_R is None else rows_RD.index_select(0, receipt.regroup_R)

    def combine(self, rows_RD: Tensor, receipt: Receipt, affine: Affine | None) -> Tensor:
        """Send outputs back to their tokens' ranks; their weighted sum per token plus the affine part, [T, D]."""
        if receipt.regroup_R is not None:
            rows_RD = rows_RD.index_select(0, torch.argsort(receipt.regroup_R))
        pending, in_flight_ND = comm.start_exchange(
            rows_RD, receipt.receive_splits, receipt.send_splits, self.group, self.traffic
        )
        rows_ND = comm.finish_exchange(in_flight_ND, pending)
        return combine_rows(rows_ND, receipt.order, receipt.weights_TK, affine)


def _regroup(received_PL: Tensor, num_rows: int) -> Tensor | None:
    """Where in the received order (source, expert) each row of the order (expert, source) lies: int64 [R]."""
    num_ranks, num_local = received_PL.shape
    if num_local == 1:
        return None
    expert_of_block = torch.arange(num_local, device=received_PL.device).repeat(num_ranks)
    expert_R = expert_of_block.repeat_interleave(received_PL.flatten(), output_size=num_rows)
    return torch.argsort(expert_R, stable=True)
