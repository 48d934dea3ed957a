"""DeepSpeed's launcher, but signals reach the training processes, which save, and the exit code is theirs.

The launcher itself dies of SIGTERM and SIGUSR1 and leaves its processes behind.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from types import FrameType

import psutil

_LAUNCHER_OF_HOST = "deepspeed.launcher.launch"  # its children are the training processes of this host
_POLL_SECONDS = 0.2


def main() -> int:
    """Run DeepSpeed's launcher with the command line's arguments; returns the exit code."""
    early: list[int] = []  # signals that came before there was a process to send them to
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: early.append(number))
    launcher = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.runner", *sys.argv[1:]])

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        processes = _training_processes(launcher.pid)
        if not processes and number not in early:
            early.append(number)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the launcher, too
    code = None
    while code is None:
        try:
            code = launcher.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if early and _training_processes(launcher.pid):
                pass_on(early.pop(0))
    return _shell_code(code)


def _shell_code(code: int) -> int:
    """Return the exit code by which a shell tells the same end: 128 + n for signal n.

    The launcher leaves with the code that Popen has for its processes, -n for signal n, of which 256 - n arrives.
    """
    if code > 256 - signal.NSIG:
        code -= 256
    return code if code >= 0 else 128 - code


def _training_processes(launcher: int) -> list[psutil.Process]:
    found = []
    try:
        for process in psutil.Process(launcher).children(recursive=True):
            if _LAUNCHER_OF_HOST in process.cmdline():
                found += process.children()
    except psutil.NoSuchProcess:  # ended in between
        pass
    return found


if __name__ == "__main__":
    sys.exit(main())
