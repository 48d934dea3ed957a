"""Which checkpoint a run continues from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from moepp.checkpoint.format import CheckpointInfo, list_checkpoints, read_info, step_of, verify
from moepp.config import Config, to_dict
from moepp.config.compare import breaking_differences, other_differences
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import CheckpointError

logger = logging.getLogger(__name__)

DataDifferences = Callable[[CheckpointInfo], list[str]]
"""A line per dataset of the run that is not the one at its place in a checkpoint."""


def choose_checkpoint(
    cfg: Config, checkpoints: Path, groups: ParallelGroups, data_differences: DataDifferences
) -> Path | None:
    """Return the checkpoint that ``run.resume`` means, verified, or ``None`` to start from the beginning; collective.

    ``auto`` takes the newest one that verifies and falls back past damaged ones with a warning; ``never`` takes none.

    Raises:
        CheckpointError: an explicit path does not verify, every checkpoint is damaged, or the model, the data or the
            seed differ from the saved run's (a line per difference).
    """
    if cfg.run.resume == "never":
        return None
    if cfg.run.resume == "auto":
        chosen = newest_checkpoint(checkpoints, groups)
    else:
        chosen = _explicit(Path(cfg.run.resume).expanduser(), groups)
    if chosen is not None:
        comm.on_first_rank(lambda: _check_same_run(cfg, chosen, data_differences))
    return chosen


def continues_same_data(cfg: Config, checkpoints: Path, data_differences: DataDifferences) -> bool:
    """Return whether the run was trained on the data of ``cfg``, wherever stored; call it before continuing.

    False where there is no checkpoint to compare with, or none that can be read.

    Raises:
        CheckpointError: it has trained on other data (a line per difference).
    """
    if cfg.run.resume == "never":
        return False
    own = [Path(cfg.run.resume).expanduser()] if cfg.run.resume != "auto" else list_checkpoints(checkpoints)
    for path in reversed(own):
        try:
            info = read_info(path)
        except CheckpointError:
            continue
        _refuse(path, data_differences(info))
        return True
    return False


def verify_together(path: Path, groups: ParallelGroups) -> list[str]:
    """Return every problem of a checkpoint, its files shared out over the ranks; collective."""
    found = comm.gather_objects(verify(path, (groups.rank, groups.world_size)), groups.world)
    return sorted({problem for part in found for problem in part})


def _explicit(path: Path, groups: ParallelGroups) -> Path:
    problems = verify_together(path, groups)
    if problems:
        raise CheckpointError(f"run.resume={path} does not verify: {'; '.join(problems)}; name another checkpoint")
    return path.resolve()


def newest_checkpoint(checkpoints: Path, groups: ParallelGroups) -> Path | None:
    """Return the newest checkpoint that verifies, ``None`` where there is none at all; collective.

    Raises:
        CheckpointError: there are some, and all of them are damaged.
    """
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


def _check_same_run(cfg: Config, path: Path, data_differences: DataDifferences) -> None:
    info = read_info(path)
    old, new = info.config, to_dict(cfg)
    untrained = info.step == 0
    breaking = breaking_differences(old, new, untrained=untrained, same_data=True)
    breaking += data_differences(info)
    _refuse(path, breaking)
    logger.info("continuing from %s (step %d, %s tokens)", path, step_of(path), f"{info.tokens:,}")
    for difference in other_differences(old, new, untrained=untrained, same_data=True):
        logger.info("changed since the checkpoint: %s", difference)


def _refuse(path: Path, breaking: list[str]) -> None:
    if breaking:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run; choose another run.name or run.dir, or undo:\n  "
            + "\n  ".join(breaking)
        )
