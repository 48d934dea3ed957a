"""routing.jsonl: what every layer's router did, one snapshot a line, for heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moepp.metrics.jsonl import MAX_VALUE, JsonlSink, parse_line, read_records, require_ascending
from moepp.metrics.routing import RoutingSnapshot

FILE = "routing.jsonl"
_MAX_VALUES = 1 << 22  # of one line


class RoutingSink:
    """Appends snapshots to ``<run_dir>/routing.jsonl``; other records are none of its business."""

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the file, without snapshots of steps after ``start_step``; errors as of :class:`JsonlSink`."""
        self._file = JsonlSink(run_dir / FILE, start_step, _parse)

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Do nothing."""

    def log_routing(self, snapshot: RoutingSnapshot) -> None:
        """Append one line."""
        self._file.write(_line(snapshot))

    def rewind(self, step: int) -> None:
        """Drop the snapshots of steps after ``step``."""
        self._file.rewind(step)

    def sync(self) -> None:
        """Force the snapshots to the disk."""
        self._file.sync()

    def close(self) -> None:
        """Write what is left; errors as of :class:`JsonlSink`."""
        self._file.close()


def read_routing(run_dir: Path) -> list[RoutingSnapshot]:
    """Return the snapshots of a run, oldest first; none where there is no file.

    Raises:
        RunError: the file is not what :class:`RoutingSink` writes.
    """
    path = run_dir / FILE
    lines = read_records(path, _parse) if path.exists() else []
    require_ascending(lines, path)
    return [_snapshot(line) for line in lines]


def _line(snapshot: RoutingSnapshot) -> dict[str, Any]:
    """Return plain lists, NaN as null."""
    return {
        "step": snapshot.step,
        "tokens": snapshot.tokens,
        "layers": list(snapshot.layers),
        "kinds": dict(snapshot.kinds),
        "share": _rounded(snapshot.share_LE),
        "per_layer": {name: _rounded(values_L) for name, values_L in snapshot.per_layer.items()},
        "gates": {name: _rounded(shares) for name, shares in snapshot.gates.items()},
    }


def _rounded(values: np.ndarray) -> list[Any]:
    """Six digits: all that a picture shows."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def _snapshot(line: Mapping[str, Any]) -> RoutingSnapshot:
    parts = ({name: _array(found) for name, found in line[part].items()} for part in ("per_layer", "gates"))
    return RoutingSnapshot(
        line["step"], line["tokens"], tuple(line["layers"]), dict(line["kinds"]), _array(line["share"]), *parts
    )


def _array(values: list[Any]) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)  # null becomes NaN


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line whose lists have the lengths that its layers (at least one) and experts ask for; None otherwise."""
    found = parse_line(line)
    if found is None or any(not isinstance(found.get(name), list) for name in ("layers", "share")):
        return None
    if any(not isinstance(found.get(name), dict) for name in ("kinds", "per_layer", "gates")):
        return None
    layers, kinds = found["layers"], found["kinds"]
    if not all(type(number) is int and 0 <= number < _MAX_VALUES for number in (*layers, *kinds.values())):
        return None
    if not layers or not kinds.get("ffn"):
        return None
    tables = [(found["share"], sum(kinds.values()))]
    for table in found["gates"].values():
        bins = len(table[0]) if isinstance(table, list) and table and isinstance(table[0], list) else 0
        tables.append((table, bins))
    is_whole = all(_is_table(table, len(layers), width) for table, width in tables)
    return found if is_whole and all(_is_row(row, len(layers)) for row in found["per_layer"].values()) else None


def _is_table(table: Any, rows: int, width: int) -> bool:
    return isinstance(table, list) and len(table) == rows and all(_is_row(row, width) for row in table)


def _is_row(row: Any, width: int) -> bool:
    return isinstance(row, list) and len(row) == width and all(x is None or _is_number(x) for x in row)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_VALUE < value < MAX_VALUE
