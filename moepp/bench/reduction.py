"""Steps of a small model whose gradients are summed over ranks: after backward, and in buckets while it goes on."""

from __future__ import annotations

import time

import torch

from moepp.bench.processes import run_processes
from moepp.bench.tables import Record
from moepp.bench.timing import Timing, clock_for, measure
from moepp.bench.train import OURS, Options, Step
from moepp.distributed import comm

# Elements of a bucket. One bucket of all gradients is complete, and starts, when backward ends.
BUCKETS = {"after backward": 2**62, "during backward": 2**20}


def run(
    world_size: int, num_tokens: int, dtype: torch.dtype, rounds: int, device_type: str = "cpu", kernels: str = "auto"
) -> list[Record]:
    """Return one row per way; times are the slowest rank's, each with one thread and ``num_tokens`` tokens."""
    seq_len = min(num_tokens, 256)
    options = Options(
        dtype=dtype,
        device=torch.device(device_type),
        kernels=kernels,
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        num_heads=4,
        vocab_size=8192,
        seq_len=seq_len,
        batch_size=num_tokens // seq_len,
    )
    by_rank = run_processes(_work, world_size, options, rounds, device_type=device_type)
    numbers = by_rank[0][1]
    slowest = {name: max((timings[name] for timings, _ in by_rank), key=lambda one: one.median) for name in BUCKETS}
    return [
        {
            "ranks": world_size,
            "tokens per rank": options.num_tokens,
            "gradients summed": name,
            "MB": numbers * 4 / 2**20,
            "ms": timing.median,
            "spread": timing.spread,
            "x after": slowest["after backward"].median / timing.median,
        }
        for name, timing in slowest.items()
    ]


def _work(rank: int, world_size: int, options: Options, rounds: int) -> tuple[dict[str, Timing], int]:
    steps = {name: Step(OURS, options, bucket_elements) for name, bucket_elements in BUCKETS.items()}
    timings = measure(
        {name: step.run for name, step in steps.items()},
        rounds=rounds,
        clock=time.perf_counter if options.device.type == "cpu" else clock_for(options.device, 1),
        warmup=1,
        before=lambda: comm.barrier(),
    )
    numbers = sum(parameter.numel() for parameter in steps["after backward"].engine.model.parameters())
    return timings, numbers
