"""The one place that writes files: what it writes is whole or not there, and goes nowhere but where it was sent.

A file or folder is made under a new hidden name beside its place (O_EXCL, O_NOFOLLOW), forced to the disk, and renamed.
So a crash leaves the old one or the new one. What it leaves besides, ``.NAME.<8 hex digits>.new`` or ``.old``, is
removed by the next write of the same path: a living writer holds a lock on its own. Symbolic links are refused as
targets, never followed; folders above the target may be links.

Errors are :class:`moepp.errors.WriteError`: one line with the remedy for what happened, and an OSError to those who
catch that. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moepp.errors import WriteError
from moepp.io.owners import permissions, require_own
from moepp.io.write_errors import write_error

_REMAINS = re.compile(r"\.(?P<name>.*)\.[0-9a-f]{8}\.(?:new|old)", re.DOTALL)
_NAME_BYTES = 230  # of the 255 that file systems take: the hidden name adds 14
_NO_FILE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write to an open file meets; it names no file
# What renameat2 says where the system or the file system cannot exchange two names.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EPERM)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_ANOTHER_PLACE = "remove it, or choose another place"


def write_whole(path: str | Path, data: bytes | str, mode: int = 0o644) -> None:
    """Write a file in one go; text as UTF-8. Readers see the old content or the new, never a part.

    Args:
        path: its folder exists; an earlier file there is replaced.
        data: the whole content.
        mode: permissions, less the umask, of a new file; an earlier one's stay.

    Raises:
        WriteError: it cannot be written, or something else than a file is in the way; the old file is untouched.
    """
    content = memoryview(data.encode() if isinstance(data, str) else data)
    with _explained(path), _new_name(Path(path), mode) as descriptor:
        while content:
            content = content[os.write(descriptor, content) :]


@contextlib.contextmanager
def new_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yield a stream whose content becomes ``path`` when the block succeeds; an error changes nothing.

    Args:
        path: as for :func:`write_whole`.
        mode: "wb", or "w" for UTF-8 text.

    Raises:
        ValueError: another mode.
        WriteError: as for :func:`write_whole`.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode={mode!r} is neither 'wb' nor 'w'")
    with (
        _explained(path, in_body=True),
        _new_name(Path(path), 0o644) as descriptor,
        open(descriptor, mode, encoding=None if mode == "wb" else "utf-8", closefd=False) as stream,
    ):
        yield stream


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden empty folder that replaces ``path`` when the block succeeds.

    Every file in it is forced to the disk first. The earlier folder goes whole, with whatever it holds: look before
    you write. Where the file system can, both change places in one step; elsewhere the earlier one is archived by a
    rename, and put back by the next write if there was no time for the second rename.

    Raises:
        WriteError: it cannot be made, or something else than a folder is in the way; the earlier one is untouched.
    """
    path = Path(os.path.abspath(path))
    with _explained(path, in_body=True):
        make_folder(path.parent)
        _refuse_other_kind(path, stat.S_ISDIR, "folder")
        _clean(path)
        mode = path.stat().st_mode & 0o7777 if path.exists() else 0o777 & ~_umask()
        folder, descriptor = _lock_new(path, lambda hidden: os.mkdir(hidden, 0o700))
        try:
            yield folder
            os.fchmod(descriptor, mode)
            sync_tree(folder)
            _put_in_place(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # after a failure the new one; after an exchange the earlier one
            os.close(descriptor)


def open_append(path: str | Path, mode: int = 0o644) -> IO[bytes]:
    """Open an own file for appending, unbuffered, made if there is none; no link, pipe or file of another user.

    Its descriptor can be read as well: what was written can be read even after somebody has removed the file.

    Raises:
        WriteError: it is none of that, or cannot be opened.
    """
    return open(open_own(path, os.O_RDWR | os.O_APPEND, mode), "ab", buffering=0)


def open_own(path: str | Path, flags: int, mode: int = 0o644) -> int:
    """Return the descriptor of an own regular file, made if missing, closed in other programs.

    Raises:
        WriteError: a link, a pipe, a file of another user, or one that cannot be opened.
    """
    with _explained(path):
        # O_NONBLOCK: a pipe without a reader is an error then, not an endless wait.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise write_error(errno.EINVAL, path, "what lies there is not a regular file", "remove it")
            require_own(path, found.st_uid)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def make_folder(path: str | Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it, unless it is there. For folders inside one's own: :func:`make_own_folder`.

    Raises:
        WriteError: it cannot be made.
    """
    with _explained(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).mkdir(mode=mode, exist_ok=True)


def make_own_folder(path: str | Path) -> None:
    """Make a folder in an existing one unless it is there; a link in its place is refused, and so is a full lock-out.

    Raises:
        WriteError: it cannot be made, is no folder, or cannot be written to.
    """
    with _explained(path):
        _refuse_other_kind(Path(path), stat.S_ISDIR, "folder")
        Path(path).mkdir(mode=0o755, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise write_error(errno.EACCES, path)


def move(source: str | Path, target: str | Path, replace: bool = False) -> None:
    """Rename durably; ``replace`` lets a file take the place of another.

    Raises:
        WriteError: it cannot be renamed, or there is something at ``target`` already.
    """
    with _explained(target):
        if replace:
            _refuse_other_kind(Path(target), stat.S_ISREG, "file")
            os.replace(source, target)
        else:
            if os.path.lexists(target):
                raise write_error(errno.EEXIST, target, "something lies there already", _ANOTHER_PLACE)
            os.rename(source, target)
        for folder in {os.path.dirname(os.path.abspath(place)) for place in (source, target)}:
            sync_folder(folder)


def link_tree(source: Path, target: Path) -> None:
    """Give a file, or a folder's files, a second name; copies where the file system has no hard links.

    Raises:
        WriteError: it cannot be done.
    """
    with _explained(target):
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=_link)
        else:
            _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def sync_folder(path: str | Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power failure."""
    _sync(path, os.O_DIRECTORY)


def sync_tree(path: str | Path) -> None:
    """Force a folder and all that is in it to the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            place = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(place).st_mode):
                _sync(place, os.O_NOFOLLOW)
        sync_folder(folder)


def is_remains(name: str) -> bool:
    """Return whether this is the hidden name of a write in progress, or of a crash's remains."""
    return _REMAINS.fullmatch(name) is not None


def is_at(descriptor: int, path: str | Path) -> bool:
    """Return whether an open file is still at ``path``: neither removed nor replaced."""
    try:
        found, opened = os.lstat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


@contextlib.contextmanager
def _explained(path: str | Path, in_body: bool = False) -> Iterator[None]:
    """Turn an OSError into a WriteError; ``in_body``: not one that names another file, or comes from reading."""
    try:
        yield
    except WriteError as error:
        if in_body and _is_hidden(Path(error.filename)):  # the user knows the folder by its final name
            raise WriteError(error.errno or 0, str(path), error.strerror or "", error.remedy) from error
        raise
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else None
        foreign = error.errno not in _NO_FILE if place is None else not _is_beside(place, Path(path))
        if in_body and foreign:
            raise
        raise write_error(error.errno or 0, path, error.strerror) from error


def _is_beside(place: Path, path: Path) -> bool:
    """Return whether an error at ``place`` is one of writing ``path``: there, above, or in its hidden folder."""
    return place == path or place in path.parents or _is_hidden(place)


def _is_hidden(place: Path) -> bool:
    return any(is_remains(part) for part in place.parts)


@contextlib.contextmanager
def _new_name(path: Path, mode: int) -> Iterator[int]:
    """Yield a new locked file beside ``path``, which it replaces at the end; removed after an exception."""
    earlier = _refuse_other_kind(path, stat.S_ISREG, "file")
    _clean(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    hidden, descriptor = _lock_new(path, lambda hidden: os.close(os.open(hidden, flags, mode)), os.O_WRONLY)
    try:
        os.fchmod(descriptor, permissions(earlier or os.fstat(descriptor)))
        yield descriptor
        _force(descriptor, hidden)
        os.replace(hidden, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)
        raise
    finally:
        os.close(descriptor)


def _lock_new(path: Path, make: Any, flags: int = os.O_RDONLY) -> tuple[Path, int]:
    """Make something under a new hidden name and lock it, so that :func:`_clean` of another process leaves it."""
    while True:
        hidden = _hidden(path, "new")
        make(hidden)
        descriptor = os.open(hidden, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        _try_lock(descriptor, fcntl.LOCK_EX)
        if is_at(descriptor, hidden):
            return hidden, descriptor
        os.close(descriptor)  # cleaned away before it was locked


def _put_in_place(folder: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(folder, path)
    elif not _exchange(folder, path):
        old = _hidden(path, "old")
        os.rename(path, old)
        try:
            os.rename(folder, path)
        except BaseException:
            os.rename(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(4)}.{kind}")


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])


def _clean(path: Path) -> None:
    """Remove what dead writers of ``path`` left; put an old folder back that was archived for a new one."""
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return
    for name in names:
        match = _REMAINS.fullmatch(name)
        if match is not None and match["name"] == _stem(path):
            with contextlib.suppress(OSError):  # it must not hinder the write
                _clean_one(path.with_name(name), path)


def _clean_one(remains: Path, path: Path) -> None:
    found = os.lstat(remains)
    is_folder = stat.S_ISDIR(found.st_mode)
    if found.st_uid != os.geteuid() or not (is_folder or stat.S_ISREG(found.st_mode)):
        return
    descriptor = os.open(remains, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not _try_lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return
        if remains.name.endswith(".old") and not os.path.lexists(path):
            os.rename(remains, path)
        elif is_folder:
            shutil.rmtree(remains)
        else:
            os.unlink(remains)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    """Return whether the lock is held now; without locks, live writers look like dead ones."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def _refuse_other_kind(path: Path, is_kind: Any, kind: str) -> os.stat_result | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise write_error(errno.ELOOP, path)
    if not is_kind(found.st_mode):
        raise write_error(errno.EEXIST, path, f"what lies there is not a {kind}", _ANOTHER_PLACE)
    return found


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        _force(descriptor, path)
    finally:
        os.close(descriptor)


def _force(descriptor: int, path: str | Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    umask = os.umask(0)  # it cannot be read without being set
    os.umask(umask)
    return umask
