"""A run on the terminal: where it is, how the loss goes, how layers route, what was saved and what was warned of."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.analysis.runs import Run, Series
from moepp.io.untrusted import printable
from moepp.runs.directory import RunDir

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_LAYERS = 16
_WARNINGS = 4
_TAIL_BYTES = 200_000
_SERIOUS = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Return values as blocks, the lowest as the lowest block; of more than ``width`` values, means of equal parts."""
    if len(values) > width:
        edges = [len(values) * i // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    for size, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {small}"
    return f"{seconds:.0f} s"


def remaining_seconds(run: Run) -> float | None:
    """Return the time that is left at the newest throughput; None where the end or the throughput is not known."""
    speed = run.series("throughput/tokens_per_second").last
    total = run.tree.get("train", {}).get("steps") if isinstance(run.tree.get("train"), dict) else None
    if not speed or not isinstance(total, int) or not run.steps:
        return None
    return max(0.0, (total - run.steps) * (run.tokens / run.steps) / speed)


def warnings_of(run: Run) -> list[str]:
    """Return the newest warnings and errors of all ranks' logs, oldest first."""
    found = []
    for path in sorted(RunDir(run.path).log.glob("rank-*.txt")):
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
        found += [(line[:19], path.stem, printable(line, 160)) for line in lines if _SERIOUS.search(line)]
    return [f"{rank}: {line}" for _, rank, line in sorted(found)[-_WARNINGS:]]


def panel(run: Run, now: float | None = None) -> RenderableType:
    """Return everything that :func:`moepp.cli.watch.run` shows."""
    from rich.console import Group
    from rich.text import Text

    now = time.time() if now is None else now
    parts: list[Any] = [Text(_headline(run, now), style="bold"), _curves(run)]
    if (layers := _layers(run)) is not None:
        parts.append(layers)
    parts.append(Text(_saved(run, now)))
    parts += [Text(line, style="yellow") for line in warnings_of(run)]
    return Group(*parts)


def _headline(run: Run, now: float) -> str:
    total = run.tree.get("train", {}).get("steps") if isinstance(run.tree.get("train"), dict) else None
    age = max(0.0, now - RunDir(run.path).metrics_file.stat().st_mtime)
    parts = [run.name, f"step {run.steps:,}" + (f" of {total:,}" if isinstance(total, int) else "")]
    parts += [f"{run.tokens:,} tokens", f"last record {duration(age)} ago"]
    left = remaining_seconds(run)
    if left:
        parts.append(f"about {duration(left)} left at this pace")
    return "  |  ".join(parts)


def _curves(run: Run) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("last", "right"), ("lowest", "right"), ("highest", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # pyright: ignore[reportArgumentType]
    for label, metric, pattern in (
        ("training loss, nats", "train/loss", "{:.4f}"),
        ("validation loss, nats", "eval/loss", "{:.4f}"),
        ("tokens per second", "throughput/tokens_per_second", "{:,.0f}"),
        ("FFN experts per token", "routing/ffn_per_token", "{:.3f}"),
        ("gradient norm", "train/grad_norm", "{:.3g}"),
        ("skipped steps", "train/skipped_steps", "{:.0f}"),
    ):
        series: Series = run.series(metric)
        if series:
            numbers = [pattern.format(v) for v in (series.values[-1], min(series.values), max(series.values))]
            table.add_row(label, *numbers, sparkline(series.values))
    return table


def _layers(run: Run) -> RenderableType | None:
    from rich.table import Table

    shares, loads = run.layers("share_ffn"), run.layers("max_over_mean")
    if not shares:
        return None
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "FFN share", "", "FFN load max/mean"):
        table.add_column(heading, justify="left" if not heading else "right")
    step = -(-len(shares) // _LAYERS)
    for layer in list(shares)[::step]:
        share = shares[layer].values[-1]
        load = loads[layer].last if layer in loads else None
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        table.add_row(str(layer), f"{share:.1%}", bar, "-" if load is None else f"{load:.2f}")
    return table


def _saved(run: Run, now: float) -> str:
    if not run.checkpoints:
        return "no checkpoint yet"
    name, size = run.checkpoints[-1]
    age = max(0.0, now - (RunDir(run.path).checkpoints / name).stat().st_mtime)
    return f"newest checkpoint: {name}, {size / 1e6:,.1f} MB, {duration(age)} ago; {len(run.checkpoints)} in all"


def has_records(path: Path) -> bool:
    """Whether the run has logged anything yet."""
    file = RunDir(path).metrics_file
    if not file.exists():
        return False
    with file.open("rb") as stream:
        return b"\n" in stream.read(_TAIL_BYTES)
