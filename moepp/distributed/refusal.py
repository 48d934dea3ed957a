"""One voice when all ranks end with the same error: a bad configuration, data that is not there.

Launchers end all ranks as soon as one of them exits. So no rank may leave before the first has printed the reason, and
the first, which may keep the store, leaves last. A rank that fails before the ranks have met tells the meeting, so that
the others do not wait for it.

    start/<meeting>/printed    the first rank has printed
    start/<meeting>/left       ranks that have heard of it and leave
"""

from __future__ import annotations

import sys
import time

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed import meeting
from moepp.distributed.launch import LaunchEnvironment, read_launch_environment
from moepp.errors import MoeppError

SPEAK_SECONDS = 30.0  # for all ranks to get as far: processes start at different speeds
MET_SECONDS = 5.0  # for the first rank to speak where they have met before
LEAVE_SECONDS = 10.0  # for the others to have heard of it there


def print_once(message: str, here: bool = False) -> None:
    """Print "error: ``message``" to standard error on the first rank; to be called by every rank, which may then exit.

    The ranks need not have met before. One that finds an error alone prints it itself, and the first rank is told.

    Args:
        here: print it on this rank in any case.
    """
    line = f"error: {message}"
    try:
        launch = read_launch_environment()
    except MoeppError:  # the launcher's variables are what is wrong, or wrong as well: nobody can be met
        _print(line)
        return
    if launch.rank == 0 or here:
        _print(line)
    if launch.world_size == 1:
        return
    try:
        if launch.rank == 0:
            _wait_for_others(launch, message)
        elif not _first_has_printed(launch, message) and not here:
            _print(line)
    except (RuntimeError, MoeppError):  # too late, or the first rank was lost
        if launch.rank != 0 and not here:
            _print(line)


def _wait_for_others(launch: LaunchEnvironment, message: str) -> None:
    store = meeting.join_store(launch, SPEAK_SECONDS)
    name = meeting.announce_meeting(store, launch)
    first_seen = meeting.take_place(store, name, 0)
    if first_seen:
        meeting.refuse_all(store, name, message)
    store.set(f"start/{name}/printed", "yes")
    all_came = not first_seen and store.add(f"start/{name}/arrived", 0) >= launch.world_size
    deadline = time.monotonic() + (LEAVE_SECONDS if all_came else SPEAK_SECONDS)
    while store.add(f"start/{name}/left", 0) < launch.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)


def _first_has_printed(launch: LaunchEnvironment, message: str) -> bool:
    """Return whether the first rank, which is told if necessary, has printed the same message."""
    start = time.monotonic()
    store = meeting.join_store(launch, SPEAK_SECONDS)
    told, limit = "", SPEAK_SECONDS
    while True:
        name = meeting.current_meeting(store)
        if name and name != told and not _is_old(store, name, start):
            told = name
            if meeting.take_place(store, name, launch.rank):
                meeting.tell_problem(store, name, launch.rank, message)
            else:
                limit = MET_SECONDS
        if told and store.check([f"start/{told}/printed"]):
            is_same = meeting.refusal_of(store, told) in ("", message, f"rank 0 cannot start: {message}")
            store.add(f"start/{told}/left", 1)  # last of all: the first rank may then take the store with it
            return is_same
        if time.monotonic() - start > limit:
            return False
        time.sleep(0.02)


def _is_old(store: Store, name: str, start: float) -> bool:
    """Return whether a meeting may be of an earlier start: its end was there when this rank came."""
    recent = time.monotonic() - start < meeting.GRACE_SECONDS
    return meeting.outlives_starts() and recent and store.check([f"start/{name}/printed"])


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
