"""Ranks whose training threads wait in a call that never returns, as in a collective of NCCL, when one is lost.

No collective fails here: all that the others have is the store. They must end by themselves, soon, with the documented
code, and name the lost rank and its host.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from moepp.distributed import peers, session
from moepp.distributed.heartbeat import Process
from moepp.distributed.launch import LaunchEnvironment
from moepp.distributed.session import watched

LIMIT_SECONDS = 2.0  # of silence: more than a busy machine may hold a process up
END_SECONDS = 30.0  # on a busy machine; idle it takes 2
LOST = 5  # exit code
HOST = socket.gethostname()
CPU = torch.device("cpu")


def _rank(rank: int, world_size: int, port: int, keeps_store: bool, work: str, folder: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    peers.ANSWER_SECONDS, peers.LEAVE_SECONDS, peers.POLL_SECONDS = 1.0, 0.3, 0.1
    session.LEAVE_SECONDS = 0.5
    if "elsewhere" in work:  # no rank can look at another's process
        own = Process.own()
        Process.own = classmethod(lambda cls: dataclasses.replace(own, system=""))  # pyright: ignore
    store = TCPStore("127.0.0.1", port, is_master=keeps_store and rank == 0, timeout=timedelta(seconds=60))
    with watched(store, LaunchEnvironment(rank, world_size, rank), CPU, LIMIT_SECONDS, "start again") as watch:
        store.get(f"peers/who/{rank}")  # the watching thread has said where this process is
        print("ready")
        if rank == 1 and "holds the interpreter" in work:
            with watch.busy() if "busy" in work else contextlib.nullcontext():
                ctypes.PyDLL(None).usleep(int(2.5e6 * LIMIT_SECONDS))
            time.sleep(LIMIT_SECONDS)
        elif "ends" not in work:
            ctypes.CDLL(None).pause()  # gives the interpreter back, and never returns
        elif rank != 1:
            time.sleep(2 * LIMIT_SECONDS)
        print("done")


class Run:
    """Processes of one test."""

    def __init__(self, folder: Path, world_size: int, store: str, work: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch.distributed", "tests.dist", "moepp", "moepp.distributed.session"]
        )
        self.folder = folder
        self._store = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if store == "launcher":
            self._store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            arguments = (rank, world_size, port, store == "rank 0", work, str(folder))
            self.processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            self.processes[-1].start()
        self.wait_for("ready", range(world_size))

    def output(self, rank: int) -> str:
        path = self.folder / str(rank)
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, ranks) -> None:
        deadline = time.monotonic() + 120
        while not all(text in self.output(rank) for rank in ranks):
            assert time.monotonic() < deadline, [self.output(rank) for rank in ranks]
            time.sleep(0.05)

    def codes(self, ranks) -> list[int | None]:
        deadline = time.monotonic() + END_SECONDS
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_one(store: str = "launcher", work: str = "", world_size: int = 3) -> Run:
        runs.append(Run(tmp_path, world_size, store, work))
        return runs[-1]

    yield start_one
    for run in runs:
        run.end()


@pytest.mark.parametrize(
    ("lost", "number", "store", "work"),
    [
        (1, signal.SIGKILL, "launcher", ""),
        pytest.param(1, signal.SIGSTOP, "launcher", "", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGKILL, "launcher", "elsewhere", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, "rank 0", "", marks=pytest.mark.slow),
        (0, signal.SIGSTOP, "rank 0", "elsewhere"),  # with it, the store freezes
    ],
)
def test_others_end_soon_and_name_the_lost_rank(start, lost, number, store, work):
    run = start(store, work)
    time.sleep(0.5)  # so that the ranks have found each other
    os.kill(run.processes[lost].pid, number)
    others = [rank for rank in range(3) if rank != lost]
    assert run.codes(others) == [LOST, LOST], [run.output(rank) for rank in others]
    for rank in others:
        (line,) = [line for line in run.output(rank).splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: rank {rank} stops: rank {lost} on {HOST} does not answer (last collective: "), (
            line
        )
        assert line.endswith("; start again")


@pytest.mark.parametrize(
    "work",
    ["holds the interpreter", pytest.param("holds the interpreter, busy, elsewhere", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_only_slow_is_waited_for(start, work):
    run = start(work=work)
    run.wait_for("done", [1])
    time.sleep(LIMIT_SECONDS)
    assert [process.exitcode for process in (run.processes[0], run.processes[2])] == [None, None], run.output(0)


def test_ranks_that_are_done_leave_one_after_the_other(start):
    assert start(work="ends", world_size=3).codes([0, 1, 2]) == [0, 0, 0]


def test_leaving_does_not_wait_for_ever_for_the_process_groups(monkeypatch, caplog):
    forever = threading.Event()
    monkeypatch.setattr(session, "_destroy", lambda *args: forever.wait())
    monkeypatch.setattr(session, "LEAVE_SECONDS", 0.2)
    start = time.monotonic()
    session.leave_process_groups(CPU, is_in_order=False)
    assert time.monotonic() - start < 60 and "could not be left within 0.2 s" in caplog.text
    forever.set()


@pytest.mark.parametrize(
    ("kind", "in_order", "aborted"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_collectives_under_way_are_aborted_where_they_would_hang(monkeypatch, kind, in_order, aborted):
    events: list[str] = []
    monkeypatch.setattr(session, "use_in_thread", lambda device: events.append(f"thread on {device}"))
    monkeypatch.setattr(session.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(session.comm, "abort_all", lambda: events.append("aborted"))
    monkeypatch.setattr(session.dist, "destroy_process_group", lambda: events.append("destroyed"))
    session.leave_process_groups(torch.device(kind, 0), in_order)
    assert events == [f"thread on {kind}:0", *["aborted"] * aborted, "destroyed"]
