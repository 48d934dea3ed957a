"""Several runs in one table: what differs between them, what they cost and what came out."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.analysis.charts import tokens_per_second
from moepp.analysis.curves import group_runs, mean_and_spread
from moepp.analysis.figures import shorten
from moepp.analysis.losses import benchmarks, compared_loss, validation_sets
from moepp.analysis.runs import Run, compared_keys, setting
from moepp.errors import ConfigError
from moepp.io.cells import plain_cell
from moepp.io.tables import parquet_bytes
from moepp.io.untrusted import printable

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
_LOSSES = ("eval_loss", "best_eval_loss")
_TOKENS = {"fewest_tokens": "fewest tokens", "most_tokens": "most tokens"}
_HEADINGS = _TOKENS | {"also_differs_in": "also differs in"}
_FIRST = ("eval_loss", "tokens")  # what is read first stands first, before the settings
_SET = re.compile(r"(best_)?eval_loss/(.+)")
# Ends of a benchmark's column whose small numbers are good ones.
_SMALL_METRICS = re.compile(r"[/_](perplexity|bits_per_byte|loss|nll|brier_score|[wct]er|mse|mae)(,[^/]*)?$")
_RESULT = re.compile(r"eval/(.+)")
_LONG = 40  # letters of a cell on a page; files have the whole of it
_WHOLE = 1_000_000  # letters, more than any setting has
FORMATS = (".csv", ".parquet")


def row_of(run: Run, keys: Sequence[str], more: Mapping[str, str]) -> dict[str, Any]:
    """One run: its name, its settings that differ, and :data:`COLUMNS`; None where a number is not known.

    Args:
        run: the run.
        keys: settings that differ.
        more: metric of each further column, as :func:`more_columns` names them.
    """
    best = run.series("eval/loss").values
    sent, vanilla = run.bytes_sent or (None, None)
    numbers = {
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
    for column, metric in more.items():
        series = run.series(metric)
        numbers[column] = min(series.values) if series and column.startswith("best_") else series.last
    row = {"run": run.name} | {name: numbers.pop(name) for name in _FIRST}
    return row | dict(zip(keys, setting(run, keys), strict=True)) | numbers


def more_columns(runs: Sequence[Run]) -> dict[str, str]:
    """Return the metric of each column that these runs have besides :data:`COLUMNS`.

    ``eval_loss/<name>`` and ``best_eval_loss/<name>`` of a set of ``data.validation``, ``eval/<task>/<metric>`` of a
    benchmark.
    """
    found = {f"{which}/{name}": key for name, key in validation_sets(runs).items() for which in _LOSSES}
    return found | {key: key for key in benchmarks(runs).values()}


def default_sort(runs: Sequence[Run]) -> str:
    """Return the column by which runs are ordered: the loss that compares them, else one that some have, else names.

    See :func:`moepp.analysis.losses.compared_loss`.
    """
    sets = validation_sets(runs)
    columns = {"train/loss": "train_loss", "eval/loss": "eval_loss"}
    columns |= {metric: f"eval_loss/{name}" for name, metric in sets.items()}
    losses = (compared_loss(runs), *sets.values())
    return next((columns[metric] for metric in losses if any(run.series(metric) for run in runs)), "run")


def order_text(sort: str) -> str:
    """Say by what and in which direction a table is ordered."""
    if not is_number(sort):
        return f"by {sort}, ascending"
    return f"by {sort}, the {'lowest' if _is_small_good(sort) else 'highest'} first"


def _is_small_good(column: str) -> bool:
    if column in COLUMNS:
        return COLUMNS[column][2]
    return bool(_SET.fullmatch(column) or _SMALL_METRICS.search(column))


def compare(runs: Sequence[Run], sort: str | None = None) -> list[dict[str, Any]]:
    """Return a row per run, the best by ``sort`` first, those without that number last; None: :func:`default_sort`.

    Raises:
        ConfigError: ``sort`` is no column.
    """
    sort = default_sort(runs) if sort is None else sort
    keys, more = compared_keys(runs), more_columns(runs)
    choices = ["run", *keys, *COLUMNS, *more]
    if sort not in choices:
        raise ConfigError(f"--sort={sort} is no column; choose one of {', '.join(choices)}")
    rows = [row_of(run, keys, more) for run in runs]
    if sort not in COLUMNS and sort not in more:
        return sorted(rows, key=lambda row: (_as_number(row[sort]), str(row[sort]), row["run"]))
    sign = 1 if _is_small_good(sort) else -1
    return sorted(rows, key=lambda row: (row[sort] is None, sign * (row[sort] or 0.0), row["run"]))


def with_paths(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return rows of runs for a file: with the directory of each, which a page tells elsewhere."""
    paths = {run.name: str(run.path) for run in runs}
    return [{**row, "path": paths[row["run"]]} for row in rows]


def _as_number(text: str) -> float:
    """Return a setting's number, so that 10 comes after 9; texts come last."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def group_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Merge runs that differ in nothing but their seed, as one row of means and spreads each; [] without siblings.

    The spread is the sample standard deviation over seeds. ``fewest_tokens`` and ``most_tokens`` say how far they are.
    """
    keys, groups, more = compared_keys(runs), group_runs(runs), more_columns(runs)
    if all(len(group.runs) == 1 for group in groups):
        return []
    found = []
    sets = [column for column in more if column.startswith("eval_loss/")]
    for group in groups:
        rows = [row_of(run, keys, more) for run in group.runs]
        tokens = [row["tokens"] for row in rows]
        row: dict[str, Any] = {"setting": group.label, "runs": len(rows)}
        for column in ("eval_loss", *sets, "train_loss", "ffn_per_token", "tokens_per_second"):
            numbers = [r[column] for r in rows if r[column] is not None]
            mean, spread = mean_and_spread(numbers) if numbers else (None, None)
            row |= {column: mean, f"{column}_spread": spread}
        row |= {"fewest_tokens": min(tokens), "most_tokens": max(tokens)}
        found.append(row | dict(zip(keys, setting(group.runs[0], keys), strict=True)))
    return found


def uneven_seeds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which rows of :func:`group_seeds` hold seeds that are not equally far."""
    uneven = [row["setting"] for row in rows if row["fewest_tokens"] < row["most_tokens"]]
    if not uneven:
        return []
    return [
        f"Seeds of {', '.join(uneven)} have not done equally many tokens: means and spreads of their last values are "
        "of different lengths; the charts compare equal tokens."
    ]


def text_of(column: str, value: Any) -> str:
    """Return a cell as people read it."""
    if value is None:
        return "-"
    if column.startswith("loss_at_equal_"):
        return f"{value:.4f}" if column.endswith("_error") else f"{value:+.4f}"
    if column.startswith("ratio_"):
        return f"{value:.3f}"
    name = column.removesuffix("_spread")
    if name in COLUMNS:
        return COLUMNS[name][1].format(value)
    if name in _TOKENS:
        return f"{value:,.0f}"
    return f"{value:.4f}" if is_number(name) and isinstance(value, float) else shorten(printable(value, _WHOLE), _LONG)


def heading_of(column: str) -> str:
    """Return a column's heading, with its unit."""
    if column.startswith("loss_at_equal_"):
        what = column.removeprefix("loss_at_equal_").removesuffix("_error").replace("_", " ")
        return f"± at equal {what}" if column.endswith("_error") else f"loss at equal {what}, nats"
    if column.startswith("ratio_"):
        return f"{column.removeprefix('ratio_').replace('_', ' ')}, times"
    name = column.removesuffix("_spread")
    if found := _SET.fullmatch(name):
        text = f"{'lowest' if found[1] else 'loss'} on {found[2]}, nats"
    elif found := _RESULT.fullmatch(name):
        text = found[1]
    else:
        text = COLUMNS[name][0] if name in COLUMNS else _HEADINGS.get(name, name)
    return f"± {text}" if column.endswith("_spread") else text


def is_number(column: str) -> bool:
    """Whether a column holds numbers."""
    name = column.removesuffix("_spread")
    is_known = name in COLUMNS or name in _TOKENS or name in ("runs", "seeds")
    return is_known or column.startswith(("loss_at_equal_", "ratio_", "eval_loss/", "best_eval_loss/", "eval/"))


def headings(columns: Sequence[str]) -> list[str]:
    """Return the headings of a table: settings by the last part of their key, where that tells them apart."""
    short = Counter(column.rpartition(".")[2] for column in columns)
    names = [column.rpartition(".")[2] if _is_key(column) else column for column in columns]
    return [
        name if _is_key(column) and short[name] == 1 else heading_of(column)
        for column, name in zip(columns, names, strict=True)
    ]


def _is_key(column: str) -> bool:
    return "." in column and "/" not in column and not is_number(column)


def shown_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns in which any row has something: others say nothing on a page, and stay in files."""
    return [column for column in rows[0] if any(row[column] is not None for row in rows)]


def table_bytes(name: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV or parquet, by the end of the file's name.

    Raises:
        ConfigError: another end.
    """
    suffix = Path(name).suffix
    if suffix == ".parquet":
        return parquet_bytes(rows)
    if suffix != ".csv":
        raise ConfigError(f"--table={name} ends in {suffix or 'nothing'}; end it in {' or '.join(FORMATS)}")
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows([plain_cell(value) for value in row] for row in (rows[0], *(row.values() for row in rows)))
    return stream.getvalue().encode()
