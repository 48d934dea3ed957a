"""Reading a released checkpoint into a model, whole or one rank's share of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from moepp.config import ModelConfig
from moepp.errors import CheckpointError
from moepp.interop.official.config import read_config, read_released
from moepp.interop.official.keys import pieces_of
from moepp.interop.official.model import OfficialModel
from moepp.interop.weights import (
    TensorFolder,
    check_keys,
    copy_pieces,
    require_agreement,
    require_room,
    weight_bytes,
    whole_parameters,
)
from moepp.model import Transformer

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> OfficialModel:
    """Return a released checkpoint, ready for inference on one process.

    Args:
        folder: holds ``config.json`` and safetensors, or pickled .bin files (read without running code in them).
        dtype: of the model. Routers keep fp32, as in the released code.

    Raises:
        CheckpointError: another format, damaged files, or missing, unexpected or mis-shaped tensors.
    """
    cfg, token_ids = read_released(folder)
    tensors = open_tensors(folder, cfg)
    with torch.device("meta"):
        model = OfficialModel(cfg, token_ids).to(dtype)
        for name, parameter in model.named_parameters():
            if ".router." in name and "gate_map" not in name:
                parameter.data = parameter.data.float()
    model.to_empty(device="cpu")
    copy_pieces(model.transformer, tensors, partial(pieces_of, cfg=cfg))
    return model.eval()


def load_into(model: Transformer, folder: str | Path, ep_rank: int = 0, ep_size: int = 1) -> None:
    """Copy a released checkpoint into a model that may be sharded; no rank reads other ranks' experts.

    Args:
        model: with memory, any dtype and device; rank ``ep_rank`` of ``ep_size``.

    Raises:
        CheckpointError: as for :func:`load_pretrained`, or a model of another shape.
    """
    tensors = check_folder(folder, model.cfg)
    copy_pieces(model, tensors, partial(pieces_of, cfg=model.cfg), ep_rank, ep_size)


def check_folder(folder: str | Path, cfg: ModelConfig) -> TensorFolder:
    """Open a folder whose weights fit a run's model; errors as for :func:`load_into`."""
    source = read_config(folder)
    require_agreement(cfg, source, folder)
    return open_tensors(folder, source)


def open_tensors(folder: str | Path, cfg: ModelConfig) -> TensorFolder:
    """Return the folder's tensors, after comparing their names and shapes with the configuration."""
    tensors = TensorFolder(folder)
    require_room(cfg, weight_bytes(tensors.path), tensors.path / "config.json")
    pieces = [piece for name, shape in whole_parameters(cfg).items() for piece in pieces_of(name, shape, cfg)]
    check_keys(tensors, pieces, lambda key: cfg.tie_embeddings and key == _LM_HEAD)
    # Pickled checkpoints of tied models name the one matrix twice.
    is_stored_twice = cfg.tie_embeddings and _LM_HEAD in tensors.shapes
    if is_stored_twice and not torch.equal(tensors.read(_LM_HEAD), tensors.read(_EMBEDDING)):
        raise CheckpointError(
            f"{folder}: config.json says tie_word_embeddings=true but {_LM_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings=false"
        )
    return tensors
