"""Notice within seconds that another rank was lost, and which one.

A failed collective says little: the neighbours of a dead rank see a closed connection, all others wait on for the whole
time limit, and nobody learns who is missing; a collective of an accelerator may not fail at all. So each rank has a
thread that asks the store twice a second whether any rank has reported a failure, and that gives and looks for signs of
life (:mod:`moepp.distributed.heartbeat`). If there is a failure, every rank that can still run answers, and those that
do not are the lost ones. A rank whose training thread is stuck in a collective is then ended from here. A second thread
looks whether the first still gets answers from the store, which may freeze with the host that keeps it.

    peers/failure         what the first rank to notice has reported
    peers/there/<rank>    the answers
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from types import FrameType

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed.agreement import name_ranks
from moepp.distributed.heartbeat import Heartbeat, announce_state

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
ANSWER_SECONDS = 4.0  # for every rank to see a failure and to answer
LEAVE_SECONDS = 4.0  # for a training thread that has not noticed to notice
CLOSE_SECONDS = 60.0  # for one that has to close its files and leave
MOST_PLACES = 64  # lost ranks whose hosts are looked up
_FAILURE, _THERE = "peers/failure", "peers/there"


class PeerWatch:
    """The watching threads of one rank, from the start of a run to its end.

    Args:
        store: reachable from every rank; rank 0 keeps it, unless the launcher does.
        leave: called in a watching thread, with a message, when the training thread does not end by itself; ends the
            process.
        limit_seconds: a rank, or the store, is lost after so long a silence.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, leave: Callable[[str], None], limit_seconds: float
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._leave = leave
        self._limit = limit_seconds
        self._training_thread = threading.get_ident()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._posted = threading.Event()
        self._explained = threading.Event()
        self._noticed = False  # by the training thread
        self._error: str | None = None  # of the training thread, not of a collective
        self._silent: int | None = None  # a rank without signs of life
        self._explanation = "rank 0 does not answer"  # true if the store does not
        self._answered = time.monotonic()  # the store, for the last time
        self._ending = threading.Lock()  # taken by the thread that sees to the end
        self._thread: threading.Thread | None = None
        self._shared_store = store
        if world_size > 1:
            # Its own connection: a call that hangs must not hold up training. (torch's stubs forget the method.)
            self._store: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_store, name="store-watch", daemon=True).start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Work that may hold Python's interpreter lock for long, such as building indices: silence is no loss then."""
        self._announce_state("busy")
        yield
        self._announce_state("")

    def finish(self) -> None:
        """Say that this rank's part is done: it may end at any time from now on, and watches on until it does."""
        self._announce_state("done")

    def stop(self) -> None:
        """End in good order: what happens to the other ranks from now on is no failure."""
        self._stopped.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_SECONDS)

    def announce(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error of its own; they rarely have to time out then."""
        if self._thread is not None:
            self._error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._wake.set()
            self._posted.wait(2 * POLL_SECONDS)
        self.stop()

    def explain(self, error: BaseException) -> str:
        """After a failed collective: which ranks are lost, and what this one was waiting for."""
        self._noticed = True
        self._wake.set()
        if self._thread is not None:
            self._explained.wait(POLL_SECONDS + ANSWER_SECONDS)
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        reason = " ".join(str(error).split())[:200]
        return f"rank {self._rank} stops: {self._explanation} (last collective: {_collective_in(frames)}: {reason})"

    def _announce_state(self, state: str) -> None:
        if self._thread is not None:
            announce_state(self._shared_store, self._rank, state)

    def _run(self) -> None:
        try:
            heartbeat = Heartbeat(self._store, self._rank, self._world_size, self._limit)
            polls = chain([POLL_SECONDS / 10] * 10, repeat(POLL_SECONDS))  # soon at first: places are learnt by asking
            while not self._wake.wait(next(polls)) and not self._store.check([_FAILURE]) and self._silent is None:
                self._silent = heartbeat.beat()
                self._explanation = f"{heartbeat.place_of(0)} does not answer"
                self._answered = time.monotonic()
            if self._error is not None or self._noticed or self._silent is not None:
                self._post()
            if self._stopped.is_set() or self._error is not None:
                return
            self._explanation = self._find_lost(heartbeat)
        except RuntimeError:  # the store has ended: rank 0 was lost, or has left in good order with this one about to
            self._posted.set()
        except Exception:  # a defect of this watch, which must not end the training that it watches over
            logger.exception("lost ranks are not noticed any more")
            self._posted.set()
            self._ending.acquire(blocking=False)
            return
        self._end()

    def _watch_store(self) -> None:
        """Notice that the other thread waits for the store in vain; not while this whole process was held up."""
        last = time.monotonic()
        while not self._stopped.wait(POLL_SECONDS) and not self._ending.locked():
            now = time.monotonic()
            if now - last > self._limit / 4:
                self._answered = now
            last = now
            if now - self._answered > self._limit:
                self._posted.set()
                self._end()

    def _end(self) -> None:
        """Give the training thread time to notice and to close its files, then end the process."""
        if not self._ending.acquire(blocking=False):
            return
        self._explained.set()
        if self._stopped.wait(LEAVE_SECONDS) or (self._noticed and self._stopped.wait(CLOSE_SECONDS)):
            return
        where = _collective_in(_stack_of(self._training_thread))
        self._leave(f"rank {self._rank} stops: {self._explanation} (last collective: {where})")

    def _post(self) -> None:
        """Report a failure unless another rank was faster."""
        if not self._store.check([_FAILURE]):
            failure = {"rank": self._rank, "error": self._error, "silent": self._silent}
            self._store.set(_FAILURE, json.dumps(failure))
        self._posted.set()

    def _find_lost(self, heartbeat: Heartbeat) -> str:
        failure = json.loads(self._store.get(_FAILURE))
        self._store.set(f"{_THERE}/{self._rank}", "")
        missing = set(range(self._world_size)) - {self._rank, failure["rank"]}
        silent = failure["silent"]
        # At once: rank 0 may leave, and take the store with it, before it is known which of these are lost.
        asked = [rank for rank in (failure["rank"], silent, *sorted(missing)[:MOST_PLACES]) if rank is not None]
        hosts = {rank: heartbeat.host_of(rank) for rank in asked}
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not self._store.check([f"{_THERE}/{rank}"])}
                self._answered = time.monotonic()
                time.sleep(POLL_SECONDS / 10)
            hosts |= {rank: heartbeat.host_of(rank) for rank in sorted(missing)[:MOST_PLACES] if rank not in hosts}
        except RuntimeError:  # rank 0 has taken the store with it: it was lost, or has ended its own count
            pass
        if failure["error"] is not None:
            return f"{_name([failure['rank']], hosts)} failed with {failure['error']}"
        if missing:
            return f"{_name(sorted(missing), hosts)} {'does' if len(missing) == 1 else 'do'} not answer"
        if silent is not None:
            seconds = f"{self._limit:g} s (parallel.heartbeat_seconds)"
            return f"{_name([silent], hosts)} gave no sign of life for {seconds}, though it does now"
        return "all ranks still answer"


def _name(ranks: list[int], hosts: dict[int, str]) -> str:
    """Name ranks with their hosts: "rank 1 on node01", "ranks 8-15 on node02, rank 31"."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts.get(rank, ""), []).append(rank)
    return ", ".join(f"{name_ranks(of)}{f' on {host}' if host else ''}" for host, of in by_host.items())


def _stack_of(thread: int) -> list[FrameType]:
    """Frames of a running thread, outermost first."""
    return [frame for frame, _ in traceback.walk_stack(sys._current_frames().get(thread))][::-1]


def _collective_in(frames: list[FrameType]) -> str:
    """Return the innermost function of this project and the innermost of all; ``frames`` start outermost."""
    codes = [frame.f_code for frame in frames if frame.f_code.co_name != "wrapper"]
    names = [code.co_qualname for code in codes]
    own = [code.co_qualname for code in codes if f"{os.sep}moepp{os.sep}" in code.co_filename]
    innermost = names[-1] if names else "none"
    return f"{own[-1]} ({innermost})" if own and own[-1] != innermost else innermost
