"""Writing the project's own Hugging Face format: code, configuration and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter
from moepp.interop.hf.config import hf_config
from moepp.interop.hf.load import pieces_of
from moepp.interop.official.save import DTYPE_NAMES, ReadParameter, generation_config, read_from
from moepp.interop.token_ids import TokenIds
from moepp.interop.weights import whole_parameters, write_tensors
from moepp.interop.weights.write import MAX_SHARD_BYTES, export_folder, write_json
from moepp.io import files
from moepp.model import Transformer

CODE = Path(__file__).parent / "code"
CODE_FILES = ("cache_moepp.py", "configuration_moepp.py", "layers_moepp.py", "mask_moepp.py", "modeling_moepp.py")


def save_pretrained(model: Transformer, folder: str | Path, token_ids: TokenIds) -> list[str]:
    """Write a whole model, in the dtype of its embedding, for ``from_pretrained(folder, trust_remote_code=True)``.

    The folder tells of the model's ``document_end`` where ``token_ids`` names none.

    Returns:
        names of the files written.

    Raises:
        WriteError: the folder cannot be written to.
    """
    dtype = model.embed_tokens.weight.dtype
    if token_ids.document_end is None:
        token_ids = replace(token_ids, document_end=model.document_end)
    with export_folder(Path(folder)) as new:
        return write_hf(read_from(model), model.cfg, new, token_ids=token_ids, dtype=dtype)


def write_hf(
    read: ReadParameter,
    cfg: ModelConfig,
    folder: Path,
    *,
    token_ids: TokenIds,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """As :func:`save_pretrained`, from wherever ``read`` takes the parameters, one shard in memory at a time.

    ``folder`` is made if missing, and otherwise empty: see :func:`moepp.interop.weights.write.export_folder`.
    """
    parameters = whole_parameters(cfg)
    names = {piece.key: name for name, shape in parameters.items() for piece in pieces_of(name, shape, cfg)}

    def read_key(key: str) -> Tensor:
        name = names[key]
        if not is_expert_parameter(name):
            return read(name, None)
        return torch.stack([read(name, expert) for expert in range(parameters[name][0])])

    files.make_folder(folder)
    write_json(folder / "config.json", hf_config(cfg, token_ids, DTYPE_NAMES[dtype]))
    write_json(folder / "generation_config.json", generation_config(token_ids))
    for name in CODE_FILES:
        files.write_whole(folder / name, (CODE / name).read_bytes())
    shapes = {key: parameters[name] for key, name in names.items()}
    weights = write_tensors(folder, shapes, read_key, dtype, max_shard_bytes)
    return ["config.json", "generation_config.json", *CODE_FILES, *weights]
