"""Writing tensors as safetensors, in shards where they are large."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp.errors import WriteError
from moepp.interop.weights.files import INDEX_SUFFIX, SAFETENSORS
from moepp.io import files
from moepp.io.write_errors import write_error

MAX_SHARD_BYTES = 5 * 10**9
# Readers up to transformers 4.46 need it.
METADATA = {"format": "pt"}
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
# Files that one export or another writes: none of an earlier one may stay beside a new one.
_WRITTEN = re.compile(
    r"config\.json|generation_config\.json|README\.md|tokenizer\.json|tokenizer_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|\w+_moepp\.py"
)
# Files that loaders read beside those, or instead of them, and that no export writes.
_READ_BESIDE = re.compile(
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|tokenizer\.model|spiece\.model"
    r"|vocab\.(json|txt)|merges\.txt|pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?|adapter_.*|.*\.safetensors"
)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write ``read(key)`` of every key, cast to ``dtype``; holds one shard in memory at a time.

    A single file ``model.safetensors`` where all fits in one shard; otherwise
    ``model-<i>-of-<n>.safetensors`` and their index. A tensor larger than a shard gets one of its own.

    Returns:
        names of the files written.

    Args:
        folder: an empty one; see :func:`export_folder`.
        shapes: of every key.
        read: the tensor of a key.
        dtype: of the file.
        max_shard_bytes: of one file.

    Raises:
        WriteError: the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    stem = SAFETENSORS.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SAFETENSORS]
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: read(key).detach().to("cpu", dtype, copy=True).contiguous() for key in keys}
        try:
            save_file(tensors, folder / name, metadata=METADATA)
            # safetensors makes files that nobody but their owner can read.
            (folder / name).chmod(0o666 & ~_umask())
        except (OSError, SafetensorError) as error:
            raise _unwritable(folder / name, error) from error
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / (SAFETENSORS + INDEX_SUFFIX), index)
        names.append(SAFETENSORS + INDEX_SUFFIX)
    return names


@contextlib.contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder that replaces ``folder`` (an earlier export) when the block succeeds.

    What no export writes is kept of the earlier one, such as code that was copied beside the weights.

    Raises:
        WriteError: it cannot be made; an earlier export is untouched.
    """
    with files.new_folder(folder) as new:
        yield new
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not _WRITTEN.fullmatch(entry.name) and not (new / entry.name).exists():
                files.link_tree(entry, new / entry.name)


def read_beside(folder: Path) -> list[str]:
    """Return the names of files in ``folder`` that would be kept, and mix with a new export when it is loaded."""
    names = (entry.name for entry in folder.iterdir())
    return sorted(name for name in names if _READ_BESIDE.fullmatch(name) and not _WRITTEN.fullmatch(name))


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        WriteError: it cannot be written.
    """
    files.write_whole(path, json.dumps(tree, indent=2) + "\n")


def _umask() -> int:
    umask = os.umask(0)  # it cannot be read without being set
    os.umask(umask)
    return umask


def _unwritable(path: Path, error: Exception) -> WriteError:
    """Return the error of a write that failed; safetensors passes on the system's reason as text."""
    number = getattr(error, "errno", None)
    found = _SYSTEM_ERROR.search(str(error))
    if number is None and found is not None:
        number = int(found.group(1))
    return write_error(number or 0, path, str(error))


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
