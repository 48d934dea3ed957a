"""Whose files and folders: those of other users are not written to. Who may read them."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from pathlib import Path

from moepp.io.write_errors import user_name, write_error

logger = logging.getLogger(__name__)

_warned: set[tuple[int, int]] = set()  # folders, by device and inode


def permissions(found: os.stat_result) -> int:
    """Return who may read, write and run a file: what its copies and later versions keep."""
    return stat.S_IMODE(found.st_mode) & 0o777


def require_own(path: str | Path, uid: int) -> None:
    """Refuse the file at ``path`` if ``uid``, its owner, is another user.

    Raises:
        WriteError: it is.
    """
    if not _is_own(uid, Path(path).parent):
        remedy = "write to a folder of your own, or have its owner do this"
        raise write_error(errno.EPERM, path, f"it belongs to {user_name(uid)}", remedy)


def require_safe_folder(path: str | Path) -> None:
    """Refuse a folder in which others can replace files, if it is another user's; warn once if it is one's own.

    A sticky bit, as /tmp has it, makes a folder safe: there everybody can remove only files of their own.

    Raises:
        WriteError: the folder of another user (root aside) that its group or everybody may write to.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise write_error(error.errno or 0, path) from error
    if not found.st_mode & 0o022 or found.st_mode & stat.S_ISVTX:
        return
    who = "everybody" if found.st_mode & 0o002 else "its group"
    if found.st_uid != 0 and not _is_own(found.st_uid, Path(path)):
        reason = f"it belongs to {user_name(found.st_uid)} and {who} may write to it"
        raise write_error(errno.EPERM, path, reason, "use a folder of your own, or run chmod go-w on it")
    if (found.st_dev, found.st_ino) not in _warned:
        _warned.add((found.st_dev, found.st_ino))
        logger.warning("%s may write to %s and so replace what lies there; chmod go-w prevents that", who, path)


def require_safe_place(place: Path, below: Path) -> None:
    """Refuse a place inside the folder ``below`` if a link leads there, or others can replace what lies on the way.

    Raises:
        WriteError: a link lies at the place or between the two, or see :func:`require_safe_folder`.
    """
    inner = [step for step in (place, *place.parents) if below in step.parents]
    for step in reversed(inner):
        if step.is_symlink():
            raise write_error(errno.ELOOP, step)
    for step in (below, *inner):
        if step.is_dir():
            require_safe_folder(step)


def _is_own(uid: int, folder: Path) -> bool:
    return uid == os.geteuid() or uid == _uid_of_new_files(folder)


def _uid_of_new_files(folder: Path) -> int:
    """Return the owner of new files here: network file systems may give root's, or all, to another user."""
    probe = folder / f".owner.{secrets.token_hex(4)}.new"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise write_error(error.errno or 0, probe) from error
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(probe)
