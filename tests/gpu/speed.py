"""Checks 11 to 13: times of the layer and of whole steps. Only what has a right value is a mark to pass.

Shapes: T tokens, S tokens per sequence.
"""

from __future__ import annotations

import gc
import math
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moepp.bench import layer as bench_layer
from moepp.bench import train as bench_train
from moepp.bench.tables import Record
from moepp.bench.timing import clock_for
from moepp.config import ModelConfig, OptimConfig
from moepp.distributed.groups import build_groups
from moepp.distributed.layout import Layout as RankLayout
from moepp.engine.native import NativeEngine
from moepp.metrics.throughput import peak_flops_per_second
from moepp.model.accounting import balanced_ffn_per_token, flops_per_token
from moepp.ops import use_kernels
from moepp.training.build import device_name
from tests.gpu.layer import kernel_sets
from tests.gpu.models import ModelRun, device_events, paper_model
from tests.gpu.report import Place, Report, Skip, is_installed
from tests.gpu.training import alone

GFLOP_PER_TOKEN = {"moepp_0.6b": 1.107, "moe_0.6b": 1.378}  # forward and backward, S = 2048, balanced routing
MEMORY_GIB = 40.0  # 10.5 GB of states and about 9 GB of activations at 16,384 tokens
TIMED_STEPS, WARMUP_STEPS = 10, 3


def check_layer_speed(place: Place, report: Report) -> None:
    """The MoE++ layer against the vanilla one and against its bare products, with each set of kernels."""
    rows: list[Record] = []
    sets = kernel_sets(place, report)
    for kernels in sets if place.is_cuda else sets[:2]:  # times of Triton's interpreter say nothing
        options = bench_layer.Options(
            cases=("8+4", "16+4", "32+8") if place.is_cuda else ("quick",),
            taus=(0.75,),
            num_tokens=place.size(16384, 32),
            dtype=torch.bfloat16,
            device=place.device,
            num_threads=(1,),
            rounds=place.size(10, 1),
            learned=False,
        )
        with use_kernels(kernels):
            for case in options.cases:
                times, _ = bench_layer.run_case(case, options)
                rows += [{"kernels": kernels, "case": case} | row for row in times]
    report.measure("layer", rows)
    for row in rows:
        if row["layer"] == "MoE++":
            report.note(f"{row['kernels']} {row['case']} {row['pass']}, share of limit", row["share of limit"])


def check_step_speed(place: Place, report: Report) -> None:
    """Whole steps of MoE++ 0.6B and of its vanilla twin: tokens/s, MFU, memory, launches, idle share."""
    rows: list[Record] = []
    seq_len = place.size(2048, 16)
    with alone(place.device):
        for name, gflop in GFLOP_PER_TOKEN.items():
            full = paper_model(name)
            report.at_most(f"{name}: GFLOP per token, distance from {gflop}", abs(_gflop(full, 2048) - gflop), 0.0005)
            cfg = full
            if not place.is_cuda:
                cfg = paper_model(name, 1, hidden_size=96, vocab_size=128, max_seq_len=64)
            for batch_size in (8, 16) if place.is_cuda else (1,):
                row, losses = _time_steps(place, ModelRun(place, cfg, torch.bfloat16, batch_size, seq_len))
                peak = peak_flops_per_second(device_name(place.device), "bf16")
                row["MFU"] = row["tokens/s"] * _gflop(cfg, seq_len) * 1e9 / peak if peak else None
                rows.append({"model": name} | row)
                tokens = row["tokens"]
                report.at_most(f"{name}, {tokens} tokens: losses that are not finite", _count_broken(losses), 0)
                report.at_most(f"{name}, {tokens} tokens: last loss less the first", losses[-1] - losses[0], 0.0)
                if place.is_cuda:
                    report.at_most(f"{name}, {tokens} tokens: peak GiB", row["peak GiB"], MEMORY_GIB)
    report.measure("steps", rows)


def _gflop(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward of one token."""
    flops = flops_per_token(cfg, seq_len, balanced_ffn_per_token(cfg.moe)).forward_backward
    assert flops is not None, "no registered part that does not count its operations"
    return flops / 1e9


def _count_broken(losses: list[float]) -> int:
    return sum(not math.isfinite(loss) for loss in losses)


def _time_steps(place: Place, run: ModelRun) -> tuple[Record, list[float]]:
    engine = NativeEngine(run.model, build_groups(RankLayout(1), place.device), OptimConfig(), 1)
    clock = clock_for(place.device, torch.get_num_threads())
    if place.is_cuda:
        gc.collect()  # the model before this one, whose hooks hold it in circles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[Tensor] = []

    def step() -> None:
        loss = run.loss()
        engine.backward(loss)
        engine.step(1e-4)
        losses.append(loss.detach())

    seconds = []
    for turn in range(WARMUP_STEPS + place.size(TIMED_STEPS, 2)):
        start = clock()
        step()
        if turn >= WARMUP_STEPS:
            seconds.append(clock() - start)
    tokens = run.ids_BS.shape[0] * (run.ids_BS.shape[1] - 1)
    median = statistics.median(seconds)
    row: Record = {"tokens": tokens, "step ms": median * 1e3, "tokens/s": tokens / median}
    if place.is_cuda:
        row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} | _profile_step(step)
    return row, torch.stack(losses).tolist()


def _profile_step(step: Any) -> Record:
    """Launches of a step, and the share of its time in which no kernel runs."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in device_events(profiler))
    return {"launches": len(spans), "idle share": idle_share(spans)}


def idle_share(spans: list[tuple[int, int]]) -> float:
    """Share of the time from the first start to the last end in which none of the spans runs."""
    if not spans:
        return 1.0
    busy, end = 0, spans[0][0]
    for start, stop in sorted(spans):
        busy += max(stop - max(start, end), 0)
        end = max(end, stop)
    whole = end - min(start for start, _ in spans)
    return 1 - busy / whole if whole else 0.0


def check_peer_speed(place: Place, report: Report) -> None:
    """The same step as transformers' Mixtral takes it, interleaved with ours and our vanilla twin's."""
    if not is_installed("transformers"):
        raise Skip("the package transformers is not installed")
    shapes: dict[str, Any] = {"seq_len": 2048, "vocab_size": 65536, "batch_size": 8}
    if not place.is_cuda:
        shapes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 2, "vocab_size": 64}
        shapes |= {"seq_len": 8, "batch_size": 1, "rounds": 1}
    options = bench_train.Options(dtype=torch.bfloat16, device=place.device, **shapes)
    with alone(place.device):
        rows = bench_train.compare(options)
    for row in rows:
        if "skipped" in row:
            report.skip(f"{row['contestant']}: {row['skipped']}")
    report.measure("step", rows)
    for row in rows:
        if row.get("x fastest transformers"):
            report.note(f"{row['contestant']} against the fastest transformers", row["x fastest transformers"])
