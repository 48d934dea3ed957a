"""metrics.csv: the records as a table, for spreadsheets. metrics.jsonl stays the source."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moepp.errors import MoeppError, RunError
from moepp.io import files
from moepp.io.cells import plain_cell
from moepp.metrics.jsonl import read_records

logger = logging.getLogger(__name__)

FILE = "metrics.csv"


def retire(run_dir: Path, step: int) -> None:
    """Give the table of an earlier start, which this one does not write on, a name that says where it ends.

    ``metrics.csv`` would look whole and end early; what it lacks is in metrics.jsonl. Nothing where there is none. What
    cannot be moved is said, and ends nothing.

    Args:
        run_dir: the run's directory, whose metrics.jsonl ends at ``step``.
        step: optimizer steps done before this start.
    """
    table = run_dir / FILE
    if not table.is_file():
        return
    try:
        if step == 0:  # none of its rows is of this run: metrics.jsonl.<n> has them
            table.unlink()
            return
        CsvSink(run_dir)  # anew, without the rows that will be computed again
        target = run_dir / f"metrics.until-step-{step}.csv"
        files.move(table, target, replace=True)
        logger.info("logging.csv=false: %s is now %s, for it ends there; metrics.jsonl goes on", FILE, target.name)
    except (MoeppError, OSError) as error:
        logger.warning("%s ends before this start, and stays: %s", FILE, error)


class CsvSink:
    """Writes ``<run_dir>/metrics.csv``: a row per record, a column per metric, empty where a record has none.

    It must take each record after metrics.jsonl has: from there the table is written anew when a metric appears that
    has no column yet, when a run starts or rewinds, and after a failure. What cannot be written, as on a full disk, is
    said once and leaves whole rows; it is tried again after 1, 2, 4 ... records, and at the end.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path, self._source = run_dir / FILE, run_dir / "metrics.jsonl"
        self._columns: list[str] = []
        self._size = 0  # of the table as it was written; another size: somebody else has changed it
        self._failures = self._waits = 0  # in a row, and records until the next attempt
        self._write_anew()

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Append a row."""
        if self._failures and self._waits > 0:
            self._waits -= 1
        elif self._failures or not record.keys() <= set(self._columns):
            self._try(lambda: self._write_anew(record, step))
        else:
            self._try(lambda: self._append({"step": step, "tokens": tokens, **record}))

    def rewind(self, step: int) -> None:
        """Write what metrics.jsonl, which was rewound before, still has."""
        self._try(self._write_anew)

    def close(self) -> None:
        """Write what is missing; metrics.jsonl has it by now."""
        if self._failures:
            self._try(self._write_anew)
        if self._failures:
            logger.warning("%s lacks rows; the next start, and metrics.jsonl, have them", self._path)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._failures = 0
        except (MoeppError, OSError) as error:
            if not self._failures:
                logger.warning("%s is not written now, but later anew: %s", self._path, error)
            self._failures += 1
            self._waits = 2 ** min(self._failures - 1, 20) - 1

    def _append(self, record: Mapping[str, Any]) -> None:
        row = _rows(self._columns, [dict(record)])
        with files.open_append(self._path) as stream:
            if os.fstat(stream.fileno()).st_size != self._size:  # removed, or cut short
                self._write_anew(record, record["step"])
                return
            try:
                while row:
                    row = row[stream.write(row) :]
                self._size = os.fstat(stream.fileno()).st_size
            except OSError:
                os.ftruncate(stream.fileno(), self._size)  # no half row, to which the next would be glued
                raise

    def _write_anew(self, record: Mapping[str, float] | None = None, step: int = 0) -> None:
        records = read_records(self._source) if self._source.exists() else []
        if record and (not records or records[-1]["step"] != step or not record.keys() <= records[-1].keys()):
            raise RunError(
                f"{self._source} lacks the record of step {step} for now"
            )  # on a full disk it waits in memory
        columns = dict.fromkeys(("step", "tokens", *self._columns, *(record or ())))
        for one in records:
            columns |= dict.fromkeys(one)
        self._columns = list(columns)
        header = dict(zip(self._columns, self._columns, strict=True))
        content = _rows(self._columns, [header, *records])
        files.write_whole(self._path, content)
        self._size = len(content)


def _rows(columns: list[str], records: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerows({name: _cell(value) for name, value in record.items()} for record in records)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a value, or nothing where there is no number: metrics.jsonl has no NaN and no infinity either."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else plain_cell(value)
