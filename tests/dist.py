"""A pool of gloo worker processes for tests that need several ranks.

Usage, with the module-scoped fixtures of ``tests/conftest.py``::

    def _sum_of_ranks(rank: int, offset: int) -> int:          # top level: it is pickled by name
        total = torch.tensor(rank + offset)
        torch.distributed.all_reduce(total)
        return int(total)

    def test_sum(pool_2):                                       # also pool_1, pool_4, pools(n)
        assert pool_2.run(_sum_of_ranks, 10) == [21, 21]        # one result per rank, in rank order

What a task may rely on:

- it is called as ``function(rank, *args)`` on every rank; function, arguments and results travel by pickle (tensors by
  value);
- the default process group (gloo, file store: no ports) is initialised and ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and
  ``LOCAL_WORLD_SIZE`` are set, so code under test that attaches to an existing group or reads these finds them;
- torch and OpenMP run one thread per worker;
- workers live for the whole test module, so module globals, process groups and random state survive from task to task:
  a task that needs a seed sets it; :func:`subgroups` creates process groups once and remembers them.

A task must end within ``time_limit`` seconds on every rank. If a rank raises, dies or hangs, :class:`WorkerFailure`
names it and carries its traceback (for a hang: the stacks of its threads) and the end of its output; all workers are
then killed, and the next ``run`` starts fresh ones, so one failure never spoils later tests. ``run(..., raises=E)``
instead expects every rank to raise ``E`` and returns the messages.

The folder ``tests/dist/`` must not get an ``__init__.py``: it would hide this module.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

THREAD_ENVIRONMENT: dict[str, str] = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# What most tasks import: once in the server, for all workers of all modules.
PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported with every optimizer: it compiles, which takes 1 s
    "pytest",
    "moepp.engine.deepspeed",
    "moepp.engine.fsdp",
    "moepp.engine.native",
    "moepp.training.trainer",
    "tests.dist",
)
START_LIMIT_SECONDS = 120.0  # four processes on a busy two-core machine
GRACE_SECONDS = 3.0  # after one rank failed, for the others to report what they saw
OUTPUT_TAIL_CHARACTERS = 4000
STACK_MARK = "(most recent call first)"  # in what faulthandler writes


class WorkerFailure(RuntimeError):
    """A task failed on at least one rank; ``by_rank`` maps each rank that failed to its report."""

    def __init__(self, task: str, by_rank: dict[int, str]) -> None:
        self.by_rank = by_rank
        reports = "\n".join(f"--- rank {rank}: {report}" for rank, report in sorted(by_rank.items()))
        super().__init__(f"{task} failed on rank(s) {', '.join(map(str, sorted(by_rank)))}\n{reports}")


@dataclass(frozen=True)
class _Answer:
    """What a worker sends back: a pickled result, or the exception (its type's name, message, traceback)."""

    result: bytes | None = None
    error_types: tuple[str, ...] = ()
    message: str = ""
    trace: str = ""


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    log: Path


def subgroups(size: int) -> dist.ProcessGroup:
    """The calling rank's group among consecutive groups of ``size`` ranks. To be called on all ranks alike."""
    if size not in _SUBGROUPS:
        starts = range(0, dist.get_world_size(), size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]
        _SUBGROUPS[size] = groups[dist.get_rank() // size]
    return _SUBGROUPS[size]


_SUBGROUPS: dict[int, Any] = {}


def _set_up_worker(rank: int, world_size: int, folder: str, log: str, time_limit: float) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(THREAD_ENVIRONMENT | {name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=time_limit),
    )


def _answer(rank: int, request: bytes) -> _Answer:
    try:
        function, args = pickle.loads(request)
        return _Answer(result=pickle.dumps(function(rank, *args)))
    except BaseException as error:  # SystemExit of code under test must reach the parent too
        types = tuple(kind.__name__ for kind in type(error).__mro__)
        return _Answer(error_types=types, message=str(error), trace=traceback.format_exc())


def _worker_main(rank: int, world_size: int, folder: str, log: str, time_limit: float, connection: Connection) -> None:
    _set_up_worker(rank, world_size, folder, log, time_limit)
    connection.send(_Answer())
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):  # the parent is gone
            os._exit(1)
        if not request:
            break
        connection.send(_answer(rank, request))
    dist.destroy_process_group()


class WorkerPool:
    """``world_size`` gloo ranks that run functions on request; see the module's docstring."""

    def __init__(self, world_size: int, time_limit: float = 60.0) -> None:
        self.world_size = world_size
        self.time_limit = time_limit
        self._folder: str | None = None
        self._workers: list[_Worker] = []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        time_limit: float | None = None,
        raises: type[BaseException] | None = None,
    ) -> list[Any]:
        """Call ``function(rank, *args)`` on every rank; returns the results in rank order.

        ``time_limit`` (seconds) replaces the pool's. With ``raises`` every rank must raise that exception (or a
        subclass) and the messages are returned. Raises :class:`WorkerFailure` otherwise.
        """
        request = pickle.dumps((function, args))
        task = getattr(function, "__name__", repr(function))
        if not self._workers:
            self._start()
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # a dead worker is reported by _collect
                worker.connection.send_bytes(request)
        answers = self._collect(task, time_limit if time_limit is not None else self.time_limit)
        errors = {rank: answer for rank, answer in answers.items() if answer.result is None}
        if errors:
            self.close(kill=True)
        if raises is not None:
            wrong = {
                rank: answer.trace or f"returned instead of raising {raises.__name__}"
                for rank, answer in answers.items()
                if raises.__name__ not in answer.error_types
            }
            if wrong:
                raise WorkerFailure(task, wrong)
            return [answers[rank].message for rank in range(self.world_size)]
        if errors:
            raise WorkerFailure(task, {rank: answer.trace for rank, answer in errors.items()})
        return [pickle.loads(answers[rank].result or b"") for rank in range(self.world_size)]

    def close(self, kill: bool = False) -> None:
        """End the workers, gently unless ``kill``, and remove their files. May be called twice."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                if kill:
                    worker.process.kill()
                else:
                    worker.connection.send_bytes(b"")
        for worker in self._workers:
            worker.process.join(10.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        """Fork the workers from a server that imported torch once and has no threads."""
        self._folder = tempfile.mkdtemp(prefix="moepp-pool-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        saved = {name: os.environ.get(name) for name in THREAD_ENVIRONMENT}
        os.environ.update(THREAD_ENVIRONMENT)  # read by the server when it starts
        try:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                log = Path(self._folder) / f"rank-{rank}.txt"
                args = (rank, self.world_size, self._folder, str(log), START_LIMIT_SECONDS, theirs)
                process = context.Process(target=_worker_main, args=args, daemon=True, name=f"rank-{rank}")
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, log))
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        self._collect("start of the workers", START_LIMIT_SECONDS)

    def _collect(self, task: str, time_limit: float) -> dict[int, _Answer]:
        """One answer per rank. Kills all workers and raises if a rank dies or does not answer in time."""
        deadline = time.monotonic() + time_limit
        ranks = {id(worker.connection): rank for rank, worker in enumerate(self._workers)}
        answers: dict[int, _Answer] = {}
        dead: dict[int, str] = {}
        while len(answers) + len(dead) < self.world_size:
            pending = [w.connection for r, w in enumerate(self._workers) if r not in answers and r not in dead]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = ranks[id(connection)]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._workers[rank].process.join(5.0)
                    dead[rank] = f"process died with exit code {self._workers[rank].process.exitcode}"
                if rank in dead or answers[rank].trace:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) == self.world_size:
            return answers
        raise self._failure(task, time_limit, answers, dead)

    def _failure(self, task: str, limit: float, answers: dict[int, _Answer], dead: dict[int, str]) -> WorkerFailure:
        reports = {rank: answer.trace for rank, answer in answers.items() if answer.trace}
        failed_first = bool(reports or dead)
        silent = [rank for rank in range(self.world_size) if rank not in answers and rank not in dead]
        for rank in silent:
            with contextlib.suppress(OSError):
                os.kill(self._workers[rank].process.pid or 0, signal.SIGUSR1)  # faulthandler writes the stacks
        patience = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < patience and not all(STACK_MARK in self._output(rank) for rank in silent):
            time.sleep(0.1)
        why = f"gave no answer within {GRACE_SECONDS} s of the first failure" if failed_first else ""
        silence = why or f"gave no answer within the limit of {limit} s"
        for rank, reason in dead.items() | {(rank, silence) for rank in silent}:
            reports[rank] = f"{reason}; end of its output:\n{self._output(rank)[-OUTPUT_TAIL_CHARACTERS:]}"
        self.close(kill=True)
        return WorkerFailure(task, reports)

    def _output(self, rank: int) -> str:
        log = self._workers[rank].log
        return log.read_text(errors="replace") if log.exists() else ""
