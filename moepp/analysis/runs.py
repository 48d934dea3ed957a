"""Finished and running runs as their directories tell them: records, configuration, what they cost."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moepp.checkpoint import list_checkpoints
from moepp.checkpoint.format import total_size
from moepp.config import Config, from_stored
from moepp.config.compare import differing_keys, flatten
from moepp.errors import MoeppError, RunError
from moepp.io.untrusted import printable, read_yaml
from moepp.metrics.jsonl import read_records
from moepp.model.accounting import flops_per_token
from moepp.runs.directory import RunDir
from moepp.runs.report import mean_per_step

logger = logging.getLogger(__name__)

# Where a run lies, what it is called and which random numbers it draws: no part of what it tries out.
_NOT_COMPARED = re.compile(
    r"(run\.(name|dir|seed|resume)|data\.cache_dir|logging\..*|checkpoint\..*|train\.log_interval)"
)


@dataclass(frozen=True)
class Series:
    """A metric over the run: ``tokens[i]`` training tokens were done when ``values[i]`` was logged."""

    tokens: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def last(self) -> float | None:
        """Newest value."""
        return self.values[-1] if self.values else None


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: its directory.
        records: lines of metrics.jsonl.
        tree: its configuration as stored; empty where it cannot be read.
        config: the same, typed; None where this version cannot read it, or parts of it are registered elsewhere.
    """

    path: Path
    records: Sequence[Mapping[str, Any]]
    tree: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

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

    def layers(self, metric: str) -> dict[int, Series]:
        """Return a metric of every layer, ``routing/layer_<i>/<metric>``."""
        pattern = re.compile(rf"routing/layer_([0-9]{{1,9}})/{re.escape(metric)}")
        found = {int(match[1]) for record in self.records for key in record if (match := pattern.fullmatch(key))}
        return {layer: self.series(f"routing/layer_{layer}/{metric}") for layer in sorted(found)}

    @cached_property
    def kinds(self) -> list[str]:
        """Expert kinds that were logged, FFN first."""
        pattern = re.compile(r"routing/layer_[0-9]{1,9}/share_(\w{1,60})")
        found = dict.fromkeys(match[1] for r in self.records for key in r if (match := pattern.fullmatch(key)))
        return sorted(found, key=lambda kind: kind != "ffn")

    @cached_property
    def flops(self) -> Series:
        """Operations of forward and backward up to each training record, by the FFN experts really computed.

        See :func:`moepp.model.accounting.flops_per_token`; empty where the configuration cannot be read.
        """
        ffn = self.series("routing/ffn_per_token")
        if self.config is None:
            return Series([], [])
        total, before, values = 0.0, 0, []
        for tokens, per_token in zip(ffn.tokens, ffn.values, strict=True):
            cost = flops_per_token(self.config.model, self.config.data.seq_len, per_token).forward_backward
            if cost is None:  # of an expert kind that does not tell its own
                return Series([], [])
            total, before = total + (tokens - before) * cost, tokens
            values.append(total)
        return Series(ffn.tokens, values)

    def over_flops(self, metric: str) -> tuple[list[float], list[float]]:
        """Return operations done and value, for every logged value of a metric (linear between records)."""
        series, costs = self.series(metric), self.flops
        if not costs or not series:
            return [], []
        import numpy as np

        known = [0, *costs.tokens]
        return list(np.interp(series.tokens, known, [0.0, *costs.values])), series.values

    @cached_property
    def bytes_sent(self) -> tuple[float, float] | None:
        """Rows sent per step, and what a vanilla MoE would have sent; means over the run."""
        sent = mean_per_step(self.records, "comm/dispatch_bytes")
        vanilla = mean_per_step(self.records, "comm/dispatch_bytes_vanilla")
        return None if sent is None or vanilla is None else (sent, vanilla)

    @cached_property
    def checkpoints(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every checkpoint."""
        return [(path.name, total_size(path)) for path in list_checkpoints(RunDir(self.path).checkpoints)]


def find_runs(places: Sequence[str]) -> list[Run]:
    """Read run directories, and those in a folder of runs (a sweep's).

    Raises:
        RunError: a place is no run and holds none, or a run's metrics cannot be read.
    """
    found: dict[Path, Run] = {}
    for place in places:
        path = Path(place).expanduser().resolve()
        if not path.is_dir():
            raise RunError(f"{printable(place)} is not a directory; name the directory of a run, or a folder of runs")
        folders = [path] if RunDir(path).metrics_file.exists() else _runs_in(path)
        if not folders:
            raise RunError(f"{printable(place)} holds no metrics.jsonl and no run; name the directory of a run")
        found |= {folder: read_run(folder) for folder in folders if folder not in found}
    return list(found.values())


def _runs_in(folder: Path) -> list[Path]:
    runs = [path for path in sorted(folder.iterdir()) if path.is_dir() and RunDir(path).metrics_file.exists()]
    for path in sorted(folder.iterdir()):
        if path.is_dir() and RunDir(path).config_file.exists() and path not in runs:
            logger.warning("%s has a configuration but no metrics yet; it is left out", printable(path))
    return runs


def read_run(path: Path) -> Run:
    """Read one run directory.

    Raises:
        RunError: no record, or a damaged metrics.jsonl.
    """
    records = read_records(RunDir(path).metrics_file)
    if not records:
        raise RunError(
            f"{RunDir(path).metrics_file} holds no record yet; train at least train.log_interval steps first"
        )
    tree, config = {}, None
    try:
        tree = read_yaml(RunDir(path).config_file)
        config = from_stored(tree)
    except MoeppError as error:
        logger.warning("%s: no operations are counted, for its configuration is not read: %s", path.name, error)
    return Run(path, records, tree if isinstance(tree, dict) else {}, config)


def compared_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys in which runs differ, without those that say where a run lies or what its seed is."""
    return sorted(key for key in differing_keys([run.tree for run in runs]) if not _NOT_COMPARED.fullmatch(key))


def setting(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the run's values of these keys, as text."""
    flat = flatten(run.tree)
    return tuple(printable(flat.get(key, "absent"), 60) for key in keys)
