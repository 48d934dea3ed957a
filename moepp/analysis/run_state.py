"""What a run is doing, as far as its files and this host tell: nothing is asked of its processes."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from moepp.analysis.runs import Run
from moepp.io.untrusted import printable, read_part
from moepp.runs.directory import RunDir

_HOLDER = re.compile(r"process ([0-9]{1,10}) on (\S{1,253})")  # what moepp.runs.lock writes
_CHECKPOINT = re.compile(r"step-([0-9]{1,15})")
_LOCKS = Path("/proc/locks")
_QUIET_RECORDS = 10.0  # usual times between records without one, after which a run is called silent
_QUIET_SECONDS = 120.0  # but never before: evaluations and checkpoints take their time


@dataclass(frozen=True)
class RunState:
    """What a run is doing.

    Attributes:
        name: "finished" (all steps are done and, as far as can be told, saved); "running"; "continued" (it runs, and
            has no new record yet); "silent" (its process lives, but records are overdue); "elsewhere" (another host
            has it, so whether it lives is not known); "stopped" (it ended, and what it did is saved); "killed" (it
            ended, and steps are lost); "idle" (no process was ever seen here); "waiting" (no record yet).
        text: the same for people.
    """

    name: str
    text: str

    @property
    def goes_on(self) -> bool:
        """Whether it makes sense to say when it will be done."""
        return self.name in ("running", "continued", "elsewhere")


@dataclass(frozen=True)
class _Holder:
    """Who wrote its name into the run's lock last."""

    name: str
    is_here: bool  # of this host
    lives: bool  # and still has the lock


def state_of(path: Path, run: Run | None, now: float) -> RunState:
    """Return what the run in a directory is doing.

    Args:
        path: its directory.
        run: the same as read; None: it has no record yet.
        now: seconds since the epoch.
    """
    holder = _holder(path)
    if run is None:
        return _without_records(holder)
    if run.total_steps is not None and run.steps >= run.total_steps:
        if holder is not None and holder.lives:
            return RunState("finished", f"finished; {holder.name} still writes")
        # The last step is logged before it is saved. Of a run whose checkpoints were removed nothing can be missing.
        if _saved(run)[0] or not RunDir(path).checkpoints.is_dir():
            return RunState("finished", "finished")
    if holder is None:
        return RunState("idle", f"not running here; {_saved(run)[1]}")
    written = RunDir(path).metrics_file.stat().st_mtime
    limit = max(_QUIET_SECONDS, _QUIET_RECORDS * _usual_seconds(run))
    if not holder.is_here:
        if now - written <= limit:
            return RunState("elsewhere", f"on another host: {holder.name}")
        return RunState("silent", f"no new record; last held by {holder.name}")
    if not holder.lives:
        is_saved, text = _saved(run)
        return RunState("stopped" if is_saved else "killed", f"not running: {holder.name} has ended; {text}")
    if written < (path / ".lock").stat().st_mtime:
        return RunState("continued", f"running: {holder.name}; no record since it was started again")
    if now - written > limit:
        return RunState("silent", f"silent: {holder.name} lives, but records are overdue")
    return RunState("running", f"running: {holder.name}")


def _without_records(holder: _Holder | None) -> RunState:
    text = "waiting for the first record"
    if holder is None:
        return RunState("waiting", f"{text}; not running here")
    if not holder.is_here:
        return RunState("waiting", f"{text}; last held by {holder.name}")
    if holder.lives:
        return RunState("waiting", f"{text}; running: {holder.name}")
    return RunState("killed", f"no record; not running: {holder.name} has ended")


def _holder(path: Path) -> _Holder | None:
    lock = path / ".lock"
    try:
        found = _HOLDER.match(read_part(lock, 200).decode("utf-8", "replace"))
    except OSError:
        return None
    if found is None:
        return None
    name, is_here = printable(found[0], 100), found[2] == socket.gethostname()
    return _Holder(name, is_here, is_here and _has_lock(lock, found[1]))


def _has_lock(lock: Path, process: str) -> bool:
    """Return whether a process of this host has the lock; where the system does not list locks, whether it lives."""
    try:
        number, lines = str(lock.stat().st_ino), _LOCKS.read_text().splitlines()
    except OSError:
        return Path("/proc", process).is_dir()
    # "1: FLOCK ADVISORY WRITE <process> <major>:<minor>:<inode> 0 EOF"; a lock that is waited for has "->".
    fields = [line.split() for line in lines if "->" not in line]
    return any(len(part) > 5 and part[4] == process and part[5].rpartition(":")[2] == number for part in fields)


def _saved(run: Run) -> tuple[bool, str]:
    """Return whether the newest checkpoint has every step that was logged, and say so."""
    try:
        names = [entry.name for entry in RunDir(run.path).checkpoints.iterdir()]
    except OSError:
        names = []
    steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    if not steps:
        return False, "nothing is saved, so it would begin anew"
    if max(steps) >= run.steps:
        return True, "all of it is saved: start it again to go on"
    return False, f"it would go on from step {max(steps):,}, {run.steps - max(steps):,} steps before its last record"


def _usual_seconds(run: Run) -> float:
    """Return the usual time between records: tokens between them over the newest throughput; 0 if not known."""
    speed = run.series("throughput/tokens_per_second")
    gaps = [after - before for before, after in pairwise(speed.tokens)]
    return median(gaps) / speed.values[-1] if gaps and speed.values[-1] > 0 else 0.0
