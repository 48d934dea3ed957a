"""``config.json`` of the project's own Hugging Face format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moepp.config import ModelConfig
from moepp.errors import CheckpointError, ConfigError
from moepp.interop.token_ids import TokenIds, read_token_ids
from moepp.interop.weights.features import refuse_foreign
from moepp.interop.weights.files import read_json
from moepp.io.untrusted import show

MODEL_TYPE = "moepp"
ARCHITECTURE = "MoeppForCausalLM"
AUTO_MAP = {
    "AutoConfig": "configuration_moepp.MoeppConfig",
    "AutoModel": "modeling_moepp.MoeppModel",
    "AutoModelForCausalLM": f"modeling_moepp.{ARCHITECTURE}",
}
# Name there -> name here. What training alone needs is not part of the format.
_MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rotary_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "moe_layer_interval": "moe_layer_interval",
    "dense_ffn_hidden_size": "dense_ffn_hidden_size",
}
_MOE = {
    "num_ffn_experts": "num_ffn_experts",
    "num_constant_experts": "num_constant_experts",
    "num_copy_experts": "num_copy_experts",
    "num_zero_experts": "num_zero_experts",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_experts_per_tok": "top_k",
    "router": "router",
    "gating_residual": "gating_residual",
    "logits_norm_std": "logits_norm_std",
    "gate_normalization": "gate_normalization",
    "scale_input_by_top_k": "scale_input_by_top_k",
}
_DOCUMENT_END = "document_end_token_id"
_OTHER = ("auto_map", "rotary_scaling_type", "rotary_scaling_factor", "output_router_logits", _DOCUMENT_END)
_TOKEN_IDS = ("bos", "eos", "pad")


def hf_config(cfg: ModelConfig, ids: TokenIds, dtype: str) -> dict[str, Any]:
    """Return the contents of ``config.json``; ``dtype`` of the weights, "float32" or "bfloat16".

    Raises:
        ConfigError: the model has parts that the exported code does not know.
    """
    if parts := cfg.moe.registered_parts:
        raise ConfigError(
            f"{', '.join(parts)} is registered outside the package, and the exported code does not know it; a model "
            "with it runs from its checkpoints only"
        )
    scaling = cfg.rope_scaling
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        **{theirs: getattr(cfg, own) for theirs, own in _MODEL.items()},
        **{theirs: getattr(cfg.moe, own) for theirs, own in _MOE.items()},
        "rotary_scaling_type": None if scaling is None else scaling.type,
        "rotary_scaling_factor": 1.0 if scaling is None else scaling.factor,
        **{f"{name}_token_id": getattr(ids, name) for name in _TOKEN_IDS},
        _DOCUMENT_END: ids.document_end,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def read_config(folder: str | Path) -> ModelConfig:
    """Return shapes and flags; what only training needs (tau, losses, capacity) has its defaults.

    Raises:
        CheckpointError: not a folder of this format, or values that make no model.
    """
    return read_hf(folder)[0]


def read_hf(folder: str | Path) -> tuple[ModelConfig, TokenIds]:
    """As :func:`read_config`, with the special tokens."""
    from moepp.config.load import build

    path = Path(folder) / "config.json"
    tree = read_json(path)
    if tree.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} describes a model of type {show(tree.get('model_type'))}, not {MODEL_TYPE!r} as `moepp export "
            "--format moepp` writes; name another folder or format"
        )
    refuse_foreign(path, tree, {*_MODEL, *_MOE, *_OTHER})
    missing = [key for key in (*_MODEL, *_MOE) if key not in tree]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; export the model again")
    ids = read_token_ids(path, tree, dict.fromkeys(_TOKEN_IDS))
    for name, value in ((name, getattr(ids, name)) for name in _TOKEN_IDS):
        if value is not None and value < 0:
            raise CheckpointError(f"{path}: {name}_token_id={value} is negative; correct it, or write null for none")
    model = {own: tree[theirs] for theirs, own in _MODEL.items()}
    model["moe"] = {own: tree[theirs] for theirs, own in _MOE.items()}
    if tree.get("rotary_scaling_type") is not None:
        model["rope_scaling"] = {"type": tree["rotary_scaling_type"], "factor": tree.get("rotary_scaling_factor")}
    try:
        cfg = build(ModelConfig, model, "model")
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error
    end = tree.get(_DOCUMENT_END)
    if end is not None and not (type(end) is int and 0 <= end < cfg.vocab_size):
        raise CheckpointError(
            f"{path}: {_DOCUMENT_END}={show(end)} is no token of the model (0 to {cfg.vocab_size - 1}); correct it, or "
            "write null if attention crossed documents in training"
        )
    return cfg, replace(ids, document_end=end)


def read_document_end(folder: str | Path) -> int | None:
    """Return the token that ended documents in training, if attention stayed within them; None: it did not.

    Errors as for :func:`read_config`.
    """
    return read_hf(folder)[1].document_end
