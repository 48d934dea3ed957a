"""Traces of chosen optimizer steps by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moepp.config.schema import ProfileConfig
from moepp.io import files

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
        self._folder, self._rank = run_dir / FOLDER, rank

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile what runs within it, if optimizer step ``number`` (from 1) was asked for."""
        if number not in self._steps:
            yield
            return
        with torch.profiler.profile(activities=_activities()) as profile:
            yield
        target = self._folder / f"step-{number:08d}-rank-{self._rank}.json"
        files.make_own_folder(self._folder)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            files.write_whole(target, trace.read_bytes())
        logger.info("step %d was profiled, which made it slower: %s", number, target)


def _activities() -> list[torch.profiler.ProfilerActivity]:
    return sorted(torch.profiler.supported_activities(), key=str)
