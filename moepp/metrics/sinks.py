"""Where metric records go: the protocol, the fan-out, and the set that a configuration asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moepp.config.load import to_dict
from moepp.config.schema import Config
from moepp.metrics.console import BarSink, LineSink
from moepp.metrics.jsonl import JsonlSink
from moepp.metrics.wandb import WandbSink

Record = Mapping[str, float]
"""Metric name -> value, for example ``{"train/loss": 5.1}``."""


class Sink(Protocol):
    """Takes records of one log interval or evaluation each."""

    def log(self, record: Record, step: int, tokens: int) -> None:
        """Take ``record``, measured after optimizer step ``step`` and ``tokens`` training tokens."""
        ...

    def close(self) -> None:
        """Write everything out; nothing is logged afterwards."""
        ...


class SinkGroup:
    """Passes each record to every sink; without sinks (every rank but 0) it does nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def log(self, record: Record, step: int, tokens: int) -> None:
        for sink in self._sinks:
            sink.log(record, step, tokens)

    def rewind(self, step: int) -> None:
        """Training goes back to ``step``: drop the later records of metrics.jsonl, which will be written again."""
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.rewind(step)

    def sync(self) -> None:
        """Force what metrics.jsonl has to the disk."""
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.sync()

    @property
    def wandb_run_id(self) -> str | None:
        """Id of the W&B run, where there is one on this rank."""
        return next((sink.run_id for sink in self._sinks if isinstance(sink, WandbSink)), None)

    def close(self) -> None:
        """Close every sink, even if one of them fails; then raise the first failure."""
        failure: BaseException | None = None
        while self._sinks:
            try:
                self._sinks.pop().close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> SinkGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_sinks(run_dir: Path, cfg: Config, start_step: int) -> SinkGroup:
    """The sinks that ``cfg`` asks for, to be called on rank 0 of a run whose directory is claimed.

    Args:
        run_dir: run directory.
        cfg: the run's configuration.
        start_step: optimizer steps done before this start; records of later steps are dropped from metrics.jsonl,
            because they will be computed again.

    Raises:
        RunError: metrics.jsonl cannot be written or is not a metrics file.
        ConfigError: W&B cannot start.
    """
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", start_step)]
    try:
        if cfg.logging.wandb.mode != "disabled":
            sinks.append(WandbSink(run_dir, cfg.logging.wandb, cfg.run.name, to_dict(cfg), is_resumed=start_step > 0))
    except BaseException:
        SinkGroup(sinks).close()
        raise
    has_bar = cfg.logging.progress and sys.stderr.isatty()
    sinks.append(LineSink(cfg.train.steps, start_step, to_console=not has_bar))
    if has_bar:
        sinks.append(BarSink(cfg.train.steps, start_step))
    return SinkGroup(sinks)
