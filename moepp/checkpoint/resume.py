"""Which checkpoint a run continues from."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from moepp import comm
from moepp.checkpoint.format import list_checkpoints, read_info, step_of, verify
from moepp.config import Config, to_dict
from moepp.config.compare import breaking_differences, other_differences
from moepp.data.indexed import IndexedFile, open_indexed
from moepp.errors import CheckpointError
from moepp.parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)

_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 4096  # how much of a .bin without a manifest is looked at


def choose_checkpoint(cfg: Config, checkpoints: Path, groups: ParallelGroups) -> Path | None:
    """The checkpoint that ``run.resume`` means, verified, or ``None`` to start from the beginning; collective.

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
        comm.run_together(lambda: _check_same_run(cfg, chosen) if groups.rank == 0 else None)
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


def newest_checkpoint(checkpoints: Path, groups: ParallelGroups) -> Path | None:
    """The newest checkpoint that verifies, ``None`` where there is none at all; collective.

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


def identify_data(cfg: Config) -> dict[str, dict[str, Any]]:
    """What tells a dataset from another one under the same name, by path."""
    return {prefix: _identify(open_indexed(prefix)) for prefix in cfg.data.paths}


def _identify(file: IndexedFile) -> dict[str, Any]:
    content = file.manifest.bin_sha256 if file.manifest is not None else _sampled_digest(Path(f"{file.prefix}.bin"))
    return {"tokens": file.num_tokens, "documents": file.documents, "lengths": file.fingerprint(), "content": content}


def _sampled_digest(path: Path) -> str:
    """A digest of blocks spread evenly over a file: cheap for any size, and different for other text."""
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with path.open("rb") as stream:
        for i in range(_SAMPLED_BLOCKS):
            stream.seek(i * max(size - _BLOCK_BYTES, 0) // max(_SAMPLED_BLOCKS - 1, 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _data_differences(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """A line per key that changed of each dataset; paths that changed are among the configuration's differences."""
    return [
        f"{path} {key}: {old[path][key]} -> {new[path][key]}"
        for path in old.keys() & new.keys()
        for key in old[path]
        if old[path][key] != new[path][key]
    ]


def _check_same_run(cfg: Config, path: Path) -> None:
    info = read_info(path)
    old, new = info.config, to_dict(cfg)
    untrained = info.step == 0
    breaking = breaking_differences(old, new, untrained=untrained)
    breaking += _data_differences(info.run_state["data"], identify_data(cfg))
    if breaking:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run; choose another run.name or run.dir, or undo:\n  "
            + "\n  ".join(breaking)
        )
    logger.info("continuing from %s (step %d, %s tokens)", path, step_of(path), f"{info.tokens:,}")
    for difference in other_differences(old, new, untrained=untrained):
        logger.info("changed since the checkpoint: %s", difference)
