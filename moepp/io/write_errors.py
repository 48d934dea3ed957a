"""What to do about a write that failed: the remedy follows from what the system said."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from moepp.errors import WriteError


def write_error(
    number: int | None, path: str | Path, reason: str | None = None, remedy: str | None = None
) -> WriteError:
    """Return the error for a failed write of ``path``: reason and remedy as given, or else as the error number says.

    A full disk is told from a lack of permission, and so on: each needs another remedy.
    """
    if remedy is None:
        reason, remedy = _usual(number or 0, Path(path), reason)
    return WriteError(number or 0, str(path), reason or os.strerror(number or 0), remedy)


def _usual(number: int, path: Path, reason: str | None) -> tuple[str, str]:
    """Return the reason and remedy of a system error in writing ``path``."""
    reason = reason or os.strerror(number)
    folder = next((place for place in (path.absolute(), *path.absolute().parents) if os.path.isdir(place)), Path("/"))
    if number == errno.ENOSPC:
        return _describe_full(folder)
    if number in (errno.EEXIST, errno.ENOTDIR):
        blocker = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p) and not p.is_dir()), path)
        return f"{blocker} is not a folder", "remove it, or choose another place"
    usual = {
        errno.EDQUOT: ("your disk quota is used up", f"remove files of yours on the file system of {folder}"),
        errno.EFBIG: ("the file is larger than allowed", "raise the limit (ulimit -f), or use another file system"),
        errno.EACCES: (_describe_denial(path), f"get permission to write in {folder}, or choose another place"),
        errno.EPERM: ("operation not permitted", f"get permission to write in {folder}, or choose another place"),
        errno.EROFS: ("the file system is mounted read-only", "choose another place, or have it mounted for writing"),
        errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
        errno.ELOOP: ("a symbolic link lies there, which is not followed", "remove it, or name what it leads to"),
        errno.EISDIR: ("a folder lies there", "remove it, or choose another name"),
        errno.ENOENT: _describe_absence(path, folder),
        errno.EBUSY: ("it is in use", "choose another place: a mount point cannot be replaced"),
        errno.ENXIO: ("what lies there is not a regular file", "remove it"),
        errno.EIO: ("the disk reports an error", "check the disk, or choose another place"),
        errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    }
    return usual.get(number, (reason, "remove the cause, or choose another place"))


def _describe_full(folder: Path) -> tuple[str, str]:
    mount = next(place for place in (folder, *folder.parents) if os.path.ismount(place))
    space = os.statvfs(folder)
    if space.f_files and not space.f_favail:
        return (
            f"the file system at {mount} holds as many files as it can",
            "remove files there, or choose another place",
        )
    free = space.f_bavail * space.f_frsize / 1e6
    return f"the disk is full ({free:.1f} MB free at {mount})", f"free space at {mount}, or choose another place"


def _describe_absence(path: Path, folder: Path) -> tuple[str, str]:
    if folder == path.absolute().parent:  # as /proc and others that the system makes up
        return f"{folder} takes no new files", "choose another place"
    return "its folder does not exist", f"make it, or choose another place ({folder} exists)"


def _describe_denial(path: Path) -> str:
    try:
        uid = os.lstat(path).st_uid
    except OSError:
        return "permission denied"
    return "permission denied" if uid == os.geteuid() else f"permission denied, it belongs to {user_name(uid)}"


def user_name(uid: int) -> str:
    """Return a user as messages name one."""
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
