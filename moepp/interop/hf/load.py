"""Reading the project's own Hugging Face format. Letters: E FFN experts."""

from __future__ import annotations

from pathlib import Path

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter
from moepp.interop.hf.config import read_config
from moepp.interop.weights import (
    Piece,
    TensorFolder,
    check_keys,
    copy_pieces,
    require_agreement,
    require_room,
    weight_bytes,
    whole_parameters,
)
from moepp.model import Transformer


def pieces_of(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return training's names below ``model.``; experts stay stacked and are read one by one."""
    key = name if name.startswith("lm_head") else f"model.{name}"
    if is_expert_parameter(name):
        return [Piece(key, shape, (expert,), expert) for expert in range(shape[0])]
    return [Piece(key, shape)]


def load_into(model: Transformer, folder: str | Path, ep_rank: int = 0, ep_size: int = 1) -> None:
    """Copy an exported model into one that may be sharded; no rank reads other ranks' experts.

    Raises:
        CheckpointError: another format, damaged files, missing, unexpected or mis-shaped tensors, or a model of
            another shape.
    """
    tensors = check_folder(folder, model.cfg)
    copy_pieces(model, tensors, pieces_of, ep_rank, ep_size)


def check_folder(folder: str | Path, cfg: ModelConfig) -> TensorFolder:
    """Open a folder whose weights fit a run's model; errors as for :func:`load_into`."""
    source = read_config(folder)
    require_agreement(cfg, source, folder)
    return open_tensors(folder, source)


def open_tensors(folder: str | Path, cfg: ModelConfig) -> TensorFolder:
    """Return the folder's tensors, after comparing their names and shapes with the configuration."""
    tensors = TensorFolder(folder)
    require_room(cfg, weight_bytes(tensors.path), tensors.path / "config.json")
    check_keys(tensors, [piece for name, shape in whole_parameters(cfg).items() for piece in pieces_of(name, shape)])
    return tensors
