"""Every collective of the project, with the bytes it sends.

The row exchange is split in two autograd functions so that work can run while it is in flight:

    pending, in_flight_RD = start_exchange(rows_ND, ...)   # launches the all-to-all
    ...                                                    # local work
    rows_RD = finish_exchange(in_flight_RD, pending)       # waits

Backward mirrors it: ``finish`` launches the reverse all-to-all, ``start`` waits for it, and whatever
autograd runs between the two (the local work's backward) overlaps with it.

Shapes: N rows sent, R rows received, D width, P ranks of the group, L local experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.distributed.stage_clock import StageClock
from moepp.errors import MoeppError

Group = dist.ProcessGroup
T = TypeVar("T")

# torch 2.13 calls them so, and the older names deprecated.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class CommStats:
    """What this rank has sent to *other* ranks within a layer, in bytes and calls.

    Counts what really crosses: forward, backward, recomputation and evaluation alike. Whoever wants the
    bytes of one phase takes the difference of :attr:`row_bytes` around it.

    Attributes:
        sequence_bytes: of the collectives that split the sequence, by kind (:mod:`moepp.distributed.sequence`).
        sequence_calls: of the same.
        clock: measures how long the exchange is waited for.
    """

    row_bytes: int = 0
    count_bytes: int = 0
    row_exchanges: int = 0
    count_exchanges: int = 0
    balance_bytes: int = 0
    balance_reductions: int = 0
    sequence_bytes: Counter[str] = field(default_factory=Counter)
    sequence_calls: Counter[str] = field(default_factory=Counter)
    pipeline_bytes: int = 0  # hidden states, router logits and their gradients, sent to the stages beside this one
    clock: StageClock = field(default_factory=StageClock)

    def by_kind(self) -> Counter[str]:
        """Return the bytes so far of what does not depend on the routing, by metric; rows are :attr:`row_bytes`."""
        return Counter(
            {
                "comm/pipeline_bytes": self.pipeline_bytes,
                "comm/sequence_bytes": self.sequence_bytes.total(),
                "comm/balance_bytes": self.balance_bytes,
            }
        )


@dataclass
class PendingExchange:
    """State of one row exchange between its start and its finish, forward or backward."""

    group: Group
    comm_stats: CommStats
    send_splits: list[int]
    receive_splits: list[int]
    work: Any = None
    keep_alive: list[Tensor] = field(default_factory=list)
    grad_in_flight: Tensor | None = None

    def launch(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Start the all-to-all of ``rows`` [N, D]; returns the buffer [R, D] it fills."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        own = dist.get_rank(self.group)
        row_size = rows[:1].numel() if rows.dim() == 1 else rows.shape[1:].numel()
        self.comm_stats.row_bytes += (sum(send_splits) - send_splits[own]) * row_size * rows.element_size()
        self.comm_stats.row_exchanges += 1
        with self.comm_stats.clock.stage("exchange"):
            self.work = dist.all_to_all_single(
                received, rows, receive_splits, send_splits, group=self.group, async_op=True
            )
        self.keep_alive = [rows]
        return received

    def wait(self) -> None:
        """Block (or make the current stream wait) until the exchange under way has finished."""
        with self.comm_stats.clock.stage("exchange"):
            self.work.wait()
        self.work, self.keep_alive = None, []


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, pending: PendingExchange) -> Tensor:
        ctx.pending = pending
        return pending.launch(rows_ND, pending.send_splits, pending.receive_splits)

    @staticmethod
    def backward(ctx: Any, token_RD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # What autograd hands over is only a token shaped like the forward's output; the rows are in the buffer.
        pending = ctx.pending
        pending.wait()
        grad_ND, pending.grad_in_flight = pending.grad_in_flight, None
        return grad_ND, None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight_RD: Tensor, pending: PendingExchange) -> Tensor:
        ctx.pending = pending
        pending.wait()
        return in_flight_RD.view_as(in_flight_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pending = ctx.pending
        pending.grad_in_flight = pending.launch(grad_RD, pending.receive_splits, pending.send_splits)
        return grad_RD, None


def start_exchange(
    rows_ND: Tensor, send_splits: list[int], receive_splits: list[int], group: Group, comm_stats: CommStats
) -> tuple[PendingExchange, Tensor]:
    """Launch the all-to-all of ``rows_ND`` (differentiable); nothing may read the result before the finish.

    Args:
        rows_ND: rows ordered by destination rank.
        send_splits: rows for each rank of the group, summing to N.
        receive_splits: rows from each rank of the group, summing to R.
        group: the expert-parallel process group.
        comm_stats: where the bytes are counted.
    """
    pending = PendingExchange(group, comm_stats, send_splits, receive_splits)
    return pending, _StartExchange.apply(rows_ND, pending)


def finish_exchange(in_flight_RD: Tensor, pending: PendingExchange) -> Tensor:
    """Wait for :func:`start_exchange`; returns the received rows, ordered by source rank."""
    return _FinishExchange.apply(in_flight_RD, pending)


def host_reads_at_once(tensor: Tensor) -> bool:
    """Return whether reading values does not wait for a device to compute them."""
    return tensor.is_cpu


@dataclass
class PendingCounts:
    """An exchange of row counts [P, L] under way, as nested lists.

    Where the host reads tensors at once, work can run before the others' counts are asked for. On an accelerator the
    first question waits for both: one synchronisation.
    """

    sent_PL: Tensor
    received_PL: Tensor
    work: Any
    clock: StageClock
    _values: list[list[list[int]]] | None = None

    def sent(self) -> list[list[int]]:
        """Return this rank's rows for each (rank, local expert)."""
        return self.sent_PL.tolist() if host_reads_at_once(self.sent_PL) else self._both()[0]

    def received(self) -> list[list[int]]:
        """Return the rows that come from each rank, for each local expert."""
        return self._both()[1]

    def _both(self) -> list[list[list[int]]]:
        if self._values is None:
            with self.clock.stage("exchange"):
                self.work.wait()
            self._values = torch.stack((self.sent_PL, self.received_PL)).tolist()
        return self._values


def start_count_exchange(counts_PL: Tensor, group: Group, comm_stats: CommStats) -> PendingCounts:
    """Launch the all-to-all of row counts: [P, L] rows for each (rank, local expert)."""
    counts_PL = counts_PL.contiguous()
    received_PL = torch.empty_like(counts_PL)
    comm_stats.count_bytes += (counts_PL.shape[0] - 1) * counts_PL.shape[1] * counts_PL.element_size()
    comm_stats.count_exchanges += 1
    work = dist.all_to_all_single(received_PL, counts_PL, group=group, async_op=True)
    return PendingCounts(counts_PL, received_PL, work, comm_stats.clock)


def all_gather_equal(part: Tensor, group: Group) -> Tensor:
    """Gather [N, ...] of each of the P ranks to [P, N, ...] on all of them, in the order of ranks."""
    num_ranks = size(group)
    # Gloo takes the parts only as one longer first dimension.
    whole = part.new_empty(num_ranks * part.shape[0], *part.shape[1:])
    _ALL_GATHER(whole, part.contiguous(), group=group)
    return whole.view(num_ranks, *part.shape)


def reduce_scatter_equal(parts: Tensor, group: Group) -> Tensor:
    """Sum [P, N, ...] over the P ranks, each of which gets its part, [N, ...]."""
    own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    _REDUCE_SCATTER(own, parts.contiguous().flatten(0, 1), group=group)
    return own


def all_to_all_equal(parts: Tensor, group: Group) -> Tensor:
    """Exchange a part for each of the P ranks, [P, ...], for the part that each had for this one, [P, ...]."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def all_reduce_sum(tensor: Tensor, group: Group | None) -> Tensor:
    """Sum in place over the group (``None``: the default group, or nothing when there is one process)."""
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


@dataclass
class Pending:
    """A collective under way, or nothing where there is one rank."""

    work: Any

    def wait(self) -> None:
        """Block (or make the current stream wait) until it has finished."""
        if self.work is not None:
            self.work.wait()


def start_all_reduce_sum(tensor: Tensor, group: Group | None, comm_stats: CommStats | None = None) -> Pending:
    """As :func:`all_reduce_sum`, without waiting: nothing may touch the tensor before the wait.

    ``comm_stats`` counts it as a reduction for the balance loss: the bytes of the tensor, whatever the algorithm sends.
    """
    if size(group) == 1:
        return Pending(None)
    if comm_stats is not None:
        comm_stats.balance_bytes += tensor.numel() * tensor.element_size()
        comm_stats.balance_reductions += 1
    return Pending(dist.all_reduce(tensor, group=group, async_op=True))


def own_share(tensor: Tensor, group: Group | None) -> Tensor:
    """Return this rank's part of a flat tensor that the ranks of the group share equally; a view."""
    return tensor if size(group) == 1 else tensor.chunk(size(group))[rank(group)]


def start_reduce_scatter_sum(tensor: Tensor, group: Group | None) -> Pending:
    """Sum a flat tensor over the group where it counts: in this rank's :func:`own_share`, in place; does not wait."""
    if size(group) == 1:
        return Pending(None)
    return Pending(_REDUCE_SCATTER(own_share(tensor, group), tensor, group=group, async_op=True))


def start_all_gather(tensor: Tensor, group: Group | None) -> Pending:
    """Fill a flat tensor from every rank's :func:`own_share` of it, in place; does not wait."""
    if size(group) == 1:
        return Pending(None)
    return Pending(_ALL_GATHER(tensor, own_share(tensor, group), group=group, async_op=True))


def all_reduce_max(tensor: Tensor, group: Group | None) -> Tensor:
    """Take the maximum over the group, in place."""
    if size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def agree_on_flag(flag: bool, group: Group | None) -> bool:
    """Return whether ``flag`` is set on any rank; over gloo, which waits for no accelerator."""
    return bool(all_reduce_max(torch.tensor(int(flag)), group))


def agree_on_digest(digest: str, group: Group | None) -> bool:
    """Return whether all ranks have the same digest (32 hexadecimal digits); costs one small reduction over gloo."""
    words = torch.tensor([int(digest[i : i + 8], 16) for i in range(0, 32, 8)])
    # The largest value is the smallest one too, which is the negative of the largest negative.
    most = all_reduce_max(torch.cat((words, -words)), group)
    return bool((most[:4] == -most[4:]).all())


def size(group: Group | None = None) -> int:
    """Return the number of ranks of the group; 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group | None = None) -> int:
    """Return the rank of this process in the group; 0 where nothing is distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def barrier(group: Group | None = None) -> None:
    """Wait for every rank of the group."""
    if size(group) > 1:
        dist.barrier(group=group)


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Return the ``value`` of every rank, on every rank."""
    if size(group) == 1:
        return [value]
    values: list[Any] = [None] * size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, group: Group | None = None) -> Any:
    """Return rank 0's ``value`` on every rank."""
    if size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def is_communication_error(error: BaseException) -> bool:
    """Return whether a collective failed because another rank was lost or did not answer in time."""
    if not isinstance(error, RuntimeError):
        return False  # an OSError, say, of a file whose path happens to hold one of the words
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection reset"))


def all_groups() -> list[Group]:
    """Return every process group there is."""
    return list(dist.distributed_c10d._world.pg_map)


def abort_all() -> None:
    """Give up every collective under way, in all process groups; none can be used afterwards."""
    dist.distributed_c10d._abort_process_group()


def run_together(action: Callable[[], Any], group: Group | None = None) -> Any:
    """Run ``action`` on every rank; if it raises a :class:`MoeppError` anywhere, raise the same error everywhere.

    Keeps an error that only one rank can see (a disk, a permission) from leaving the others in a hang. The first rank
    that has one is named, unless it is rank 0, which prints it; a rank with an error of its own prints that too.
    """
    result, problem = None, None
    try:
        result = action()
    except MoeppError as error:
        problem = error
    problems = gather_objects(problem, group)
    failed = [rank for rank, found in enumerate(problems) if found is not None]
    if not failed:
        return result
    first = failed[0]
    if problem is None:
        where = f"rank {first}: " if first > 0 else ""
        raise type(problems[first])(f"{where}{problems[first]}")
    if first > 0 or str(problem) != str(problems[0]):
        problem.said_here = True
    raise problem


def on_first_rank(action: Callable[[], T], group: Group | None = None) -> T | None:
    """Run ``action`` on rank 0 of ``group`` alone, None elsewhere; a :class:`MoeppError` is raised on every rank."""
    return run_together(lambda: action() if rank(group) == 0 else None, group)
