"""Log files, one per rank, and log lines on the console of rank 0."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from moepp.errors import RunError, WriteError
from moepp.io import files
from moepp.io.untrusted import terminal_text

_LOGGER = "moepp"


class _Formatter(logging.Formatter):
    """Lines whose text cannot command a terminal, wherever it came from; times are UTC, with a Z.

    Hosts of a run, and whoever looks at it, may have other time zones.
    """

    converter = time.gmtime
    default_msec_format = "%s,%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        return terminal_text(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Writes to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if not getattr(record, "to_console", True):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _FileHandler(logging.Handler):
    """Appends to a file of its own; what cannot be written is lost with a word on the console, and ends nothing."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            WriteError: it cannot be written, is a link, or another user's.
        """
        super().__init__()
        self._path = path
        self._file = files.open_append(path)
        self._has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
            if not files.is_at(self._file.fileno(), self._path):  # removed, or moved by a log rotation
                file = files.open_append(self._path)
                self._file.close()
                self._file = file
            while line:
                line = line[self._file.write(line) :]
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(f"cannot write {self._path} now, its lines are lost: {error.strerror}", file=sys.stderr)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._file.close()
        super().close()


def setup_logging(run_dir: Path, rank: int) -> None:
    """Send the logger ``moepp`` to ``<run_dir>/log/rank-<rank>.txt``, and to stderr: all on rank 0, warnings elsewhere.

    A second call replaces the first; :func:`close_logging` ends it. A restarted run appends to its files.

    Raises:
        RunError: the file cannot be written.
    """
    path = run_dir / "log" / f"rank-{rank}.txt"
    try:
        files.make_folder(run_dir)
        files.make_own_folder(path.parent)
        file_handler = _FileHandler(path)
    except WriteError as error:
        raise RunError(str(error)) from error
    close_logging()
    file_handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console_handler = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console_handler.setFormatter(_Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the root logger belongs to whoever embeds moepp
    logger.addHandler(file_handler)
    logger.addHandler(console_handler)


def close_logging() -> None:
    """Close the files and hand the logger ``moepp`` back as it was."""
    logger = logging.getLogger(_LOGGER)
    for handler in list(logger.handlers):
        if isinstance(handler, _ConsoleHandler | _FileHandler):
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
