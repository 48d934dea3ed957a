"""Processes of a benchmark that need one another: each joins a process group and returns records to the parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moepp.bench.host_memory import keep_freed_memory
from moepp.errors import RunError
from moepp.io.temporary import temporary_folder


def run_processes(
    work: Callable[..., Any], world_size: int, *args: Any, device_type: str = "cpu", timeout_seconds: float = 1800
) -> list[Any]:
    """``work(rank, world_size, *args)`` in ``world_size`` processes, one thread each; results by rank.

    ``work`` and its arguments must be importable and picklable. CPU tensors travel over gloo; with another
    ``device_type`` each rank has one device of it, the current one, whose tensors travel over its own backend.

    Raises:
        RunError: a process failed or did not finish in time.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with temporary_folder("moepp-bench-") as folder:
        store = str(folder / "store")
        processes = [
            context.Process(
                target=_enter, args=(work, rank, world_size, store, results, device_type, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            found = _collect(results, processes, timeout_seconds)
        finally:
            for process in processes:
                process.join(timeout=20)
                if process.is_alive():
                    process.kill()
    for rank, (_, error) in sorted(found.items()):
        if error is not None:
            raise RunError(f"rank {rank} of {world_size} failed: {error}")
    return [found[rank][0] for rank in range(world_size)]


def _collect(results: Any, processes: list[Any], timeout_seconds: float) -> dict[int, Any]:
    """Return the results of all processes; fail if one was killed, which never sends its own."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(found) < len(processes):
        dead = {rank: one.exitcode for rank, one in enumerate(processes) if one.exitcode}  # before looking for results
        try:
            rank, result = results.get(timeout=1.0)
            found[rank] = result
        except queue.Empty:
            for rank, code in dead.items():
                if rank not in found:
                    why = f"signal {-code}, perhaps out of memory" if code < 0 else f"code {code}"
                    raise RunError(f"rank {rank} of {len(processes)} ended with {why}; try smaller shapes") from None
            if time.monotonic() > deadline:
                raise RunError(f"the {len(processes)} processes did not finish in {timeout_seconds:.0f} s") from None
    return found


def _end_with_parent() -> None:
    """End with the parent, so that a killed benchmark leaves no process computing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _enter(
    work: Callable[..., Any], rank: int, world_size: int, store: str, results: Any, device_type: str, args: tuple
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        backend = "gloo"
        if device_type != "cpu":
            torch.accelerator.set_device_index(rank)
            backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=300),
        )
        results.put((rank, (work(rank, world_size, *args), None)))
        dist.destroy_process_group()
    except Exception as error:  # the parent raises it
        traceback.print_exc()
        results.put((rank, (None, f"{type(error).__name__}: {error}")))
