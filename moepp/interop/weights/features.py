"""Features that a ``config.json`` may ask for and the project's model does not have: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moepp.errors import CheckpointError
from moepp.io.untrusted import show

_OFF = (None, False)
_ONE = (None, 1)
# Key: (what it switches on, values that leave the model as it is).
_FEATURES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attention_bias": ("biases in the attention", _OFF),
    "qkv_bias": ("biases in the attention", _OFF),
    "mlp_bias": ("biases in the FFN", _OFF),
    "use_bias": ("biases", _OFF),
    "hidden_act": ("an activation other than silu", ("silu", "swish")),
    "hidden_activation": ("an activation other than silu", (None, "silu", "swish")),
    "qk_norm": ("norms of queries and keys", _OFF),
    "use_qk_norm": ("norms of queries and keys", _OFF),
    "qk_layernorm": ("norms of queries and keys", _OFF),
    "attn_logit_softcapping": ("soft-capped attention scores", _OFF),
    "final_logit_softcapping": ("soft-capped logits", _OFF),
    "query_pre_attn_scalar": ("another scale of the attention scores", (None,)),
    "attention_multiplier": ("another scale of the attention scores", (None,)),
    "embedding_multiplier": ("scaled embeddings", _ONE),
    "scale_emb": ("scaled embeddings", _ONE),
    "residual_multiplier": ("scaled residuals", _ONE),
    "scale_depth": ("scaled residuals", (None,)),
    "dim_model_base": ("scaled logits", (None,)),
    "logits_scaling": ("scaled logits", _ONE),
    "logit_scale": ("scaled logits", _ONE),
    "use_parallel_residual": ("parallel residuals", _OFF),
    "parallel_attn": ("parallel residuals", _OFF),
    "use_post_attention_norm": ("sandwich norms", _OFF),
    "sandwich_norm": ("sandwich norms", _OFF),
    "partial_rotary_factor": ("rotary embeddings of a part of each head", _ONE),
    "rotary_pct": ("rotary embeddings of a part of each head", _ONE),
    "rope_local_base_freq": ("a rotary base of its own in some layers", (None,)),
    "rotary_percent": ("rotary embeddings of a part of each head", _ONE),
    "rotary_emb_base": ("another base of the rotary embeddings", (None,)),
    "no_rope_layers": ("layers without rotary embeddings", (None,)),
    "quantization_config": ("quantised weights", (None,)),
    "compression_config": ("quantised weights", (None,)),
    "pretraining_tp": ("sliced matrix products (pretraining_tp)", _ONE),
    "num_local_experts": ("a mixture of experts", (None, 0)),
    "num_experts": ("a mixture of experts", (None, 0)),
    "n_routed_experts": ("a mixture of experts", (None, 0)),
    "is_encoder_decoder": ("an encoder", _OFF),
    "add_cross_attention": ("cross attention", _OFF),
    "pruned_heads": ("pruned heads", (None, {})),
}
# Keys that change nothing of what the weights compute: names, tokens, training, defaults of generation.
_HARMLESS = frozenset(
    (
        *("_name_or_path", "name_or_path", "architectures", "model_type", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "initializer_range", "max_position_embeddings"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout", "bos_token_id"),
        *("eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
        *("decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict"),
        *("return_dict_in_generate", "output_scores", "torchscript", "use_bfloat16", "is_decoder"),
        *("cross_attention_hidden_size", "tie_encoder_decoder", "chunk_size_feed_forward", "problem_type"),
        *("id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "tokenizer_class"),
        *("prefix", "tf_legacy_loss", "_attn_implementation", "_attn_implementation_autoset"),
        *("attn_implementation", "_commit_hash", "max_length", "min_length", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "unsloth_version", "unsloth_fixed", "use_flash_attention"),
        *("gradient_checkpointing",),
    )
)


def refuse_foreign(path: Path, tree: Mapping[str, Any], own: Collection[str]) -> None:
    """Refuse a configuration that asks for what the model does not have.

    A key that nothing is known of counts as a feature, unless it is null.

    Args:
        path: of the ``config.json``.
        own: keys that the caller reads.

    Raises:
        CheckpointError: one line with every such key, its value and what it means.
    """
    found = []
    for key, value in tree.items():
        if key in own or key in _HARMLESS:
            continue
        what, neutral = _FEATURES.get(key, ("unknown here", (None,)))
        if not any(value is same or (value == same and type(value) is not bool) for same in neutral):
            found.append(f"{show(key)}={show(value)} ({what})")
    if found:
        raise CheckpointError(
            f"{path} asks for what this model does not have: {'; '.join(found)}; use other weights, or remove keys "
            "that change nothing of what the weights compute"
        )
