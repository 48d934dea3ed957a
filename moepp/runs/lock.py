"""An exclusive lock on a run directory, held until its process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from moepp.errors import RunError
from moepp.io import files
from moepp.io.locks import NoLocksError, try_lock

_RETRY_SECONDS = 0.2

_held: set[int] = set()  # file descriptors of the locks that this process holds


def _close_in_child() -> None:
    # A forked child (a data worker, say) shares the lock: without this, one that outlives a killed run would keep
    # the directory locked. Closing the child's copy leaves the parent's lock alone.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """A held lock; the kernel frees it when the process ends, however it ends."""

    def __init__(self, path: Path, fd: int, text: bytes) -> None:
        self._path = path
        self._fd = fd
        self._text = text  # a file system may not pass locks on to other hosts: who overwrites this has the file too
        self._mutex = threading.Lock()  # checkpoints are written in the background
        _held.add(fd)

    @classmethod
    def acquire(cls, path: Path, wait_seconds: float = 0.0) -> RunLock:
        """Lock ``path`` (created if missing), if need be after waiting for its holder, who may be about to end.

        Raises:
            RunError: another process holds it, or the file system has no locks.
            WriteError: the file cannot be created, is a link, or another user's.
        """
        deadline = time.monotonic() + wait_seconds
        has_told = False
        while True:
            fd = files.open_own(path, os.O_RDWR)
            try:
                _require_single_name(fd, path)
                # Also that it still lies there: its holder may have removed it between opening and locking.
                if _try_lock(fd, path) and files.is_at(fd, path):
                    return cls(path, fd, _sign(fd))
                holder = _holder(fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            if time.monotonic() >= deadline:
                raise RunError(
                    f"run.dir={path.parent} is in use by {holder}; wait for it, stop it, or choose another run.name"
                )
            if not has_told:
                print(f"{path.parent} is in use by {holder}; waiting {wait_seconds:g} s for it", file=sys.stderr)
                has_told = True
            time.sleep(_RETRY_SECONDS)

    def check(self) -> None:
        """Make sure that the lock is still this one's; a lock file that was removed is made again.

        Raises:
            RunError: another process has it.
        """
        with self._mutex:
            if self._fd not in _held:
                return
            if files.is_at(self._fd, self._path):
                if os.pread(self._fd, 200, 0) != self._text:
                    raise _taken(self._path, _holder(self._fd))
            elif os.path.lexists(self._path):
                raise _taken(self._path, _holder_at(self._path))
            else:
                self._make_again()

    def _make_again(self) -> None:
        flags = os.O_RDWR | os.O_EXCL
        try:
            fd = files.open_own(self._path, flags)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise _taken(self._path, _holder_at(self._path)) from error
            raise
        try:
            if not _try_lock(fd, self._path) or not files.is_at(fd, self._path):
                raise _taken(self._path, _holder(fd))
            self._text = _sign(fd)
        except BaseException:
            os.close(fd)
            raise
        _held.add(fd)
        _held.remove(self._fd)
        os.close(self._fd)
        self._fd = fd

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        with self._mutex:
            if self._fd in _held:
                _held.remove(self._fd)
                os.close(self._fd)


def _require_single_name(fd: int, path: Path) -> None:
    """Refuse a planted second name of another file: what is locked is overwritten."""
    if os.fstat(fd).st_nlink > 1:
        raise RunError(f"{path} is a hard link to another file, which locking would overwrite; remove it")


def _try_lock(fd: int, path: Path) -> bool:
    try:
        return try_lock(fd)
    except NoLocksError as error:
        raise RunError(
            f"run.dir={path.parent} lies on a file system without file locks ({error}); "
            "mount it with flock, or set run.dir elsewhere"
        ) from error


def _sign(fd: int) -> bytes:
    """Write who holds the lock; the second line tells this holder from any other of the same name."""
    text = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n".encode()
    os.ftruncate(fd, 0)
    os.pwrite(fd, text, 0)
    return text


def _taken(path: Path, holder: str) -> RunError:
    return RunError(
        f"run.dir={path.parent} was taken over by {holder} while this run used it ({path.name} is another's now); this "
        "run stops and leaves the directory alone; start it again with another run.name, or stop the other one"
    )


def _holder_at(path: Path) -> str:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _holder(fd)
        finally:
            os.close(fd)
    return "another process"


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode(errors="replace")
    name = text.partition("\n")[0].strip()
    return name if name and name.isprintable() else "another process"
