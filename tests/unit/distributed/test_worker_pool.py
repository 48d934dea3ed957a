"""The gloo worker pool itself: results, failures that name the rank, and recovery."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import WorkerFailure, subgroups


def _sum_of_ranks(rank: int, offset: int) -> tuple[int, int, int]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, int(total), torch.get_num_threads()


def _sum_in_pairs(rank: int) -> int:
    total = torch.tensor(10**rank)
    dist.all_reduce(total, group=subgroups(2))
    return int(total)


def _raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("value of rank one")
    dist.barrier()


def _raise_everywhere(rank: int) -> None:
    raise KeyError(f"key {rank}")


def _exit_on_rank_0(rank: int) -> None:
    if rank == 0:
        print("last words", flush=True)
        os._exit(7)


def _sleep_on_rank_1(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_pool_returns_each_ranks_result_in_rank_order(pool_2):
    assert pool_2.run(_sum_of_ranks, 10) == [(0, 21, 1), (1, 21, 1)]


def test_pool_of_one_rank_runs_collectives(pool_1):
    assert pool_1.run(_sum_of_ranks, 5) == [(0, 5, 1)]


def test_subgroups_are_consecutive_ranks(pool_4):
    assert pool_4.run(_sum_in_pairs) == [11, 11, 1100, 1100]
    assert pool_4.run(_sum_in_pairs) == [11, 11, 1100, 1100]


def test_exception_on_one_rank_names_it_with_its_traceback_and_the_pool_recovers(pool_2):
    start = time.monotonic()
    with pytest.raises(WorkerFailure, match="value of rank one") as failure:
        pool_2.run(_raise_on_rank_1)
    assert "_raise_on_rank_1" in failure.value.by_rank[1] and "ValueError" in failure.value.by_rank[1]
    assert time.monotonic() - start < 60, "the other rank's collective must not be waited for"
    assert pool_2.run(_sum_of_ranks, 0) == [(0, 1, 1), (1, 1, 1)]


def test_expected_exception_must_come_from_every_rank(pool_2):
    assert pool_2.run(_raise_everywhere, raises=LookupError) == ["'key 0'", "'key 1'"]
    with pytest.raises(WorkerFailure, match="returned instead of raising"):
        pool_2.run(_sum_of_ranks, 0, raises=ValueError)


def test_dead_rank_is_named_with_exit_code_and_output(pool_2, monkeypatch):
    monkeypatch.setattr("tests.dist.GRACE_SECONDS", 30.0)  # rank 1 answers, on a busy machine perhaps not at once
    with pytest.raises(WorkerFailure, match="rank 0: process died with exit code 7") as failure:
        pool_2.run(_exit_on_rank_0)
    assert "last words" in failure.value.by_rank[0]
    assert 1 not in failure.value.by_rank


def test_hanging_rank_is_named_with_its_stack(pool_2):
    with pytest.raises(WorkerFailure, match="the limit of") as failure:
        pool_2.run(_sleep_on_rank_1, time_limit=3.0)
    assert list(failure.value.by_rank) == [1] and "_sleep_on_rank_1" in failure.value.by_rank[1]
