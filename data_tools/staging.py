"""Files that appear whole or not at all: written in a hidden folder beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator

from moepp.errors import DataError


@contextlib.contextmanager
def staging_folder(prefix: str) -> Iterator[str]:
    """A locked empty folder on the file system of ``prefix``, removed at the end whatever happens.

    A killed process leaves the folder behind, unlocked; the next one for the same prefix empties and takes it.

    Raises:
        DataError: the place is not writable, or another process prepares the same prefix.
    """
    parent, name = os.path.split(os.path.abspath(prefix))
    folder = os.path.join(parent, f".{name}.preparing")
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot write {prefix}: {error.strerror}; choose a folder you may write to") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is preparing {prefix}; wait for it, or choose another --output"
            ) from error
        _empty(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def publish(staged: list[tuple[str, str]], remove_first: str | None = None) -> None:
    """Sync every staged file to disk, remove ``remove_first``, then rename (staged, final) pairs in their order."""
    for path, _ in staged:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    if remove_first is not None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(remove_first)
    for path, final in staged:
        os.replace(path, final)
    for folder in {os.path.dirname(os.path.abspath(final)) for _, final in staged}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one."""
    with staging_folder(path) as folder:
        staged = os.path.join(folder, "content")
        try:
            with open(staged, "wb") as stream:
                stream.write(content)
            publish([(staged, path)])
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; free space, or choose another place") from error


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
