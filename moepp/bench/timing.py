"""Interleaved timing: in every round each contestant runs once, so that a machine that changes its pace is fair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one contestant over all rounds, in milliseconds.

    Attributes:
        median: of all rounds.
        low, high: the quartiles.
    """

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles relative to the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(samples_ms: list[float]) -> Timing:
    """Return the median and quartiles."""
    if len(samples_ms) < 2:
        return Timing(samples_ms[0], samples_ms[0], samples_ms[0])
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(median, low, high)


def clock_for(device: torch.device, num_threads: int) -> Callable[[], float]:
    """Return a clock in seconds; one thread on the CPU has its own, which other processes do not slow."""
    if device.type == "cpu":
        return time.thread_time if num_threads == 1 else time.perf_counter

    def synchronized() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronized


def measure(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float],
    warmup: int = 2,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time each contestant ``rounds`` times, taking turns; ``before`` runs before each, untimed."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            if before is not None:
                before()
            start = clock()
            run()
            elapsed = clock() - start
            if turn >= warmup:
                samples[name].append(elapsed * 1e3)
    return {name: summarize(values) for name, values in samples.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with ``count`` threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
