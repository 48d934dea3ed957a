"""Files that appear whole or not at all: written in a hidden folder beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from moepp.errors import DataError
from moepp.io.files import is_at, sync_folder, write_whole
from moepp.io.locks import NoLocksError, try_lock
from moepp.io.owners import permissions, require_own
from moepp.io.untrusted import printable, read_json
from moepp.io.write_errors import write_error

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


def publish(folder: str, staged: list[tuple[str, str]], remove: str | None = None) -> None:
    """Sync every staged file to disk, then rename (staged, final) pairs; the last of them makes the others count.

    Finals elsewhere than beside ``folder``, perhaps on another file system, come first, and ``remove`` is removed when
    they are in place: what they fail with (a disk that is full) costs nothing that was there. A process killed in
    between leaves a note in ``folder``, by which the next one removes those that are new.
    """
    home = os.path.dirname(folder)
    for path, final in staged:
        os.makedirs(_parent(final), exist_ok=True)
        if os.path.isfile(final):
            os.chmod(path, permissions(os.stat(final)))
        _sync(path)
    elsewhere = [pair for pair in staged if not os.path.samefile(_parent(pair[1]), home)]
    rest = [pair for pair in staged if pair not in elsewhere]
    with _copies_beside(elsewhere, folder) as first:
        _write_note(folder, [*first, *rest], [copy for copy, _ in first])
        for path, final in first:
            with _named(final):
                os.replace(path, final)
        if remove is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(remove)
        for path, final in rest:
            os.replace(path, final)
    for parent in {_parent(final) for _, final in staged}:
        sync_folder(parent)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn a failed write into one that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(error.errno, path) from error


def _sync(path: str) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _parent(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


@contextlib.contextmanager
def _copies_beside(staged: list[tuple[str, str]], folder: str) -> Iterator[list[tuple[str, str]]]:
    """Yield (copy, final) pairs of small staged files; the copies lie beside the finals, and none is left at the end.

    Their names, which nobody else uses, are noted before there is anything under them.
    """
    copies = [
        os.path.join(_parent(final), f".{os.path.basename(final)}.preparing-{uuid.uuid4().hex[:8]}")
        for _, final in staged
    ]
    if copies:
        write_whole(os.path.join(folder, NOTE), json.dumps({"files": [], "copies": copies, "last": folder}))
    try:
        for (path, final), copy in zip(staged, copies, strict=True):
            with _named(final):
                write_whole(copy, Path(path).read_bytes(), permissions(os.stat(path)))
        yield [(copy, final) for copy, (_, final) in zip(copies, staged, strict=True)]
    finally:
        for copy in copies:
            with contextlib.suppress(OSError):
                os.remove(copy)


def _write_note(folder: str, staged: list[tuple[str, str]], copies: list[str]) -> None:
    """Note which files will be new, by their identity, which a rename keeps, and the copies."""
    note = {
        "files": [_identified(final, path) for path, final in staged if not os.path.lexists(final)],
        "copies": copies,
        "last": os.path.abspath(staged[-1][1]),
    }
    write_whole(os.path.join(folder, NOTE), json.dumps(note))


def _identified(path: str, like: str) -> dict[str, str | int]:
    return {"path": os.path.abspath(path), "inode": os.stat(like).st_ino}


def _remove_unfinished(folder: str) -> None:
    """Remove what a process killed between its renames left under final names."""
    note = os.path.join(folder, NOTE)
    if not os.path.isfile(note):
        return
    new, copies, last = _read_note(note)
    if os.path.lexists(last):  # it had got to its end, or not yet begun to rename
        new = []
    for copy in copies:
        with contextlib.suppress(FileNotFoundError):
            os.remove(copy)
    for path, inode in new:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_ino == inode:
                os.remove(path)


def _read_note(note: str) -> tuple[list[tuple[str, int]], list[str], str]:
    """Return the new files with their inodes, the copies beside finals, and the last file.

    Raises:
        DataError: the note was damaged, so nobody knows what is unfinished.
    """
    remedy = f"remove {os.path.dirname(note)}, and what an interrupted preparation has left beside it"
    plan = read_json(Path(note), error=DataError, remedy=remedy)
    try:
        new = [(file["path"], file["inode"]) for file in plan["files"]]
        copies = list(plan.get("copies", []))
        paths = [*(path for path, _ in new), *copies, plan["last"]]
        if all(type(path) is str and "\0" not in path for path in paths) and all(type(i) is int for _, i in new):
            return new, copies, plan["last"]
    except (TypeError, KeyError, AttributeError):
        pass
    raise DataError(f"{printable(note)} is not the note of a preparation; {remedy}")


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
