"""Checks 6 and 7: the exchange through NCCL on one rank, and expert parallelism of two ranks that share the GPU.

NCCL refuses two ranks on one device: those two exchange over gloo, which copies through the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from moepp import MoEConfig
from moepp.bench.peers import one_process_group
from moepp.moe import ExpertParallel
from moepp.moe.dispatch import AllToAllDispatcher
from tests.dist import WorkerFailure, WorkerPool, subgroups
from tests.gpu.layouts import why_broken
from tests.gpu.models import LayerRun, device_events, expect_same_bits
from tests.gpu.report import Place, Report, Skip
from tests.gpu.training import alone
from tests.moe_cases import Case, Choices, Observed, assert_agrees, expect, run_layer
from tests.parity import TOLERANCE, Layout, Setting, deviation, train

WORKER_SECONDS = 100.0


def check_exchange(place: Place, report: Report) -> None:
    """The layer's rows sent to its own rank, whole and in two chunks: the bits of the layer without an exchange."""
    for dtype in (torch.float32, torch.bfloat16):
        run = LayerRun(place, place.size(8192, 64), dtype)
        local = run.step()
        with one_process_group(place.device):
            for chunks in (1, 2):
                parallel = ExpertParallel(dist.group.WORLD, num_chunks=chunks)
                run.layer.dispatcher = AllToAllDispatcher(parallel, run.layer.cfg.num_ffn_experts)
                name = f"{str(dtype).removeprefix('torch.')}, {chunks} chunks"
                expect_same_bits(report, name, run.step(), local)
                report.at_most(f"{name}: exchanges that were made", -parallel.stats.row_exchanges, -4 * chunks)
            if dtype == torch.bfloat16:
                with report.part("streams"):
                    _check_streams(place, report, run)


def _check_streams(place: Place, report: Report, run: LayerRun) -> None:
    """The exchange runs on a stream of its own, so that it can overlap with the experts."""
    place.require_cuda("streams")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run.step()
        torch.cuda.synchronize()
    streams = {event.device_resource_id() for event in device_events(profiler)}
    report.note("streams", len(streams))
    report.at_most("streams, at least two", -len(streams), -2)


def check_two_ranks(place: Place, report: Report) -> None:
    """The layer on two ranks against the oracle, and 20 steps of a model against one rank."""
    pool = WorkerPool(2, WORKER_SECONDS)
    try:
        if why := why_broken(pool, "all_to_all", place.device.type):
            raise Skip(f"gloo's all-to-all on tensors of {place.device.type}: {why}")
        cases = _cases(place)
        by_rank = pool.run(_run_cases, list(cases.values()), place.device.type)
        for name, case, *observed in zip(cases, cases.values(), *by_rank, strict=True):
            expected = expect(case)
            for rank in range(2):
                with report.part(f"{name}, rank {rank}"):
                    assert_agrees(case, observed[rank], expected[rank], rank)
                    report.expect(f"{name}, rank {rank}", "agrees", "the oracle's values", True)
        _check_training(place, report, pool)
    except WorkerFailure as failure:
        reason = str(failure).strip().splitlines()
        report.expect("two processes", f"{reason[0]}: {reason[-1]}", "results of both", False)
    finally:
        pool.close()


SPREAD: Choices = ((0, 5), (1, 2), (2, 7), (3, 6), (4, 6), (1, 0), (3, 4))
ONE_SIDED: Choices = ((0, 4), (0, 6))  # nothing for the second rank's experts


def _cases(place: Place) -> dict[str, Case]:
    cfg = MoEConfig(
        4,
        place.size(256, 8),
        num_constant_experts=2,
        num_copy_experts=1,
        num_zero_experts=1,
        tau=0.6,
        balance_loss_weight=0.3,
        balance_loss_scope="data_parallel",
    )
    base = Case(cfg, hidden_size=place.size(128, 16), ep_size=2, dtype=torch.float32)
    cases = {}
    for chunks in (1, 2):
        for name, choices in {"spread": (SPREAD, SPREAD[1:4]), "a rank without rows": (ONE_SIDED, ONE_SIDED)}.items():
            tokens = tuple(len(rank) for rank in choices)
            cases[f"{name}, {chunks} chunks"] = replace(base, tokens=tokens, choices=choices, exchange_chunks=chunks)
    cases["bfloat16"] = replace(cases["spread, 1 chunks"], dtype=torch.bfloat16)
    return cases


def _run_cases(rank: int, cases: list[Case], device: str) -> list[Observed]:
    groups = {"ep_group": subgroups(2), "balance_group": dist.group.WORLD}
    return [run_layer(case, rank, device=device, **groups) for case in cases]


def _check_training(place: Place, report: Report, pool: WorkerPool) -> None:
    device = place.device.type
    for recompute in (False, True):
        setting = Setting(one_sided=recompute, steps=place.size(20, 5))
        with alone(place.device):
            wanted = train(0, setting, Layout(device=device))
        found = pool.run(train, setting, Layout(2, 2, micro_batch=2, recompute=recompute, device=device))[0]
        name = f"{setting.steps} steps, " + ("one-sided routing, recomputed" if recompute else "spread routing")
        report.at_most(f"{name}: deviation from one rank", deviation(wanted, found).worst, TOLERANCE)
        report.note(name, deviation(wanted, found).worst)
