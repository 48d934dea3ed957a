"""The process of one job of a sweep: `python -m moepp.training.job RUN_DIR`, started by :mod:`moepp.training.jobs`.

The configuration comes as one line of JSON on standard input; RUN_DIR is for those who look at a list of processes.
"""

from __future__ import annotations

import json
import os
import signal
import threading

from moepp.errors import MoeppError
from moepp.training.leave import leave, leave_interrupted


def main() -> None:
    """Train as the sweep says."""
    try:
        tree = json.loads(_read_line())
        threading.Thread(target=_end_with_the_sweep, name="sweep-watch", daemon=True).start()
        from moepp.config import from_dict, import_plugins
        from moepp.training.run import run_training

        import_plugins(tree)
        run_training(from_dict(tree))
    except MoeppError as error:
        leave(error)
    except KeyboardInterrupt:
        leave_interrupted()


def _read_line() -> bytes:
    # Not through sys.stdin, which would read on into the end of the pipe.
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            raise SystemExit("the sweep ended before it had said what to train")
        line += part
    return line


def _end_with_the_sweep() -> None:
    """Wait for the sweep's end of the pipe to close, which it does when the sweep is killed; then save and end."""
    while os.read(0, 1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
