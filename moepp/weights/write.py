"""Writing tensors as safetensors, in shards where they are large."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp.errors import CheckpointError
from moepp.weights.files import INDEX_SUFFIX, SAFETENSORS

MAX_SHARD_BYTES = 5 * 10**9
# Readers up to transformers 4.46 need it.
METADATA = {"format": "pt"}


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

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    stem = SAFETENSORS.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SAFETENSORS]
    _remove_other_weights(folder, names)
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: read(key).detach().to("cpu", dtype, copy=True).contiguous() for key in keys}
        try:
            save_file(tensors, folder / name, metadata=METADATA)
            # safetensors makes files that nobody but their owner can read.
            (folder / name).chmod(0o666 & ~_umask())
        except (OSError, SafetensorError) as error:
            raise _unwritable(folder, error) from error
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / (SAFETENSORS + INDEX_SUFFIX), index)
        names.append(SAFETENSORS + INDEX_SUFFIX)
    return names


def prepare_folder(folder: Path) -> None:
    """Make the folder.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_text(path, json.dumps(tree, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; errors as for :func:`write_json`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _umask() -> int:
    umask = os.umask(0)  # it cannot be read without being set
    os.umask(umask)
    return umask


def _remove_other_weights(folder: Path, names: list[str]) -> None:
    """An earlier export with other shards would be found first, or mixed with this one."""
    stem = SAFETENSORS.removesuffix(".safetensors")
    for path in (*folder.glob(f"{stem}*.safetensors"), folder / (SAFETENSORS + INDEX_SUFFIX)):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _unwritable(folder: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"cannot write to {folder}: {reason}; choose another folder, or free some space")


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
