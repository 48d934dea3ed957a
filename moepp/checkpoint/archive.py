"""One tensor out of the archive in which torch.save put it, as raw bytes within limits; nothing is unpickled.

The archive is a zip file without compression: ``data.pkl`` says dtype, sizes and strides, ``data/0`` holds the
elements.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moepp.checkpoint.index import MAX_OVERHEAD_BYTES, StoredTensor
from moepp.checkpoint.inert_pickle import Made, Name, Persistent, interpret

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        *(("Float", torch.float32), ("Double", torch.float64), ("BFloat16", torch.bfloat16), ("Half", torch.float16)),
        *(("Long", torch.int64), ("Int", torch.int32), ("Byte", torch.uint8), ("Bool", torch.bool)),
    )
}
_REBUILD, _NO_HOOKS = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"
_NAMES = frozenset({_REBUILD, _NO_HOOKS, *_STORAGES})
_LOCAL_HEADER = 30  # bytes, before a record's name and extra field


def read_tensor(stream: BinaryIO, stored: StoredTensor) -> Tensor:
    """Return the tensor whose place is ``stored`` in ``stream``, on the CPU.

    Raises:
        ValueError, OSError: the bytes there are no archive of such a tensor.
    """
    part = _Part(stream, stored.offset, stored.length)
    try:
        with zipfile.ZipFile(part) as archive:
            pickled, elements = _records(archive)
            description = interpret(archive.read(pickled), _NAMES, "a stored tensor")
            offset, stride = _view(description, stored, elements.file_size)
            start = _start(part, elements)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        raise ValueError(f"it is no archive of a tensor ({error})") from None
    if stored.size == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    bytes_ = torch.empty(elements.file_size, dtype=torch.uint8)
    stream.seek(stored.offset + start)
    if stream.readinto(bytes_.numpy()) != elements.file_size:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("the file ends inside a tensor")
    return bytes_.view(stored.dtype).as_strided(stored.shape, stride, offset)


def _records(archive: zipfile.ZipFile) -> tuple[zipfile.ZipInfo, zipfile.ZipInfo]:
    """Return the records data.pkl and data/0."""
    pickled = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickled) != 1 or pickled[0].file_size > MAX_OVERHEAD_BYTES:
        raise ValueError("it is no archive of a tensor (it has no data.pkl)")
    folder = pickled[0].filename.removesuffix("data.pkl")
    names = [info.filename for info in archive.infolist()]
    if names.count(f"{folder}data/0") != 1 or any(name.startswith(f"{folder}data/1") for name in names):
        raise ValueError("it is no archive of one tensor")
    elements = archive.getinfo(f"{folder}data/0")
    for info in (pickled[0], elements):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError("its archive is compressed or encrypted")
    if f"{folder}byteorder" in names:
        order = archive.getinfo(f"{folder}byteorder")
        if order.file_size > 16 or archive.read(order) != sys.byteorder.encode():
            raise ValueError("it was written by a machine with another order of bytes")
    return pickled[0], elements


def _view(description: Any, stored: StoredTensor, storage_bytes: int) -> tuple[int, tuple[int, ...]]:
    """Return the offset and strides, in elements, of the tensor in its storage."""
    if type(description) is not Made or description.name != _REBUILD or description.has_state:
        raise ValueError("it does not hold a plain tensor")
    if len(description.args) not in (6, 7) or description.args[6:] not in ((), (None,)):
        raise ValueError("it does not hold a plain tensor")
    storage, offset, shape, stride = description.args[:4]
    if type(storage) is not Persistent or type(storage.key) is not tuple or len(storage.key) != 5:
        raise ValueError("its storage is damaged")
    kind, name, number, _device, numel = storage.key
    if kind != "storage" or type(name) is not Name or number != "0" or type(numel) is not int:
        raise ValueError("its storage is damaged")
    if _STORAGES.get(name) != stored.dtype or not _are_counts(shape) or shape != stored.shape:
        raise ValueError("its dtype or shape is not what the index says")
    if not _are_counts(stride) or len(stride) != len(shape) or not _are_counts((offset, numel)):
        raise ValueError("its strides are damaged")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if numel * stored.dtype.itemsize != storage_bytes or (stored.size and last >= numel):
        raise ValueError("its elements lie outside its storage")
    return offset, stride


def _are_counts(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _start(part: _Part, record: zipfile.ZipInfo) -> int:
    """Return where the content of a record starts in the archive."""
    part.seek(record.header_offset)
    header = part.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise ValueError("its archive is damaged")
    start = record.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + record.file_size > part.length:
        raise ValueError("its elements lie outside its part of the file")
    return start


class _Part(io.RawIOBase):
    """A part of a file, of which only little is read at a time: directory and description of an archive are small."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        self._stream, self._offset, self.length = stream, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("its archive is damaged")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self.length - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > 2 * MAX_OVERHEAD_BYTES:
            raise ValueError("the directory of its archive is too long")
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(count)
        self._position += len(data)
        return data
