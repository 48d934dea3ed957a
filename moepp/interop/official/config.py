"""The released format's ``config.json`` and what of it the project's configuration can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepp.config import ModelConfig, MoEConfig, RopeScalingConfig
from moepp.errors import CheckpointError, ConfigError
from moepp.interop.token_ids import TokenIds, read_token_ids
from moepp.interop.weights.features import refuse_foreign
from moepp.interop.weights.files import read_json
from moepp.io.untrusted import show

MODEL_TYPE = "MoE++"
ARCHITECTURE = "MoeForCausalLM"
CODE = {
    "AutoConfig": "configuration_moe_plus_plus.MoeConfig",
    "AutoModelForCausalLM": f"modeling_moe_plus_plus.{ARCHITECTURE}",
}
# Fixed in the released code.
TOP_K, NUM_CONSTANT, NUM_COPY, NUM_ZERO = 2, 2, 1, 1
NUM_ZERO_COMPUTATION = NUM_CONSTANT + NUM_COPY + NUM_ZERO

_BOOL, _INT, _NUMBER = (bool,), (int,), (int, float)
# Every key that matters: (type, value where it is absent).
_KEYS: dict[str, tuple[tuple[type, ...], Any]] = {
    "vocab_size": (_INT, 32000),
    "hidden_size": (_INT, 4096),
    "intermediate_size": (_INT, 11008),
    "num_hidden_layers": (_INT, 32),
    "num_attention_heads": (_INT, 32),
    "num_key_value_heads": (_INT, None),  # as many as query heads
    "max_position_embeddings": (_INT, 2048),
    "initializer_range": (_NUMBER, 0.02),
    "rms_norm_eps": (_NUMBER, 1e-6),
    "rope_theta": (_NUMBER, 1e4),
    "rope_scaling": ((dict,), None),
    "tie_word_embeddings": (_BOOL, False),
    "num_experts": ((list,), (32,)),
    "moe_expert_interval": (_INT, 1),
    "moe_use_mixtral_gating": (_BOOL, False),
    "moe_2layer_gate": (_BOOL, True),
    "moe_use_logits_norm": (_BOOL, False),
    "moe_gate_norm_std": (_NUMBER, 1.0),
    "moe_feature_no_mul_topk": (_BOOL, False),
}
_NULLABLE = {"num_key_value_heads", "rope_scaling"}
_TOKEN_IDS = {"bos": 1, "eos": 2, "pad": None}  # where they are absent


def read_config(folder: str | Path) -> ModelConfig:
    """Return a released checkpoint's shapes and flags; training's own (tau, losses, capacity) have defaults.

    Raises:
        CheckpointError: not a folder of the released format, or values that its code cannot run.
    """
    return read_released(folder)[0]


def read_released(folder: str | Path) -> tuple[ModelConfig, TokenIds]:
    """As :func:`read_config`, with the special tokens."""
    path = Path(folder) / "config.json"
    tree = read_json(path)
    _require_model_type(path, tree)
    refuse_foreign(path, tree, {*_KEYS, "auto_map"})
    values = {key: _value(path, tree, key) for key in _KEYS}
    token_ids = read_token_ids(path, tree, _TOKEN_IDS)
    num_experts = values["num_experts"][0] if values["num_experts"] else None
    if type(num_experts) is not int or num_experts < NUM_ZERO_COMPUTATION:
        raise CheckpointError(
            f"{path}: num_experts={show(values['num_experts'])} must start with the number of experts of every kind, "
            f"at least the {NUM_ZERO_COMPUTATION} zero-computation ones; correct it"
        )
    if values["moe_expert_interval"] != 1:
        raise CheckpointError(
            f"{path}: moe_expert_interval={values['moe_expert_interval']} makes dense layers, with which the released "
            "code cannot run; only 1 can be imported"
        )
    try:
        return _model_config(values, num_experts), token_ids
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error


def _model_config(values: dict[str, Any], num_experts: int) -> ModelConfig:
    mixtral = values["moe_use_mixtral_gating"]
    moe = MoEConfig(
        num_ffn_experts=num_experts - NUM_ZERO_COMPUTATION,
        ffn_hidden_size=values["intermediate_size"],
        num_zero_experts=NUM_ZERO,
        num_copy_experts=NUM_COPY,
        num_constant_experts=NUM_CONSTANT,
        top_k=TOP_K,
        router="mlp" if values["moe_2layer_gate"] else "linear",
        logits_norm_std=float(values["moe_gate_norm_std"]) if values["moe_use_logits_norm"] else None,
        gate_normalization="topk_softmax" if mixtral else "zero_masked",
        scale_input_by_top_k=not (mixtral or values["moe_feature_no_mul_topk"]),
    )
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        max_seq_len=values["max_position_embeddings"],
        moe=moe,
        rope_theta=float(values["rope_theta"]),
        rope_scaling=_rope_scaling(values["rope_scaling"]),
        norm_eps=float(values["rms_norm_eps"]),
        init_std=float(values["initializer_range"]),
        tie_embeddings=values["tie_word_embeddings"],
    )


def _rope_scaling(tree: dict[str, Any] | None) -> RopeScalingConfig | None:
    if tree is None:
        return None
    if set(tree) != {"type", "factor"} or not isinstance(tree["factor"], float) or not isinstance(tree["type"], str):
        raise ConfigError(
            f'rope_scaling={show(tree)} must be {{"type": linear, ntk or dynamic, "factor": a float above 1}}; '
            "correct it"
        )
    return RopeScalingConfig(tree["type"], tree["factor"])


def released_config(cfg: ModelConfig, ids: TokenIds, dtype: str, code_repo: str | None = None) -> dict[str, Any]:
    """Return the contents of ``config.json``.

    Args:
        dtype: of the weights, "float32" or "bfloat16".
        code_repo: Hugging Face repository (or folder) that holds the released .py files; None: they lie beside it.

    Raises:
        CheckpointError: lists what the released code cannot express.
    """
    reasons = refusals(cfg)
    if reasons:
        raise CheckpointError(
            f"the released MoE++ code cannot express this model: {'; '.join(reasons)}; "
            "use --format moepp to export it with the project's own code"
        )
    moe = cfg.moe
    prefix = "" if code_repo is None else f"{code_repo}--"
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {name: prefix + where for name, where in CODE.items()},
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": cfg.init_std,
        "intermediate_size": moe.ffn_hidden_size,
        "max_position_embeddings": cfg.max_seq_len,
        "model_type": MODEL_TYPE,
        "moe_2layer_gate": moe.router == "mlp",
        "moe_expert_interval": 1,
        "moe_feature_no_mul_topk": not moe.scale_input_by_top_k,
        "moe_gate_norm_std": 1.0 if moe.logits_norm_std is None else moe.logits_norm_std,
        "moe_use_logits_norm": moe.logits_norm_std is not None,
        "moe_use_mixtral_gating": moe.gate_normalization == "topk_softmax",
        "num_attention_heads": cfg.num_heads,
        "num_experts": [moe.num_experts],
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": cfg.norm_eps,
        "rope_scaling": None
        if cfg.rope_scaling is None
        else {"type": cfg.rope_scaling.type, "factor": cfg.rope_scaling.factor},
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
    }


def refusals(cfg: ModelConfig) -> list[str]:
    """Return why the released code cannot run a model; empty where it can."""
    moe = cfg.moe
    fixed = (
        ("moe.num_constant_experts", moe.num_constant_experts, NUM_CONSTANT),
        ("moe.num_copy_experts", moe.num_copy_experts, NUM_COPY),
        ("moe.num_zero_experts", moe.num_zero_experts, NUM_ZERO),
        ("moe.top_k", moe.top_k, TOP_K),
        ("moe.gating_residual", moe.gating_residual, True),
        ("moe_layer_interval", cfg.moe_layer_interval, 1),
    )
    reasons = [f"model.{key}={value} (it has {only})" for key, value, only in fixed if value != only]
    reasons += [f"{part} (registered outside the package)" for part in moe.registered_parts]
    if moe.gate_normalization == "none":
        reasons.append("model.moe.gate_normalization=none (it has zero_masked and topk_softmax)")
    if moe.gate_normalization == "topk_softmax" and moe.scale_input_by_top_k:
        reasons.append("model.moe.scale_input_by_top_k=True with gate_normalization=topk_softmax (it has one or other)")
    return reasons


def _require_model_type(path: Path, tree: dict[str, Any]) -> None:
    model_type = tree.get("model_type")
    is_released = model_type == MODEL_TYPE or (model_type is None and ARCHITECTURE in str(tree.get("auto_map")))
    if not is_released:
        raise CheckpointError(
            f"{path} describes a model of type {show(model_type)}, not a released MoE++ checkpoint ({MODEL_TYPE!r}); "
            "name another folder or format"
        )


def _value(path: Path, tree: dict[str, Any], key: str) -> Any:
    types, default = _KEYS[key]
    value = tree.get(key, default)
    if key not in tree or (value is None and key in _NULLABLE):
        return value
    if type(value) not in types:
        wanted = " or ".join(t.__name__ for t in types)
        raise CheckpointError(f"{path}: {key}={show(value)} is not of type {wanted}; correct it")
    return value
