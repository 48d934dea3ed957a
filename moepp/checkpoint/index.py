"""Where the tensors of a checkpoint lie: torch.distributed.checkpoint's index, read as data and checked field by field.

The index is a pickle of DCP's ``Metadata``. None of DCP's classes is touched in reading it, see
:mod:`moepp.checkpoint.inert_pickle`; every number is held against the files that it speaks of, so that what follows
(memory for a tensor, reading a file) is bounded by what lies on the disk.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepp.checkpoint.format import INDEX
from moepp.checkpoint.inert_pickle import Made, Name, Pairs, interpret
from moepp.errors import CheckpointError
from moepp.io.untrusted import printable, read_bytes, show

MAX_INDEX_BYTES = 512 << 20
MAX_OVERHEAD_BYTES = 64 << 10  # of the archive around a tensor
_MAX_DIMENSIONS, _MAX_KEY = 16, 1000
_DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp", re.ASCII)

DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
}
_METADATA = "torch.distributed.checkpoint.metadata."
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_MEMORY_FORMAT, _CONTIGUOUS = f"{_METADATA}_MEM_FORMAT_ENCODING", (0, "TORCH_CONTIGUOUS_FORMAT")
_LAYOUT = "torch.serialization._get_layout"
_NAMES = frozenset(
    {
        *(_METADATA + name for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata")),
        *(_METADATA + name for name in ("TensorProperties", "MetadataIndex", "StorageMeta")),
        *(_MEMORY_FORMAT, _STORAGE_INFO, _LAYOUT, "torch.Size", *DTYPES),
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),  # where it was saved; not looked at
        "builtins.getattr",  # with which Python 3.11.2, say, pickles members of an enumeration
    }
)


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor and its place: ``length`` bytes from ``offset`` of ``file`` are an archive that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by its key.

    Raises:
        CheckpointError: the index is missing or damaged, refers to anything but whole tensors in files of ``folder``,
            or contradicts their sizes.
    """
    data = read_bytes(folder / INDEX, MAX_INDEX_BYTES, CheckpointError, "use another checkpoint")
    try:
        tensors = _tensors(interpret(data, _NAMES, "a checkpoint index"))
        _require_places(folder, tensors)
    except (ValueError, OSError, MemoryError, RecursionError, OverflowError) as error:
        reason = printable(error, 300) or type(error).__name__
        raise CheckpointError(f"{folder}: {INDEX} cannot be read ({reason}); use another checkpoint") from None
    return tensors


def _tensors(index: Any) -> dict[str, StoredTensor]:
    if type(index) is not Made or index.name != f"{_METADATA}Metadata":
        raise ValueError("it is not a checkpoint index")
    optional = ("planner_data", "storage_meta", "version")  # of no use here, so not looked at
    metadata = _fields(index, f"{_METADATA}Metadata", ("state_dict_metadata", "storage_data"), optional)
    described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, entry in _pairs(metadata["state_dict_metadata"], "state_dict_metadata"):
        key = _key(key)
        if key in described:
            raise ValueError(f"{show(key)} appears twice")
        described[key] = _shape_and_dtype(key, entry)
    tensors: dict[str, StoredTensor] = {}
    for place, info in _pairs(metadata["storage_data"], "storage_data"):
        key = _place(place, described)
        if key in tensors:
            raise ValueError(f"{show(key)} is stored twice")
        tensors[key] = StoredTensor(*described[key], *_extent(key, info))
    if lost := described.keys() - tensors.keys():
        raise ValueError(f"it does not say where {show(min(lost))} is stored")
    return {key: tensors[key] for key in described}


def _shape_and_dtype(key: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype]:
    if type(entry) is not Made or entry.name != f"{_METADATA}TensorStorageMetadata":
        raise ValueError(f"{show(key)} is not a tensor")
    tensor = _fields(entry, entry.name, ("properties", "size", "chunks"))
    shape = _size(tensor["size"], key)
    dtype = _dtype(key, tensor["properties"])
    chunks = tensor["chunks"]
    if type(chunks) is not list or len(chunks) != 1:
        raise ValueError(f"{show(key)} is not stored in one piece")
    chunk = _fields(chunks[0], f"{_METADATA}ChunkStorageMetadata", ("offsets", "sizes"))
    if _size(chunk["sizes"], key) != shape or _size(chunk["offsets"], key) != (0,) * len(shape):
        raise ValueError(f"the piece that is stored of {show(key)} is not the whole tensor")
    return shape, dtype


def _dtype(key: str, properties: Any) -> torch.dtype:
    """DCP's state of the properties: dtype, layout, requires_grad, memory format, pin_memory."""
    is_made = type(properties) is Made and properties.name == f"{_METADATA}TensorProperties" and properties.args == ()
    state = properties.state if is_made else None
    if type(state) is not tuple or len(state) != 5:
        raise ValueError(f"the properties of {show(key)} are damaged")
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if type(dtype) is not Name or dtype not in DTYPES:
        raise ValueError(f"{show(key)} has no dtype that a checkpoint uses")
    is_strided = _is_call(layout, _LAYOUT) and layout.args == ("torch.strided",)
    if not is_strided or not _is_contiguous(memory_format):
        raise ValueError(f"{show(key)} is not a plain, contiguous tensor")
    if type(requires_grad) is not bool or type(pin_memory) is not bool:
        raise ValueError(f"the properties of {show(key)} are damaged")
    return DTYPES[dtype]


def _is_contiguous(memory_format: Any) -> bool:
    if _is_call(memory_format, "builtins.getattr"):
        owner, *member = memory_format.args or (None,)
        if type(owner) is not Name or owner != _MEMORY_FORMAT:
            raise ValueError(f"getattr of {show(owner)} is not part of a checkpoint index")
    else:
        member = memory_format.args if _is_call(memory_format, _MEMORY_FORMAT) else ()
    return len(member) == 1 and type(member[0]) in (int, str) and member[0] in _CONTIGUOUS


def _is_call(value: Any, name: str) -> bool:
    return type(value) is Made and value.name == name and not value.has_state


def _place(place: Any, described: dict[str, Any]) -> str:
    """Return the key that a place is for."""
    fields = _fields(place, f"{_METADATA}MetadataIndex", ("fqn",), ("offset", "index"))
    key = _key(fields["fqn"])
    if key not in described:
        raise ValueError(f"{show(key)} is stored but not described")
    zeros = (0,) * len(described[key][0])
    offset, index = fields.get("offset"), fields.get("index")
    if (offset is not None and _size(offset, key) != zeros) or (index is not None and _integer(index, key) != 0):
        raise ValueError(f"{show(key)} is not stored in one piece")
    return key


def _extent(key: str, info: Any) -> tuple[str, int, int]:
    """Return the file, offset and length of a place."""
    fields = _fields(info, _STORAGE_INFO, ("relative_path", "offset", "length"), ("transform_descriptors",))
    name = fields["relative_path"]
    if type(name) is not str or not _DATA_FILE.fullmatch(name):
        raise ValueError(f"it refers to {show(name)}, which is not a plain file of the checkpoint")
    if fields.get("transform_descriptors") is not None:
        raise ValueError(f"{show(key)} is stored transformed")
    return name, _integer(fields["offset"], key), _integer(fields["length"], key)


def _require_places(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError unless each tensor has its own part of a regular file, of about its own size."""
    sizes: dict[str, int] = {}
    for name in {tensor.file for tensor in tensors.values()}:
        status = (folder / name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a regular file")
        sizes[name] = status.st_size
    ends = dict.fromkeys(sizes, 0)
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        end = tensor.offset + tensor.length
        if tensor.offset < ends[tensor.file] or end > sizes[tensor.file]:
            raise ValueError(f"the place of {show(key)} lies outside {tensor.file} or inside another tensor's")
        ends[tensor.file] = end
        extent = math.prod(max(length, 1) for length in tensor.shape) * tensor.dtype.itemsize
        if not (tensor.size <= tensor.length <= tensor.size + MAX_OVERHEAD_BYTES and extent <= 1 << 60):
            shown = f"{show(list(tensor.shape))} {tensor.dtype}"
            raise ValueError(f"{show(key)}, {shown}, does not fit its {tensor.length:,} bytes in {tensor.file}")


def _fields(value: Any, name: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return the attributes of a recorded object of class ``name``."""
    if type(value) is not Made or value.name != name or value.args != () or type(value.state) is not Pairs:
        raise ValueError(f"an entry that should be a {name.rpartition('.')[2]} is not")
    fields: dict[str, Any] = {}
    for key, content in value.state:
        if type(key) is not str or key in fields or key not in (*required, *optional):
            raise ValueError(f"a {name.rpartition('.')[2]} with {show(key)} is not part of a checkpoint index")
        fields[key] = content
    if lost := [key for key in required if key not in fields]:
        raise ValueError(f"a {name.rpartition('.')[2]} lacks {lost[0]}")
    return fields


def _pairs(value: Any, what: str) -> Pairs:
    if type(value) is not Pairs:
        raise ValueError(f"its {what} is not a dictionary")
    return value


def _key(value: Any) -> str:
    if type(value) is not str or not value.isascii() or not value.isprintable() or not 0 < len(value) <= _MAX_KEY:
        raise ValueError(f"the key {show(value)} is not the name of a tensor")
    return value


def _size(value: Any, key: str) -> tuple[int, ...]:
    is_size = _is_call(value, "torch.Size") and len(value.args) == 1 and type(value.args[0]) is tuple
    if not is_size or len(value.args[0]) > _MAX_DIMENSIONS:
        raise ValueError(f"a size of {show(key)} is damaged")
    return tuple(_integer(item, key) for item in value.args[0])


def _integer(value: Any, key: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise ValueError(f"{show(value)} of {show(key)} is not an integer of 0 or more")
    return value
