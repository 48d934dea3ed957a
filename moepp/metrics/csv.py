"""metrics.csv: the records as a table, for spreadsheets. metrics.jsonl stays the source."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.errors import MoeppError
from moepp.io import files
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
    has no column yet, and when a run starts or rewinds.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path, self._source = run_dir / FILE, run_dir / "metrics.jsonl"
        self._columns: list[str] = []
        self._write_anew()

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Append a row."""
        if not record.keys() <= set(self._columns):
            self._write_anew(record)  # this record is among those of metrics.jsonl
            return
        with files.open_append(self._path) as stream:
            stream.write(_rows(self._columns, [{"step": step, "tokens": tokens, **record}]))

    def rewind(self, step: int) -> None:
        """Write what metrics.jsonl, which was rewound before, still has."""
        self._write_anew()

    def close(self) -> None:
        """Do nothing: nothing is held back."""

    def _write_anew(self, record: Mapping[str, float] | None = None) -> None:
        records = read_records(self._source) if self._source.exists() else []
        columns = dict.fromkeys(("step", "tokens", *self._columns, *(record or ())))
        for one in records:
            columns |= dict.fromkeys(one)
        self._columns = list(columns)
        header = dict(zip(self._columns, self._columns, strict=True))
        files.write_whole(self._path, _rows(self._columns, [header, *records]).decode())


def _rows(columns: list[str], records: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerows({name: _cell(value) for name, value in record.items()} for record in records)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a value, or nothing where there is no number: metrics.jsonl has no NaN and no infinity either."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
