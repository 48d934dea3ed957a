"""How long ranks wait for one another in collectives before they take the others for lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from moepp.distributed import comm

PATIENCE_SECONDS = 24 * 3600.0


def limit_waits(seconds: float) -> None:
    """Set the longest wait for another rank on every process group there is.

    torch gives each new group 30 minutes (NCCL 10), whatever the default group has; DeepSpeed's are made out of reach.
    """
    for group in comm.all_groups():
        limit_wait(group, seconds)


def limit_wait(group: comm.Group, seconds: float) -> None:
    """Set the longest wait for another rank of one group."""
    group.set_timeout(timedelta(seconds=seconds))


@contextmanager
def limited_waits(seconds: float) -> Iterator[None]:
    """Limit the waits of all groups for a while, in which all ranks work at one speed.

    Otherwise ranks may wait for as long as it takes: what one does while others wait takes as long as data are large
    and disks are slow, and the watch over the ranks notices one that is lost.
    """
    limit_waits(seconds)
    try:
        yield
    finally:
        limit_waits(PATIENCE_SECONDS)


@contextmanager
def unlimited_waits(seconds: float) -> Iterator[None]:
    """Lift the limit of :func:`limited_waits` for a while, in which one rank works and the others wait.

    Args:
        seconds: the limit, set again afterwards.
    """
    limit_waits(PATIENCE_SECONDS)
    try:
        yield
    finally:
        limit_waits(seconds)
