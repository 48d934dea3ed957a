"""What the layer does, in counts that no machine changes: operations, bytes saved and sent, collectives, host waits.

A change that makes the layer slower on every machine shows here; times are for `moepp bench`.

Letters: T tokens, D width, F expert width, N experts of all kinds, C constant experts, S FFN assignments, P ranks.
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moepp import MoEConfig, MoELayer, ops
from moepp.bench.cases import ForcedRouting
from moepp.bench.memory import saved_bytes
from moepp.distributed import comm
from moepp.distributed.comm import CommStats
from moepp.moe import ExpertParallel
from moepp.ops import use_grouped_products, use_kernels
from moepp.ops.backend import cpu_kernels
from tests.host_waits import counted_waits

T, D, F = 96, 32, 64
VANILLA = MoEConfig(4, F, capacity_factor=None, gating_residual=False)
MOEPP = MoEConfig(4, F, 1, 1, 2, tau=0.5, capacity_factor=None)
CONFIGS = {"vanilla": VANILLA, "MoE++": MOEPP}
# Per token: routing numbers of a few dozen bytes per expert or choice, whatever D and F are.
SMALL_BYTES_PER_TOKEN = 600


def build(
    cfg: MoEConfig, dtype: torch.dtype = torch.float32, parallel: ExpertParallel | None = None
) -> tuple[MoELayer, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoELayer(cfg, D, parallel=parallel).to(dtype)
    return layer, torch.randn(T, D).to(dtype).requires_grad_()


def step(layer: MoELayer, x: torch.Tensor) -> Any:
    out = layer(x)
    (out.hidden.square().sum() + out.aux_loss).backward()
    return out


def expected_forward_flops(cfg: MoEConfig, ffn_assignments: int) -> int:
    """Matrix products of a first layer's forward: SwiGLU experts, router, constant experts' weights and vectors."""
    experts = ffn_assignments * 6 * D * F
    router = 2 * T * D * (cfg.num_experts + cfg.num_constant_experts)  # a softmax of two is one sigmoid
    values = 2 * T * cfg.num_constant_experts * D
    return experts + router + values


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_forward_computes_the_chosen_ffn_assignments_and_nothing_more(cfg):
    layer, x = build(cfg)
    with use_kernels("torch"), FlopCounterMode(display=False) as counter:  # counts torch's matrix products
        out = layer(x)
    ffn_assignments = int(out.stats.ffn_assignments)
    assert 0 < ffn_assignments < T * cfg.top_k or cfg is VANILLA
    assert counter.get_total_flops() == expected_forward_flops(cfg, ffn_assignments)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("chunk_rows", [None, 10])
def test_backward_computes_twice_the_forward_and_a_chunked_one_the_hidden_products_again(cfg, chunk_rows, monkeypatch):
    layer, x = build(MoEConfig(**{**vars(cfg), "expert_chunk_rows": chunk_rows}))
    monkeypatch.setattr(importlib.import_module("moepp.ops.grouped_swiglu"), "supports_avx2", lambda _: False)
    with FlopCounterMode(display=False) as counter:
        ffn_assignments = int(step(layer, x).stats.ffn_assignments)
    experts = ffn_assignments * 18 * D * F + (ffn_assignments * 4 * D * F if chunk_rows else 0)
    # Counted are torch's products: with compiled kernels the experts', else the router's and constant experts' too.
    others = expected_forward_flops(cfg, ffn_assignments) - ffn_assignments * 6 * D * F
    assert counter.get_total_flops() == experts + (0 if cpu_kernels(x) else 3 * others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_saved_memory_is_that_of_the_ffn_assignments(cfg, chunk_rows, dtype):
    """Per FFN assignment: its row and its output (2 D) and, where not computed again, gate and up (2 F)."""
    layer, x = build(MoEConfig(**{**vars(cfg), "expert_chunk_rows": chunk_rows}), dtype)
    found, out = saved_bytes(layer, x)
    per_assignment = (2 * D + (2 * F if chunk_rows is None else 0)) * x.element_size()
    ffn_assignments = int(out.stats.ffn_assignments)
    assert ffn_assignments * per_assignment <= found <= ffn_assignments * per_assignment + T * SMALL_BYTES_PER_TOKEN


def test_tokens_without_ffn_expert_save_next_to_nothing():
    layer, x = build(MOEPP)
    with torch.no_grad():  # the last three experts: one constant, copy, zero
        layer.router.weight.zero_()
    layer.router.register_forward_hook(lambda _m, _a, out: out + torch.arange(MOEPP.num_experts))
    found, out = saved_bytes(layer, x)
    assert int(out.stats.ffn_assignments) == 0 and found <= T * SMALL_BYTES_PER_TOKEN


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_all_tokens_on_one_expert_stay_within_the_chunk():
    """The dropless worst case: memory of the hidden layer is bounded by the option, not by the routing."""
    chunk = 8
    largest = {}
    for chunk_rows in (None, chunk):
        layer, x = build(MoEConfig(1, 40 * D, top_k=1, capacity_factor=None, expert_chunk_rows=chunk_rows))
        with LargestTensor() as seen:
            step(layer, x)
        largest[chunk_rows] = seen.numel
    weights = 2 * 40 * D * D  # its gradient is as large, whatever the rows
    assert largest[None] >= T * 2 * 40 * D
    assert largest[chunk] == max(chunk * 2 * 40 * D, T * D, weights)


def count_calls(owner: Any, names: tuple[str, ...], counts: Counter[str], patch: pytest.MonkeyPatch) -> None:
    for name in names:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, _original: Callable[..., Any] = original, _name: str = name, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        patch.setattr(owner, name, counted)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("cfg", [*CONFIGS.values(), MoEConfig(**{**vars(MOEPP), "capacity_factor": 1.1})])
def test_the_host_waits_once_per_forward_and_never_in_backward(cfg, compiled, monkeypatch):
    layer, x = build(cfg)
    with counted_waits(monkeypatch) as waits, use_kernels("auto" if compiled else "torch"):
        step(layer, x)
    assert waits == {"tolist": 1}, (
        "the experts' row counts, for their loop; see test_host_waits.py for grouped products"
    )


def _count_on_rank(
    rank: int, cfg: MoEConfig, like_an_accelerator: bool = False
) -> tuple[Counter[str], Counter[str], CommStats, int]:
    counts: Counter[str] = Counter()
    comm_stats = CommStats()
    layer, x = build(cfg, parallel=ExpertParallel(dist.group.WORLD, stats=comm_stats))
    with pytest.MonkeyPatch.context() as patch, ForcedRouting(layer, T):
        if like_an_accelerator:
            patch.setattr(comm, "host_reads_at_once", lambda tensor: False)
        count_calls(dist, ("all_to_all_single", "all_reduce", "broadcast", "all_gather", "barrier"), counts, patch)
        with ExitStack() as stack:
            if like_an_accelerator:
                stack.enter_context(use_kernels("torch"))
                stack.enter_context(use_grouped_products())
            waits = stack.enter_context(counted_waits(patch))
            out = step(layer, x)
    return counts, waits, comm_stats, int(out.stats.remote_assignments)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_layer_exchanges_counts_once_and_rows_twice_each_way_and_only_remote_ffn_assignments(pools, cfg):
    results = pools(2).run(_count_on_rank, cfg)
    remote = sum(result[3] for result in results)
    for counts, waits, comm_stats, _ in results:
        assert counts == {"all_to_all_single": 5}, "counts; rows there and back; their gradients"
        assert waits == {"tolist": 2}, "blocks to send, which are there, and blocks to receive"
        assert (comm_stats.count_exchanges, comm_stats.row_exchanges) == (1, 4)
        assert comm_stats.count_bytes == 8 * cfg.num_ffn_experts // 2
    assert sum(result[2].row_bytes for result in results) == 4 * remote * D * 4
    expected = 2 * T * cfg.top_k / 2 * (1 if cfg is VANILLA else cfg.tau * 4 / (cfg.tau * 4 + 4))
    assert abs(remote - expected) < 0.1 * expected


@pytest.mark.parametrize("cfg", [*CONFIGS.values(), MoEConfig(**{**vars(MOEPP), "capacity_factor": 1.1})])
def test_a_rank_whose_device_computes_the_counts_waits_for_it_once(pools, cfg):
    for _, waits, _, _ in pools(2).run(_count_on_rank, cfg, True):
        assert waits == {"tolist": 1}, "sizes of the blocks there and back"


def _outputs_and_order_of_work(rank: int, like_an_accelerator: bool) -> tuple[list[str], list[torch.Tensor]]:
    layer, x = build(MOEPP, parallel=ExpertParallel(dist.group.WORLD))
    events: list[str] = []

    def trace(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args: events.append(event) or original(*args))

    with pytest.MonkeyPatch.context() as patch, ForcedRouting(layer, T):
        if like_an_accelerator:
            patch.setattr(comm, "host_reads_at_once", lambda tensor: False)
        trace(comm, "start_count_exchange", "counts leave")
        trace(comm.PendingCounts, "_both", "host waits")
        trace(ops, "gather_ahead" if like_an_accelerator else "gather_rows", "gather")
        trace(comm, "start_exchange", "rows leave")
        trace(ops, "affine_experts", "copy and constant experts")
        trace(comm, "finish_exchange", "rows are waited for")
        trace(ops, "grouped_swiglu", "FFN experts")
        trace(ops, "combine_rows", "combine")
        with use_kernels("torch"):
            out = step(layer, x)
    assert x.grad is not None
    return events, [out.hidden.detach(), x.grad]


def test_work_that_needs_no_counts_precedes_them_and_local_experts_run_while_rows_travel(pools):
    for (events, values), (others, other_values) in zip(
        pools(2).run(_outputs_and_order_of_work, False), pools(2).run(_outputs_and_order_of_work, True), strict=True
    ):
        before = ["counts leave", "gather", "host waits"]
        there = ["rows leave", "copy and constant experts", "rows are waited for", "FFN experts"]
        assert events == [*before, *there, "rows leave", "rows are waited for", "combine"]
        assert [event for event, _ in itertools.groupby(others)] == events
        assert all(torch.equal(value, other) for value, other in zip(values, other_values, strict=True))
