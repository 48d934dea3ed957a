"""The end of a training process that goes wrong: one line, and the documented exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import NoReturn

from moepp.errors import MoeppError, PeerError
from moepp.io.untrusted import terminal_text

EXIT_CRASHED = 1  # as Python does
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do


def leave(error: MoeppError) -> NoReturn:
    """Print what a user can cause as one line, and exit with the same code on every rank.

    The first rank prints it; others only if their error says so, for example because it is theirs alone.
    """
    from moepp.distributed.launch import record_exit_code
    from moepp.distributed.refusal import print_once

    message = terminal_text(str(error))
    # Where ranks have not met, or one was lost, each has seen another thing, and the first may be the one that failed.
    if isinstance(error, PeerError) or error.cannot_meet:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        print_once(message, here=error.said_here)
    sys.stdout.flush()
    record_exit_code(error.exit_code)
    os._exit(error.exit_code)  # exit handlers may wait for ranks that have left


def leave_crashed() -> None:
    """End one of several ranks whose exception nobody expected; the caller raises it on where there is but one.

    Python would end with what is under way in the background, and collectives that wait for other ranks never end.
    """
    from moepp.distributed.launch import read_launch_environment, record_exit_code

    with contextlib.suppress(MoeppError):
        if read_launch_environment().world_size > 1:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            record_exit_code(EXIT_CRASHED)
            os._exit(EXIT_CRASHED)


def leave_interrupted() -> NoReturn:
    """End after Ctrl-C."""
    print("interrupted; start the same command to continue from the newest checkpoint", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)
