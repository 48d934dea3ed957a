"""Shape of the model: the MoE++ layer and the decoder around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moepp.config.options import convert_options
from moepp.config.require import require, require_above, require_at_least, require_choice
from moepp.registry import BALANCE_RULES, EXPERT_KINDS, GATE_NORMALIZATIONS, ROUTERS

# Beyond any model: what is listed by layer or expert, and counted in products of sizes, stays small enough to refuse.
MOST_LAYERS, MOST_EXPERTS, LARGEST_SIZE = 10**4, 10**5, 10**9


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer (MoE++, arXiv 2410.07348).

    Expert order: FFN, constant, copy, zero, then registered kinds by name.

    Vanilla MoE is the same configuration with no zero-computation experts.
    """

    num_ffn_experts: int  # FFN experts of the layer, over all ranks
    ffn_hidden_size: int  # F, width of one FFN expert
    num_zero_experts: int = 0  # E(x) = 0
    num_copy_experts: int = 0  # E(x) = x
    num_constant_experts: int = 0  # E(x) = a1 x + a2 v, [a1, a2] = softmax(W_c x)
    top_k: int = 2  # experts selected per token
    router: str = "linear"  # "linear" (paper), "mlp" (D -> 8N, tanh, 8N -> N; released code) or a registered one
    gating_residual: bool = True  # add W_g times the previous MoE layer's router logits
    logits_norm_std: float | None = None  # scale each token's logits to this standard deviation; None: off
    gate_normalization: str = "zero_masked"  # "zero_masked", "none", "topk_softmax" or a registered one
    scale_input_by_top_k: bool = False  # multiply the experts' input by top_k (released code)
    tau: float = 0.75  # weight of zero-computation experts in Eq. 7, of FFN capacity in Eq. 8
    capacity_factor: float | None = 1.1  # gamma of Eq. 8; None: dropless. Only while training
    drop_policy: str = "weight"  # which overflowing assignments go: lowest "weight" or latest "position"
    balance_loss_weight: float = 0.01  # beta
    balance_loss_scope: str = "micro_batch"  # tokens that f_i counts: "micro_batch", "data_parallel", "global_batch"
    balance_rule: str = "heterogeneous"  # Eq. 7, or a registered one
    balance_loss_switch_scale: bool = False  # multiply Eq. 7 by N/K as Switch Transformer does; the paper does not
    z_loss_weight: float = 0.0  # weight of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906 Eq. 5)
    expert_chunk_rows: int | None = None  # rows that experts compute at a time, again in backward; None: all at once
    extra_experts: Mapping[str, int] = field(default_factory=dict, hash=False)  # experts of each registered kind
    router_options: Mapping[str, bool | int | float | str] = field(
        default_factory=dict, hash=False
    )  # of a registered router

    def __post_init__(self) -> None:
        for name in ("num_ffn_experts", "num_zero_experts", "num_copy_experts", "num_constant_experts"):
            require_at_least(f"model.moe.{name}", getattr(self, name), 0, MOST_EXPERTS)
        for kind, count in self.extra_experts.items():
            EXPERT_KINDS.require(kind)
            require_at_least(f"model.moe.extra_experts.{kind}", count, 0, MOST_EXPERTS)
        object.__setattr__(self, "extra_experts", dict(sorted(self.extra_experts.items())))
        require_at_least("model.moe.ffn_hidden_size", self.ffn_hidden_size, 1, LARGEST_SIZE)
        require(
            self.num_experts > 0,
            "model.moe has 0 experts of every kind; an MoE layer needs at least one: raise num_ffn_experts",
        )
        require(
            1 <= self.top_k <= self.num_experts,
            f"model.moe.top_k={self.top_k} must lie between 1 and the {self.num_experts} experts of the layer; "
            "lower top_k or add experts",
        )
        self._check_router()
        GATE_NORMALIZATIONS.require(self.gate_normalization)
        BALANCE_RULES.require(self.balance_rule)
        require_choice("model.moe.drop_policy", self.drop_policy, ("weight", "position"))
        require_choice(
            "model.moe.balance_loss_scope",
            self.balance_loss_scope,
            ("micro_batch", "data_parallel", "global_batch"),
        )
        require_above("model.moe.tau", self.tau, 0)
        for name in ("logits_norm_std", "capacity_factor"):
            value = getattr(self, name)
            if value is not None:
                require_above(f"model.moe.{name}", value, 0)
        require_at_least("model.moe.balance_loss_weight", self.balance_loss_weight, 0)
        require_at_least("model.moe.z_loss_weight", self.z_loss_weight, 0)
        if self.expert_chunk_rows is not None:
            require_at_least("model.moe.expert_chunk_rows", self.expert_chunk_rows, 1)
        require(
            self.logits_norm_std is None or self.num_experts > 1,
            "model.moe.logits_norm_std needs at least 2 experts (a standard deviation of one logit is undefined); "
            "set it to null",
        )

    def _check_router(self) -> None:
        ROUTERS.require(self.router)
        router = ROUTERS.get(self.router)
        key, owner = "model.moe.router_options", f"router={self.router}"
        options = convert_options(self.router_options, router.default_options, key, owner)
        object.__setattr__(self, "router_options", options)
        router.check(self)

    @property
    def num_zero_computation_experts(self) -> int:
        """Experts that every rank computes itself, registered kinds among them."""
        return self.num_experts - self.num_ffn_experts

    @property
    def num_experts(self) -> int:
        """N: all experts of every kind."""
        return sum(self.expert_counts.values())

    @property
    def expert_counts(self) -> dict[str, int]:
        """Experts of each kind, in the order of experts."""
        kinds = ("ffn", "constant", "copy", "zero")
        return {kind: getattr(self, f"num_{kind}_experts") for kind in kinds} | dict(self.extra_experts)

    @property
    def registered_parts(self) -> list[str]:
        """Settings that name parts from outside the package, as "key=value": exports cannot express them."""
        parts = [f"extra_experts.{kind}={count}" for kind, count in self.extra_experts.items() if count]
        if self.router not in ("linear", "mlp"):
            parts.append(f"router={self.router}")
        if self.gate_normalization not in ("zero_masked", "none", "topk_softmax"):
            parts.append(f"gate_normalization={self.gate_normalization}")
        return [f"model.moe.{part}" for part in parts]

    @property
    def kind_slices(self) -> dict[str, slice]:
        """Index range of each expert kind, in the order of experts."""
        slices, start = {}, 0
        for kind, count in self.expert_counts.items():
            slices[kind] = slice(start, start + count)
            start += count
        return slices


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary embeddings for positions beyond those that a model was trained on; Q positions seen, d head size.

    "linear": positions divided by ``factor``. "ntk": theta multiplied by it, at any length. "dynamic": for Q above
    max_seq_len theta is multiplied by ``(factor Q / max_seq_len - (factor - 1)) ^ (d / (d - 2))``.
    """

    type: str  # "linear", "ntk" or "dynamic"
    factor: float  # above 1

    def __post_init__(self) -> None:
        require_choice("model.rope_scaling.type", self.type, ("linear", "ntk", "dynamic"))
        require_above("model.rope_scaling.factor", self.factor, 1)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder with MoE++ layers."""

    vocab_size: int  # rows of the embedding; at least the tokens of data.tokenizer
    hidden_size: int  # D
    num_layers: int  # transformer layers
    num_heads: int  # attention heads; hidden_size / num_heads is the head size
    num_kv_heads: int  # key and value heads (grouped-query attention); divides num_heads
    max_seq_len: int  # longest sequence of positions the model is meant for, tokens
    moe: MoEConfig
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths
    rope_scaling: RopeScalingConfig | None = None  # None: positions as they are
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    init_std: float = 0.02  # standard deviation of initial weights, constant vectors aside
    constant_init_std: float = 1.0  # of the constant experts' vectors v; FFN experts' outputs start far smaller
    tie_embeddings: bool = False  # output projection = embedding
    moe_layer_interval: int = 1  # layer i is an MoE layer iff (i + 1) % interval == 0, dense SwiGLU otherwise
    dense_ffn_hidden_size: int | None = None  # width of the dense SwiGLU; needed when the interval is above 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
            largest = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            require_at_least(f"model.{name}", getattr(self, name), 1, largest)
        require_at_least("model.moe_layer_interval", self.moe_layer_interval, 1)
        for name in ("rope_theta", "norm_eps", "init_std"):
            require_above(f"model.{name}", getattr(self, name), 0)
        require_at_least("model.constant_init_std", self.constant_init_std, 0)
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}; "
            "change one of them",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.hidden_size={self.hidden_size} / model.num_heads={self.num_heads} gives an odd head size "
            f"{self.head_dim}, and rotary embeddings need an even one; change one of them",
        )
        require(
            self.rope_scaling is None or self.rope_scaling.type != "dynamic" or self.head_dim > 2,
            f"model.rope_scaling.type=dynamic needs a head size above 2, and model.hidden_size={self.hidden_size} / "
            f"model.num_heads={self.num_heads} gives {self.head_dim}; change one of them",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}; "
            "change one of them",
        )
        require(
            self.moe_layer_interval == 1 or self.dense_ffn_hidden_size is not None,
            f"model.moe_layer_interval={self.moe_layer_interval} leaves dense layers without a width; "
            "set model.dense_ffn_hidden_size",
        )
        if self.dense_ffn_hidden_size is not None:
            require_at_least("model.dense_ffn_hidden_size", self.dense_ffn_hidden_size, 1, LARGEST_SIZE)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold an MoE layer."""
        return tuple(i for i in range(self.num_layers) if (i + 1) % self.moe_layer_interval == 0)
