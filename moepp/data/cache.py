"""A folder of dataset indices that runs share, also while they start: one builds at a time, the others wait."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence

import numpy as np

from moepp.data.indexed import IndexedFile
from moepp.errors import DataError, MoeppError, is_out_of_memory
from moepp.io.locks import NoLocksError, try_lock
from moepp.io.untrusted import printable
from moepp.io.write_errors import write_error

LOCK = ".lock"
LOCK_SECONDS = 300.0  # how long to wait for a run that builds; indices of a billion sequences take about a minute
RETRY_SECONDS = 0.1
NEARLY_FULL_BYTES = 16 << 20  # less room than this explains a write that failed without saying why


def cache_folder(files: Sequence[IndexedFile], cache_dir: str) -> str:
    """Return the folder for the indices of some files.

    Megatron's cache key knows the path but not the content, so data prepared again under the same name would be read
    through stale indices: hence a folder per content.
    """
    content = hashlib.blake2b("".join(file.fingerprint() for file in files).encode(), digest_size=8).hexdigest()
    return os.path.join(os.path.abspath(cache_dir), content)


@contextlib.contextmanager
def building(folder: str, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the folder's lock, wait for it if need be, and remove what a killed run left half written.

    Files that are whole stay: no run removes what another one reads, and none writes while another one does.

    Raises:
        DataError: another run holds the lock for too long, or the file system has no locks.
        WriteError: the folder cannot be written to.
    """
    descriptor = -1
    try:
        os.makedirs(folder, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(os.path.join(folder, LOCK), flags, 0o666)
        _wait_for_lock(descriptor, folder, time.monotonic() + wait_seconds)
        _remove_damaged(folder)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, MoeppError):
            raise
        raise write_error(error.errno, folder) from error
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    try:
        yield
    finally:
        os.close(descriptor)  # which frees the lock


def _wait_for_lock(descriptor: int, folder: str, deadline: float) -> None:
    try:
        while not try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise DataError(
                    f"another run has been building the dataset indices in {folder} for long; wait for it, or set "
                    "data.cache_dir elsewhere"
                )
            time.sleep(RETRY_SECONDS)
    except NoLocksError as error:
        raise DataError(
            f"{folder} lies on a file system without file locks ({error}); mount it with flock, or set "
            "data.cache_dir elsewhere"
        ) from error


def _remove_damaged(folder: str) -> None:
    """Remove indices that a killed run left half written: Megatron takes them for whole."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            os.remove(path)


def explained(error: Exception, folder: str) -> MoeppError:
    """Return what to tell the user about an error while the indices in ``folder`` were written or read.

    Megatron hides the system's error behind an Exception of its own.
    """
    if is_out_of_memory(error) or isinstance(error, OverflowError):
        return DataError(
            "the dataset indices of so many sequences do not fit into memory; lower train.steps, train.eval_batches or "
            "train.global_batch_size"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    free_bytes = shutil.disk_usage(folder).free if os.path.isdir(folder) else None
    if cause is None or cause.errno is None:
        if cause is not None and free_bytes is not None and free_bytes < NEARLY_FULL_BYTES:
            return write_error(errno.ENOSPC, folder)  # numpy does not pass on what the system said
        if cause is not None and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            return write_error(errno.EFBIG, folder)
        room = "" if free_bytes is None else f", {free_bytes / 1e6:,.0f} MB free there"
        return DataError(
            f"cannot use the dataset indices cached in {folder} ({printable(cause or error, 200)}{room}); delete that "
            "folder when no run uses it"
        )
    if cause.errno == errno.ENOMEM:
        return DataError(
            f"cannot map the dataset indices in {folder} into memory; raise vm.max_map_count, or train for fewer epochs"
        )
    return write_error(cause.errno, cause.filename if isinstance(cause.filename, str) else folder)
