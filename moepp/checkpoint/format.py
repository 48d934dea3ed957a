"""What lies in ``checkpoints/``, and whether it is whole. Plain file operations, no torch.

checkpoints/step-00000100/    a whole checkpoint: it appears under this name only after it was verified
    info.json                 step, tokens, layout, configuration, versions
    .metadata, __<rank>_<n>.distcp    tensors, torch.distributed.checkpoint
    manifest.json             size and SHA-256 of every other file; written last
checkpoints/.step-00000100.tmp/       one being written, or the remains of one that was interrupted
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.errors import CheckpointError

MANIFEST = "manifest.json"
INFO = "info.json"
FORMAT = "moepp-checkpoint-1"
_NAME = re.compile(r"step-(\d{8})")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class CheckpointInfo:
    """Contents of ``info.json``.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        layout: world_size, expert, engine, zero_stage, precision of the run that saved it.
        config: the resolved configuration.
        versions: package versions.
        run_state: what the trainer and the metrics keep besides tensors.
    """

    step: int
    tokens: int
    layout: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, Any]
    run_state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints by increasing step; folders being written are not among them."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named step-<8 digits>; name a folder in checkpoints/ of a run directory")
    return int(match.group(1))


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as a manifest keeps them."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def write_durably(path: Path, text: str) -> None:
    """Write a file and force it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and SHA-256.

    Raises:
        CheckpointError: no such checkpoint, or a manifest that is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; name a checkpoint such as runs/NAME/checkpoints/step-00000100")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']!r}, expected {FORMAT!r}; use the version that wrote it"
            )
        files = manifest["files"].items()
        return {str(name): {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in files}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so it is not whole; use another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error}); use another checkpoint") from error


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint: a line per problem, empty when it is whole.

    Args:
        path: the checkpoint's folder.
        share: (i, n): check every n-th file from the i-th, so that n ranks together check all.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name in sorted(manifest)[share[0] :: share[1]]:
        file, expected = path / name, manifest[name]
        if Path(name).name != name:
            problems.append(f"{name}: not a plain file name")
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name}: {file.stat().st_size} bytes, expected {expected['size']}")
        else:
            problems += _verify_content(file, expected["sha256"])
    if share[0] == 0 and not {INFO, ".metadata"} <= manifest.keys():
        problems.append(f"{MANIFEST} lists no {INFO} or .metadata")
    return problems


def _verify_content(file: Path, sha256: str) -> list[str]:
    try:
        return [] if checksum(file)["sha256"] == sha256 else [f"{file.name}: content changed (SHA-256 differs)"]
    except OSError as error:
        return [f"{file.name}: cannot be read ({error.strerror})"]


def read_info(path: Path) -> CheckpointInfo:
    """Contents of ``info.json``.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return CheckpointInfo(**json.loads((path / INFO).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {INFO} cannot be read ({error}); use another checkpoint") from error


def total_size(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def prunable(checkpoints: Path, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints that may go: all but the ``keep`` newest (0: keep all) and the multiples of ``keep_every`` steps."""
    if keep == 0:
        return []
    old = list_checkpoints(checkpoints)[:-keep]
    return [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]
