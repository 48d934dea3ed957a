"""Several runs in one table: what differs between them, what they cost and what came out."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.analysis.charts import tokens_per_second
from moepp.analysis.runs import Run, compared_keys, setting
from moepp.errors import ConfigError
from moepp.io import files

# Column -> (heading with its unit, pattern of a number, whether small is good)
COLUMNS = {
    "tokens": ("tokens", "{:,.0f}", False),
    "flops": ("operations", "{:.3e}", True),
    "train_loss": ("training loss, nats", "{:.4f}", True),
    "eval_loss": ("validation loss, nats", "{:.4f}", True),
    "best_eval_loss": ("lowest validation loss", "{:.4f}", True),
    "ffn_per_token": ("FFN experts per token", "{:.3f}", True),
    "tokens_per_second": ("tokens/s, median", "{:,.0f}", False),
    "bytes_per_step": ("bytes sent per step", "{:,.0f}", True),
    "bytes_saved": ("traffic saved", "{:.1%}", False),
}
FORMATS = (".csv", ".parquet")


def row_of(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """One run: its name, its settings that differ, and :data:`COLUMNS`; None where a number is not known."""
    best = run.series("eval/loss").values
    sent, vanilla = run.bytes_sent or (None, None)
    return {
        "run": run.name,
        **dict(zip(keys, setting(run, keys), strict=True)),
        "tokens": run.tokens,
        "flops": run.flops.last,
        "train_loss": run.series("train/loss").last,
        "eval_loss": run.series("eval/loss").last,
        "best_eval_loss": min(best) if best else None,
        "ffn_per_token": run.series("routing/ffn_per_token").last,
        "tokens_per_second": tokens_per_second(run),
        "bytes_per_step": sent,
        "bytes_saved": 1 - sent / vanilla if sent is not None and vanilla else None,
    }


def compare(runs: Sequence[Run], sort: str = "eval_loss") -> list[dict[str, Any]]:
    """Return a row per run, the best by ``sort`` first, those without that number last.

    Raises:
        ConfigError: ``sort`` is no column.
    """
    keys = compared_keys(runs)
    choices = ["run", *keys, *COLUMNS]
    if sort not in choices:
        raise ConfigError(f"--sort={sort} is no column; choose one of {', '.join(choices)}")
    rows = [row_of(run, keys) for run in runs]
    if sort not in COLUMNS:
        return sorted(rows, key=lambda row: str(row[sort]))
    sign = 1 if COLUMNS[sort][2] else -1
    return sorted(rows, key=lambda row: (row[sort] is None, sign * (row[sort] or 0.0), row["run"]))


def group_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Merge runs that differ in nothing but their seed, as one row of means and spreads each; [] without siblings.

    The spread is the sample standard deviation over seeds.
    """
    keys = compared_keys(runs)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(setting(run, keys), []).append(run)
    if all(len(members) == 1 for members in groups.values()):
        return []
    found = []
    for values, members in groups.items():
        rows = [row_of(run, keys) for run in members]
        row: dict[str, Any] = {"runs": ", ".join(run.name for run in members), "seeds": len(members)}
        row |= dict(zip(keys, values, strict=True))
        for column in ("eval_loss", "train_loss", "ffn_per_token", "tokens_per_second"):
            numbers = [r[column] for r in rows if r[column] is not None]
            row[column] = statistics.fmean(numbers) if numbers else None
            row[f"{column}_spread"] = statistics.stdev(numbers) if len(numbers) > 1 else None
        found.append(row)
    return found


def text_of(column: str, value: Any) -> str:
    """Return a cell as people read it."""
    if value is None:
        return "-"
    name = column.removesuffix("_spread")
    return COLUMNS[name][1].format(value) if name in COLUMNS else str(value)


def heading_of(column: str) -> str:
    """Return a column's heading, with its unit."""
    name = column.removesuffix("_spread")
    text = COLUMNS[name][0] if name in COLUMNS else name
    return f"± {text}" if column.endswith("_spread") else text


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as CSV or parquet, by the name's end.

    Raises:
        ConfigError: another end.
        WriteError: the file cannot be written.
    """
    if path.suffix == ".csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        files.write_whole(path, stream.getvalue())
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
        files.write_whole(path, buffer.getvalue())
    else:
        raise ConfigError(f"--table={path} ends in {path.suffix or 'nothing'}; end it in {' or '.join(FORMATS)}")
