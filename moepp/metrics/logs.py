"""Log files, one per rank, and log lines on the console of rank 0."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from moepp.errors import RunError

_LOGGER = "moepp"


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


def setup_logging(run_dir: Path, rank: int) -> None:
    """Send the logger ``moepp`` to ``<run_dir>/log/rank-<rank>.txt``, and to stderr: all on rank 0, warnings elsewhere.

    A second call replaces the first; :func:`close_logging` ends it. A restarted run appends to its files.

    Raises:
        RunError: the file cannot be written.
    """
    path = run_dir / "log" / f"rank-{rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; set another run.dir") from error
    close_logging()
    file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console_handler = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console_handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the root logger belongs to whoever embeds moepp
    logger.addHandler(file_handler)
    logger.addHandler(console_handler)


def close_logging() -> None:
    """Close the files and hand the logger ``moepp`` back as it was."""
    logger = logging.getLogger(_LOGGER)
    for handler in list(logger.handlers):
        if isinstance(handler, _ConsoleHandler | logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
