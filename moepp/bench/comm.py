"""The expert exchange on real collectives: bytes against the formula, time against a bare all-to-all, overlap.

Also the sum of gradients beside backward.

Three ways to place the experts of the same layer: *vanilla* (FFN experts alone, sharded), *MoE++* (zero-computation
experts on every rank, so that only FFN assignments are sent), *all sharded* (zero-computation experts on one rank
each, as any other expert). Every rank is a process with its own tokens.

Shapes: T tokens per rank, D width, K experts per token, P ranks, E experts of the sharded kinds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moepp import ops
from moepp.bench import reduction
from moepp.bench.cases import CASES, Case, ForcedRouting, balanced_logits, random_tokens
from moepp.bench.processes import run_processes
from moepp.bench.tables import Record
from moepp.bench.timing import Timing, clock_for, measure
from moepp.distributed import comm
from moepp.errors import ConfigError
from moepp.moe import ExpertParallel, MoELayer
from moepp.moe.dispatch import AllToAllDispatcher, Assignments, Chunk, DispatchMetadata
from moepp.moe.gates import compute_gates
from moepp.ops import count_experts, sort_assignments

WARMUP = 2
LAYER_TOKENS_PER_MODEL_TOKEN = 4  # a whole model does more with a token
ROUNDS_PER_STEP = 5  # an exchange takes milliseconds, and they vary more


@dataclass(frozen=True)
class Options:
    """What to measure; every rank has one thread, and a device of its own where they are accelerators."""

    case: str
    taus: tuple[float, ...]
    ep_sizes: tuple[int, ...]
    num_tokens: int  # per rank
    dtype: torch.dtype
    rounds: int
    overlap_tau: float = 0.75  # of the MoE++ layer whose whole steps are timed, beside the vanilla one's
    device_type: str = "cpu"
    kernels: str = "auto"


def run(options: Options) -> dict[str, list[Record]]:
    """Return the tables ``exchange`` (bytes and times of dispatch and combine), ``overlap`` and ``gradients``.

    ``overlap`` times steps of the layer, ``gradients`` steps of a small model.
    """
    gradients: list[Record] = []
    exchange: list[Record] = []
    overlap: list[Record] = []
    for ep_size in options.ep_sizes:
        by_rank = run_processes(_work, ep_size, options, device_type=options.device_type)
        exchange += [_merge(ep_size, list(records)) for records in zip(*(one[0] for one in by_rank), strict=True)]
        for records in zip(*(one[1] for one in by_rank), strict=True):
            slowest = max(records, key=lambda record: record["ms"])
            overlap.append({"ep": ep_size} | slowest)
        num_tokens = max(options.num_tokens // LAYER_TOKENS_PER_MODEL_TOKEN, 1)
        gradients += reduction.run(
            ep_size, num_tokens, options.dtype, options.rounds, options.device_type, options.kernels
        )
    return {"exchange": exchange, "overlap": overlap, "gradients": gradients}


def require_devices(device: torch.device, ranks: int) -> None:
    """Refuse more ranks than accelerators: each needs its own.

    Raises:
        ConfigError: there are too few.
    """
    if device.type != "cpu" and ranks > torch.accelerator.device_count():
        raise ConfigError(
            f"--ep {ranks} needs {ranks} devices of type {device.type}, and there are "
            f"{torch.accelerator.device_count()}; lower it, or measure processes with --device cpu"
        )


def _world() -> comm.Group:
    group = dist.group.WORLD
    assert group is not None
    return group


def _merge(ep_size: int, records: list[Record]) -> Record:
    """Return one row of all ranks: bytes summed, times of the slowest rank."""
    sent, formula = (sum(record[key] for record in records) for key in ("bytes", "formula"))
    dispatch, counts, exchange, bare = (
        max(record[key] for record in records) for key in ("whole", "counts", "exchange", "bare")
    )
    return {
        "ep": ep_size,
        "experts": records[0]["experts"],
        "tau": records[0]["tau"],
        "MB per pass": sent / 2**20,
        "equals formula": sent == formula,
        "x vanilla": sent / sum(record["vanilla"] for record in records),
        "expected": records[0]["expected"],
        "dispatch+combine ms": dispatch,
        "counts ms": counts,
        "exchange ms": exchange,
        "bare all-to-all ms": bare,
        "share of bare bandwidth": bare / exchange,
        "with counts": bare / (counts + exchange),
    }


def _work(rank: int, world_size: int, options: Options) -> tuple[list[Record], list[Record]]:
    case = CASES[options.case]
    ops.choose_kernels(options.kernels, _device(options))
    records = []
    vanilla_bytes = 0
    for name, tau in [("vanilla", None), *((name, t) for t in options.taus for name in ("MoE++", "all sharded"))]:
        record = _exchange(rank, world_size, case, name, tau, options)
        vanilla_bytes = vanilla_bytes or record["bytes"]
        records.append(record | {"vanilla": vanilla_bytes})
    return records, [record for tau in (None, options.overlap_tau) for record in _overlap(case, tau, options)]


def _device(options: Options) -> torch.device:
    """Return this rank's device, which is the current one of its kind."""
    return torch.device(options.device_type)


def _clock(options: Options) -> Callable[[], float]:
    """Return a clock of elapsed time: a rank waits for others, which its own CPU time would leave out."""
    return time.perf_counter if options.device_type == "cpu" else clock_for(_device(options), 1)


def _exchange(rank: int, world_size: int, case: Case, name: str, tau: float | None, options: Options) -> Record:
    cfg = case.config(tau)
    num_sharded = cfg.num_experts if name == "all sharded" else cfg.num_ffn_experts
    gates = compute_gates(balanced_logits(cfg, options.num_tokens, seed=rank).to(_device(options)), cfg)
    ids_TK = gates.topk_ids_TK
    load_E = count_experts(ids_TK.flatten(), cfg.num_experts)
    ffn = sort_assignments(ids_TK, num_sharded)
    assignments = Assignments(ids_TK, gates.weights_TK, ffn, load_E, None, ids_TK.numel())
    x_TD = random_tokens(options.num_tokens, case.hidden_size, options.dtype, _device(options)).detach()
    group, comm_stats = _world(), comm.CommStats()
    dispatcher = AllToAllDispatcher(ExpertParallel(group, stats=comm_stats), num_sharded)

    def whole() -> tuple[Chunk, DispatchMetadata]:
        [chunk], metadata = dispatcher.dispatch(x_TD, assignments)
        dispatcher.combine([dispatcher.send_back(dispatcher.receive(chunk), chunk)], metadata, None)
        return chunk, metadata

    chunk, metadata = whole()
    sent = comm_stats.row_bytes  # of a dispatch and a combine
    row_bytes = case.hidden_size * x_TD.element_size()
    returned = sum(chunk.receive_splits) - chunk.receive_splits[rank]
    formula = (_remote_assignments(gates.topk_ids_TK, num_sharded, rank, world_size) + returned) * row_bytes
    timings = _time_exchange(whole, dispatcher, chunk, metadata, x_TD, options)
    # Every FFN assignment of a balanced vanilla layer is sent with probability (P - 1) / P.
    share = num_sharded / cfg.num_experts if tau is None or name == "all sharded" else 1 / case.limit(tau)
    return {
        "experts": name,
        "tau": tau,
        "bytes": sent // 2,
        "formula": formula // 2,
        "expected": share,
        **{key: timing.median for key, timing in timings.items()},
    }


def _remote_assignments(topk_ids_TK: Tensor, num_sharded: int, rank: int, world_size: int) -> int:
    """Return assignments whose expert lives elsewhere, counted from the choices alone."""
    owner_TK = topk_ids_TK // (num_sharded // world_size)
    return int(((topk_ids_TK < num_sharded) & (owner_TK != rank)).sum())


def _time_exchange(
    whole: Callable[[], object],
    dispatcher: AllToAllDispatcher,
    chunk: Chunk,
    metadata: DispatchMetadata,
    x_TD: Tensor,
    options: Options,
) -> dict[str, Timing]:
    group, comm_stats = dispatcher.group, comm.CommStats()
    rows_ND = x_TD[metadata.order.token_ids_R]
    there, back = chunk.send_splits, chunk.receive_splits
    outputs_RD = rows_ND.new_zeros(sum(back), rows_ND.shape[1])
    counts_PL = chunk.counts_E.new_tensor(chunk.received_PL)

    def counts() -> None:
        comm.start_count_exchange(counts_PL, group, comm_stats).received()

    def exchange() -> None:
        for rows, send, receive in ((rows_ND, there, back), (outputs_RD, back, there)):
            pending, in_flight = comm.start_exchange(rows, send, receive, group, comm_stats)
            comm.finish_exchange(in_flight, pending)

    def bare() -> None:
        for rows, send, receive in ((rows_ND, there, back), (outputs_RD, back, there)):
            pending = comm.PendingExchange(group, comm_stats, send, receive)
            pending.launch(rows, send, receive)
            pending.wait()

    contestants = {"whole": whole, "counts": counts, "exchange": exchange, "bare": bare}
    return measure(
        contestants,
        rounds=options.rounds * ROUNDS_PER_STEP,
        clock=_clock(options),
        warmup=WARMUP,
        before=lambda: comm.barrier(group),
    )


class BlockingDispatcher(AllToAllDispatcher):
    """Waits for the rows at once: what the layer would do without overlap, in both passes."""

    def dispatch(self, x_TD: Tensor, assignments: Assignments) -> tuple[list[Chunk], DispatchMetadata]:
        [chunk], metadata = super().dispatch(x_TD, assignments)
        assert chunk.pending is not None
        return [replace(chunk, rows=comm.finish_exchange(chunk.rows, chunk.pending), pending=None)], metadata


def _overlap(case: Case, tau: float | None, options: Options) -> list[Record]:
    """Return forward-and-backward steps of one layer, with and without overlapping the exchange."""
    group = _world()
    torch.manual_seed(0)
    layer = MoELayer(case.config(tau), case.hidden_size, ep_group=group).to(_device(options), options.dtype)
    x_TD = random_tokens(options.num_tokens, case.hidden_size, options.dtype, _device(options))
    routing = ForcedRouting(layer, options.num_tokens)
    comm_stats, num_ffn = comm.CommStats(), layer.cfg.num_ffn_experts
    dispatchers = {
        "blocking": BlockingDispatcher(ExpertParallel(group, stats=comm_stats), num_ffn),
        "beside zero-computation experts": AllToAllDispatcher(ExpertParallel(group, stats=comm_stats), num_ffn),
    }
    local = num_ffn // comm.size(group)
    for chunks in (2, 4):
        if local % chunks == 0:
            parallel = ExpertParallel(group, stats=comm_stats, num_chunks=chunks)
            dispatchers[f"in {chunks} chunks"] = AllToAllDispatcher(parallel, num_ffn)

    def step(dispatcher: AllToAllDispatcher) -> None:
        layer.dispatcher = dispatcher
        layer.zero_grad(set_to_none=True)
        with routing:
            out = layer(x_TD)
        (out.hidden.sum() + out.aux_loss).backward()

    contestants = {name: lambda one=one: step(one) for name, one in dispatchers.items()}
    timings = measure(
        contestants, rounds=options.rounds, clock=_clock(options), warmup=1, before=lambda: comm.barrier(group)
    )
    return [
        {
            "experts": "vanilla" if tau is None else "MoE++",
            "tau": tau,
            "exchange": name,
            "ms": t.median,
            "spread": t.spread,
            "x blocking": timings["blocking"].median / t.median,
        }
        for name, t in timings.items()
    ]
