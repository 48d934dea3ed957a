"""Tensors of a checkpoint on the disk, in the layout of torch.distributed.checkpoint (DCP).

DCP writes them. They are read without it: its reader unpickles the index.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from moepp.checkpoint.archive import read_tensor
from moepp.checkpoint.format import FileEntry
from moepp.checkpoint.index import StoredTensor, read_index
from moepp.distributed import comm
from moepp.errors import CheckpointError
from moepp.io.untrusted import open_regular, printable


@dataclass(frozen=True)
class Part:
    """One of ``count`` equal parts of a tensor along ``dim``."""

    dim: int
    index: int
    count: int

    def whole_shape(self, part: Tensor) -> list[int]:
        """Return the shape of the tensor that ``part`` is of."""
        return [size * self.count if dim == self.dim else size for dim, size in enumerate(part.shape)]

    def of(self, whole: Tensor) -> Tensor:
        """Return the part, a view."""
        return whole.chunk(self.count, self.dim)[self.index]


class TensorReader:
    """Fills tensors from a checkpoint, any subset of its keys, without communication."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: it is missing, damaged, or refers to anything but tensors and their places.
        """
        self.path = path
        self._tensors = read_index(path)
        self.shapes = {key: stored.shape for key, stored in self._tensors.items()}
        """Key -> shape of everything stored."""
        self.dtypes = {key: stored.dtype for key, stored in self._tensors.items()}

    def fill(self, targets: dict[str, Tensor], part: Part | None = None) -> None:
        """Copy the stored tensors into ``targets`` in place, converting dtype and device.

        Args:
            targets: by key.
            part: what the targets are of the stored tensors; None: all.

        Raises:
            CheckpointError: a key is missing or has another shape, or its file cannot be read.
        """
        by_file: dict[str, list[tuple[StoredTensor, str]]] = {}
        for key, target in targets.items():
            if key not in self.shapes:
                raise CheckpointError(f"{self.path} has no {key}; it was saved by another model or optimizer")
            stored = self._tensors[key]
            expected = list(target.shape) if part is None else part.whole_shape(target)
            if list(stored.shape) != expected:
                raise CheckpointError(
                    f"{self.path}: {key} has shape {list(stored.shape)}, expected {expected}; "
                    "use the configuration that it was saved with"
                )
            by_file.setdefault(stored.file, []).append((stored, key))
        for name, places in by_file.items():
            try:
                with open_regular(self.path / name) as stream:
                    for stored, key in sorted(places, key=lambda place: place[0].offset):
                        tensor = read_tensor(stream, stored)
                        targets[key].detach().copy_(tensor if part is None else part.of(tensor))
            except (OSError, ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: no memory
                problem = f"{name}: {printable(error) or type(error).__name__}"
                raise CheckpointError(f"{self.path} cannot be read: {problem}; use another checkpoint") from error


def source_of(error: BaseException) -> tuple[int | None, BaseException]:
    """Return the original exception and its rank: DCP wraps each rank's exception and traceback in its own."""
    failures = getattr(error, "failures", None)
    if not failures:
        return None, error
    rank, (inner, _) = next(iter(failures.items()))
    return rank, inner


def is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C ended the work of a rank: DCP catches that as well."""
    failures = getattr(error, "failures", None) or {}
    return any(isinstance(inner, KeyboardInterrupt) for inner, _ in failures.values())


def cause(error: BaseException) -> str:
    """Return what went wrong, in one line."""
    rank, error = source_of(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return text if rank is None else f"rank {rank}: {text}"


def write_tensors(path: Path, tensors: dict[str, Tensor], group: comm.Group | None) -> dict[str, FileEntry]:
    """Write every rank's ``tensors`` (no key on two ranks) into the existing folder ``path``; collective.

    Returns:
        Size and checksum of the files that this rank has written, of the bytes as they left memory.

    Raises:
        Exception: what failed on this rank.
        CheckpointException: what failed on another one (or, on rank 0, here).
    """
    files = _HashingFileSystem()
    # Nothing to copy ahead: the tensors are in host memory, and copying ahead would wait for the training's stream.
    writer = FileSystemWriter(path, sync_files=False, overwrite=False, per_thread_copy_ahead=0)
    writer.fs = files
    save(tensors, storage_writer=writer, process_group=group, no_dist=not torch.distributed.is_initialized())
    return files.entries


class _HashingStream:
    """A file being written, as DCP uses one, that keeps the checksum of everything on its way to the disk."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0
        self.tell, self.flush = stream.tell, stream.flush
        self.error: OSError | KeyboardInterrupt | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
            raise

    def close(self) -> None:
        """Close the stream once all of it is on the disk: DCP's own fsync comes before the last flush."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._size, self._digest.hexdigest())


class _HashingFileSystem(FileSystem):
    """DCP's access to files, with a record of what was written."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # pyright: ignore
        with super().create_stream(path, mode) as stream:
            hashing = _HashingStream(cast(BinaryIO, stream))
            try:
                yield cast(io.IOBase, hashing)
            except RuntimeError as error:  # torch.save hides what the disk or the user said
                raise (hashing.error or error) from None
            hashing.close()
        self.entries[Path(path).name] = hashing.entry

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)
