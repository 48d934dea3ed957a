"""What lies in ``checkpoints/``, and whether it is whole. Plain file operations, no torch.

checkpoints/step-00000100/    a whole checkpoint: it appears under this name only after it was verified
    info.json                 step, tokens, layout, configuration, versions
    .metadata, __<rank>_<n>.distcp    tensors, torch.distributed.checkpoint
    manifest.json             size and SHA-256 of every other file; written last
checkpoints/.step-00000100.tmp/       one being written or removed, or the remains of that
checkpoints/step-00000100.replaced-1/ one that the run has gone back behind: kept, but not part of the run any more
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moepp.errors import CheckpointError

MANIFEST = "manifest.json"
INFO = "info.json"
INDEX = ".metadata"  # DCP's name for it
FORMAT = "moepp-checkpoint-1"
_NAME = re.compile(r"step-(\d{8})")
_REPLACED = re.compile(r"step-(\d{8})\.replaced-\d+")
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


@dataclass(frozen=True)
class FileEntry:
    """What a manifest keeps of one file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints by increasing step; folders being written are not among them."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def list_replaced(checkpoints: Path) -> list[Path]:
    """Checkpoints that were set aside, see :func:`set_aside`."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if _REPLACED.fullmatch(p.name) and p.is_dir())


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named step-<8 digits>; name a folder in checkpoints/ of a run directory")
    return int(match.group(1))


def checksum(path: Path, from_disk: bool = False) -> FileEntry:
    """Size and SHA-256 of a file; ``from_disk`` drops the system's copy in memory first, where it can."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def write_durably(path: Path, text: str) -> FileEntry:
    """Write a file and force it to the disk."""
    data = text.encode()
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, files: dict[str, FileEntry]) -> None:
    """Write ``manifest.json``."""
    tree = {"format": FORMAT, "files": {name: asdict(files[name]) for name in sorted(files)}}
    write_durably(folder / MANIFEST, json.dumps(tree, indent=2) + "\n")
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """Entry of every file by name.

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
        if any(Path(name).name != name for name, _ in files):
            raise ValueError("it names files outside the checkpoint")
        return {str(name): FileEntry(int(file["size"]), str(file["sha256"])) for name, file in files}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so it is not whole; use another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error}); use another checkpoint") from error


def verify(path: Path, share: tuple[int, int] = (0, 1), from_disk: bool = False) -> list[str]:
    """What is wrong with a checkpoint: a line per problem, empty when it is whole.

    Args:
        path: the checkpoint's folder.
        share: (i, n): check every n-th file from the i-th, so that n ranks together check all.
        from_disk: do not be content with what the system still has in memory.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name in sorted(manifest)[share[0] :: share[1]]:
        problems += _verify_file(path / name, manifest[name], from_disk)
    if share[0] == 0 and not {INFO, INDEX} <= manifest.keys():
        problems.append(f"{MANIFEST} lists no {INFO} or no {INDEX}")
    return problems


def _verify_file(file: Path, expected: FileEntry, from_disk: bool) -> list[str]:
    try:
        if not file.is_file():
            return [f"{file.name}: missing"]
        if file.stat().st_size != expected.size:
            return [f"{file.name}: {file.stat().st_size} bytes, expected {expected.size}"]
        if checksum(file, from_disk) != expected:
            return [f"{file.name}: content changed (SHA-256 differs)"]
    except OSError as error:
        return [f"{file.name}: cannot be read ({error.strerror})"]
    return []


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


def remove(path: Path) -> None:
    """Delete a checkpoint without ever showing half of it: under its temporary name, which no reader looks at."""
    doomed = path.with_name(f".{path.name}.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_remains(checkpoints: Path) -> None:
    """Delete what interrupted saves and removals left behind. Only for who holds the run directory's lock."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Take a checkpoint out of the run without deleting it; returns its new place."""
    n = 1
    while (place := path.with_name(f"{path.name}.replaced-{n}")).exists():
        n += 1
    path.rename(place)
    return place
