"""Staging behind an accelerator, which is imitated: blocks are ordinary memory, and waiting is counted."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from moepp.checkpoint import Checkpointer, saver
from moepp.checkpoint.host_memory import HostMemory
from moepp.checkpoint.storage import write_tensors
from moepp.config import CheckpointConfig

GPU = torch.device("cuda", 3)
TENSORS = [
    torch.arange(12, dtype=torch.float32).view(3, 4).t(),  # not contiguous
    torch.tensor(7.0),
    torch.arange(5, dtype=torch.int64),
    torch.zeros(0, 3),
    torch.linspace(0, 1, 1001, dtype=torch.bfloat16),
    torch.tensor([True, False, True]),
    torch.arange(3000, dtype=torch.float64),  # larger than a block
    torch.arange(100, dtype=torch.uint8),
]


def imitation() -> tuple[HostMemory, list[torch.Tensor], list[str]]:
    blocks: list[torch.Tensor] = []
    events: list[str] = []

    def allocate(size: int) -> torch.Tensor:
        blocks.append(torch.full((size,), 255, dtype=torch.uint8))
        return blocks[-1]

    return HostMemory(GPU, 4096, allocate, lambda: events.append("waited")), blocks, events


def test_copies_hold_the_values_and_outlive_their_sources():
    memory, _, _ = imitation()
    sources = [tensor.clone() for tensor in TENSORS]
    memory.start()
    copies = [memory.copy(tensor) for tensor in sources]
    memory.finish()
    for source in sources:
        source.zero_()
    for tensor, copied in zip(TENSORS, copies, strict=True):
        assert copied.dtype == tensor.dtype and torch.equal(copied, tensor) and copied.is_contiguous()


def test_a_save_waits_once_and_takes_the_memory_of_the_one_before():
    memory, blocks, events = imitation()
    places = []
    for _ in range(3):
        memory.start()
        places.append([memory.copy(tensor).data_ptr() for tensor in TENSORS])
        memory.finish()
    assert events == ["waited"] * 3
    assert places[0] == places[1] == places[2]
    assert len(blocks) == 3 and sum(block.numel() for block in blocks) == 4096 + 24000 + 4096


def test_on_the_cpu_copies_are_tensors_of_their_own():
    memory = HostMemory(torch.device("cpu"), allocate=lambda size: pytest.fail("a block was made"))
    memory.start()
    copies = [memory.copy(tensor) for tensor in TENSORS]
    memory.finish()
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(copies, TENSORS, strict=True) if a.numel()
    )


def test_memory_that_cannot_be_locked_is_used_as_it_is(monkeypatch, caplog):
    real = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    memory = HostMemory(GPU, 4096, synchronize=lambda: None)
    memory.start()
    assert torch.equal(memory.copy(TENSORS[2]), TENSORS[2])
    assert "cannot be page-locked, so saving is slower: CUDA error" in caplog.text


def test_the_thread_that_saves_takes_the_ranks_device_first(monkeypatch, tmp_path):
    events: list[tuple[str, Any]] = []
    groups: Any = SimpleNamespace(rank=1, device=GPU)
    checkpointer = Checkpointer(CheckpointConfig(async_=True), groups, tmp_path, SimpleNamespace())  # pyright: ignore
    monkeypatch.setattr(saver, "stage", lambda *args: {})
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda index: events.append((threading.current_thread().name, index))
    )
    monkeypatch.setattr(
        checkpointer, "_publish", lambda *args: events.append((threading.current_thread().name, "saved"))
    )
    checkpointer.save(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(step=1))  # pyright: ignore
    checkpointer.wait()
    (thread, index), (same, what) = events
    assert thread == same != threading.current_thread().name and (index, what) == (3, "saved")


def test_writing_does_not_wait_for_the_training_stream(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *args, **kwargs: pytest.fail("copies ahead"))
    assert write_tensors(tmp_path, {"a": torch.ones(3)}, None)
