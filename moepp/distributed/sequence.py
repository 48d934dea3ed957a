"""Sequences split over ranks: tensor parallelism with sequence parallelism, and context parallelism.

The ranks of a replica share a micro-batch. Outside attention each of them has its own tokens of every sequence, and
nothing else there knows of it. Attention needs more:

- over C context-parallel ranks, either each rank gets all tokens of some heads ("ulysses", DeepSpeed-Ulysses,
  arXiv 2309.14509), or all keys and values ("gather", as Llama 3, arXiv 2407.21783, section 3.3.2);
- over P tensor-parallel ranks, each has some heads. They gather the tokens of their context part before the first
  product and sum and scatter them after the last one (Megatron, arXiv 2205.05198).

Every function here is differentiable; its backward is the opposite collective.

Letters: B batch, S sequence, s this rank's part of it, H heads (of queries, keys or values), d head size, C context-
and P tensor-parallel ranks, n ranks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moepp.config.parallel_rules import sequence_multiple
from moepp.distributed import comm
from moepp.errors import ConfigError


@dataclass(frozen=True)
class SequenceParallel:
    """How the ranks of a replica share sequences; one object for the whole model. The default: one rank has them whole.

    Ulysses gives context rank c the c-th of C equal runs of a sequence. Gathered keys and values are balanced in
    zigzag: of 2C runs it gets the c-th and the c-th from the end, so that all ranks have as many pairs of query and key
    below the diagonal. Tensor rank t has the t-th of P equal runs of its context part.

    Attributes:
        tensor: ranks that have some heads each.
        context: ranks that have some part of the sequence each.
        replica: the C·P ranks of both, tensor ranks next to each other.
        method: "ulysses" or "gather".
        stats: counts the bytes that are sent.
    """

    tensor: comm.Group | None = None
    context: comm.Group | None = None
    replica: comm.Group | None = None
    method: str = "ulysses"
    stats: comm.CommStats = field(default_factory=comm.CommStats)

    @property
    def tensor_size(self) -> int:
        """P."""
        return 1 if self.tensor is None else comm.size(self.tensor)

    @property
    def tensor_rank(self) -> int:
        """Of this process."""
        return 0 if self.tensor is None else comm.rank(self.tensor)

    @property
    def context_size(self) -> int:
        """C."""
        return 1 if self.context is None else comm.size(self.context)

    @property
    def context_rank(self) -> int:
        """Of this process."""
        return 0 if self.context is None else comm.rank(self.context)

    @property
    def size(self) -> int:
        """C·P: ranks that share a sequence."""
        return self.tensor_size * self.context_size

    @property
    def is_zigzag(self) -> bool:
        """Whether a context part consists of two runs of the sequence."""
        return self.method == "gather" and self.context_size > 1

    def context_positions(self, seq_len: int, rank: int | None = None, device: Any = None) -> Tensor:
        """Return where the tokens of a context rank (None: this one) lie in the sequence, [S/C], in its order.

        Raises:
            ConfigError: the sequence cannot be split so.
        """
        rank = self.context_rank if rank is None else rank
        num_runs = self.context_size * (2 if self.is_zigzag else 1)
        of = sequence_multiple(self.method, self.context_size, self.tensor_size)
        if seq_len % of:
            raise ConfigError(
                f"a sequence of {seq_len} tokens cannot be split over {self.context_size} context-parallel "
                f"({self.method}) and {self.tensor_size} tensor-parallel ranks; "
                f"make it a multiple of {of}"
            )
        length = seq_len // num_runs
        runs = (rank, num_runs - 1 - rank) if self.is_zigzag else (rank,)
        return torch.cat([torch.arange(run * length, (run + 1) * length, device=device) for run in runs])

    def own_positions(self, seq_len: int, device: Any = None) -> Tensor:
        """Return where this rank's tokens outside attention lie in the sequence, [S/(C·P)], in its order."""
        return self.context_positions(seq_len, device=device).chunk(self.tensor_size)[self.tensor_rank]

    def own(self, x_BS: Tensor) -> Tensor:
        """Take this rank's tokens, [B, S/(C·P), ...], out of whole sequences [B, S, ...]."""
        if self.size == 1:
            return x_BS
        return x_BS.index_select(1, self.own_positions(x_BS.shape[1], x_BS.device))

    def whole(self, x_Bs: Tensor) -> Tensor:
        """Join each rank's own tokens, [B, S/(C·P), ...], to sequences in their order, [B, S, ...]; no gradient."""
        if self.size == 1:
            return x_Bs
        assert self.replica is not None
        _count(self.stats, "gather_sequence", x_Bs.detach(), self.size - 1)
        gathered_BS = comm.all_gather_equal(x_Bs.detach(), self.replica).movedim(0, 1).flatten(1, 2)
        # Ranks of a replica are ordered by context rank and then by tensor rank, which is the order of the positions.
        return gathered_BS.index_select(1, self._context_order(gathered_BS.shape[1], x_Bs.device))

    def gather_tensor(self, x_BsD: Tensor) -> Tensor:
        """Gather the tokens of this rank's context part: [B, S/(C·P), D] -> [B, S/C, D]."""
        return x_BsD if self.tensor_size == 1 else gather_sequence(x_BsD, self._tensor, self.stats)

    def sum_scatter_tensor(self, x_BsD: Tensor) -> Tensor:
        """Sum [B, S/C, D] over the tensor ranks, each of which gets its own tokens: [B, S/(C·P), D]."""
        return x_BsD if self.tensor_size == 1 else sum_scatter_sequence(x_BsD, self._tensor, self.stats)

    def gather_context(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Gather keys and values of the whole sequence: [B, H, S/C, d] each -> [B, H, S, d]."""
        heads = [part.shape[1] for part in parts]
        together_BsX = torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
        whole_BSX = gather_sequence(together_BsX, self._context, self.stats)
        if self.is_zigzag:
            order_S = self._context_order(whole_BSX.shape[1], whole_BSX.device)
            whole_BSX = whole_BSX.index_select(1, order_S)
        whole_BHSd = whole_BSX.unflatten(2, (sum(heads), -1)).transpose(1, 2)
        return whole_BHSd.split(heads, dim=1)

    def scatter_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Exchange parts of all heads for whole sequences of some heads: [B, H, S/C, d] each -> [B, H/C, S, d]."""
        by_rank = [part.unflatten(1, (self.context_size, -1)) for part in parts]
        heads = [part.shape[2] for part in by_rank]
        together_BHsd = torch.cat(by_rank, dim=2).flatten(1, 2)
        return exchange_heads(together_BHsd, self._context, self.stats, heads_out=True).split(heads, dim=1)

    def gather_heads(self, x_BHSd: Tensor) -> Tensor:
        """Undo :meth:`scatter_heads`, for one tensor: [B, H/C, S, d] -> [B, H, S/C, d]."""
        return exchange_heads(x_BHSd, self._context, self.stats, heads_out=False)

    @property
    def _tensor(self) -> comm.Group:
        assert self.tensor is not None
        return self.tensor

    @property
    def _context(self) -> comm.Group:
        assert self.context is not None
        return self.context

    def _context_order(self, seq_len: int, device: torch.device) -> Tensor:
        """Where each position of the sequence lies among the context ranks' tokens, one rank after the other."""
        ranks = range(self.context_size)
        return torch.cat([self.context_positions(seq_len, rank, device) for rank in ranks]).argsort()


def gather_sequence(x_BsX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
    """Gather [B, s, ...] of each rank to [B, n·s, ...], one rank's tokens after the other's; gradients are summed."""
    return _GatherSequence.apply(x_BsX, group, stats)


def sum_scatter_sequence(x_BSX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
    """Sum [B, n·s, ...] over the ranks, each of which gets its s tokens: [B, s, ...]."""
    return _SumScatterSequence.apply(x_BSX, group, stats)


def exchange_heads(x: Tensor, group: comm.Group, stats: comm.CommStats, *, heads_out: bool) -> Tensor:
    """Exchange [B, H, s, d] for [B, H/n, n·s, d] with ``heads_out``, else [B, H, n·s, d] for [B, n·H, s, d]."""
    return _ExchangeHeads.apply(x, group, stats, heads_out)


def _count(stats: comm.CommStats, kind: str, sent: Tensor, copies: int) -> None:
    stats.sequence_bytes[kind] += sent.numel() * sent.element_size() * copies
    stats.sequence_calls[kind] += 1


def _gather(x_BsX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
    _count(stats, "gather_sequence", x_BsX, comm.size(group) - 1)
    return comm.all_gather_equal(x_BsX, group).movedim(0, 1).flatten(1, 2)


def _sum_scatter(x_BSX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
    parts_nBsX = x_BSX.unflatten(1, (comm.size(group), -1)).movedim(1, 0)
    _count(stats, "sum_scatter_sequence", parts_nBsX[0], len(parts_nBsX) - 1)
    return comm.reduce_scatter_equal(parts_nBsX, group)


def _exchange(x: Tensor, group: comm.Group, stats: comm.CommStats, heads_out: bool) -> Tensor:
    parts = x.unflatten(1 if heads_out else 2, (comm.size(group), -1)).movedim(1 if heads_out else 2, 0)
    _count(stats, "exchange_heads", parts[0], len(parts) - 1)
    received = comm.all_to_all_equal(parts, group)
    return received.movedim(0, 2).flatten(2, 3) if heads_out else received.movedim(0, 1).flatten(1, 2)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
        ctx.group, ctx.stats = group, stats
        return _gather(x_BsX, group, stats)

    @staticmethod
    def backward(ctx: Any, grad_BSX: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_scatter(grad_BSX, ctx.group, ctx.stats), None, None


class _SumScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSX: Tensor, group: comm.Group, stats: comm.CommStats) -> Tensor:
        ctx.group, ctx.stats = group, stats
        return _sum_scatter(x_BSX, group, stats)

    @staticmethod
    def backward(ctx: Any, grad_BsX: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(grad_BsX, ctx.group, ctx.stats), None, None


class _ExchangeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: comm.Group, stats: comm.CommStats, heads_out: bool) -> Tensor:
        ctx.group, ctx.stats, ctx.heads_out = group, stats, heads_out
        return _exchange(x, group, stats, heads_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad, ctx.group, ctx.stats, not ctx.heads_out), None, None, None
