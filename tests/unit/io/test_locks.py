"""Locks are exclusive, and where a file system has none each holder says so in one line with a remedy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moepp.data import cache
from moepp.data.prepare import staging
from moepp.errors import MoeppError
from moepp.io.locks import NoLocksError, try_lock
from moepp.runs.lock import RunLock


def test_one_holder_at_a_time_and_closing_frees(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert try_lock(first) and not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)


HOLDERS: dict[str, Callable[[Path], object]] = {
    "run.dir": lambda folder: RunLock.acquire(folder / "lock"),
    "data.cache_dir": lambda folder: cache.building(str(folder)).__enter__(),
    "--output": lambda folder: staging.staging_folder(str(folder / "out")).__enter__(),
}


def _open_below(folder: Path) -> list[str]:
    """Paths below a folder that this process holds open; other descriptors come and go."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return [target for target in targets if target.startswith(str(folder))]


@pytest.mark.parametrize("remedy", HOLDERS)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_named(
    remedy: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(MoeppError, match="without file locks") as caught:
        HOLDERS[remedy](tmp_path)
    assert (
        remedy in str(caught.value) and os.strerror(number) in str(caught.value) and str(tmp_path) in str(caught.value)
    )
    assert _open_below(tmp_path) == []
    with pytest.raises(NoLocksError):
        try_lock(-1)
