"""Reading the project's own Hugging Face format. Letters: E FFN experts."""

from __future__ import annotations

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter
from moepp.interop.hf.config import read_config
from moepp.interop.weights import FolderFormat, Piece


def pieces_of(name: str, shape: tuple[int, ...], _: ModelConfig) -> list[Piece]:
    """Return training's names below ``model.``; experts stay stacked and are read one by one."""
    key = name if name.startswith("lm_head") else f"model.{name}"
    if is_expert_parameter(name):
        return [Piece(key, shape, (expert,), expert) for expert in range(shape[0])]
    return [Piece(key, shape)]


_FORMAT = FolderFormat(read_config, pieces_of)
open_tensors, check_folder, load_into = _FORMAT.open_tensors, _FORMAT.check_folder, _FORMAT.load_into
