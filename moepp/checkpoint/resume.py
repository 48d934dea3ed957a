"""Which checkpoint a run continues from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from moepp.checkpoint.format import CheckpointInfo, list_checkpoints, read_info, step_of, verify
from moepp.config import Config, to_dict
from moepp.config.compare import breaking_differences, other_differences
from moepp.data.identity import sampled_digest
from moepp.data.indexed import IndexedFile, open_indexed
from moepp.data.manifest import sha256_of
from moepp.data.vocabulary import read_vocabulary
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import CheckpointError

logger = logging.getLogger(__name__)

_SHA256_DIGITS = 64


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


def continues_same_data(cfg: Config, checkpoints: Path) -> bool:
    """Whether the run has trained on the data of ``cfg``, wherever they lie; to be called before it is continued.

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
        _refuse(path, _data_differences(info, cfg))
        return True
    return False


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
    """What tells a dataset from another one, wherever it lies, by path."""
    return {prefix: _identify(open_indexed(prefix)) for prefix in cfg.data.paths}


def _identify(file: IndexedFile, content: str | None = None) -> dict[str, Any]:
    if content is None:
        content = file.manifest.bin_sha256 if file.manifest is not None else sampled_digest(_bin(file))
    return {"tokens": file.num_tokens, "documents": file.documents, "lengths": file.fingerprint(), "content": content}


def _identify_like(old: dict[str, Any], file: IndexedFile) -> dict[str, Any]:
    """As :func:`_identify`, with the digest that ``old`` has: a copy may have lost its manifest, or got one."""
    had_manifest = len(str(old.get("content"))) == _SHA256_DIGITS
    if had_manifest == (file.manifest is not None):
        return _identify(file)
    return _identify(file, sha256_of(str(_bin(file))) if had_manifest else sampled_digest(_bin(file)))


def _bin(file: IndexedFile) -> Path:
    return Path(f"{file.prefix}.bin")


def _data_differences(info: CheckpointInfo, cfg: Config) -> list[str]:
    """A line per dataset that is another one than at its place in the checkpoint's run, and for the tokenizer."""
    old = info.run_state.data
    if not old:
        return []  # nothing was trained on: any data may follow
    old_paths, new_paths = list(info.config["data"]["paths"]), list(cfg.data.paths)
    if len(old_paths) != len(new_paths):
        return [f"data.paths: {old_paths} -> {new_paths}"]
    found = []
    for old_path, path in zip(old_paths, new_paths, strict=True):
        where = path if path == old_path else f"{old_path} -> {path}"
        was = old.get(old_path, {})
        now = _identify_like(was, open_indexed(path))
        found += [f"data.paths: {where}: {key} {was[key]} -> {now[key]}" for key in was if was[key] != now.get(key)]
    vocabulary = read_vocabulary(cfg)
    for name in ("eod_id", "tokenizer_sha256"):
        was, now = getattr(info, name), getattr(vocabulary, name)
        if was is not None and now is not None and was != now:
            found.append(f"{'data.tokenizer' if name == 'tokenizer_sha256' else 'data.paths'}: {name} {was} -> {now}")
    return found or _unknown_tokenizer(info, cfg)


def _unknown_tokenizer(info: CheckpointInfo, cfg: Config) -> list[str]:
    """Another tokenizer file where neither the checkpoint nor a manifest tells which tokenizer made the data."""
    was, now = info.config["data"].get("tokenizer"), cfg.data.tokenizer
    is_known = info.tokenizer_sha256 is not None or any(open_indexed(path).manifest for path in cfg.data.paths)
    if is_known or was is None or now is None or was == now:
        return []
    return [f"data.tokenizer: {was} -> {now}"]


def _check_same_run(cfg: Config, path: Path) -> None:
    info = read_info(path)
    old, new = info.config, to_dict(cfg)
    untrained = info.step == 0
    breaking = breaking_differences(old, new, untrained=untrained, same_data=True)
    breaking += _data_differences(info, cfg)
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
