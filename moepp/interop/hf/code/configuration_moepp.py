"""Configuration of MoE++ language models (arXiv 2410.07348) for Hugging Face transformers 4.46 to 5.x."""

# What the base class declares differs between versions.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MoeppConfig(PretrainedConfig):
    """A Llama-style decoder with MoE++ layers. Experts are ordered FFN, constant, copy, zero.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads: as in Llama.
        max_position_embeddings: positions that the model was trained on.
        rotary_theta: base of the rotary embeddings.
        rotary_scaling_type, rotary_scaling_factor: None, "linear", "ntk" or "dynamic", and its factor.
        rms_norm_eps: added to the mean square in RMSNorm.
        moe_layer_interval: layer i is an MoE layer iff (i + 1) % interval == 0, dense SwiGLU otherwise.
        dense_ffn_hidden_size: width of the dense layers; None where there are none.
        num_ffn_experts, num_constant_experts, num_copy_experts, num_zero_experts: experts of one layer by kind.
        ffn_hidden_size: width of one FFN expert.
        num_experts_per_tok: experts that a token chooses.
        router: "linear", or "mlp" with two layers and tanh.
        gating_residual: whether the previous MoE layer's router logits are mapped and added.
        logits_norm_std: standard deviation that each token's logits are scaled to; None: not scaled.
        gate_normalization: "zero_masked" (softmax over all, zero experts' weights to 0, chosen renormalised), "none"
            (softmax over all), or "topk_softmax" (softmax over the chosen).
        scale_input_by_top_k: multiply the experts' input by num_experts_per_tok.
        document_end_token_id: token that ended documents in training, if attention stayed within them; None: it crossed
            them. This code attends to all that it is given: give it one document at a time.
        output_router_logits: whether outputs hold the router logits of every MoE layer.
    """

    model_type = "moepp"
    _auto_class = "AutoConfig"  # save_pretrained copies this code too
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "router_logits"]

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rotary_theta: float = 10000.0,
        rotary_scaling_type: str | None = None,
        rotary_scaling_factor: float = 1.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        moe_layer_interval: int = 1,
        dense_ffn_hidden_size: int | None = None,
        num_ffn_experts: int = 8,
        num_constant_experts: int = 2,
        num_copy_experts: int = 1,
        num_zero_experts: int = 1,
        ffn_hidden_size: int = 2048,
        num_experts_per_tok: int = 2,
        router: str = "linear",
        gating_residual: bool = True,
        logits_norm_std: float | None = None,
        gate_normalization: str = "zero_masked",
        scale_input_by_top_k: bool = False,
        document_end_token_id: int | None = None,
        output_router_logits: bool = True,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rotary_theta = rotary_theta
        self.rotary_scaling_type = rotary_scaling_type
        self.rotary_scaling_factor = rotary_scaling_factor
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.moe_layer_interval = moe_layer_interval
        self.dense_ffn_hidden_size = dense_ffn_hidden_size
        self.num_ffn_experts = num_ffn_experts
        self.num_constant_experts = num_constant_experts
        self.num_copy_experts = num_copy_experts
        self.num_zero_experts = num_zero_experts
        self.ffn_hidden_size = ffn_hidden_size
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.gating_residual = gating_residual
        self.logits_norm_std = logits_norm_std
        self.gate_normalization = gate_normalization
        self.scale_input_by_top_k = scale_input_by_top_k
        self.document_end_token_id = document_end_token_id
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_experts(self) -> int:
        """Experts of every kind in one layer."""
        return self.num_ffn_experts + self.num_constant_experts + self.num_copy_experts + self.num_zero_experts
