"""Which checkpoint a run continues from."""

from __future__ import annotations

import logging
from pathlib import Path

from moepp import comm
from moepp.checkpoint.format import list_checkpoints, read_info, step_of, verify
from moepp.config import Config, to_dict
from moepp.config.compare import breaking_differences, other_differences
from moepp.errors import CheckpointError
from moepp.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)


def choose_checkpoint(cfg: Config, checkpoints: Path, groups: ParallelGroups) -> Path | None:
    """The checkpoint that ``run.resume`` means, verified, or ``None`` to start from the beginning; collective.

    ``auto`` takes the newest one that verifies and falls back past damaged ones with a warning; ``never`` takes none.

    Raises:
        CheckpointError: an explicit path does not verify, every checkpoint is damaged, or the model, the data or the
            seed differ from the saved run's (a line per difference).
    """
    if cfg.run.resume == "never":
        return None
    chosen = _explicit(Path(cfg.run.resume), groups) if cfg.run.resume != "auto" else _newest(checkpoints, groups)
    if chosen is not None:
        comm.run_together(lambda: _check_same_run(cfg, chosen, groups))
    return chosen


def verify_together(path: Path, groups: ParallelGroups) -> list[str]:
    """Every problem of a checkpoint, its files shared out over the ranks; collective."""
    found = comm.gather_objects(verify(path, (groups.rank, groups.world_size)), groups.world)
    return sorted({problem for part in found for problem in part})


def _explicit(path: Path, groups: ParallelGroups) -> Path:
    problems = verify_together(path, groups)
    if problems:
        raise CheckpointError(f"run.resume={path} does not verify: {'; '.join(problems)}; name another checkpoint")
    return path.resolve()


def _newest(checkpoints: Path, groups: ParallelGroups) -> Path | None:
    candidates = comm.broadcast_object(list_checkpoints(checkpoints), groups.world)
    for path in reversed(candidates):
        problems = verify_together(path, groups)
        if not problems:
            return path
        logger.warning("checkpoint %s is damaged and passed over: %s", path.name, "; ".join(problems))
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {checkpoints} verifies; restore one, or start a new run "
            "with another run.name"
        )
    return None


def _check_same_run(cfg: Config, path: Path, groups: ParallelGroups) -> None:
    info = read_info(path)
    old, new = info.config, to_dict(cfg)
    breaking = breaking_differences(old, new)
    if breaking:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run; undo these changes or start a new run:\n  "
            + "\n  ".join(breaking)
        )
    if groups.rank == 0:
        logger.info("continuing from %s (step %d, %s tokens)", path, step_of(path), f"{info.tokens:,}")
        for difference in other_differences(old, new):
            logger.info("changed since the checkpoint: %s", difference)
