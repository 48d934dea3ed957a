"""Memory of an accelerator, which is imitated, and of the host."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest
import torch

from moepp.metrics.memory import host_memory_values, memory_values
from moepp.metrics.values import reduce_values

GPU = torch.device("cuda", 3)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts of an allocator that has 100, 400 and 250 bytes on device 3; returns what was called."""
    calls: list[str] = []

    def count(name: str, value: int | None):
        def ask(device: torch.device) -> int | None:
            assert device == GPU
            calls.append(name)
            return value

        monkeypatch.setattr(torch.accelerator, name, ask)

    count("memory_allocated", 100)
    count("memory_reserved", 400)
    count("max_memory_allocated", 250)
    count("reset_peak_memory_stats", None)
    return calls


def test_the_fullest_rank_counts_and_the_peak_starts_anew(accelerator: list[str]) -> None:
    def add_other_rank(own: torch.Tensor) -> torch.Tensor:
        assert own.is_cpu  # no device to wait for
        by_rank = own.view(3, 2)  # in the order of names: allocated, peak, reserved; this rank is the first of two
        by_rank[:, 1] += torch.tensor([90, 260, 500])
        return own

    values = memory_values(GPU)
    assert {name: float(value) for name, value in reduce_values(values, add_other_rank, 0, 2).items()} == {
        "memory/allocated_bytes": 100,
        "memory/reserved_bytes": 500,
        "memory/peak_allocated_bytes": 260,
    }
    assert accelerator[-1] == "reset_peak_memory_stats" and accelerator.index("max_memory_allocated") == 2


def test_the_cpu_has_no_such_metrics(accelerator: list[str]) -> None:
    assert memory_values(torch.device("cpu")) == {}
    assert accelerator == []


def test_large_memories_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.accelerator, name, lambda device: 2**38 + 1)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: None)
    assert float(memory_values(GPU)["memory/reserved_bytes"].data) == 2**38 + 1


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_hosts_memory_is_that_of_the_fullest_rank_in_bytes(monkeypatch: pytest.MonkeyPatch, system, unit) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=300))

    def add_other_rank(own: torch.Tensor) -> torch.Tensor:
        assert own.tolist() == [0, 300 * unit]
        return own + torch.tensor([500.0, 0.0])

    reduced = reduce_values(host_memory_values(), add_other_rank, 1, 2)
    assert {name: float(value) for name, value in reduced.items()} == {"memory/host_peak_bytes": max(500.0, 300 * unit)}


def test_the_hosts_memory_grows_with_what_is_held() -> None:
    before = float(host_memory_values()["memory/host_peak_bytes"].data)
    held = torch.ones(16 << 20)  # 64 MiB
    after = float(host_memory_values()["memory/host_peak_bytes"].data)
    assert 50e6 < before <= after < 1e12 and float(held[0]) == 1
