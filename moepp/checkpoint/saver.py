"""Writing checkpoints: staged, written, verified, then renamed; in the foreground or the background."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moepp import comm
from moepp.checkpoint import format as fmt
from moepp.checkpoint.format import CheckpointInfo
from moepp.checkpoint.state import stage
from moepp.checkpoint.storage import write_tensors
from moepp.config import CheckpointConfig
from moepp.engine.engine import Engine
from moepp.metrics.step_stats import StepStats
from moepp.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """What one save cost and whether it succeeded.

    Attributes:
        blocked_seconds: how long training stood still.
        total_seconds: until the checkpoint was verified and in its place (or had failed).
        problems: a line per failure; empty when the checkpoint is whole.
    """

    step: int
    blocked_seconds: float
    total_seconds: float
    size: int
    problems: list[str]


class Checkpointer:
    """Saves checkpoints of one run; every method is called by every rank at the same step.

    A failing save is reported and leaves earlier checkpoints and the run alone. At most one save is in flight: the
    next one, and :meth:`close`, wait for it.

    Args:
        group: a gloo group of all ranks that nothing else uses, so that a save in the background never mixes with
            the collectives of training.
    """

    def __init__(self, cfg: CheckpointConfig, groups: ParallelGroups, checkpoints: Path, group: comm.Group) -> None:
        self.cfg = cfg
        self.groups = groups
        self.checkpoints = checkpoints
        self.group = group
        self.reports: list[SaveReport] = []
        self._thread: threading.Thread | None = None
        if groups.rank == 0:
            remove_remains(checkpoints)

    def save(self, engine: Engine, stats: StepStats, info: CheckpointInfo, background: bool | None = None) -> None:
        """Save the state after ``info.step`` steps; ``background`` overrides ``checkpoint.async``."""
        self.wait()
        start = time.perf_counter()
        staged = stage(engine, stats, self.groups)
        in_background = self.cfg.async_ if background is None else background
        if not in_background:
            self._publish(staged, info, start, None)
            return
        blocked = time.perf_counter() - start
        self._thread = threading.Thread(target=self._publish, args=(staged, info, start, blocked), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save in flight, if any, has finished."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    close = wait

    def _publish(self, staged: dict[str, Tensor], info: CheckpointInfo, start: float, blocked: float | None) -> None:
        final = self.checkpoints / fmt.checkpoint_name(info.step)
        temporary = self.checkpoints / f".{final.name}.tmp"
        problems = self._write(staged, info, temporary, final)
        total = time.perf_counter() - start
        size = fmt.total_size(final) if not problems else 0
        report = SaveReport(info.step, total if blocked is None else blocked, total, size, problems)
        self.reports.append(report)
        if self.groups.rank == 0:
            self._log(report, final)

    def _write(self, staged: dict[str, Tensor], info: CheckpointInfo, temporary: Path, final: Path) -> list[str]:
        """The steps of a save; after each of them all ranks agree whether to go on."""
        files: dict[str, Any] = {}
        stages: list[Callable[[], None]] = [
            lambda: self._on_first_rank(lambda: _prepare(temporary, info)),
            lambda: write_tensors(temporary, staged, self.group),
            lambda: files.update(self._checksums(temporary)),
            lambda: self._on_first_rank(lambda: _publish_folder(temporary, final, files)),
        ]
        for action in stages:
            problems = self._attempt(action)
            if problems:
                self._attempt(lambda: self._on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True)))
                return problems
        self._attempt(lambda: self._on_first_rank(self._prune))
        return []

    def _attempt(self, action: Callable[[], None]) -> list[str]:
        """Run ``action`` here and tell every rank what went wrong anywhere."""
        problem = None
        try:
            action()
        except Exception as error:  # whatever the storage raises must not end the run
            problem = f"rank {self.groups.rank}: {_first_line(error)}"
        return [found for found in comm.gather_objects(problem, self.group) if found is not None]

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        if self.groups.rank == 0:
            action()

    def _checksums(self, temporary: Path) -> dict[str, Any]:
        """Size and checksum of every file, each read back by the rank that wrote it."""
        pattern = f"__{self.groups.rank}_*"
        own = {file.name: fmt.checksum(file) for file in temporary.glob(pattern)}
        if self.groups.rank == 0:
            own |= {name: fmt.checksum(temporary / name) for name in (".metadata", fmt.INFO)}
        return {name: entry for part in comm.gather_objects(own, self.group) for name, entry in part.items()}

    def _prune(self) -> None:
        for path in fmt.prunable(self.checkpoints, self.cfg.keep, self.cfg.keep_every):
            shutil.rmtree(path)
            logger.info("removed old checkpoint %s (checkpoint.keep=%d)", path.name, self.cfg.keep)

    def _log(self, report: SaveReport, final: Path) -> None:
        if report.problems:
            logger.error(
                "checkpoint at step %d FAILED, training goes on and earlier checkpoints are untouched: %s",
                report.step,
                "; ".join(report.problems),
            )
            return
        logger.info(
            "saved %s: %.1f MB, training stood still for %.2f s, finished after %.2f s",
            final,
            report.size / 1e6,
            report.blocked_seconds,
            report.total_seconds,
        )


def remove_remains(checkpoints: Path) -> None:
    """Delete what interrupted saves left behind; the run directory's lock is held, so nobody is writing them."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _prepare(temporary: Path, info: CheckpointInfo) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    fmt.write_durably(temporary / fmt.INFO, json.dumps(asdict(info), indent=2) + "\n")


def _publish_folder(temporary: Path, final: Path, files: dict[str, Any]) -> None:
    fmt.write_durably(temporary / fmt.MANIFEST, json.dumps({"format": fmt.FORMAT, "files": files}, indent=2) + "\n")
    fmt.sync_folder(temporary)
    if final.exists():
        # A run that resumed from an earlier checkpoint reaches this step again; what was there is kept aside.
        final.rename(_free_name(final))
    temporary.rename(final)
    fmt.sync_folder(final.parent)


def _free_name(final: Path) -> Path:
    n = 1
    while (candidate := final.with_name(f"{final.name}.replaced-{n}")).exists():
        n += 1
    return candidate


def _first_line(error: Exception) -> str:
    """The cause in one line; DCP wraps each rank's exception in one with a traceback."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
