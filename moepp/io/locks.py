"""Exclusive locks on open files; the kernel frees one when its descriptor is closed, however the process ends."""

from __future__ import annotations

import errno
import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class NoLocksError(Exception):
    """The file system has no locks; the text is the system's reason."""


def try_lock(descriptor: int) -> bool:
    """Return whether this process now holds the file's lock; never wait.

    Raises:
        NoLocksError: the file system has no locks.
        OSError: any other failure.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(error.strerror) from error
        raise
    return True
