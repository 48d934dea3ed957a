"""Notice within seconds that another rank was lost, and which one.

A failed collective says little: the neighbours of a dead rank see a closed connection, all others wait on for the whole
time limit, and nobody learns who is missing. So each rank has a thread that asks the store twice a second whether any
rank has reported a failure. If so, every rank that can still run answers, and those that do not are the lost ones. A
rank whose training thread is stuck in a collective is then ended from here.

    peers/failure         what the first rank to notice has reported
    peers/there/<rank>    the answers
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

POLL_SECONDS = 0.5
ANSWER_SECONDS = 4.0  # for every rank to see a failure and to answer
LEAVE_SECONDS = 4.0  # for a training thread that has not noticed to notice
CLOSE_SECONDS = 60.0  # for one that has to close its files and leave
_FAILURE, _THERE = "peers/failure", "peers/there"


class PeerWatch:
    """The watching thread of one rank, from the start of a run to its end.

    Args:
        store: reachable from every rank; rank 0 keeps it, unless the launcher does.
        leave: called in the watching thread, with a message, when the training thread does not end by itself; ends
            the process.
    """

    def __init__(self, store: Store, rank: int, world_size: int, leave: Callable[[str], None]) -> None:
        self._rank = rank
        self._world_size = world_size
        self._leave = leave
        self._training_thread = threading.get_ident()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._posted = threading.Event()
        self._explained = threading.Event()
        self._noticed = False  # by the training thread
        self._error: str | None = None  # of the training thread, not of a collective
        self._explanation = "rank 0 does not answer"  # true if the store does not
        self._thread: threading.Thread | None = None
        if world_size > 1:
            # Its own connection: a call that hangs must not hold up training. (torch's stubs forget the method.)
            self._store: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
            self._thread.start()

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

    def _run(self) -> None:
        try:
            while not self._wake.wait(POLL_SECONDS) and not self._store.check([_FAILURE]):
                pass
            if self._error is not None or self._noticed:
                self._post()
            if self._stopped.is_set() or self._error is not None:
                return
            self._explanation = self._find_lost()
        except RuntimeError:  # the store has ended: rank 0 was lost, or has left in good order with this one about to
            self._posted.set()
        self._explained.set()
        if self._stopped.wait(LEAVE_SECONDS) or (self._noticed and self._stopped.wait(CLOSE_SECONDS)):
            return
        where = _collective_in(_stack_of(self._training_thread))
        self._leave(f"rank {self._rank} stops: {self._explanation} (last collective: {where})")

    def _post(self) -> None:
        """Report a failure unless another rank was faster."""
        if not self._store.check([_FAILURE]):
            self._store.set(_FAILURE, json.dumps({"rank": self._rank, "error": self._error}))
        self._posted.set()

    def _find_lost(self) -> str:
        failure = json.loads(self._store.get(_FAILURE))
        self._store.set(f"{_THERE}/{self._rank}", "")
        missing = set(range(self._world_size)) - {self._rank, failure["rank"]}
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not self._store.check([f"{_THERE}/{rank}"])}
                time.sleep(POLL_SECONDS / 10)
        except RuntimeError:  # rank 0 has taken the store with it: it was lost, or has ended its own count
            pass
        if failure["error"] is not None:
            return f"rank {failure['rank']} failed with {failure['error']}"
        if not missing:
            return "all ranks still answer"
        names = ", ".join(map(str, sorted(missing)))
        return f"rank {names} does not answer" if len(missing) == 1 else f"ranks {names} do not answer"


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
