"""A run on the terminal: where it is, how the loss goes, how layers route, what was saved and what was warned of."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.analysis.cost_charts import most_uneven
from moepp.analysis.figures import shorten
from moepp.analysis.log_lines import ERROR, RANK, Tails, log_tails, warnings_of
from moepp.analysis.losses import validation_sets
from moepp.analysis.run_state import state_of
from moepp.analysis.runs import Run, Series
from moepp.errors import MoeppError, RunError
from moepp.io.untrusted import printable, read_json, read_part
from moepp.runs.directory import RunDir

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
_LAYERS = 16
_SETS = 8  # validation sets that are shown
_NAME = 13  # letters of their names
_TAIL_BYTES = 200_000
_SHOWN_RANKS = 5
_RECENT = 20
_FOREVER = 1e10  # seconds, three centuries
_NARROW = 80  # columns of a terminal below which the extremes are left out


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
    total = run.total_steps
    if speed is None or total is None or not run.steps or speed <= 0:
        return None
    seconds = max(0.0, (total - run.steps) * (run.tokens / run.steps) / speed)
    return seconds if seconds < _FOREVER else None


def panel(run: Run, now: float | None = None, width: int = 100) -> RenderableType:
    """Return everything that :func:`moepp.cli.watch.run` shows, for a terminal of this many columns."""
    from rich.console import Group
    from rich.text import Text

    now = time.time() if now is None else now
    parts: list[Any] = [Text(_headline(run, now), style="bold"), _curves(run, width)]
    if (layers := _layers(run, width)) is not None:
        parts.append(layers)
    tails = log_tails(run)
    parts += [Text(_ranks(run, tails)), Text(_saved(run, now))]
    broken = [note for note in run.faults if "ot finite in" in note]  # "last" is then not of the last record
    parts += [Text(line, style="yellow") for line in (*broken, *warnings_of(tails))]
    return Group(*parts)


def _headline(run: Run, now: float) -> str:
    total = run.total_steps
    age = max(0.0, now - RunDir(run.path).metrics_file.stat().st_mtime)
    found = state_of(run.path, run, now)
    parts = [run.name, f"step {run.steps:,}" + (f" of {total:,}" if total is not None else "")]
    parts += [f"{run.tokens:,} tokens", f"last record {duration(age)} ago", found.text]
    left = remaining_seconds(run) if found.goes_on else None
    if left:
        parts.append(f"about {duration(left)} left at this pace")
    return "  |  ".join(parts)


def waiting(path: Path, now: float | None = None) -> str:
    """Return the line of a run that has logged nothing yet."""
    return f"{printable(path.name)}  |  {state_of(path, None, time.time() if now is None else now).text}"


def _ranks(run: Run, tails: Tails) -> str:
    """Return how many ranks there are, which have no log or an error in it, and which others wait for.

    What earlier starts left, perhaps on more ranks, does not count.
    """
    logs = {int(match[1]) for path in RunDir(run.path).log.glob("rank-*.txt") if (match := RANK.fullmatch(path.stem))}
    world = _world_size(run)
    logs = {rank for rank in logs if world is None or rank < world}
    parts = [f"ranks: {len(logs)}" + (f" of {world}" if world is not None else "")]
    missing = sorted(set(range(world or 0)) - logs)
    if missing:
        parts.append(f"no log of {_some(missing)}")
    lines, found_unreadable = tails
    started = _started(run)
    numbered = ((int(name.removeprefix("rank-")), when, line) for when, name, line in lines)
    failed = sorted({rank for rank, when, line in numbered if rank in logs and when >= started and ERROR.search(line)})
    unreadable = [rank for name, _ in found_unreadable if (rank := int(name.removeprefix("rank-"))) in logs]
    parts.append(f"errors in the log of {_some(failed)}" if failed else "no errors in their logs")
    if unreadable:
        parts.append(f"cannot read the log of {_some(unreadable)}")
    slowest = [int(value) for value in run.series("time/slowest_rank").values[-_RECENT:]]
    if slowest := [rank for rank in slowest if world is None or rank < world]:
        rank, count = Counter(slowest).most_common(1)[0]
        parts.append(f"rank {rank} was the slowest in {count} of the last {len(slowest)} records")
    if (worst := most_uneven(run, lambda values: values[-1])) is not None:
        parts.append(f"{worst[0]}: slowest {worst[1]:.2f} times the mean")
    return "; ".join(parts)


def _started(run: Run) -> int:
    """Return when the run was last started, seconds since the epoch: when its lock was taken; 0 where there is none."""
    try:
        return int((run.path / ".lock").stat().st_mtime)
    except OSError:
        return 0


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_SHOWN_RANKS])
    return f"rank {shown}" + (f" and {len(ranks) - _SHOWN_RANKS} others" if len(ranks) > _SHOWN_RANKS else "")


def _world_size(run: Run) -> int | None:
    try:
        found = read_json(RunDir(run.path).environment_file, error=RunError)
    except MoeppError:
        return None
    size = found.get("world_size") if isinstance(found, dict) else None
    return size if type(size) is int and 0 < size < 1_000_000 else None


def _curves(run: Run, width: int) -> RenderableType:
    from rich.table import Table

    is_narrow = width < _NARROW
    table = Table(box=None, pad_edge=False)
    for heading in ("", "last", *(() if is_narrow else ("lowest", "highest")), ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    sets = list(validation_sets([run]).items())
    length = max(8, min(_WIDTH, width - (36 if is_narrow else 58)))
    for label, metric, pattern in (
        ("training loss, nats", "train/loss", "{:.4f}"),
        ("validation loss, nats", "eval/loss", "{:.4f}"),
        *((f"loss on {_short(name)}", key, "{:.4f}") for name, key in sets[:_SETS]),
        ("tokens per second", "throughput/tokens_per_second", "{:,.0f}"),
        ("FFN experts per token", "routing/ffn_per_token", "{:.3f}"),
        ("gradient norm", "train/grad_norm", "{:.3g}"),
        ("skipped steps", "train/skipped_steps", "{:.0f}"),
    ):
        series: Series = run.series(metric)
        if series:
            numbers = [pattern.format(v) for v in (series.values[-1], min(series.values), max(series.values))]
            table.add_row(label, *(numbers[:1] if is_narrow else numbers), sparkline(series.values, length))
    if len(sets) > _SETS:
        table.add_row(f"and {len(sets) - _SETS} other sets", *[""] * (len(table.columns) - 1))
    return table


def _short(name: str) -> str:
    return shorten(printable(name), _NAME)


def _layers(run: Run, width: int) -> RenderableType | None:
    from rich.table import Table

    shares, loads = run.layers("share_ffn"), run.layers("max_over_mean")
    if not shares:
        return None
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "FFN share", "", "max/mean load" if width < _NARROW else "FFN load max/mean"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    length = max(5, min(20, width - 44))
    step = -(-len(shares) // _LAYERS)
    for layer in list(shares)[::step]:
        share = min(max(shares[layer].values[-1], 0.0), 1.0)
        load = loads[layer].last if layer in loads else None
        bar = "█" * round(length * share) + "░" * (length - round(length * share))
        table.add_row(str(layer), f"{share:.1%}", bar, "-" if load is None else f"{load:.2f}")
    if step > 1:
        table.add_row("", "", f"every {step} layers", "")
    return table


def _saved(run: Run, now: float) -> str:
    try:
        if not run.checkpoints:
            return "no checkpoint yet"
    except OSError as error:
        return f"checkpoints cannot be read now: {error.strerror}"
    name, size = run.checkpoints[-1]
    try:
        age = max(0.0, now - (RunDir(run.path).checkpoints / name).stat().st_mtime)
    except OSError:  # removed since it was listed
        return f"newest checkpoint: {name}; {len(run.checkpoints)} in all"
    return f"newest checkpoint: {name}, {size / 1e6:,.1f} MB, {duration(age)} ago; {len(run.checkpoints)} in all"


def has_records(path: Path) -> bool:
    """Whether the run has logged anything yet.

    Raises:
        RunError: its metrics.jsonl cannot be read.
    """
    file = RunDir(path).metrics_file
    try:
        return file.exists() and b"\n" in read_part(file, _TAIL_BYTES)
    except OSError as error:
        raise RunError(f"cannot read {printable(file)}: {error.strerror}; name the directory of a run") from error
