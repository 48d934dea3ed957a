"""A save that fails on one rank: known to all, and nothing is lost but that checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.checkpoint import format as fmt
from moepp.checkpoint import saver, storage
from tests.checkpoint_cases import Saving, check_content, names, replaced
from tests.dist import WorkerPool


def _fail(rank: int, folder: str, at_rank: int, place: str, background: bool) -> Any:
    """Three saves of which the second fails on one rank; what each reported, and the folder after each."""
    saving = Saving(folder, keep=1)
    seen = []
    with contextlib.ExitStack() as stack:
        for step in (1, 2, 3):
            if step == 2 and rank == at_rank:
                stack.enter_context(BREAK[place]())
            elif step == 3:
                stack.close()
            problems = saving.save(step, background)
            seen.append((problems, names(folder)))
            torch.distributed.barrier()
    return seen


def _raise_no_permission(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "place")


def _no_permission(owner: Any, name: str) -> Callable[[], Any]:
    return lambda: replaced(owner, name, _raise_no_permission)


class _BadDisk:
    """A stream that writes one bit wrong and says nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        wrong = bytearray(data)
        if len(wrong) > 200:
            wrong[100] ^= 4
        return self._stream.write(wrong)


def _bad_disk() -> Any:
    init = storage._HashingStream.__init__
    return replaced(storage._HashingStream, "__init__", lambda self, stream: init(self, _BadDisk(stream)))


def _lost_file() -> Any:
    """A file that is gone after it was written."""
    write = saver.write_tensors

    def write_and_lose(path: Path, *args: Any) -> Any:
        entries = write(path, *args)
        (path / f"__{torch.distributed.get_rank()}_0.distcp").unlink()
        return entries

    return replaced(saver, "write_tensors", write_and_lose)


BREAK: dict[str, Callable[[], Any]] = {
    "folder": _no_permission(saver, "_prepare"),
    "open": _no_permission(storage._HashingFileSystem, "create_stream"),
    "content": _bad_disk,
    "file": _lost_file,
    "manifest": _no_permission(fmt, "write_manifest"),
    "read": _no_permission(fmt, "checksum"),
    "rename": _no_permission(saver, "_rename"),
}
DENIED = "PermissionError: [Errno 13] Permission denied: 'place'"


@pytest.mark.parametrize(
    ("place", "at_rank", "message"),
    [
        ("folder", 0, f"rank 0: {DENIED}"),
        ("open", 0, f"rank 0: {DENIED}"),
        ("open", 1, f"rank 1: {DENIED}"),
        ("content", 1, "__1_0.distcp: content changed (SHA-256 differs)"),
        ("content", 0, "__0_0.distcp: content changed (SHA-256 differs)"),
        ("file", 1, "__1_0.distcp: missing"),
        ("manifest", 0, f"rank 0: {DENIED}"),
        ("read", 1, "cannot be read (Permission denied)"),
        ("rename", 0, f"rank 0: {DENIED}"),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_failure_on_any_rank_is_known_to_all_and_leaves_earlier_checkpoints(
    pool_2: WorkerPool, tmp_path: Path, place: str, at_rank: int, message: str, background: bool
) -> None:
    first, second, third = zip(*pool_2.run(_fail, str(tmp_path), at_rank, place, background), strict=True)
    assert first == (([], ["step-00000001"]),) * 2
    assert second[0] == second[1]
    problems, left = second[0]
    assert len(problems) >= 1 and any(message in problem for problem in problems)
    assert left == ["step-00000001"], "neither a half checkpoint nor the old one pruned"
    assert third == (([], ["step-00000003"]),) * 2
    check_content(tmp_path / "step-00000003", 3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill_disk(rank: int, folder: str, background: bool) -> list[list[str]]:
    saving = Saving(folder, keep=1)
    found = [saving.save(1, background)]
    torch.distributed.barrier()
    ballast = Path(folder, "ballast")
    if rank == 0:
        usage = shutil.disk_usage(folder)
        ballast.write_bytes(bytes(usage.free - 40_000))  # one checkpoint needs more
    torch.distributed.barrier()
    found.append(saving.save(2, background))
    if rank == 0:
        ballast.unlink()
    torch.distributed.barrier()
    found.append(saving.save(3, background))
    return found


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_costs_that_checkpoint_only(pool_2: WorkerPool, small_disk: Path, background: bool) -> None:
    for first, second, third in pool_2.run(_fill_disk, str(small_disk), background):
        assert first == [] and third == []
        assert len(second) >= 1 and all("No space left on device" in problem for problem in second)
    assert names(small_disk) == ["step-00000003"]
    check_content(small_disk / "step-00000003", 3)
