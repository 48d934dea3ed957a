"""One voice when all ranks end with the same error: a bad configuration, data that is not there.

Launchers end all ranks as soon as one of them exits. So no rank may leave before the first has printed the reason, and
the first, which may keep the store, leaves last.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from torch.distributed import Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from moepp.errors import ConfigError
from moepp.parallel.groups import LaunchEnvironment, read_launch_environment

SPEAK_SECONDS = 30.0  # for the first rank to get as far: processes start at different speeds
LEAVE_SECONDS = 5.0  # for the other ranks to have heard of it
_PRINTED, _LEFT = "refusal/printed", "refusal/left"


def print_once(line: str) -> None:
    """Print ``line`` to standard error on the first rank; to be called by every rank, which may then exit.

    The ranks need not have met before. One that finds the error alone, so that the first does not come, prints
    ``line`` itself.
    """
    try:
        launch = read_launch_environment()
    except ConfigError:  # the launcher's variables are what is wrong
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        launch = LaunchEnvironment(rank=int(rank != "0"), world_size=1, local_rank=0)
    if launch.rank == 0:
        print(line, file=sys.stderr, flush=True)
    if launch.world_size == 1:
        return
    try:
        _meet(launch)
    except RuntimeError:  # too late, or the first rank is gone
        if launch.rank != 0:
            print(line, file=sys.stderr, flush=True)


def _meet(launch: LaunchEnvironment) -> None:
    timeout = timedelta(seconds=SPEAK_SECONDS)
    store: Store
    store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    if launch.rank != 0:
        store.wait([_PRINTED], timeout)
        store.add(_LEFT, 1)
        return
    store.set(_PRINTED, "yes")
    deadline = time.monotonic() + LEAVE_SECONDS
    while store.add(_LEFT, 0) < launch.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
