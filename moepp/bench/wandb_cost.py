"""What W&B costs for each record: processor time of its thread here and of its service process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from moepp.bench.tables import Record
from moepp.config.schema import WandbConfig
from moepp.io.temporary import temporary_folder
from moepp.metrics.wandb import WandbSink

_SETTLE_SECONDS = 2.0  # for the service to start, and to write what it was given


def run(records: Mapping[str, Mapping[str, float]], repeats: int) -> list[Record]:
    """Return a row per kind of record; W&B is offline and its files go to a temporary folder.

    Args:
        records: one of each kind, as :class:`moepp.metrics.wandb.WandbSink` gets it.
        repeats: how often each is logged.
    """
    return [_row(name, record, repeats) for name, record in records.items()]


def _row(name: str, record: Mapping[str, float], repeats: int) -> Record:
    with temporary_folder("moepp-bench-") as folder:
        sink = WandbSink(folder, WandbConfig(mode="offline"), name, {}, is_resumed=False)
        try:
            time.sleep(_SETTLE_SECONDS)
            start = _processor_seconds()
            for step in range(1, repeats + 1):
                sink.log(record, step, step)
            time.sleep(_SETTLE_SECONDS + repeats / 100)
            spent = _processor_seconds() - start
        finally:
            sink.close()
    return {"W&B, offline": name, "keys": len(record), "ms of processor time per record": 1e3 * spent / repeats}


def _processor_seconds() -> float:
    """Return what this process and its children have used, W&B's service among them."""
    return time.process_time() + sum(_of_process(pid) for pid in _children())


def _children() -> list[int]:
    threads = Path("/proc/self/task").iterdir()
    return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]


def _of_process(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # of user and system
