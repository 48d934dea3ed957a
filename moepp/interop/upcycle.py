"""Starting from a dense Llama-format checkpoint: its FFN in every expert (arXiv 2212.05055).

Router and zero-computation experts keep their fresh weights. Without noise all FFN experts start equal and the router
alone tells them apart; two options make them differ:

- ``noise_std``: adds N(0, noise_std · std(W)) to each of an expert's three matrices W.
- ``reinit_fraction``: draws that share of an expert's hidden units anew, from the mean and the standard deviation of
  each matrix (drop-upcycling, arXiv 2502.19261).

Random numbers depend on the seed, the parameter's name and the expert alone, so every layout starts the same.

Letters: D width, F expert width, E FFN experts, U hidden units drawn anew.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moepp.config import InitConfig, ModelConfig, RopeScalingConfig
from moepp.errors import CheckpointError, ConfigError
from moepp.interop.weights import Piece, TensorFolder, check_keys, copy_pieces
from moepp.interop.weights.agree import require_none
from moepp.interop.weights.features import refuse_foreign
from moepp.interop.weights.files import read_json
from moepp.interop.weights.folder_format import EMBEDDING, LM_HEAD, all_pieces, require_one_embedding
from moepp.io.untrusted import show
from moepp.model import Transformer
from moepp.model.init import random_stream

MODEL_TYPES = ("llama", "mistral")
# Of config.json, read below.
_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *(
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "auto_map",
        "max_position_embeddings",
    ),
)
_NEVER_NULL = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("rope_theta", "rms_norm_eps"),
)
_COUNTS = (*_NEVER_NULL[:5], "num_key_value_heads", "head_dim")
_NUMBERS = _NEVER_NULL[5:]
_MATRICES = ("gate_proj", "up_proj", "down_proj")
_GATE_UP, _DOWN = ".moe.experts.gate_up_proj", ".moe.experts.down_proj"


def check_folder(folder: str | Path, cfg: ModelConfig) -> TensorFolder:
    """Open a dense checkpoint whose shapes fit the model.

    Raises:
        CheckpointError: another format, damaged files, or shapes that differ (all of them are listed).
    """
    _require_fit(folder, cfg)
    tensors = TensorFolder(folder)
    pieces = all_pieces(cfg, _pieces_of)
    for layer in cfg.moe_layers:
        shapes = _ffn_shapes(cfg)
        pieces += [Piece(_ffn_key(layer, matrix), shapes[matrix]) for matrix in _MATRICES]
    check_keys(tensors, pieces, _is_unused if not cfg.tie_embeddings else _is_unused_when_tied)
    if cfg.tie_embeddings:
        require_one_embedding(
            tensors,
            f"config.json ties the embeddings but {LM_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings and model.tie_embeddings to false",
        )
    return tensors


@torch.no_grad()
def load_into(
    model: Transformer, folder: str | Path, init: InitConfig, seed: int, ep_rank: int = 0, ep_size: int = 1
) -> None:
    """Replace everything but routers and zero-computation experts; errors as for :func:`check_folder`.

    Args:
        model: initialised; rank ``ep_rank`` of ``ep_size``.
        seed: of the run.
    """
    tensors = check_folder(folder, model.cfg)
    copy_pieces(model, tensors, _pieces_of, ep_rank, ep_size)
    parameters = dict(model.named_parameters())
    for layer in model.part.layers & set(model.cfg.moe_layers):
        dense = {matrix: tensors.read(_ffn_key(layer, matrix)).float() for matrix in _MATRICES}
        gate_up_EGD, down_EDF = (parameters[f"layers.{layer}{suffix}"] for suffix in (_GATE_UP, _DOWN))
        num_local = gate_up_EGD.shape[0]
        for local in range(num_local):
            key = f"{seed}/upcycle/layers.{layer}/{ep_rank * num_local + local}"
            expert = _diversified(dense, init, key)
            gate_up_EGD[local].copy_(torch.cat((expert["gate_proj"], expert["up_proj"])))
            down_EDF[local].copy_(expert["down_proj"])


def _diversified(dense: dict[str, Tensor], init: InitConfig, key: str) -> dict[str, Tensor]:
    """Return one expert's matrices: gate and up [F, D], down [D, F]."""
    num_units = dense["gate_proj"].shape[0]
    num_new = round(init.reinit_fraction * num_units)
    units_U = torch.randperm(num_units, generator=random_stream(f"{key}/units"))[:num_new]
    expert = {}
    for name, matrix in dense.items():
        std, mean = matrix.std(), matrix.mean()
        weight = matrix.clone()
        if init.noise_std:
            weight += init.noise_std * std * torch.randn(matrix.shape, generator=random_stream(f"{key}/{name}/noise"))
        if num_new:
            rows = weight if name != "down_proj" else weight.t()  # a view: one row per hidden unit
            fresh = torch.randn((num_new, rows.shape[1]), generator=random_stream(f"{key}/{name}/reinit"))
            rows[units_U] = mean + std * fresh
        expert[name] = weight
    return expert


def _pieces_of(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return a parameter's tensors in a dense model; all but the MoE layers have the same name and shape."""
    if ".moe." in name:
        return []
    return [Piece(name if name.startswith("lm_head") else f"model.{name}", shape)]


def _ffn_key(layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.{matrix}.weight"


def _ffn_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    width, ffn = cfg.hidden_size, cfg.moe.ffn_hidden_size
    return {"gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn)}


def _is_unused(key: str) -> bool:
    return key.endswith("rotary_emb.inv_freq")  # old transformers saved this table, which follows from the config


def _is_unused_when_tied(key: str) -> bool:
    return _is_unused(key) or key == LM_HEAD


def _require_fit(folder: str | Path, cfg: ModelConfig) -> None:
    path = Path(folder) / "config.json"
    tree = read_json(path)
    if tree.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{path} describes a model of type {show(tree.get('model_type'))}, not a dense one in Llama format "
            f"({', '.join(MODEL_TYPES)}); name another folder, or set init.format to what it is"
        )
    _require_types(path, tree)
    refuse_foreign(path, tree, _KEYS)
    _refuse_windows(path, tree, cfg)
    _refuse_other_code(path, tree)
    require_none(_differences(path, tree, cfg), folder)


def _refuse_windows(path: Path, tree: dict, cfg: ModelConfig) -> None:
    """Refuse sliding windows that are shorter than a sequence, which change results."""
    default = 4096 if tree["model_type"] == "mistral" else None  # of transformers' MistralConfig
    window = tree.get("sliding_window", default)
    if window is not None and (type(window) is not int or window < cfg.max_seq_len):
        raise CheckpointError(
            f"{path}: sliding_window={show(window)} is shorter than model.max_seq_len={cfg.max_seq_len}, and this "
            "model attends to all positions; lower model.max_seq_len, or use other weights"
        )
    kinds = _texts(path, tree, "layer_types") - {"full_attention", "sliding_attention"}
    if kinds:
        raise CheckpointError(f"{path}: layer_types has {show(sorted(kinds))}; use other weights")


def _refuse_other_code(path: Path, tree: dict) -> None:
    names = _texts(path, tree, "architectures")
    if names and not names & {"LlamaForCausalLM", "MistralForCausalLM"}:
        shown = show(sorted(names))
        raise CheckpointError(f"{path}: architectures={shown} is not Llama's or Mistral's; use other weights")
    if tree.get("auto_map"):
        raise CheckpointError(f"{path}: auto_map names code of its own, whose model is not known; use other weights")


def _texts(path: Path, tree: dict, key: str) -> set[str]:
    value = tree.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise CheckpointError(f"{path}: {key}={show(value)} must be a list of texts; correct it")
    return set(value or ())


def _require_types(path: Path, tree: dict) -> None:
    """Raise CheckpointError for values that no comparison could read, such as a text for a number."""
    scalings = [tree[key] for key in ("rope_parameters", "rope_scaling") if isinstance(tree.get(key), dict)]
    values = {key: tree.get(key) for key in (*_COUNTS, *_NUMBERS, "rope_parameters", "rope_scaling")}
    values |= {f"{key} of a scaling": scaling.get(key) for scaling in scalings for key in ("factor", "rope_theta")}
    for key, value in values.items():
        if key in _COUNTS:
            is_right, rule = type(value) is int and value > 0, "an integer above 0"
        elif key in ("rope_parameters", "rope_scaling"):
            is_right, rule = isinstance(value, dict), "an object"
        else:
            is_right, rule = type(value) in (int, float), "a number"
        if not (is_right or value is None):
            raise CheckpointError(f"{path}: {key}={show(value)} must be {rule}; correct it")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if type(tree.get(key)) not in (bool, type(None)):
            raise CheckpointError(f"{path}: {key}={show(tree[key])} must be true or false; correct it")
    if any("factor" in scaling and scaling["factor"] is None for scaling in scalings):
        raise CheckpointError(f"{path}: factor=null of a scaling must be a number; correct it")
    has_theta = any(scaling.get("rope_theta") is not None for scaling in scalings)
    for key in _NEVER_NULL:
        if key in tree and tree[key] is None and not (key == "rope_theta" and has_theta):
            raise CheckpointError(f"{path}: {key}=null must be a number; correct it")


def _differences(path: Path, tree: dict, cfg: ModelConfig) -> list[str]:
    heads = tree.get("num_attention_heads", 32)
    width, ffn = tree.get("hidden_size", 4096), tree.get("intermediate_size", 11008)
    theta, scaling = _rope(path, tree)
    _require_numbers(path, {"num_attention_heads": heads, "hidden_size": width, "intermediate_size": ffn})
    wanted = [
        ("model.vocab_size", cfg.vocab_size, tree.get("vocab_size", 32000)),
        ("model.hidden_size", cfg.hidden_size, width),
        ("model.num_layers", cfg.num_layers, tree.get("num_hidden_layers", 32)),
        ("model.num_heads", cfg.num_heads, heads),
        ("model.num_kv_heads", cfg.num_kv_heads, tree.get("num_key_value_heads") or heads),
        ("the head size", cfg.head_dim, tree.get("head_dim") or width // heads),
        ("model.rope_theta", cfg.rope_theta, theta),
        ("model.rope_scaling", cfg.rope_scaling, scaling),
        ("model.norm_eps", cfg.norm_eps, tree.get("rms_norm_eps", 1e-6)),
        ("model.tie_embeddings", cfg.tie_embeddings, tree.get("tie_word_embeddings", False)),
    ]
    if scaling is not None and scaling.type == "dynamic":
        wanted.append(("model.max_seq_len", cfg.max_seq_len, tree.get("max_position_embeddings", 2048)))
    if cfg.moe_layer_interval > 1:
        wanted.append(("model.dense_ffn_hidden_size", cfg.dense_ffn_hidden_size, ffn))
    found = [f"{key}={own} (the weights have {other})" for key, own, other in wanted if own != other]
    if cfg.moe.ffn_hidden_size != ffn:
        found.append(
            f"model.moe.ffn_hidden_size={cfg.moe.ffn_hidden_size} (the weights have {ffn}: the dense FFN is copied "
            "whole into each expert, neither cut nor widened)"
        )
    return found


def _require_numbers(path: Path, values: dict[str, object]) -> None:
    for key, value in values.items():
        if type(value) not in (int, float) or value <= 0:  # pyright: ignore[reportOperatorIssue]
            raise CheckpointError(f"{path}: {key}={show(value)} is not a positive number; correct it")


def _rope(path: Path, tree: dict) -> tuple[float, RopeScalingConfig | None]:
    """Return the base and scaling of the rotary embeddings; transformers 5 keeps both in ``rope_parameters``."""
    old, new = tree.get("rope_scaling") or {}, tree.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict) or any(isinstance(v, dict) for v in new.values()):
        raise CheckpointError(
            f"{path}: rope_scaling={show(old)} and rope_parameters={show(new)} must be plain objects, the same for all "
            "layers; use other weights"
        )
    thetas = {value for value in (new.get("rope_theta"), tree.get("rope_theta")) if value is not None} or {1e4}
    if len(thetas) > 1 or (old and new and old != {key: new[key] for key in new if key != "rope_theta"}):
        raise CheckpointError(
            f"{path}: rope_parameters={show(new)} contradicts rope_theta={show(tree.get('rope_theta'))} or "
            f"rope_scaling={show(old)}; correct it"
        )
    (theta,) = thetas
    _require_numbers(path, {"rope_theta": theta})
    return float(theta), _rope_scaling(path, new or old)


def _rope_scaling(path: Path, tree: dict) -> RopeScalingConfig | None:
    kind = tree.get("rope_type", tree.get("type"))
    known = {"rope_type", "type", "rope_theta"} | ({"factor"} if kind in ("linear", "dynamic") else set())
    foreign = {key: value for key, value in tree.items() if key not in known and value is not None}
    foreign = {key: value for key, value in foreign.items() if (key, value) != ("partial_rotary_factor", 1)}
    if kind not in (None, "default", "linear", "dynamic") or foreign:
        raise CheckpointError(
            f"{path}: rotary embeddings of type {show(kind)} with {show(foreign)} cannot be expressed here (default, "
            "linear and dynamic can); use other weights"
        )
    if kind in (None, "default"):
        return None
    _require_numbers(path, {"rope_scaling.factor": tree.get("factor")})
    try:
        return None if tree["factor"] == 1 else RopeScalingConfig(str(kind), float(tree["factor"]))
    except ConfigError as error:
        raise CheckpointError(f"{path}: rope_scaling cannot be expressed here: {error}") from error
