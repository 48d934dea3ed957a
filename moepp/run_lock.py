"""An exclusive lock on a run directory, held as long as its process lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from moepp.errors import RunError

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

    def __init__(self, fd: int) -> None:
        self._fd = fd
        _held.add(fd)

    @classmethod
    def acquire(cls, path: Path, wait_seconds: float = 0.0) -> RunLock:
        """Lock ``path`` (created if missing), if need be after waiting for its holder, who may be about to end.

        Raises:
            RunError: another process holds it, or the file system has no locks.
            OSError: the file cannot be created.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_seconds
        try:
            if wait_seconds and not _try_lock(fd):
                print(f"{path.parent} is in use by {_holder(fd)}; waiting {wait_seconds:g} s for it", file=sys.stderr)
            while not _try_lock(fd):
                if time.monotonic() >= deadline:
                    holder = _holder(fd)
                    os.close(fd)
                    raise RunError(
                        f"run.dir={path.parent} is in use by {holder}; wait for it, stop it, or choose another run.name"
                    )
                time.sleep(_RETRY_SECONDS)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise RunError(
                    f"run.dir={path.parent} lies on a file system without file locks ({error.strerror}); "
                    "mount it with flock, or set run.dir elsewhere"
                ) from error
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(fd)

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        if self._fd in _held:
            _held.remove(self._fd)
            os.close(self._fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> str:
    return os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
