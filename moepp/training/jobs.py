"""Jobs of a sweep, one process after another.

The process of a job gets its configuration over a pipe, which stays open as long as the sweep lives: a job whose sweep
was killed notices, saves and ends. It runs in a process group of its own, so that a signal reaches it exactly once,
through the sweep, whether it was meant for the sweep alone or came from the terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moepp.errors import ConfigError, MoeppError, Preempted, RunError
from moepp.training.leave import EXIT_INTERRUPTED

_COMMAND = (sys.executable, "-m", "moepp.training.job")
_LOSS = re.compile(r"(train|eval(/[\w-]{1,64})?)/loss")  # of the validation part of data.paths, or of a named set
_ROOT = Path(__file__).resolve().parents[2]
# Signal of the sweep -> signal that its job gets. Without a terminal there is nothing to interrupt: the job saves.
_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
_MEANINGS = {
    1: "failed with an error of the program",
    2: "refused",
    4: "failed: training could not go on",
    5: "failed: a process was lost",
    Preempted.exit_code: "stopped; its state is saved",
    EXIT_INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        num: place in the sweep, from 0.
        values: the overrides that tell it from the others.
        path: its directory; ``None`` where it could not be composed.
        tree: its configuration as plain dictionaries; ``None`` where it cannot run.
        error: why it cannot run.
    """

    num: int
    values: str
    path: str | None
    tree: dict[str, Any] | None
    error: MoeppError | None

    @property
    def title(self) -> str:
        return f"job {self.num} ({self.values})" if self.values else f"job {self.num}"


def run_jobs(jobs: Sequence[Job]) -> int:
    """Run every job that can run, print how each ended, and return the first exit code that is not 0.

    A job that fails does not end the sweep; a signal does, once the job at work has saved.

    Raises:
        MoeppError: none can run, all for the same reason.
    """
    reasons = {str(job.error) for job in jobs}
    if len(reasons) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    for job in jobs:
        if job.error is not None:
            print(f"error: {job.title}: {job.error}", file=sys.stderr, flush=True)
    codes: dict[int, int] = {job.num: ConfigError.exit_code for job in jobs if job.error is not None}
    with _Signals() as signals:
        for job in jobs:
            if job.tree is None or job.error is not None or signals.received is not None:
                continue
            print(f"{job.title} of {len(jobs)}: {_shown(job.path)}", flush=True)
            codes[job.num] = _run(job, signals)
            if codes[job.num] in (Preempted.exit_code, EXIT_INTERRUPTED):
                break  # stopped on purpose, though perhaps not through the sweep
    print(_summary(jobs, codes), flush=True)
    stopped = _stopped_code(codes, signals.received)
    if stopped:
        print("the sweep was stopped; start the same command again to continue it", file=sys.stderr, flush=True)
        return stopped
    return next((codes[job.num] for job in jobs if codes.get(job.num)), 0)


class _Signals:
    """Passes signals on to the job at work, and remembers the first."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.process: subprocess.Popen[str] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in _PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup: the jobs ignore it, too
                self._previous[number] = signal.signal(number, self._pass_on)
        self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the job at work, if there is one."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        self.send(_PASSED_ON[signal.Signals(number)])

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Stop the job as long as the sweep is stopped (Ctrl-Z)."""
        self.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.send(signal.SIGCONT)


def _run(job: Job, signals: _Signals) -> int:
    """Run one job in a process of its own; its exit code as a shell would give it."""
    places = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [*_COMMAND, str(job.path)],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        text=True,
        process_group=0,
    )
    signals.process = process
    if signals.received is not None:  # while the process was made
        signals.send(_PASSED_ON[signals.received])
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code says how
        process.stdin.write(json.dumps(job.tree) + "\n")
        process.stdin.flush()
    code = process.wait()
    signals.process = None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return code if code >= 0 else 128 - code


def _stopped_code(codes: dict[int, int], received: signal.Signals | None) -> int | None:
    """Return the exit code of a sweep that was stopped: 130 by Ctrl-C, 75 by another signal."""
    for code in (EXIT_INTERRUPTED, Preempted.exit_code):
        if code in codes.values():
            return code
    if received is None:
        return None
    return EXIT_INTERRUPTED if received == signal.SIGINT else Preempted.exit_code


def _summary(jobs: Sequence[Job], codes: dict[int, int]) -> str:
    done = sum(codes.get(job.num) == 0 for job in jobs)
    rows = [(_shown(job.path), job.values, _outcome(job, codes.get(job.num))) for job in jobs]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {path:<{widths[0]}}  {values:<{widths[1]}}  {outcome}" for path, values, outcome in rows]
    return "\n".join([f"sweep: {done} of {len(jobs)} jobs done", *lines])


def _outcome(job: Job, code: int | None) -> str:
    if job.error is not None:
        return f"refused: {str(job.error).splitlines()[0]}"
    if code is None:
        return "not started"
    if code == 0:
        return ", ".join(["done", *_last_losses(Path(job.path or "", "metrics.jsonl"))])
    if code > 128 and code != EXIT_INTERRUPTED:
        return f"ended by {signal.Signals(code - 128).name}"
    return f"{_MEANINGS.get(code, 'failed')} (exit code {code})"


def _last_losses(metrics: Path) -> list[str]:
    """Return the newest training and validation losses, or nothing if they cannot be read."""
    from moepp.metrics.jsonl import read_records

    found: dict[str, float] = {}
    try:
        for record in read_records(metrics):
            found |= {name: value for name, value in record.items() if _LOSS.fullmatch(name) and value is not None}
    except RunError:
        return []
    return [f"{name.replace('/', ' ')} {value:.4f}" for name, value in found.items()]


def _shown(path: str | None) -> str:
    """Return the shortest way to write a directory from here."""
    if path is None:
        return "-"
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
