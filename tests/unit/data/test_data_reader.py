"""Reading ahead changes neither the batches nor where an error shows, and leaves no thread behind."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from moepp.config import make_plan
from moepp.data.reader import Batch, BatchReader
from moepp.errors import DataError
from tests.data_files import make_config, numbered_documents, open_data, write_indexed

CPU = torch.device("cpu")
PLAN = dataclasses.replace(make_plan(make_config(["x"]), 1), accumulation_steps=2, train_batches=10)


class Source:
    """Batches that tell their place; ``broken`` steps raise."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.asked: list[tuple[int, int, str]] = []
        self.read = threading.Semaphore(0)
        self.active = 0

    def train_batch(self, step: int, micro_step: int) -> Batch:
        self.active += 1
        assert self.active == 1, "two readers at once"
        self.asked.append((step, micro_step, threading.current_thread().name))
        self.read.release()
        self.active -= 1
        if step in self.broken:
            raise DataError(f"step {step} is broken")
        return torch.tensor([[step]]), torch.tensor([[micro_step]])


def places(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(int(ids), int(labels)) for ids, labels in batches]


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_next_step_is_read_while_this_one_trains() -> None:
    source = Source()
    reader = BatchReader(source, PLAN, CPU)
    assert places(reader.read(3)) == [(3, 0), (3, 1)]
    for _ in range(4):
        assert source.read.acquire(timeout=120)  # nobody has asked for step 4
    assert [ask[:2] for ask in source.asked] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert places(reader.read(4, has_next=False)) == [(4, 0), (4, 1)] and len(source.asked) == 4
    reader.close()
    assert len(source.asked) == 4  # nothing beyond the last step
    assert "MainThread" not in {ask[2] for ask in source.asked}


def test_a_step_that_was_not_foreseen_is_read_when_it_is_asked_for() -> None:
    source = Source()
    reader = BatchReader(source, PLAN, CPU)
    for step in (5, 6, 2, 3, 9, 0):
        assert places(reader.read(step)) == [(step, 0), (step, 1)]
    reader.close()
    assert max(ask[0] for ask in source.asked) == 9  # the last batch that there is


def test_an_error_shows_at_the_step_that_has_it_and_at_no_other() -> None:
    reader = BatchReader(Source(broken=(2,)), PLAN, CPU)
    assert places(reader.read(1)) == [(1, 0), (1, 1)]
    with pytest.raises(DataError, match="step 2 is broken"):
        reader.read(2)
    assert places(reader.read(1)) == [(1, 0), (1, 1)]
    assert places(reader.read(7)) == [(7, 0), (7, 1)]  # a rewind has left the broken one out
    reader.close()


def test_closing_ends_the_thread_and_reading_may_begin_again() -> None:
    reader = BatchReader(Source(), PLAN, CPU)
    for step in (0, 4):
        reader.read(step)
        assert len(reader_threads()) == 1
        reader.close()
        assert not reader_threads()
    reader.close()


def test_batches_are_bitwise_those_of_the_loader(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "a", numbered_documents([11, 3, 29, 17, 5, 2, 41, 8, 13, 7] * 4))
    data, same = (open_data(make_config([prefix], train__micro_batch_size=4, train__steps=40)) for _ in range(2))
    reader = BatchReader(data, data.plan, CPU)
    for step in range(40):  # several epochs
        for batch, micro_step in zip(reader.read(step), range(2), strict=True):
            assert all(map(torch.equal, batch, same.train_batch(step, micro_step)))
    reader.close()


def test_the_thread_takes_the_ranks_device_before_it_locks_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: events.append(("device", index)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: events.append(("lock", tensor.shape)) or tensor)
    reader = BatchReader(Source(), PLAN, torch.device("cuda", 5))
    reader.read(0, has_next=False)
    reader.close()
    assert events[0] == ("device", 5) and {kind for kind, _ in events[1:]} == {"lock"}
