"""Where metric records go: the protocol, the fan-out, and the set that a configuration asks for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moepp.config.load import to_dict
from moepp.config.schema import Config, LoggingConfig
from moepp.errors import MoeppError
from moepp.metrics.console import BarSink, LineSink
from moepp.metrics.csv import CsvSink, retire
from moepp.metrics.jsonl import JsonlSink
from moepp.metrics.routing import RoutingSnapshot
from moepp.metrics.routing_file import RoutingSink
from moepp.metrics.tensorboard import TensorBoardSink, require_tensorboard
from moepp.metrics.wandb import Draw, Table, WandbSink, require_wandb_login, require_wandb_settings

logger = logging.getLogger(__name__)

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
    """Passes each record to every sink; without sinks (every rank but 0) it does nothing.

    A sink that fails is reported once and gets no more records, for training must not end with it. Only what says
    itself that the run must stop does: a MoeppError.

    Args:
        sinks: in the order in which they take a record.
        check: called before each record and each sync; raises a MoeppError where the run's directory is not its own
            any more, so that nothing more is written there.
    """

    def __init__(self, sinks: Sequence[Sink] = (), check: Callable[[], None] = lambda: None) -> None:
        self._sinks = list(sinks)
        self._check = check

    def log(self, record: Record, step: int, tokens: int) -> None:
        self._pass(step, lambda sink: sink.log(record, step, tokens))

    def log_routing(self, snapshot: RoutingSnapshot) -> None:
        """Pass it to the sinks that draw or keep what every router did."""
        self._pass(
            snapshot.step,
            lambda sink: sink.log_routing(snapshot) if isinstance(sink, RoutingSink | WandbSink) else None,
        )

    def log_tables(self, tables: Mapping[str, Table], step: int, tokens: int) -> None:
        """Pass tables by name, such as "tokens/types", to the sinks that show some."""
        self._pass(step, lambda sink: sink.log_tables(tables, step, tokens) if isinstance(sink, WandbSink) else None)

    def _pass(self, step: int, take: Callable[[Sink], None]) -> None:
        self._check()
        for sink in list(self._sinks):
            try:
                take(sink)
            except MoeppError:
                raise
            except Exception as error:
                self._drop(sink, step, error)

    def _drop(self, sink: Sink, step: int, error: Exception) -> None:
        self._sinks.remove(sink)
        name = type(sink).__name__
        logger.warning("%s failed at step %d and gets no more records: %s", name, step, _in_one_line(error))

    def rewind(self, step: int, offset: int) -> None:
        """Drop the records of the run's files after ``step``, which will be written again.

        ``offset``: global batches left out by rewinds so far; with it, W&B's steps go on increasing.
        """

        def take(sink: Sink) -> None:
            if isinstance(sink, JsonlSink | RoutingSink | CsvSink | TensorBoardSink):
                sink.rewind(step)
            elif isinstance(sink, WandbSink):
                sink.step_offset = offset

        self._pass(step, take)

    def sync(self) -> None:
        """Force what metrics.jsonl and routing.jsonl have to the disk."""
        self._check()
        for sink in self._sinks:
            if isinstance(sink, JsonlSink | RoutingSink):
                sink.sync()

    @property
    def wandb_run_id(self) -> str | None:
        """Id of the W&B run, where there is one on this rank."""
        return next((sink.run_id for sink in self._sinks if isinstance(sink, WandbSink)), None)

    def close(self) -> None:
        """Close every sink, even if one of them fails.

        Raises:
            RunError: metrics.jsonl lacks records, or the directory is another's by now.
        """
        failure: Exception | None = None
        sinks, self._sinks = self._sinks, []
        if sinks:
            try:
                self._check()
            except MoeppError as error:
                failure = error
        for sink in sinks if failure is None else ():
            if isinstance(sink, JsonlSink):
                sink.sync()  # the table is made of it
        for sink in reversed(sinks):
            try:
                if failure is None or not isinstance(
                    sink, JsonlSink | RoutingSink
                ):  # nothing more goes into another's directory
                    sink.close()
            except MoeppError as error:
                failure = failure or error
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(sink).__name__, _in_one_line(error))
        if failure is not None:
            raise failure

    def __enter__(self) -> SinkGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except MoeppError as error:
            if kind is None:
                raise
            logger.error("%s", error)  # what ends the run already is what the user needs to see


def require_sinks(cfg: LoggingConfig) -> None:
    """Check before training that W&B and TensorBoard, where they are asked for, can take records.

    Raises:
        ConfigError: an API key or a package is missing, or W&B refuses a ``WANDB_`` variable.
    """
    require_wandb_login(cfg.wandb.mode)
    require_wandb_settings(cfg.wandb.mode)
    if cfg.tensorboard:
        require_tensorboard()


def open_sinks(
    run_dir: Path,
    cfg: Config,
    start_step: int,
    step_offset: int = 0,
    check: Callable[[], None] = lambda: None,
    draw: Draw | None = None,
) -> SinkGroup:
    """Return the sinks that ``cfg`` asks for, to be called on rank 0 of a run whose directory is claimed.

    Args:
        run_dir: run directory.
        cfg: the run's configuration.
        start_step: optimizer steps done before this start; records of later steps are dropped from metrics.jsonl,
            because they will be computed again.
        step_offset: global batches left out by rewinds before this start.
        check: see :class:`SinkGroup`.
        draw: makes the images that W&B gets of every snapshot of the routing; None: it gets none.

    Raises:
        RunError: metrics.jsonl cannot be written or is not a metrics file.
        ConfigError: W&B cannot start, or TensorBoard is not installed.
    """
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", start_step)]
    try:
        sinks.append(RoutingSink(run_dir, start_step))
        if cfg.logging.csv:
            sinks.append(CsvSink(run_dir))
        else:
            retire(run_dir, start_step)
        if cfg.logging.wandb.mode != "disabled":
            wandb = WandbSink(run_dir, cfg.logging.wandb, cfg.run.name, to_dict(cfg), is_resumed=start_step > 0)
            wandb.step_offset, wandb.draw = step_offset, draw
            sinks.append(wandb)
        if cfg.logging.tensorboard:
            sinks.append(TensorBoardSink(run_dir, cfg.train.global_batch_size * cfg.data.seq_len, start_step))
    except BaseException:
        SinkGroup(sinks).close()
        raise
    has_bar = cfg.logging.progress and sys.stderr.isatty()
    sinks.append(LineSink(cfg.train.steps, start_step, to_console=not has_bar))
    if has_bar:
        sinks.append(BarSink(cfg.train.steps, start_step))
    return SinkGroup(sinks, check)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
