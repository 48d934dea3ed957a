"""Where compiled libraries are kept from process to process: whole, and touched by nobody else.

A file is the library with a seal behind it, the SHA-256 of its key and its content. So a file that was cut, damaged or
taken for another is noticed before any of it is executed. It is executed from a copy in memory, which nothing that
happens to the file can change.

The folder and its files must be the user's own, no links, and closed to the writing of others.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moepp.io.files import open_own, write_whole
from moepp.io.locks import NoLocksError, try_lock

logger = logging.getLogger("moepp")

_SEAL_BYTES = hashlib.sha256().digest_size
_MOST_BYTES = 2**26  # far above any library of ours
_LOCK_SECONDS, _POLL_SECONDS = 600.0, 0.1  # a build takes some 10 seconds, several times that on a busy machine
_SCRATCH = re.compile(r"build-(?P<host>.*)-[^-]*")
_ABANDONED_SECONDS = 3600  # after which another host's scratch folder cannot be in use


class CacheError(Exception):
    """Why no folder can serve as cache, in one line."""


@dataclass(frozen=True)
class Cache:
    """A folder that was found safe.

    Attributes:
        remarks: why better places were left out.
    """

    folder: Path
    remarks: tuple[str, ...] = ()

    def read(self, name: str, key: bytes) -> bytes | None:
        """Return the library of that name and key, or None; remove a damaged or unsafe one with a warning."""
        try:
            return _read_sealed(self.folder / name, key)
        except FileNotFoundError:
            return None
        except (OSError, CacheError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("cached kernels %s are built anew: %s", self.folder / name, reason)
            self.remove(name)
            return None

    def write(self, name: str, key: bytes, content: bytes) -> None:
        """Keep a library, forced to the disk.

        Raises:
            WriteError: it cannot be written.
        """
        write_whole(self.folder / name, content + _seal(key, content), mode=0o600)

    def remove(self, name: str) -> None:
        """Take a file, link or folder of that name away, if there is one and it can be done."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def free_bytes(self) -> int:
        """Return the free bytes on the folder's file system for this user, as far as known."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Yield whether the build lock is held; one process builds at a time where the file system has locks.

        Holding it, what killed builders left is removed.
        """
        descriptor = open_own(self.folder / "lock", os.O_RDWR, mode=0o600)
        try:
            if held := _wait_for_lock(descriptor):
                self._remove_abandoned()
            yield held
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a folder for this process's build and remove it afterwards."""
        with tempfile.TemporaryDirectory(
            dir=self.folder, prefix=f"build-{socket.gethostname()}-", ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob("build-*"):
            match = _SCRATCH.fullmatch(path.name)
            with contextlib.suppress(OSError):
                old = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
                if old or (match is not None and match["host"] == socket.gethostname()):
                    self.remove(path.name)


def find_cache() -> Cache:
    """Return the user's cache folder, or one in the temporary folder.

    Raises:
        CacheError: neither can be used.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    remarks: list[str] = []
    places = [Path(root, "moepp")]
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files either
        places.append(Path(tempfile.gettempdir(), f"moepp-{os.geteuid()}"))
    for folder in places:
        if reason := _reason_against(folder):
            remarks.append(f"{folder} {reason}")
        else:
            return Cache(folder, tuple(remarks))
    raise CacheError(f"no folder to keep them in: {'; '.join(remarks)}; set XDG_CACHE_HOME to a folder of your own")


def _reason_against(folder: Path) -> str | None:
    """Return why a folder (made if missing) cannot be used; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = os.lstat(folder)
    except FileExistsError:
        return "is not a folder"
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "is a link"
    if reason := _unsafe(found):
        return reason
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"lies in {above}, where everybody can replace it"
    return None if os.access(folder, os.W_OK | os.X_OK) else "is not writable"


def _unsafe(found: os.stat_result) -> str | None:
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o}; chmod go-w prevents that)"
    return None


def _read_sealed(path: Path, key: bytes) -> bytes:
    # O_NONBLOCK: opening a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError("not a regular file")
        if reason := _unsafe(found):
            raise CacheError(f"the file {reason}")
        sealed = stream.read(_MOST_BYTES)
    content, seal = sealed[:-_SEAL_BYTES], sealed[-_SEAL_BYTES:]
    if seal != _seal(key, content):
        raise CacheError("the file is damaged")
    return content


def _seal(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(key + hashlib.sha256(content).digest()).digest()


def _wait_for_lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            if try_lock(descriptor):
                return True
        except (NoLocksError, OSError):
            return False
        time.sleep(_POLL_SECONDS)
    return False


def open_library(content: bytes, path: Path) -> ctypes.CDLL:
    """Load a library from memory; where the system has no files in memory, from ``path``, which holds the same.

    Raises:
        OSError: it cannot be loaded.
    """
    try:
        descriptor = os.memfd_create("moepp-kernels", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        # Left open: the loader takes a library of the same name, and so of the same number, for one it has already.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    return ctypes.CDLL(str(path))  # a system that executes nothing from memory
