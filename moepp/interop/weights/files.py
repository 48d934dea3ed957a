"""A folder of tensors as Hugging Face libraries write it: safetensors or pickled .bin, whole or in shards.

Tensors are read one at a time; files are mapped into memory rather than loaded, so that a rank that wants a few
tensors of a large checkpoint takes the memory of those alone.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp.errors import CheckpointError
from moepp.io import untrusted
from moepp.io.untrusted import printable

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")  # in the folder itself


class TensorFolder:
    """Names and shapes of all tensors, and reading of single ones.

    Attributes:
        shapes: shape of every tensor by its key.

    Raises:
        CheckpointError: no weights, a file missing, truncated or of another kind, an index that disagrees with its
            files, or tensors that are not floating-point numbers.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._files: dict[str, _File] = {}  # by key
        files, weight_map = _find(self.path)
        open_file = _SafetensorsFile if files[0].endswith(".safetensors") else _BinFile
        for name in files:
            file = _explain(self.path / name, lambda name=name: open_file(self.path / name))
            self._require_places(name, file, weight_map)
            twice = sorted(file.shapes.keys() & self._files.keys())
            if twice:
                raise CheckpointError(f"{self.path} holds {_few(twice)} in two files; copy the folder again")
            self._files |= dict.fromkeys(file.shapes, file)
        self.shapes = {key: file.shapes[key] for key, file in sorted(self._files.items())}
        absent = [key for key in weight_map if key not in self.shapes]
        if absent:
            raise CheckpointError(
                f"{self.path}: the index names {len(absent)} tensors that its files do not hold ({_few(absent)}); "
                "copy the folder again"
            )

    def _require_places(self, name: str, file: _File, weight_map: dict[str, str]) -> None:
        """Every tensor of a file must be where the index says, so that none is read from another file instead."""
        misplaced = [key for key in file.shapes if weight_map and weight_map.get(key) != name]
        if misplaced:
            raise CheckpointError(
                f"{self.path / name} holds {len(misplaced)} tensors that the index places elsewhere or does not name "
                f"({_few(misplaced)}); copy the folder again"
            )

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Return the tensor, or ``tensor[row]`` alone, on the CPU in the dtype of the file.

        Raises:
            CheckpointError: it cannot be read, or holds a number that is not finite in fp32.
        """
        file = self._files[key]
        tensor = _explain(file.path, lambda: file.read(key, row))
        in_range = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not in_range.isfinite().all():
            count = in_range.numel() - int(in_range.isfinite().sum())
            raise CheckpointError(
                f"{file.path}: {printable(key, 100)} holds {count:,} of {tensor.numel():,} numbers that are NaN, "
                "infinite or beyond fp32; copy the file again, or take weights of an earlier step"
            )
        return tensor


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self._file = safe_open(path, "pt")
        self.shapes: dict[str, tuple[int, ...]] = {}
        names = self._file.keys()
        for key in names:
            view = self._file.get_slice(key)
            _require_floats(path, key, view.get_dtype() in _DTYPES, view.get_dtype())
            self.shapes[key] = tuple(view.get_shape())

    def read(self, key: str, row: int | None) -> Tensor:
        return self._file.get_tensor(key) if row is None else self._file.get_slice(key)[row]


class _BinFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            # Not with torch's own words: they advise to load it in a way that runs what it brings along.
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise CheckpointError(
                f"{path} is not read: it holds more than tensors{f' ({name[1][:100]})' if name else ''}, or is "
                "damaged; copy it again, or give a folder with safetensors"
            ) from None
        tensors = self._tensors
        if not isinstance(tensors, dict) or not all(isinstance(k, str) and _is_plain(t) for k, t in tensors.items()):
            raise CheckpointError(f"{path} does not hold plain tensors by name; give a folder of a model's weights")
        size = path.stat().st_size
        for key, tensor in tensors.items():
            _require_floats(path, key, tensor.is_floating_point() and tensor.dtype in _FLOATS, tensor.dtype)
            if tensor.numel() * tensor.itemsize > size:  # a small storage seen many times
                raise CheckpointError(f"{path}: {printable(key)} is larger than its file; copy it again")
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    def read(self, key: str, row: int | None) -> Tensor:
        tensor = self._tensors[key]
        return tensor if row is None else tensor[row]


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


_File = _SafetensorsFile | _BinFile


def weight_bytes(folder: Path) -> int:
    """Return the size of all weight files that a folder names.

    Raises:
        CheckpointError: it names none, or one is missing.
    """
    return sum((folder / name).stat().st_size for name in _find(folder)[0])


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object in a file.

    Raises:
        CheckpointError: missing, unreadable, or something else.
    """
    if not path.exists() and not path.is_symlink():
        where = f"{path.parent} has no {path.name}" if path.parent.is_dir() else f"{path.parent} is not a folder"
        raise CheckpointError(f"{where}; name the folder of a checkpoint in Hugging Face's layout")
    tree = untrusted.read_json(path, error=CheckpointError, remedy="copy the folder again, or check its permissions")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__} instead of an object; copy the folder again")
    return tree


def _find(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return names of the weight files, and the index's map from key to file (empty where there is no index)."""
    for name in (SAFETENSORS, BIN):
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            files, weight_map = _read_index(folder, index.name)
            if (folder / name).is_file() and name not in files:
                raise CheckpointError(f"{folder} holds {name} and an index of other files; remove one of the two")
            return files, weight_map
        if (folder / name).is_file():
            return [name], {}
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name the folder of a checkpoint in Hugging Face's layout")
    raise CheckpointError(
        f"{folder} holds no weights: none of {SAFETENSORS}, {BIN} and their {INDEX_SUFFIX} files; "
        "name the folder of a checkpoint in Hugging Face's layout"
    )


def _read_index(folder: Path, name: str) -> tuple[list[str], dict[str, str]]:
    weight_map = read_json(folder / name).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    suffix = ".safetensors" if name.startswith(SAFETENSORS) else ".bin"
    files = sorted({str(file) for file in weight_map.values()})
    is_named = all(isinstance(file, str) for file in weight_map.values())
    plain = all(_FILE_NAME.fullmatch(file) and file.endswith(suffix) for file in files)
    if not files or not is_named or not plain:
        raise CheckpointError(f"{folder / name} has no weight_map to {suffix} files; copy the folder again")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} files of its index ({_few(missing)}); copy them too"
        )
    return files, weight_map


def _require_floats(path: Path, key: str, is_float: bool, dtype: object) -> None:
    if not is_float:
        raise CheckpointError(
            f"{path}: {printable(key, 100)} holds {dtype} instead of floating-point numbers; "
            "quantised weights cannot be read"
        )


def _explain(path: Path, action: Callable[[], Any]) -> Any:
    """Run ``action``; whatever the readers make of a damaged file becomes one line."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, pickle and zip raise a dozen unrelated types for damaged bytes
        reason = printable((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise CheckpointError(
            f"cannot read {path}, it is damaged or not a weight file ({reason}); copy it again"
        ) from error


def _few(names: list[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(printable(name, 100) for name in names[:limit]) + (f" and {more} more" if more > 0 else "")
