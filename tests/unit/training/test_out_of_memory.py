"""Memory that does not suffice is one line, in training and in the commands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepp.cli.main import report_errors
from moepp.errors import TrainingError
from moepp.training.memory import enough_memory

FAILURES: list[Any] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 139 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FAILURES, ids=["device", "host", "python"])
def test_what_lacks_memory_names_the_rank_and_the_remedy(error):
    with pytest.raises(TrainingError) as caught, enough_memory("step 7", 3, "lower train.micro_batch_size"):
        raise error
    text = str(caught.value)
    assert text.startswith("out of memory in step 7 on rank 3 (") and "; lower train.micro_batch_size, then" in text
    assert "\n" not in text and "()" not in text and caught.value.said_here


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), enough_memory("step 7", 3, "lower it"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("error", FAILURES, ids=["device", "host", "python"])
def test_a_command_without_memory_says_so_in_one_line(error, capsys):
    def work() -> int:
        raise error

    assert report_errors(work) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory (") and told.count("\n") == 1
