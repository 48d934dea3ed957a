"""Writing checkpoints: staged, written, verified, then renamed; in the foreground or the background."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from moepp.checkpoint import format as fmt
from moepp.checkpoint.format import CheckpointInfo, FileEntry
from moepp.checkpoint.host_memory import HostMemory
from moepp.checkpoint.state import Statistics, stage
from moepp.checkpoint.storage import cause, is_interrupt, source_of, write_tensors
from moepp.config import CheckpointConfig
from moepp.distributed import comm, waits
from moepp.distributed.device import use_in_thread
from moepp.distributed.groups import ParallelGroups
from moepp.engine.engine import StateSource
from moepp.errors import CheckpointError, MoeppError, WriteError
from moepp.io.files import make_own_folder, move
from moepp.io.write_errors import write_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """What one save cost and whether it succeeded.

    Attributes:
        blocked_seconds: how long training was blocked, waiting for an earlier save included.
        total_seconds: until the checkpoint was verified and in its place (or had failed).
        size: bytes of all files.
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
        check_claim: called by the first rank before it changes anything in the folder; raises where the run's
            directory is not its own any more, and then nothing is removed, least of all what another run is writing.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        groups: ParallelGroups,
        checkpoints: Path,
        group: comm.Group,
        check_claim: Callable[[], None] = lambda: None,
    ) -> None:
        self.cfg = cfg
        self.groups = groups
        self.checkpoints = checkpoints
        self.group = group
        self._check_claim = check_claim
        self.reports: list[SaveReport] = []
        self._memory = HostMemory(groups.device)
        self._thread: threading.Thread | None = None
        self._thread_error: BaseException | None = None
        if groups.rank == 0:
            fmt.remove_remains(checkpoints)

    def save(
        self, source: StateSource, stats: Statistics, info: CheckpointInfo, background: bool | None = None
    ) -> None:
        """Save the state after ``info.step`` steps; ``background`` overrides ``checkpoint.async``.

        Raises:
            RuntimeError: another rank was lost. Whatever else goes wrong is in :attr:`reports` and in the log.
        """
        start = time.perf_counter()
        self.wait()
        staged = stage(source, stats, self.groups, self._memory)
        in_background = self.cfg.async_ if background is None else background
        if not in_background:
            self._publish(staged, info, start, None)
            return
        blocked = time.perf_counter() - start
        self._thread = threading.Thread(target=self._run, args=(staged, info, start, blocked), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in flight, if any, has finished.

        Raises:
            RuntimeError: it could not, because another rank was lost.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._thread_error = self._thread_error, None
        if error is not None:
            raise error

    close = wait

    def archive_after(self, step: int) -> None:
        """Archive every checkpoint after ``step``, because the run now goes on from there; collective.

        Otherwise they would be taken for this run's newest.
        """
        comm.run_together(lambda: self._on_first_rank(lambda: self._archive_after(step)))

    def _archive_after(self, step: int) -> None:
        for path in fmt.list_checkpoints(self.checkpoints):
            if fmt.step_of(path) > step:
                try:
                    place = fmt.archive_checkpoint(path)
                except OSError as error:
                    raise CheckpointError(
                        f"{path} is after step {step}, from which the run continues, and cannot be renamed "
                        f"({error.strerror}); make {self.checkpoints} writable"
                    ) from error
                logger.warning("%s is after step %d: archived as %s", path.name, step, place.name)

    def _run(self, staged: dict[str, Tensor], info: CheckpointInfo, start: float, blocked: float) -> None:
        try:
            use_in_thread(self.groups.device)
            self._publish(staged, info, start, blocked)
        except BaseException as error:  # handed to the training thread by wait()
            self._thread_error = error

    def _publish(self, staged: dict[str, Tensor], info: CheckpointInfo, start: float, blocked: float | None) -> None:
        waits.limit_wait(self.group, waits.PATIENCE_SECONDS)  # disks of some ranks may be slow
        final = self.checkpoints / fmt.checkpoint_name(info.step)
        files: dict[str, FileEntry] = {}
        problems = self._write(staged, info, final, files)
        total = time.perf_counter() - start
        size = sum(entry.size for entry in files.values())
        report = SaveReport(info.step, total if blocked is None else blocked, total, size, problems)
        self.reports.append(report)
        if self.groups.rank == 0:
            _log(report, final)

    def _write(
        self, staged: dict[str, Tensor], info: CheckpointInfo, final: Path, files: dict[str, FileEntry]
    ) -> list[str]:
        """Return the steps of a save, which fill ``files``; all ranks agree after each whether to go on."""
        temporary = final.with_name(f".{final.name}.tmp")
        steps: list[Callable[[], None]] = [
            lambda: self._on_first_rank(lambda: files.update(_prepare(temporary, info))),
            lambda: self._write_tensors(temporary, staged, files),
            lambda: self._write_manifest(temporary, files),
            lambda: self._verify(temporary),
            lambda: self._on_first_rank(lambda: _rename(temporary, final)),
        ]
        for step in steps:
            problems = self._attempt(step)
            if problems:
                self._attempt(lambda: self._on_first_rank(lambda: fmt.remove_remains(self.checkpoints)))
                return problems
        for problem in self._attempt(lambda: self._on_first_rank(self._prune)):
            logger.warning("old checkpoints could not be removed: %s", problem)
        return []

    def _attempt(self, action: Callable[[], None]) -> list[str]:
        """Run ``action`` here and tell every rank what went wrong anywhere.

        Raises:
            RuntimeError: a rank was lost, so nothing can be agreed on.
            KeyboardInterrupt: Ctrl-C on a rank while DCP wrote.
        """
        problem = None
        try:
            action()
        except CheckpointException as error:  # DCP has told all ranks already
            if is_interrupt(error):
                raise KeyboardInterrupt from error
            problem = self._explain(error)
        except Exception as error:  # whatever the storage raises must not end the run
            if comm.is_communication_error(error):
                raise
            problem = f"rank {self.groups.rank}: {self._explain(error)}"
        found = comm.gather_objects(problem, self.group)
        return list(dict.fromkeys(problem for problem in found if problem is not None))

    def _explain(self, error: BaseException) -> str:
        """Return what went wrong, with the remedy where the disk is the cause."""
        rank, source = source_of(error)
        if isinstance(source, OSError) and not isinstance(source, WriteError) and source.errno:
            source = write_error(source.errno, source.filename or self.checkpoints, source.strerror)
        text = str(source) if isinstance(source, MoeppError) else cause(source)
        return text if rank is None else f"rank {rank}: {text}"

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        if self.groups.rank == 0:
            self._check_claim()
            action()

    def _write_tensors(self, temporary: Path, staged: dict[str, Tensor], files: dict[str, FileEntry]) -> None:
        files.update(write_tensors(temporary, staged, self.group))
        staged.clear()  # what is on the disk need not stay in memory while it is verified

    def _write_manifest(self, temporary: Path, files: dict[str, FileEntry]) -> None:
        """Bring together what each rank meant to write."""
        for part in comm.gather_objects(dict(files), self.group):
            files.update(part)
        self._on_first_rank(lambda: fmt.write_manifest(temporary, files))

    def _verify(self, temporary: Path) -> None:
        """Read everything back, each file on another rank than its writer where there is one."""
        problems = fmt.verify(temporary, (self.groups.rank, self.groups.world_size), from_disk=True)
        if problems:
            raise CheckpointError("; ".join(problems))

    def _prune(self) -> None:
        for path in fmt.prunable(self.checkpoints, self.cfg.keep, self.cfg.keep_every):
            fmt.remove(path)
            logger.info("removed old checkpoint %s (checkpoint.keep=%d)", path.name, self.cfg.keep)


def _prepare(temporary: Path, info: CheckpointInfo) -> dict[str, FileEntry]:
    make_own_folder(temporary.parent)  # somebody may have removed it
    fmt.remove_remains(temporary.parent)
    temporary.mkdir()
    return {fmt.INFO: fmt.write_durably(temporary / fmt.INFO, json.dumps(asdict(info), indent=2) + "\n")}


def _rename(temporary: Path, final: Path) -> None:
    if final.exists():
        fmt.archive_checkpoint(final)
    move(temporary, final)


def _log(report: SaveReport, final: Path) -> None:
    if report.problems:
        logger.error(
            "checkpoint at step %d FAILED, training goes on and earlier checkpoints are untouched: %s",
            report.step,
            "; ".join(report.problems),
        )
        return
    logger.info(
        "saved %s: %.1f MB, blocked training for %.2f s, finished after %.2f s",
        final,
        report.size / 1e6,
        report.blocked_seconds,
        report.total_seconds,
    )
