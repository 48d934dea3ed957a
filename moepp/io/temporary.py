"""Temporary files, where the system may offer no place for them: a read-only container, a full /tmp."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moepp.io.write_errors import write_error

REMEDY = "set TMPDIR to a folder that you may write to"


@contextlib.contextmanager
def temporary_folder(prefix: str = "moepp-") -> Iterator[Path]:
    """Yield an empty folder that is removed at the end.

    Raises:
        WriteError: there is no place for one.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise write_error(error.errno, "temporary files", error.strerror, REMEDY) from error
    with folder as name:
        yield Path(name)


def unnamed_file() -> IO[bytes] | None:
    """Return an empty file without a name, in memory where the system can do that; None: nowhere."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on this system
        return os.fdopen(os.memfd_create("moepp", os.MFD_CLOEXEC), "w+b")
    with contextlib.suppress(OSError):
        return tempfile.TemporaryFile()
    return None
