"""torch.distributed.checkpoint storage, read without executing anything that a checkpoint brings along."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moepp import comm
from moepp.checkpoint.format import INDEX, FileEntry
from moepp.errors import CheckpointError

# DCP pickles its index. These are all the names that it needs for tensors; anything else is refused, entries that are
# not tensors (BytesStorageMetadata) above all: DCP would unpickle what they refer to.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
}


def _memory_format(owner: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """Stands for ``getattr``, with which Python 3.11.2, say, pickles members of an enumeration; for one alone."""
    if owner is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"getattr of {owner!r} is not part of a checkpoint index")
    return _MEM_FORMAT_ENCODING[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _memory_format
        if global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not part of a checkpoint index")
        return super().find_class(module_name, global_name)


class TensorReader:
    """Fills tensors from a checkpoint, any subset of its keys, without communication."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: it is missing, damaged, or refers to anything but tensors and their places.
        """
        self.path = path
        try:
            with (path / INDEX).open("rb") as stream:
                index = _IndexUnpickler(io.BytesIO(stream.read())).load()
            _require_plain_tensors(index)
        except Exception as error:  # unpickling damaged bytes can raise almost anything
            raise CheckpointError(f"{path}: {INDEX} cannot be read ({error}); use another checkpoint") from error
        self._index = index
        self.shapes = {key: tuple(entry.size) for key, entry in index.state_dict_metadata.items()}
        """Key -> shape of everything stored."""

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy the stored tensors into ``targets`` in place, converting dtype and device.

        Raises:
            CheckpointError: a key is missing or has another shape, or its file cannot be read.
        """
        for key, target in targets.items():
            if key not in self.shapes:
                raise CheckpointError(f"{self.path} has no {key}; it was saved by another model or optimizer")
            if self.shapes[key] != tuple(target.shape):
                raise CheckpointError(
                    f"{self.path}: {key} has shape {list(self.shapes[key])}, expected {list(target.shape)}; "
                    "use the configuration that it was saved with"
                )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
                load(dict(targets), storage_reader=_Reader(self.path, self._index), no_dist=True)
        except (Exception, CheckpointException) as error:  # DCP's own is no Exception; tensors are read weights-only
            raise CheckpointError(f"{self.path} cannot be read: {cause(error)}; use another checkpoint") from error


def _require_plain_tensors(index: Any) -> None:
    """Raise ValueError unless the index holds tensors in files of the checkpoint's own folder, and nothing else."""
    if not isinstance(index, Metadata):
        raise ValueError("it is not a checkpoint index")
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{key} is not a tensor")
    for place in index.storage_data.values():
        name = place.relative_path
        if Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise ValueError(f"it refers to {name!r}, which is not a plain file of the checkpoint")


def cause(error: BaseException) -> str:
    """What went wrong, in one line; DCP wraps each rank's exception in one with a traceback."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (error, _) = next(iter(failures.items()))
        return f"rank {rank}: {cause(error)}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class _Reader(FileSystemReader):
    """DCP's reader with an index that is in memory already."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        return self._index


def write_tensors(path: Path, tensors: dict[str, Tensor], group: comm.Group | None) -> dict[str, FileEntry]:
    """Write every rank's ``tensors`` (no key on two ranks) into the existing folder ``path``; collective.

    Returns:
        Size and checksum of the files that this rank has written, of the bytes as they left memory.

    Raises:
        Exception: what failed on this rank.
        CheckpointException: what failed on another one (or, on rank 0, here).
    """
    files = _HashingFileSystem()
    writer = FileSystemWriter(path, sync_files=False, overwrite=False)
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
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def close(self) -> None:
        """Everything is on the disk afterwards. (DCP's own fsync comes before the last flush.)"""
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
            except RuntimeError as error:  # torch.save hides what the disk said
                raise (hashing.error or error) from None
            hashing.close()
        self.entries[Path(path).name] = hashing.entry

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)
