"""Files that appear whole or not at all: written in a hidden folder beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moepp.errors import DataError
from moepp.io.files import is_at, sync_folder, write_whole
from moepp.io.locks import NoLocksError, try_lock
from moepp.io.owners import require_own
from moepp.io.untrusted import printable, read_json

NOTE = "publishing.json"


@contextlib.contextmanager
def staging_folder(prefix: str) -> Iterator[str]:
    """Yield a locked empty folder on the file system of ``prefix``, removed at the end whatever happens.

    A killed process leaves the folder behind, unlocked; the next one for the same prefix empties and takes it.

    Raises:
        DataError: the place is not writable, or another process prepares the same prefix.
    """
    parent, name = os.path.split(os.path.abspath(prefix))
    folder = os.path.join(parent, f".{name}.preparing")
    lock = _locked(folder, prefix)
    try:
        _remove_unfinished(folder)
        _empty(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _locked(folder: str, prefix: str) -> int:
    """Return the descriptor that locks the folder, which is made if missing."""
    while True:
        try:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the process that had it has just removed it
        except OSError as error:
            raise DataError(f"cannot write {prefix}: {error.strerror}; choose a folder you may write to") from error
        try:
            require_own(folder, os.fstat(lock).st_uid)
            if not try_lock(lock):
                raise DataError(f"another process is preparing {prefix}; wait for it, or choose another --output")
        except NoLocksError as error:
            os.close(lock)
            raise DataError(
                f"{folder} lies on a file system without file locks ({error}); mount it with flock, or choose another "
                "--output"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        if is_at(lock, folder):
            return lock
        os.close(lock)


def publish(folder: str, staged: list[tuple[str, str]], remove_first: str | None = None) -> None:
    """Sync every staged file to disk, remove ``remove_first``, then rename (staged, final) pairs in their order.

    The last of them makes the others count. A process killed before it leaves a note in ``folder``, by which the next
    one removes those that are new.
    """
    for path, final in staged:
        os.makedirs(os.path.dirname(os.path.abspath(final)), exist_ok=True)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    _write_note(folder, staged)
    if remove_first is not None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(remove_first)
    for path, final in staged:
        os.replace(path, final)
    for parent in {os.path.dirname(os.path.abspath(final)) for _, final in staged}:
        sync_folder(parent)


def _write_note(folder: str, staged: list[tuple[str, str]]) -> None:
    """Note which files will be new, by their identity: a rename keeps it."""
    new = [
        {"path": os.path.abspath(final), "inode": os.stat(path).st_ino}
        for path, final in staged
        if not os.path.lexists(final)
    ]
    write_whole(os.path.join(folder, NOTE), json.dumps({"files": new, "last": os.path.abspath(staged[-1][1])}))


def _remove_unfinished(folder: str) -> None:
    """Remove what a process killed between its renames left under final names."""
    note = os.path.join(folder, NOTE)
    if not os.path.isfile(note):
        return
    new, last = _read_note(note)
    if os.path.lexists(last):
        return  # it had got to its end
    for path, inode in new:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_ino == inode:
                os.remove(path)


def _read_note(note: str) -> tuple[list[tuple[str, int]], str]:
    """Return the new files with their inodes, and the last file.

    Raises:
        DataError: the note was damaged, so nobody knows what is unfinished.
    """
    remedy = f"remove {os.path.dirname(note)}, and what an interrupted preparation has left beside it"
    plan = read_json(Path(note), error=DataError, remedy=remedy)
    try:
        new = [(file["path"], file["inode"]) for file in plan["files"]]
        if all(type(path) is str and type(inode) is int for path, inode in [*new, (plan["last"], 0)]):
            return new, plan["last"]
    except (TypeError, KeyError):
        pass
    raise DataError(f"{printable(note)} is not the note of a preparation; {remedy}")


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
