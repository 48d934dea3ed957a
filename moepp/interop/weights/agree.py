"""Whether a run's model is the one that a folder's weights were made for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from moepp.config import ModelConfig, MoEConfig, to_dict
from moepp.config.compare import TRAINING_ONLY
from moepp.errors import CheckpointError


def differences(cfg: ModelConfig, source: ModelConfig) -> list[str]:
    """``key=value (the weights have other)`` for everything that must agree and does not."""
    pairs = [(f"model.{f.name}", f.name, cfg, source) for f in fields(ModelConfig) if f.name != "moe"]
    pairs += [(f"model.moe.{f.name}", f.name, cfg.moe, source.moe) for f in fields(MoEConfig)]
    found = []
    for key, name, own_section, other_section in pairs:
        if key in TRAINING_ONLY:
            continue
        own, other = getattr(own_section, name), getattr(other_section, name)
        if name == "dense_ffn_hidden_size" and cfg.moe_layer_interval == 1:
            continue  # no layer has it
        if own != other:
            found.append(f"{key}={_shown(own)} (the weights have {_shown(other)})")
    is_dynamic = cfg.rope_scaling is not None and cfg.rope_scaling.type == "dynamic"
    if is_dynamic and cfg.max_seq_len != source.max_seq_len:
        found.append(f"model.max_seq_len={cfg.max_seq_len} (the weights have {source.max_seq_len})")
    return found


def require_agreement(cfg: ModelConfig, source: ModelConfig, folder: str | Path) -> None:
    """Raise :class:`CheckpointError` listing what differs, if anything does."""
    require_none(differences(cfg, source), folder)


def require_none(found: list[str], folder: str | Path) -> None:
    """Raise :class:`CheckpointError` listing ``found``, if there is anything in it."""
    if found:
        raise CheckpointError(
            f"the weights in {folder} do not fit the model of this run: {'; '.join(found)}; "
            "set these keys to the weights' values, or choose other weights"
        )


def _shown(value: object) -> object:
    return value if value is None or isinstance(value, int | float | str) else to_dict(value)
