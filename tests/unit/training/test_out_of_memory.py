"""Memory that does not suffice is one line, in training and in the commands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepp.cli.main import report_errors
from moepp.errors import ConfigError, TrainingError
from moepp.training import build
from moepp.training.memory import enough_memory
from tests.parity import Layout, Setting, make_config

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


@pytest.mark.parametrize(
    ("layout", "helps"),
    [
        (Layout(), "or use more ranks: `moepp plan`"),
        (Layout(2, 2, "fsdp", 3), "more data-parallel ranks do not lower them; raise parallel.expert or parallel.pipe"),
    ],
    ids=["native", "fsdp"],
)
def test_a_model_that_does_not_fit_is_answered_with_what_helps_its_engine(layout, helps):
    cfg = make_config(Setting(), layout)
    with pytest.raises(ConfigError) as caught, build._enough_memory(cfg, torch.device("cuda", 1)):
        raise FAILURES[0]
    text = str(caught.value)
    assert "of a rank's cuda (CUDA out of memory" in text and helps in text and "\n" not in text


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
