"""Ranks working together from their meeting to their end: a watch over lost ranks, and a way out that never hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed import comm
from moepp.distributed.device import use_in_thread
from moepp.distributed.launch import LaunchEnvironment, record_exit_code
from moepp.distributed.peers import PeerWatch
from moepp.errors import PeerError

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 10.0  # for the process groups to be destroyed


@contextlib.contextmanager
def watched(
    store: Store,
    launch: LaunchEnvironment,
    device: torch.device,
    heartbeat_seconds: float,
    remedy: str,
    note: Callable[[PeerError], None] = lambda error: None,
) -> Iterator[PeerWatch]:
    """Work of all ranks, in process groups that exist, which are left at its end.

    Args:
        store: the key-value store where the ranks have met.
        heartbeat_seconds: a rank is lost after so long a silence.
        remedy: what to do after the loss of a rank.
        note: leaves the error in a log; this process may end without another word.

    Raises:
        PeerError: another rank was lost; the message names it.
    """

    def lost(explanation: str) -> PeerError:
        error = PeerError(f"{explanation}; {remedy}")
        note(error)
        return error

    def leave(explanation: str) -> None:
        error = lost(explanation)
        print(f"error: {error}", file=sys.stderr, flush=True)
        record_exit_code(error.exit_code)
        os._exit(error.exit_code)  # the training thread waits for a rank that is gone

    watch = PeerWatch(store, launch.rank, launch.world_size, leave, heartbeat_seconds)
    is_in_order = False
    try:
        yield watch
        watch.finish()
        with contextlib.suppress(RuntimeError):  # all work is done; a rank that died reports its own error
            comm.barrier()  # rank 0 keeps the store, so it leaves last
        watch.stop()
        is_in_order = True
    except Exception as error:
        if comm.is_communication_error(error):
            raise lost(watch.explain(error)) from error
        watch.announce(error)
        raise
    finally:
        leave_process_groups(device, is_in_order)


def leave_process_groups(device: torch.device, is_in_order: bool) -> None:
    """Destroy all process groups, but do not wait for ever.

    NCCL waits for its collectives under way, which never end where a rank was lost: so they are aborted first, unless
    all is in order.
    """
    thread = threading.Thread(target=_destroy, args=(device, is_in_order), name="leave", daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    if thread.is_alive():
        logger.warning("the process groups could not be left within %g s", LEAVE_SECONDS)


def _destroy(device: torch.device, is_in_order: bool) -> None:
    use_in_thread(device)
    try:
        if not is_in_order and device.type != "cpu" and dist.is_initialized():
            comm.abort_all()
        # DeepSpeed's record of the groups too, or a second run would get the old ones.
        adopter = sys.modules.get("deepspeed.comm")
        if adopter is not None and adopter.is_initialized():
            adopter.destroy_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:  # of a group that is broken already
        logger.warning("the process groups could not be left: %s", " ".join(str(error).split())[:200])
