"""Writing a model as a released checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter
from moepp.interop.official.config import released_config
from moepp.interop.official.keys import pieces_of
from moepp.interop.official.model import OfficialModel
from moepp.interop.token_ids import TokenIds
from moepp.interop.weights import whole_parameters, write_tensors
from moepp.interop.weights.write import MAX_SHARD_BYTES, export_folder, write_json
from moepp.io import files
from moepp.model import Transformer

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

ReadParameter = Callable[[str, int | None], Tensor]
"""(parameter name, FFN expert or None) -> the parameter, or that expert's part of a stacked one."""


def save_pretrained(
    model: OfficialModel | Transformer, folder: str | Path, *, token_ids: TokenIds | None = None
) -> list[str]:
    """Write ``config.json``, ``generation_config.json`` and safetensors, all in the dtype of the embedding.

    Args:
        model: on one process, not sharded.
        folder: created where it does not exist; an earlier export in it is replaced as a whole.
        token_ids: None: the model's own, or those that the format assumes.

    Returns:
        names of the files written.

    Raises:
        CheckpointError: what the released code cannot express (a list).
        WriteError: the folder cannot be written to.
    """
    decoder = model.transformer if isinstance(model, OfficialModel) else model
    if token_ids is None:
        token_ids = model.token_ids if isinstance(model, OfficialModel) else TokenIds()
    read, dtype = read_from(decoder), decoder.embed_tokens.weight.dtype
    with export_folder(Path(folder)) as new:
        return write_released(read, decoder.cfg, new, token_ids=token_ids, dtype=dtype)


def read_from(model: Transformer) -> ReadParameter:
    """Return parameters of a whole model in memory."""
    parameters = dict(model.named_parameters())
    return lambda name, expert: parameters[name].data if expert is None else parameters[name].data[expert]


def write_released(
    read: ReadParameter,
    cfg: ModelConfig,
    folder: Path,
    *,
    token_ids: TokenIds,
    dtype: torch.dtype,
    code_repo: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """As :func:`save_pretrained`, from wherever ``read`` takes the parameters, one shard in memory at a time.

    ``folder`` is made if missing, and otherwise empty: see :func:`moepp.interop.weights.write.export_folder`.
    """
    config = released_config(cfg, token_ids, DTYPE_NAMES[dtype], code_repo)
    sources: dict[str, tuple[str, int | None]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in whole_parameters(cfg).items():
        for piece in pieces_of(name, shape, cfg):
            index = piece.target[0] if piece.target else None
            assert index is None or isinstance(index, int)
            shapes[piece.key] = piece.shape
            sources[piece.key] = (name, index)

    def read_key(key: str) -> Tensor:
        name, index = sources[key]
        if index is None or is_expert_parameter(name):
            return read(name, index)
        return read(name, None)[index]

    files.make_folder(folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(token_ids))
    return ["config.json", "generation_config.json", *write_tensors(folder, shapes, read_key, dtype, max_shard_bytes)]


def generation_config(token_ids: TokenIds) -> dict[str, int | bool | list[int]]:
    """Return the contents of ``generation_config.json``: greedy, stop at the end token, no unused rows."""
    ids = {"bos_token_id": token_ids.bos, "eos_token_id": token_ids.eos, "pad_token_id": token_ids.pad}
    unused = {"suppress_tokens": list(token_ids.unused)} if token_ids.unused else {}
    return {key: value for key, value in ids.items() if value is not None} | unused | {"do_sample": False}
