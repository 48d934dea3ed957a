"""Bringing FFN slots to the rank that holds their expert, and their outputs back.

Both dispatchers compute the same thing. With expert parallelism, for the tokens of one rank:

    1. permute:  slots sorted by expert are already sorted by the rank that holds it
    2. exchange: one all-to-all of counts, one of rows (only FFN slots; nothing is padded)
    3. regroup:  received rows, ordered by (source rank, expert), are reordered by (expert, source rank)
    ... experts ...
    3'. 2'. 1'.  the same way back, then each token sums its weighted outputs

Rows may travel in several parts, each of some of every rank's experts: while one part is computed the next is on its
way there and the one before on its way back. Zero-computation and dropped slots never appear here. A rank that sends or
receives nothing still takes part.

Shapes: T tokens, D width, K experts per token, S = T·K slots, N FFN slots of this rank, R rows received in a part,
E FFN experts, P expert-parallel ranks, L = E/P local experts, G parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepp import comm
from moepp.errors import ConfigError
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
class Part:
    """Rows of some of every rank's experts, which travel together."""

    rows: Tensor  # for the local experts; on their way until they are received
    rows_per_expert: list[int]  # of each of these local experts, summing to R
    received_PL: list[list[int]]  # rows from each rank for each of them
    send_splits: list[int] = field(default_factory=list)
    pending: comm.PendingExchange | None = None  # None: they have arrived

    @property
    def receive_splits(self) -> list[int]:
        """Rows from each rank."""
        return [sum(row) for row in self.received_PL]


@dataclass(frozen=True)
class Receipt:
    """What :meth:`combine` needs to bring the outputs home."""

    order: RowOrder  # of this rank's own FFN slots
    weights_TK: Tensor
    remote_slots: int  # of this rank's FFN slots, those whose expert lives on another rank
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Outputs:
    """A part's outputs on their way home."""

    rows: Tensor
    pending: comm.PendingExchange | None = None


class LocalDispatcher:
    """All FFN experts live on this rank: a gather and a scatter.

    Args:
        triton: whether these are done by Triton's kernels.
    """

    num_ranks = 1

    def __init__(self, triton: bool = False) -> None:
        self.triton = triton

    def in_order(self, expert_TK: Tensor) -> Tensor:
        """Numbers by which the slots are to be sorted."""
        return expert_TK

    def dispatch(self, x_TD: Tensor, slots: FFNSlots) -> tuple[Receipt, Tensor]:
        """Gather the rows [N, D] in expert order; x comes back for its next use."""
        counts = slots.order.counts_E.tolist()
        order = slots.rows(sum(counts))
        rows_ND, x_TD = gather_rows(x_TD, order, self.triton)
        return Receipt(order, slots.weights_TK, 0, (Part(rows_ND, counts, []),)), x_TD

    def receive(self, part: Part) -> Tensor:
        """The rows to compute, [R, D] ordered by local expert."""
        return part.rows

    def send_back(self, rows_RD: Tensor, part: Part) -> Outputs:
        """Start the outputs' way home."""
        return Outputs(rows_RD)

    def combine(self, outputs: list[Outputs], receipt: Receipt, affine: Affine | None) -> Tensor:
        """Sum of weighted expert outputs per token and of the zero-computation experts' affine part, [T, D]."""
        return combine_rows(outputs[0].rows, receipt.order, receipt.weights_TK, affine, self.triton)


class AllToAllDispatcher:
    """FFN experts are sharded over the ranks of ``group``: rank r holds experts [r·L, (r+1)·L).

    Args:
        group: the expert-parallel ranks.
        traffic: where bytes are counted.
        num_experts: E.
        num_parts: G; part g carries local experts [g·L/G, (g+1)·L/G) of every rank.
        triton: whether rows are gathered and summed by Triton's kernels.

    Raises:
        ConfigError: the local experts cannot be divided into so many parts.
    """

    def __init__(
        self, group: comm.Group, traffic: comm.Traffic, num_experts: int, num_parts: int = 1, triton: bool = False
    ) -> None:
        self.group = group
        self.traffic = traffic
        self.num_ranks = comm.size(group)
        self.rank = comm.rank(group)
        self.num_parts = num_parts
        self.triton = triton
        local = num_experts // self.num_ranks
        if num_parts > 1 and (local == 0 or local % num_parts):
            raise ConfigError(
                f"parallel.exchange_parts={num_parts} does not divide the {local} FFN experts of each rank; "
                "change it, so that every part carries the same number of experts"
            )
        self.experts_per_part = local // num_parts

    def in_order(self, expert_TK: Tensor) -> Tensor:
        """Numbers by which the slots are to be sorted: expert (rank, part, l) becomes (part, rank, l); others keep
        theirs."""
        if self.num_parts == 1:
            return expert_TK
        size, ranks, parts = self.experts_per_part, self.num_ranks, self.num_parts
        rank, part = expert_TK // (parts * size), expert_TK // size % parts
        moved_TK = (part * ranks + rank) * size + expert_TK % size
        return torch.where(expert_TK < ranks * parts * size, moved_TK, expert_TK)

    def dispatch(self, x_TD: Tensor, slots: FFNSlots) -> tuple[Receipt, Tensor]:
        """Start the exchange; each part is in flight until :meth:`receive`; x comes back for its next use."""
        counts_GPL = slots.order.counts_E.view(self.num_parts, self.num_ranks, self.experts_per_part)
        counts_PL = counts_GPL.transpose(0, 1).flatten(1)
        # The one host synchronisation of the layer: split sizes must be known. On the CPU the gather runs meanwhile.
        pending = comm.start_count_exchange(counts_PL, self.group, self.traffic)
        sent = pending.sent()
        order = slots.rows(sum(map(sum, sent)))
        rows_ND, x_TD = gather_rows(x_TD, order, self.triton)
        received = pending.received()
        splits = [(self._counts_of(part, sent), self._counts_of(part, received)) for part in range(self.num_parts)]
        blocks = rows_ND.split([sum(map(sum, there)) for there, _ in splits]) if self.num_parts > 1 else (rows_ND,)
        parts = tuple(self._start(rows, *counts) for rows, counts in zip(blocks, splits, strict=True))
        remote_slots = len(rows_ND) - sum(sent[self.rank])
        return Receipt(order, slots.weights_TK, remote_slots, parts), x_TD

    def _counts_of(self, part: int, counts_PL: list[list[int]]) -> list[list[int]]:
        experts = slice(part * self.experts_per_part, (part + 1) * self.experts_per_part)
        return [row[experts] for row in counts_PL]

    def _start(self, rows_XD: Tensor, sent_PL: list[list[int]], received_PL: list[list[int]]) -> Part:
        send_splits, receive_splits = [sum(row) for row in sent_PL], [sum(row) for row in received_PL]
        pending, in_flight_RD = comm.start_exchange(rows_XD, send_splits, receive_splits, self.group, self.traffic)
        rows_per_expert = [sum(column) for column in zip(*received_PL, strict=True)]
        return Part(in_flight_RD, rows_per_expert, received_PL, send_splits, pending)

    def receive(self, part: Part) -> Tensor:
        """Wait for a part; its rows to compute, [R, D] ordered by local expert."""
        rows_RD = part.rows if part.pending is None else comm.finish_exchange(part.rows, part.pending)
        return _reorder_blocks(rows_RD, part.received_PL)

    def send_back(self, rows_RD: Tensor, part: Part) -> Outputs:
        """Start the outputs' way back to their tokens' ranks."""
        rows_RD = _reorder_blocks(rows_RD, [list(column) for column in zip(*part.received_PL, strict=True)])
        pending, in_flight_XD = comm.start_exchange(
            rows_RD, part.receive_splits, part.send_splits, self.group, self.traffic
        )
        return Outputs(in_flight_XD, pending)

    def combine(self, outputs: list[Outputs], receipt: Receipt, affine: Affine | None) -> Tensor:
        """Wait for the outputs; their weighted sum per token plus the affine part, [T, D]."""
        parts = [comm.finish_exchange(out.rows, out.pending) for out in outputs if out.pending is not None]
        rows_ND = parts[0] if len(parts) == 1 else torch.cat(parts)
        return combine_rows(rows_ND, receipt.order, receipt.weights_TK, affine, self.triton)


def _reorder_blocks(rows_RD: Tensor, sizes_AB: list[list[int]]) -> Tensor:
    """Blocks of rows in the order (a, b), so many rows each, brought to the order (b, a)."""
    if len(sizes_AB) <= 1 or len(sizes_AB[0]) <= 1:
        return rows_RD
    blocks = rows_RD.split([size for sizes_B in sizes_AB for size in sizes_B])
    num_b = len(sizes_AB[0])
    return torch.cat([block for b in range(num_b) for block in blocks[b::num_b]])
