"""Results as records (for ``--json``) and as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp.io import files

Record = dict[str, Any]


def format_table(records: Sequence[Record], columns: Sequence[str] | None = None) -> str:
    """Return text with aligned columns; numbers have three decimals, absent values are a dash."""
    if not records:
        return "(nothing)"
    names = list(columns) if columns else list(dict.fromkeys(name for record in records for name in record))
    cells = [[_cell(record.get(name)) for name in names] for record in records]
    widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
    numeric = [all(_is_number(record.get(name)) for record in records) for name in names]
    lines = []
    for row in [names, *cells]:
        parts = [text.rjust(w) if n else text.ljust(w) for text, w, n in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_json(path: Path, benchmark: str, settings: Record, tables: dict[str, list[Record]]) -> None:
    """One JSON object: the benchmark's name, its settings and the machine, and its tables as lists of records.

    Raises:
        WriteError: the file cannot be written.
    """
    files.write_whole(
        path, json.dumps({"benchmark": benchmark, "settings": settings, "tables": tables}, indent=1) + "\n"
    )
