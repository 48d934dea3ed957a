"""The end of a training process that goes wrong: one line, and the documented exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from moepp.errors import MoeppError, PeerError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do


def leave(error: Exception) -> NoReturn:
    """Print what a user can cause as one line, on the first rank only, and exit with the same code on every rank."""
    from moepp.config import explain_hydra_error
    from moepp.parallel.refusal import print_once

    message = str(error) if isinstance(error, MoeppError) else explain_hydra_error(error)
    if isinstance(error, PeerError):  # every rank has seen another thing, and the first may be the one that failed
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        print_once(f"error: {message}")
    sys.stdout.flush()
    os._exit(getattr(error, "exit_code", MoeppError.exit_code))  # exit handlers may wait for ranks that have left


def leave_interrupted() -> NoReturn:
    """End after Ctrl-C."""
    print("interrupted; start the same command to continue from the newest checkpoint", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)
