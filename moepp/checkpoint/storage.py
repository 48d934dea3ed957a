"""torch.distributed.checkpoint storage, read without executing anything that a checkpoint brings along."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moepp import comm
from moepp.errors import CheckpointError

# DCP pickles its index. These are all the names that it needs; anything else is refused.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
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


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
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
            with (path / ".metadata").open("rb") as stream:
                index = _IndexUnpickler(io.BytesIO(stream.read())).load()
        except Exception as error:  # unpickling damaged bytes can raise almost anything
            raise CheckpointError(f"{path}: .metadata cannot be read ({error}); use another checkpoint") from error
        if not isinstance(index, Metadata):
            raise CheckpointError(f"{path}: .metadata is not a checkpoint index; use another checkpoint")
        self._index = index

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of everything stored."""
        return {key: tuple(getattr(entry, "size", ())) for key, entry in self._index.state_dict_metadata.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Copy the stored tensors into ``targets`` in place, converting dtype and device.

        Raises:
            CheckpointError: a key is missing or has another shape.
        """
        shapes = self.shapes
        for key, target in targets.items():
            if key not in shapes:
                raise CheckpointError(f"{self.path} has no {key}; it was saved by another model or optimizer")
            if shapes[key] != tuple(target.shape):
                raise CheckpointError(
                    f"{self.path}: {key} has shape {list(shapes[key])}, expected {list(target.shape)}; "
                    "use the configuration that it was saved with"
                )
        load(dict(targets), storage_reader=_Reader(self.path, self._index), no_dist=True)


class _Reader(FileSystemReader):
    """DCP's reader with an index that is in memory already."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        return self._index


def write_tensors(path: Path, tensors: dict[str, Tensor], group: comm.Group | None) -> None:
    """Write every rank's ``tensors`` (no key on two ranks) into the existing folder ``path``; collective.

    Raises:
        Exception: whatever DCP raises, on every rank, when any rank fails.
    """
    writer = FileSystemWriter(path, sync_files=True, overwrite=False)
    save(tensors, storage_writer=writer, process_group=group, no_dist=not torch.distributed.is_initialized())
