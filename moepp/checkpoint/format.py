"""What lies in ``checkpoints/``, and whether it is whole. Plain file operations, no torch.

checkpoints/step-00000100/    a whole checkpoint: it appears under this name only after it was verified
    info.json                 step, tokens, layout, configuration, versions
    .metadata, __<rank>_<n>.distcp    tensors, torch.distributed.checkpoint
    manifest.json             size and SHA-256 of every other file; written last
checkpoints/.step-00000100.tmp/       one being written or removed, or the remains of that
checkpoints/step-00000100.replaced-1/ one that the run has gone back behind: kept, but not part of the run any more
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moepp.checkpoint.info import CheckpointInfo, info_from
from moepp.errors import CheckpointError, MoeppError
from moepp.io import files
from moepp.io.untrusted import open_regular, printable, read_json, show

MANIFEST = "manifest.json"
INFO = "info.json"
INDEX = ".metadata"  # DCP's name for it
FORMAT = "moepp-checkpoint-1"
# Eight digits, from 10^8 steps on more: what checkpoint_name makes, and no other spelling of a number.
_STEP = r"step-([0-9]{8}|[1-9][0-9]{8,14})"
NAME = re.compile(_STEP)
_REPLACED = re.compile(_STEP + r"\.replaced-[0-9]{1,9}")
_FILE = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK, _MAX_JSON_BYTES = 1 << 22, 256 << 20


@dataclass(frozen=True)
class FileEntry:
    """What a manifest keeps of one file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return checkpoints by increasing step; folders being written are not among them."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def list_archived(checkpoints: Path) -> list[Path]:
    """Return archived checkpoints, see :func:`archive_checkpoint`."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _REPLACED.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    match = NAME.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path} is not named step-<8 or more digits>; name a folder in checkpoints/ of a run directory"
        )
    return int(match.group(1))


def checksum(path: Path, from_disk: bool = False) -> FileEntry:
    """Return the size and SHA-256 of a file; ``from_disk`` drops the system's copy in memory first, where it can."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def write_durably(path: Path, text: str) -> FileEntry:
    """Write a file and force it to the disk."""
    data = text.encode()
    files.write_whole(path, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, entries: dict[str, FileEntry]) -> None:
    """Write ``manifest.json``."""
    tree = {"format": FORMAT, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    write_durably(folder / MANIFEST, json.dumps(tree, indent=2) + "\n")


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """Return the entry of every file by name.

    Raises:
        CheckpointError: no such checkpoint, or a manifest that is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; name a checkpoint such as runs/NAME/checkpoints/step-00000100")
    file = path / MANIFEST
    if not file.exists():
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so it is not whole; use another checkpoint")
    manifest = read_json(file, _MAX_JSON_BYTES, CheckpointError, f"{MANIFEST} is damaged; use another checkpoint")
    try:
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {show(manifest['format'])}, expected {FORMAT!r}; use the version that wrote it"
            )
        return {name: _entry(name, entry) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {printable(error)}" if isinstance(error, KeyError) else printable(error)
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({reason}); use another checkpoint") from error


def _entry(name: str, entry: dict[str, Any]) -> FileEntry:
    if not _FILE.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"it names files outside the checkpoint, {show(name)}")
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"the size or SHA-256 of {name} is none")
    return FileEntry(size, sha256)


def verify(path: Path, share: tuple[int, int] = (0, 1), from_disk: bool = False) -> list[str]:
    """Return what is wrong with a checkpoint: a line per problem, empty when it is whole.

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
    """Return the contents of ``info.json``.

    Raises:
        CheckpointError: missing, damaged, or of another step than the folder's name says.
    """
    try:
        info = info_from(read_json(path / INFO, _MAX_JSON_BYTES, _Unreadable, "it must be whole"))
        if NAME.fullmatch(path.name) and info.step != step_of(path):
            raise ValueError(f"it says step {info.step:,}, and the folder is {path.name}")
        return info
    except (_Unreadable, ValueError) as error:
        raise CheckpointError(f"{path}: {INFO} cannot be read ({printable(error)}); use another checkpoint") from None


class _Unreadable(MoeppError):
    pass


def total_size(path: Path) -> int:
    """Return the size of all files of a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def prunable(checkpoints: Path, keep: int, keep_every: int) -> list[Path]:
    """Return what may be deleted: all but the ``keep`` newest (0: all) and multiples of ``keep_every`` steps."""
    if keep == 0:
        return []
    old = list_checkpoints(checkpoints)[:-keep]
    return [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]


def remove(path: Path) -> None:
    """Delete a checkpoint without ever showing half of it: under its temporary name, which no reader looks at."""
    doomed = path.with_name(f".{path.name}.tmp")
    _remove_tree(doomed)
    files.move(path, doomed)
    _remove_tree(doomed)


def remove_remains(checkpoints: Path) -> None:
    """Delete what interrupted saves and removals left behind. Only for who holds the run directory's lock."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step-*.tmp"):
            with contextlib.suppress(OSError):
                _remove_tree(path)


def _remove_tree(path: Path) -> None:
    """Remove a folder if it is there; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def archive_checkpoint(path: Path) -> Path:
    """Take a checkpoint out of the run without deleting it; returns its new place."""
    n = 1
    while os.path.lexists(place := path.with_name(f"{path.name}.replaced-{n}")):
        n += 1
    files.move(path, place)
    return place
