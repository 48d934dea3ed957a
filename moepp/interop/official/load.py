"""Reading a released checkpoint into a model, whole or one rank's share of it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from moepp.interop.official.config import read_config, read_released
from moepp.interop.official.keys import pieces_of
from moepp.interop.official.model import OfficialModel
from moepp.interop.token_ids import listed_ids
from moepp.interop.weights import FolderFormat
from moepp.interop.weights.files import read_json
from moepp.io.untrusted import printable

logger = logging.getLogger(__name__)

_FORMAT = FolderFormat(read_config, pieces_of, repeats_tied=True)
open_tensors, check_folder, load_into = _FORMAT.open_tensors, _FORMAT.check_folder, _FORMAT.load_into


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> OfficialModel:
    """Return a released checkpoint, ready for inference on one process.

    Args:
        folder: holds ``config.json`` and safetensors, or pickled .bin files (read without running code in them).
        dtype: of the model. Routers keep fp32, as in the released code.

    Raises:
        CheckpointError: another format, damaged files, or missing, unexpected or mis-shaped tensors.
    """
    cfg, token_ids = read_released(folder)
    path = Path(folder) / "config.json"
    if token_ids.eos is None and (several := listed_ids(path, read_json(path), "eos")):
        logger.warning(
            "%s lists several end tokens (%s), and tokenizer_config.json names none of them: generation stops at none; "
            "pass eos_id to it",
            printable(path),
            ", ".join(map(str, several)),
        )
    tensors = open_tensors(folder, cfg)
    with torch.device("meta"):
        model = OfficialModel(cfg, token_ids).to(dtype)
        for name, parameter in model.named_parameters():
            if ".router." in name and "gate_map" not in name:
                parameter.data = parameter.data.float()
    model.to_empty(device="cpu")
    _FORMAT.copy(model.transformer, tensors)
    return model.eval()
