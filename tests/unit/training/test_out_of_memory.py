"""Memory that does not suffice ends training and the commands with one line, in a step as at the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp.cli.main import report_errors
from moepp.errors import TrainingError
from moepp.training.guards import StopRequest
from moepp.training.run import _fit

FAILURES: list[Any] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 139 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


def trainer(error: BaseException, closed: list[bool]) -> Any:
    def fit(stop: StopRequest) -> None:
        raise error

    return SimpleNamespace(
        cfg=SimpleNamespace(parallel=SimpleNamespace(timeout_seconds=1.0)),
        groups=SimpleNamespace(rank=3),
        step=6,
        fit=fit,
        parts=SimpleNamespace(checkpointer=SimpleNamespace(close=lambda: closed.append(True))),
    )


@pytest.mark.parametrize("error", FAILURES, ids=["device", "host", "python"])
def test_a_step_without_memory_names_the_rank_and_the_remedy(error):
    closed: list[bool] = []
    with pytest.raises(TrainingError) as caught:
        _fit(trainer(error, closed), StopRequest())
    text = str(caught.value)
    assert text.startswith("out of memory in step 7 on rank 3") and "train.micro_batch_size" in text
    assert "\n" not in text and caught.value.said_here and closed == [True]


def test_other_errors_of_a_step_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        _fit(trainer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), []), StopRequest())


@pytest.mark.parametrize("error", FAILURES, ids=["device", "host", "python"])
def test_a_command_without_memory_says_so_in_one_line(error, capsys):
    def work() -> int:
        raise error

    assert report_errors(work) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory (") and told.count("\n") == 1
