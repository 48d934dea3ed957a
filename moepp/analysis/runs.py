"""Finished and running runs as their directories tell them: records, configuration, what they cost."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moepp.checkpoint import list_checkpoints
from moepp.checkpoint.format import total_size
from moepp.config import Config, from_stored, to_dict
from moepp.config.compare import differing_keys, flatten
from moepp.errors import MoeppError, RunError
from moepp.io.untrusted import printable, read_yaml
from moepp.metrics.jsonl import read_records, require_ascending
from moepp.metrics.routing import RoutingSnapshot
from moepp.metrics.routing_file import read_routing
from moepp.model.accounting import BACKWARD_FACTOR, FlopsPerToken, flops_per_token, parts_without_flops
from moepp.runs.directory import RunDir
from moepp.runs.report import mean_per_step, mean_since_before

logger = logging.getLogger(__name__)

# Where a run lies, what it is called, which random numbers it draws and what it writes: no part of what it tries out.
# Kernels, compilation, devices and layouts are: speeds depend on them, and runs of one seed that differ in nothing else
# have nearly the same losses, whose spread would be none of seeds.
_NOT_COMPARED = re.compile(
    r"(run\.(name|dir|seed|resume)|data\.cache_dir|(logging|checkpoint|profile)\..*|train\.log_interval)"
)

_MAIN = ("train/loss", "eval/loss", "train/grad_norm")
_NAMED = 4  # metrics that a note names
_LEVELS = 3  # of folders below one that is named, in which runs are looked for

SPLIT_NAME = "data.paths"
"""What the validation part of ``data.paths`` is called beside sets of ``data.validation``, whose names have no dot."""


@dataclass(frozen=True)
class Series:
    """A metric over the run: ``tokens[i]`` training tokens were done when ``values[i]`` was logged."""

    tokens: Sequence[float]
    values: Sequence[float]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def last(self) -> float | None:
        """Newest value."""
        return self.values[-1] if self.values else None

    def until(self, tokens: float | None) -> Series:
        """Return the part up to there, of a metric whose values are means since the record before; None: all of it.

        A record that reaches further counts up to there.
        """
        if tokens is None:
            return self
        end = bisect_left(self.tokens, tokens)
        last = [tokens] if end < len(self.tokens) else []
        return Series([*self.tokens[:end], *last], self.values[: end + len(last)])

    @property
    def mean(self) -> float | None:
        """Mean over tokens: each value counts for those since the one before; None without a value."""
        return mean_since_before(self.tokens, self.values)


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: its directory.
        records: lines of metrics.jsonl.
        tree: its configuration as stored; empty where it cannot be read.
        config: the same, typed; None where it cannot be read, or names parts of modules that were not imported.
        config_problem: why it is None; "" where it is not.
        shown: what tells it from other runs whose directories have the same name; "" where nothing need.
    """

    path: Path
    records: Sequence[Mapping[str, Any]]
    tree: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None
    shown: str = ""
    config_problem: str = ""

    @property
    def name(self) -> str:
        """What it is called: its directory's name, with as many folders above it as it takes to tell it from others."""
        return self.shown or self.path.name

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Its configuration with every key of this version, so that runs of older versions compare; else as stored."""
        return self.tree if self.config is None else to_dict(self.config)

    @property
    def tokens(self) -> int:
        """Training tokens done."""
        return max(record["tokens"] for record in self.records)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max(record["step"] for record in self.records)

    def series(self, metric: str) -> Series:
        """Return every logged value of a metric."""
        points = [(r["tokens"], float(r[metric])) for r in self.records if r.get(metric) is not None]
        return Series([tokens for tokens, _ in points], [value for _, value in points])

    def layers(self, metric: str, family: str = "routing") -> dict[int, Series]:
        """Return a metric of every layer, ``<family>/layer_<i>/<metric>``."""
        found = self.names(rf"{family}/layer_([0-9]{{1,9}})/{re.escape(metric)}")
        return {int(layer): self.series(found[layer]) for layer in sorted(found, key=int)}

    @cached_property
    def kinds(self) -> list[str]:
        """Expert kinds that were logged, FFN first."""
        return sorted(self.names(r"routing/layer_[0-9]{1,9}/share_(\w{1,60})"), key=lambda kind: kind != "ffn")

    def names(self, pattern: str) -> dict[str, str]:
        """Return the metrics whose whole name a pattern matches, by the pattern's first group."""
        compiled = re.compile(pattern)
        return {match[1]: name for name in self._names if (match := compiled.fullmatch(name))}

    @cached_property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record))

    @cached_property
    def flops(self) -> Series:
        """Operations of forward and backward up to each training record, by the FFN experts really computed.

        See :func:`moepp.model.accounting.flops_per_token`; empty where the configuration cannot be read.
        """
        return self._add_up(lambda cost: cost.forward_backward)

    @cached_property
    def expert_flops(self) -> Series:
        """Operations of FFN experts alone, as :attr:`flops`; empty of a model without any."""
        series = self._add_up(lambda cost: (1 + BACKWARD_FACTOR) * cost.ffn_experts)
        return series if series.last else Series([], [])

    def _add_up(self, part: Callable[[FlopsPerToken], float | None]) -> Series:
        if self.config is None:
            return Series([], [])
        model, seq_len = self.config.model, self.config.data.seq_len
        ffn = self.series("routing/ffn_per_token" if model.moe_layers else "train/loss")
        # Everything but the FFN experts costs the same at every record; experts cost in proportion.
        none, one = (part(flops_per_token(model, seq_len, experts)) for experts in (0.0, 1.0))
        if none is None or one is None:  # of an expert kind that does not tell its own
            return Series([], [])
        total, before, values = 0.0, 0, []
        for tokens, per_token in zip(ffn.tokens, ffn.values, strict=True):
            experts = per_token if model.moe_layers else 0.0
            total, before = total + (tokens - before) * (none + experts * (one - none)), tokens
            values.append(total)
        return Series(ffn.tokens, values)

    def over(self, metric: str, axis: str) -> tuple[Sequence[float], Sequence[float]]:
        """Return where each logged value of a metric lies on an axis, and the value; empty where that is not known.

        Args:
            metric: its name.
            axis: "tokens", "operations" or "expert operations", which are linear between records.
        """
        series = self.series(metric)
        if axis == "tokens":
            return [float(tokens) for tokens in series.tokens], series.values
        costs = self.flops if axis == "operations" else self.expert_flops
        if not costs or not series:
            return [], []
        import numpy as np

        known = [0, *costs.tokens]
        return np.interp(series.tokens, known, [0.0, *costs.values]).tolist(), series.values

    def per_step(self, metric: str) -> float | None:
        """Return the mean of a per-step metric over the run; None where it was never logged."""
        return mean_per_step(self.records, metric)

    @cached_property
    def bytes_sent(self) -> tuple[float, float] | None:
        """Rows sent per step, and what a vanilla MoE would have sent; means over the run."""
        sent, vanilla = self.per_step("comm/dispatch_bytes"), self.per_step("comm/dispatch_bytes_vanilla")
        return None if sent is None or vanilla is None else (sent, vanilla)

    @cached_property
    def routing(self) -> list[RoutingSnapshot]:
        """Choices of every expert and gate weights over the training; empty where none were kept."""
        return self._routing[0]

    @cached_property
    def _routing(self) -> tuple[list[RoutingSnapshot], str]:
        try:
            return read_routing(self.path), ""
        except RunError as error:
            logger.warning("%s: no history of its routing is drawn: %s", self.name, error)
            return [], str(error)

    @property
    def total_steps(self) -> int | None:
        """Steps that its configuration asks for; None where that cannot be read."""
        train = self.tree.get("train")
        steps = train.get("steps") if isinstance(train, Mapping) else None
        return steps if type(steps) is int and steps > 0 else None

    @property
    def notes(self) -> list[str]:
        """What a reader of this run's page must know first: that it is not done, and :attr:`faults`."""
        total = self.total_steps
        unfinished = [f"Not at its end: step {self.steps:,} of {total:,}."] if total and self.steps < total else []
        history = f"No history of its routing is drawn: {self._routing[1]}" if self._routing[1] else ""
        return [*unfinished, *self.faults, *([history] if history else [])]

    @cached_property
    def faults(self) -> list[str]:
        """What is missing of its numbers, or not finite."""
        found = []
        if self.config is None:
            found.append(f"No operations are counted, for its configuration is not known: {self.config_problem}.")
        elif unknown := parts_without_flops(self.config.model):
            found.append(f"No operations are counted: no flops_per_token() of {', '.join(unknown)}.")
        counts = Counter(name for record in self.records for name, value in record.items() if value is None)
        for metric in _MAIN:
            if count := counts.pop(metric, 0):
                found.append(f"{metric} is not finite in {count} of {len(self.records)} records, which are left out.")
        if counts:
            named = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_NAMED))
            more = f" and {len(counts) - _NAMED} other metrics" if len(counts) > _NAMED else ""
            found.append(f"Not finite in some records, which are left out: {named}{more}.")
        if skipped := self.series("train/skipped_steps").last:
            found.append(f"{skipped:.0f} steps were skipped: not finite, or loss spikes.")
        return found

    @cached_property
    def checkpoints(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every checkpoint."""
        return [(path.name, total_size(path)) for path in list_checkpoints(RunDir(self.path).checkpoints)]


@dataclass(frozen=True)
class FoundRuns:
    """Runs, and why others of their folder are not among them."""

    runs: list[Run]
    left_out: list[str]


def find_runs(places: Sequence[str]) -> FoundRuns:
    """Read run directories, and those below folders (a sweep's), down to three levels; runs hold no other runs.

    Of a folder, runs that cannot be read or have logged nothing yet are left out. Links to runs count, links to other
    folders are not followed. Runs whose directories have the same name are told apart by the folders above.

    Raises:
        RunError: a place is no run and holds none that can be read, or the metrics of a run that is named itself
            cannot be read.
    """
    found: dict[Path, Run] = {}
    left_out: list[str] = []
    for place in places:
        path = Path(place).expanduser().resolve()
        if not path.is_dir():
            raise RunError(f"{printable(place)} is not a directory; name the directory of a run, or a folder of runs")
        if _is_run(path):
            found.setdefault(path, read_run(path))
            continue
        reasons: list[str] = []
        folders = list(dict.fromkeys(_runs_below(path, _LEVELS, reasons)))
        if not folders and not reasons:
            raise RunError(f"{printable(place)} holds no metrics.jsonl and no run; name the directory of a run")
        readable = 0
        for folder in folders:
            try:
                found.setdefault(folder, read_run(folder))
                readable += 1
            except RunError as error:
                reasons.append(f"{_below(folder, path)} is left out: {error}")
        if not readable:
            raise RunError(f"{printable(place)} holds no run that can be read: {reasons[0]}")
        left_out += reasons
    for reason in left_out:
        logger.warning("%s", printable(reason))
    return FoundRuns(_told_apart(list(found.values())), left_out)


def _runs_below(folder: Path, levels: int, unreadable: list[str]) -> Iterator[Path]:
    """Yield the directories of runs, resolved; why a folder cannot be looked into goes into ``unreadable``."""
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                continue
            if _is_run(path):
                yield path.resolve()
            elif levels > 1 and not path.is_symlink():
                yield from _runs_below(path, levels - 1, unreadable)
    except OSError as error:
        unreadable.append(f"{folder} is left out: {error.strerror}")


def _below(folder: Path, top: Path) -> str:
    return str(folder.relative_to(top)) if folder.is_relative_to(top) else str(folder)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, those of the same name under the shortest end of their path that no other has."""
    names = []
    for run in runs:
        parts = run.path.parts
        ends = ("/".join(parts[-length:]) for length in range(1, len(parts)))
        taken = [one.path.parts for one in runs if one is not run and one.path.name == run.path.name]
        free = (end for end in ends if all("/".join(other[-(end.count("/") + 1) :]) != end for other in taken))
        names.append(next(free, str(run.path)))
    return [replace(run, shown=name) for run, name in zip(runs, names, strict=True)]


def _is_run(path: Path) -> bool:
    return RunDir(path).metrics_file.exists() or RunDir(path).config_file.exists()


def read_run(path: Path) -> Run:
    """Read one run directory.

    Raises:
        RunError: no record, or a damaged metrics.jsonl.
    """
    records = read_records(RunDir(path).metrics_file) if RunDir(path).metrics_file.exists() else []
    if not records:
        raise RunError(
            f"{RunDir(path).metrics_file} holds no record yet; train at least train.log_interval steps first"
        )
    require_ascending(records, RunDir(path).metrics_file)
    tree, config, problem = {}, None, ""
    try:
        tree = read_yaml(RunDir(path).config_file)
        config = from_stored(tree)
    except MoeppError as error:
        problem = str(error)
    return Run(path, records, tree if isinstance(tree, dict) else {}, config, config_problem=problem)


def compared_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys in which runs differ, without those that say where a run lies or what its seed is."""
    return sorted(
        key
        for key in differing_keys([run.settings for run in runs if run.settings])
        if not _NOT_COMPARED.fullmatch(key)
    )


def setting(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the run's values of these keys, as whole texts; pages shorten them."""
    flat = flatten(run.settings)
    return tuple(str(flat.get(key, "absent")) for key in keys)


def setting_key(run: Run, keys: Sequence[str]) -> tuple[Any, ...]:
    """Return what is equal for runs of the same values of these keys, and can be hashed."""
    flat = flatten(run.settings)
    return tuple((key in flat, _hashable(flat.get(key))) for key in keys)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _hashable(one)) for key, one in value.items()))
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
