"""DeepSpeed's launcher, but signals reach the training processes, which save, and the exit code is theirs.

The launcher itself dies of SIGTERM and SIGUSR1 and leaves its processes behind.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from types import FrameType

import psutil

_LAUNCHER_OF_HOST = "deepspeed.launcher.launch"  # its children are the training processes of this host


def main() -> int:
    """Run DeepSpeed's launcher with the command line's arguments; returns the exit code."""
    launcher = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.runner", *sys.argv[1:]])

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in _training_processes(launcher.pid):
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the launcher, too
    code = launcher.wait()
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
