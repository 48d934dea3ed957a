"""Traces of chosen optimizer steps by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moepp.config.schema import ProfileConfig
from moepp.io import files
from moepp.io.untrusted import printable

logger = logging.getLogger(__name__)

FOLDER = "profile"


class StepProfiler:
    """Writes ``<run_dir>/profile/step-<8 digits>-rank-<rank>.json`` for the chosen steps and ranks.

    Args:
        cfg: steps and ranks.
        run_dir: run directory.
        rank: this rank.
    """

    def __init__(self, cfg: ProfileConfig, run_dir: Path, rank: int) -> None:
        self._steps = frozenset(cfg.steps) if rank in cfg.ranks else frozenset[int]()
        self._folder, self._rank, self._hidden = run_dir / FOLDER, rank, f".rank-{rank}-"
        if self._steps:
            self._remove_remains()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile what runs within it, if optimizer step ``number`` (from 1) was asked for.

        A trace that cannot be written is warned of, and ends nothing.
        """
        if number not in self._steps:
            yield
            return
        with torch.profiler.profile(activities=_activities()) as profile:
            yield
        target = self._folder / f"step-{number:08d}-rank-{self._rank}.json"
        try:
            self._write(profile, target)
        except (OSError, RuntimeError, ValueError) as error:  # a full disk, or what torch makes of one
            reason = printable(" ".join(str(error).split()), 300)
            logger.warning("step %d was profiled, but its trace is not kept; training goes on: %s", number, reason)
            return
        logger.info("step %d was profiled, which made it slower: %s", number, target)

    def _write(self, profile: torch.profiler.profile, target: Path) -> None:
        files.make_own_folder(self._folder)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=self._hidden) as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            content = trace.read_bytes()
            if not content[-64:].rstrip().endswith(b"}"):  # torch does not notice a disk that is full
                raise ValueError(f"torch wrote {len(content):,} bytes of it, and not its end")
            files.write_whole(target, content)

    def _remove_remains(self) -> None:
        """Remove what a process of this rank left that was killed while it wrote a trace."""
        if not self._folder.is_symlink():
            for remains in self._folder.glob(f"{self._hidden}*"):
                shutil.rmtree(remains, ignore_errors=True)


def _activities() -> list[torch.profiler.ProfilerActivity]:
    return sorted(torch.profiler.supported_activities(), key=str)
