"""Dataset indices in a folder that runs share: started together, killed, out of disk or of files."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp.data import cache
from moepp.errors import DataError, MoeppError
from tests.data_files import make_config, numbered_documents, open_data, write_indexed

RUNS = 3
LENGTHS = [11, 3, 29, 17, 5, 2, 41, 8, 13, 7] * 4
# One server process imports Megatron; every run is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["moepp.data.megatron", "tests.unit.data.test_data_cache"])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_indexed(tmp_path_factory.mktemp("data") / "a", numbered_documents(LENGTHS))


def _start(action: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Run ``action`` in a process that is the only rank of a run; its result or MoeppError can be received."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_as_run, args=(sender, action, arguments))
    process.start()
    sender.close()
    return process, receiver


def _as_run(sender: Any, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sender.send(action(*arguments))
    except MoeppError as error:
        sender.send(f"{type(error).__name__}: {error}")


def _outcome(started: tuple[Any, Any]) -> Any:
    process, receiver = started
    assert receiver.poll(120)
    result = receiver.recv()
    process.join(120)
    return result


def _store_indices() -> None:
    """As for large files, whose indices are not made in memory."""
    from moepp.data import megatron

    megatron.IN_MEMORY_ITEMS = 0


def _stream(prefix: str, cache_dir: str, steps: int, half: Any = None, is_first: bool = False) -> list[list[int]]:
    """All sequences of a run. The first one tells ``half`` when a file is half written; the others start then."""
    save = np.save

    def save_slowly(path: str, array: np.ndarray, **options: Any) -> None:
        save(path, array, **options)
        if "shuffle" in str(path) and not half.is_set():  # the last file of a set: all of them are there
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            half.set()
            time.sleep(1)
            Path(path).write_bytes(content)

    if is_first:
        np.save = save_slowly
    elif half is not None:
        assert half.wait(100)
    _store_indices()
    data = open_data(make_config([prefix], train__steps=steps), 1, 0, cache_dir)
    return [row for step in range(steps) for row in data.train_batch(step, 0)[0].tolist()]


@pytest.mark.slow
def test_runs_that_start_together_share_one_folder(prefix: str, tmp_path: Path) -> None:
    steps = (20, 30, 40)
    half = SERVER.Event()
    started = [_start(_stream, prefix, str(tmp_path / "cache"), steps[i], half, i == 1) for i in range(RUNS)]
    streams = [_outcome(run) for run in started]
    assert all(isinstance(stream, list) for stream in streams), streams
    assert streams[0] == streams[2][: len(streams[0])] and streams[1] == streams[2][: len(streams[1])]
    assert len(streams[2]) == 40 * 8
    expected = open_data(make_config([prefix], train__steps=40), 1, 0, None)
    assert streams[2][-8:] == expected.train_batch(39, 0)[0].tolist()


def test_what_another_run_reads_stays_and_what_is_half_written_goes(tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.npy", tmp_path / "half.npy"
    np.save(whole, np.arange(100))
    half.write_bytes(whole.read_bytes()[:-8])
    with cache.building(str(tmp_path)):
        assert not half.exists()
    assert np.load(whole).sum() == 4950


def test_a_run_that_builds_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    lock = os.open(tmp_path / cache.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match=r"another run has been building .* data\.cache_dir elsewhere"):
        cache.building(str(tmp_path), wait_seconds=0.3).__enter__()
    os.close(lock)
    with cache.building(str(tmp_path), wait_seconds=0.3):
        pass


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "important").write_text("mine")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / cache.LOCK).symlink_to(tmp_path / "important")
    with pytest.raises(MoeppError, match="symbolic link"):
        cache.building(str(tmp_path / "cache")).__enter__()
    assert (tmp_path / "important").read_text() == "mine"


def _build_on_full_disk(prefix: str, cache_dir: str) -> None:
    def fail(path: str, array: np.ndarray, **_: Any) -> None:
        Path(path).write_bytes(b"\x93NUMPY")
        raise OSError(errno.ENOSPC, "No space left on device")

    np.save = fail
    _store_indices()
    open_data(make_config([prefix]), 1, 0, cache_dir)


def _build_with_few_files(prefix: str, cache_dir: str, spare: int) -> None:
    open_data(make_config([prefix]), 1, 0, None)  # whatever is opened only once
    _store_indices()
    limit = max(map(int, os.listdir("/proc/self/fd"))) + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    open_data(make_config([prefix]), 1, 0, cache_dir)


def _build_with_a_low_soft_limit(prefix: str, cache_dir: str) -> list[int]:
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return open_data(make_config([prefix]), 1, 0, cache_dir).train_batch(0, 0)[0].flatten().tolist()


@pytest.mark.slow
def test_full_disk_and_the_limit_of_open_files_are_one_line_and_the_next_start_works(
    prefix: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "cache")
    few = [_start(_build_with_few_files, prefix, f"{folder}{spare}", spare) for spare in (1, 2)]
    message = _outcome(_start(_build_on_full_disk, prefix, folder))
    assert message.startswith("WriteError: ") and "\n" not in message
    assert folder in message and "the disk is full" in message and "MB free" in message
    outcomes = [_outcome(run) for run in few]  # of the data, and of the indices
    assert all("ulimit -n" in outcome and "permission" not in outcome for outcome in outcomes), outcomes
    low = _outcome(_start(_build_with_a_low_soft_limit, prefix, f"{folder}-low"))
    assert len(low) == 8 * 8  # the hard limit counts
    assert list((tmp_path / "cache").rglob("*.npy"))  # half written
    assert len(_outcome(_start(_stream, prefix, folder, 4))) == 4 * 8


@pytest.mark.parametrize(
    ("free", "largest_file", "expected"),
    [
        (0, resource.RLIM_INFINITY, "the disk is full"),
        (1 << 40, resource.RLIM_INFINITY, "1,099,512 MB free there"),
        (1 << 40, 1 << 20, "raise the limit (ulimit -f)"),
    ],
)
def test_a_write_that_fails_without_a_reason_names_the_room_or_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, largest_file: int, expected: str
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    monkeypatch.setattr(cache.resource, "getrlimit", lambda _: (largest_file, resource.RLIM_INFINITY))
    hidden = Exception("see above")
    hidden.__cause__ = OSError("1000 requested and 0 written")  # numpy's words
    message = str(cache.explained(hidden, str(tmp_path)))
    assert expected in message and str(tmp_path) in message
