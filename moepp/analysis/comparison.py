"""Several runs in one table: what differs between them, what they cost and what came out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.analysis.charts import tokens_per_second
from moepp.analysis.curves import group_runs, mean_and_spread
from moepp.analysis.parquet import write_parquet
from moepp.analysis.runs import Run, compared_keys, setting
from moepp.errors import ConfigError
from moepp.io import files

# Column -> (heading with its unit, pattern of a number, whether small is good)
COLUMNS = {
    "tokens": ("tokens", "{:,.0f}", False),
    "flops": ("operations", "{:.3e}", True),
    "expert_flops": ("operations of FFN experts", "{:.3e}", True),
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
        "expert_flops": run.expert_flops.last,
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
    keys, groups = compared_keys(runs), group_runs(runs)
    if all(len(group.runs) == 1 for group in groups):
        return []
    found = []
    for group in groups:
        rows = [row_of(run, keys) for run in group.runs]
        row: dict[str, Any] = {"setting": group.label, "runs": len(rows)}
        row |= dict(zip(keys, setting(group.runs[0], keys), strict=True))
        for column in ("eval_loss", "train_loss", "ffn_per_token", "tokens_per_second"):
            numbers = [r[column] for r in rows if r[column] is not None]
            mean, spread = mean_and_spread(numbers) if numbers else (None, None)
            row |= {column: mean, f"{column}_spread": spread}
        found.append(row)
    return found


def text_of(column: str, value: Any) -> str:
    """Return a cell as people read it."""
    if value is None:
        return "-"
    if column.startswith("loss_at_equal_"):
        return f"{value:.4f}" if column.endswith("_error") else f"{value:+.4f}"
    if column.startswith("ratio_"):
        return f"{value:.3f}"
    name = column.removesuffix("_spread")
    return COLUMNS[name][1].format(value) if name in COLUMNS else str(value)


def heading_of(column: str) -> str:
    """Return a column's heading, with its unit."""
    if column.startswith("loss_at_equal_"):
        what = column.removeprefix("loss_at_equal_").removesuffix("_error").replace("_", " ")
        return f"± at equal {what}" if column.endswith("_error") else f"loss at equal {what}, nats"
    if column.startswith("ratio_"):
        return f"{column.removeprefix('ratio_').replace('_', ' ')}, times"
    name = column.removesuffix("_spread")
    text = COLUMNS[name][0] if name in COLUMNS else name
    return f"± {text}" if column.endswith("_spread") else text


def is_number(column: str) -> bool:
    """Whether a column holds numbers."""
    return (
        column.removesuffix("_spread") in COLUMNS or column.startswith(("loss_at_equal_", "ratio_")) or column == "runs"
    )


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
        write_parquet(path, rows)
    else:
        raise ConfigError(f"--table={path} ends in {path.suffix or 'nothing'}; end it in {' or '.join(FORMATS)}")
