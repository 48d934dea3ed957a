"""Signs of life: how a rank that is dead or frozen is told from one that is only slow.

A collective of NCCL that waits for a lost rank never returns and raises nothing. So each rank's watching thread counts
up a number in the store, and looks at the number of the rank before it. That thread does not depend on what training
does: a long step, a compilation, a checkpoint or a slow disk do not stop it. What does is a dead or frozen process or
host, and code that holds Python's interpreter lock. Against the latter, neighbours on one host vouch for each other:
they count up each other's number as long as the system says that the process runs.

    peers/beat/<rank>    counts up
    peers/state/<rank>   "busy" while the rank may be silent, "done" once it may end
    peers/who/<rank>     its host, and its process there
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

LEAST_BEAT_SECONDS = 0.5
BEATS_PER_LIMIT = 10  # beats in the time after which a rank counts as lost
_BEAT, _STATE, _WHO = "peers/beat", "peers/state", "peers/who"
_PF_EXITING = 0x4  # include/linux/sched.h
_GONE, _STOPPED, _RUNNING = "gone", "stopped", "running"


@dataclass(frozen=True)
class Process:
    """A process as its neighbours on the same host can find it; ``system`` and ``start`` make the number unique."""

    host: str
    system: str
    pid: int
    start: str

    @classmethod
    def own(cls) -> Process:
        """Describe the calling process."""
        fields = _read_stat(os.getpid())
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            system = f"{boot} {os.readlink('/proc/self/ns/pid')}" if fields is not None else ""
        except OSError:  # no way to find each other
            system = ""
        return cls(socket.gethostname(), system, os.getpid(), fields[19] if fields is not None else "")

    def state(self) -> str:
        """Return how a process of this system is; one that is about to end counts as stopped."""
        fields = _read_stat(self.pid)
        if fields is None or fields[19] != self.start or fields[0] in "ZX":
            return _GONE
        return _STOPPED if fields[0] in "Tt" or int(fields[6]) & _PF_EXITING else _RUNNING


class Heartbeat:
    """Signs of life of this rank, and its look at those of the rank before it.

    Call :meth:`beat` twice a second or so. It judges nobody while the caller itself was held up, as in a suspended job.

    Args:
        store: of the watching thread alone.
        limit_seconds: a rank is lost after so long a silence.
        clock: must not count the time in which the machine is suspended.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        limit_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._limit, self._clock = store, rank, limit_seconds, clock
        self._interval = max(limit_seconds / BEATS_PER_LIMIT, LEAST_BEAT_SECONDS)
        self._watched = (rank - 1) % world_size
        self._neighbours = {self._watched, (rank + 1) % world_size} - {rank}
        self._own = Process.own()
        self._known: dict[int, Process] = {}
        self._learned, self._size = 0, world_size  # places of ranks below are known
        self._last_call = self._last_beat = self._last_sign = clock()
        self._count = -1
        store.set(f"{_WHO}/{rank}", json.dumps(asdict(self._own)))
        store.add(f"{_BEAT}/{rank}", 1)

    def beat(self) -> int | None:
        """Give a sign of life where one is due; return a rank that gives none any more."""
        now = self._clock()
        was_held_up = now - self._last_call > self._limit / 4
        self._last_call = now
        if was_held_up:
            self._last_sign = now
        self._learn()
        here = {rank: process.state() for rank in self._neighbours if (process := self._process_here(rank)) is not None}
        if here.get(self._watched) == _GONE:
            return self._watched if self._state_of(self._watched) != "done" else None
        if was_held_up or now - self._last_beat >= self._interval:
            self._last_beat = now
            running = [rank for rank, state in here.items() if state == _RUNNING]
            for rank in (self._rank, *running):
                self._store.add(f"{_BEAT}/{rank}", 1)
            count = self._store.add(f"{_BEAT}/{self._watched}", 0)
            if count != self._count or self._state_of(self._watched):
                self._count, self._last_sign = count, now
        return self._watched if now - self._last_sign > self._limit else None

    def place_of(self, rank: int) -> str:
        """Return "rank 3 on node01"; without the host where the rank has not named it."""
        host = self.host_of(rank)
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def host_of(self, rank: int) -> str:
        """Return the host of a rank; empty where the rank has not named it, or nobody can be asked any more."""
        try:
            process = self._process(rank)
        except RuntimeError:  # the store has ended with the rank that kept it
            process = None
        return "" if process is None else process.host

    def _learn(self) -> None:
        """Learn the place of one more rank, for a message that has to be written when the store is gone."""
        unknown = next((rank for rank in range(self._learned, self._size) if rank not in self._known), self._size)
        self._learned = unknown
        if unknown < self._size:
            self._process(unknown)

    def _state_of(self, rank: int) -> str:
        """Return what the rank has announced: "busy", "done", or nothing."""
        key = f"{_STATE}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _process(self, rank: int) -> Process | None:
        if rank not in self._known and self._store.check([f"{_WHO}/{rank}"]):
            self._known[rank] = Process(**json.loads(self._store.get(f"{_WHO}/{rank}")))
        return self._known.get(rank)

    def _process_here(self, rank: int) -> Process | None:
        """Return the process of a rank that this one can look at."""
        process = self._process(rank)
        is_here = process is not None and self._own.system and process.system == self._own.system
        return process if is_here else None


def announce_state(store: Store, rank: int, state: str) -> None:
    """Say that a rank may be silent from now on ("busy"), or gone ("done"); empty: neither."""
    store.set(f"{_STATE}/{rank}", state)


def _read_stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third, the state, on (man 5 proc); None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 else None
