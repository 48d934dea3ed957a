"""Parameters and floating-point operations, from the configuration alone.

Letters: V vocabulary, D width, S sequence, L layers (M of them MoE, the others dense), H query and G key/value heads
of size d, F width of an FFN expert, N experts of every kind, N_FFN FFN experts, C constant experts, K experts per
token, A FFN experts computed per token.

One multiply-add counts as 2 operations. Only matrix products count: norms, activations, softmax and the embedding
lookup are left out, as in ``torch.utils.flop_counter``, against which the tests check the formulas.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import nn

from moepp.config import ModelConfig, MoEConfig
from moepp.moe.registered import RegisteredModule, known_flops
from moepp.registry import EXPERT_KINDS, ROUTERS

BACKWARD_FACTOR = 2  # each product y = x W has two in backward, for the gradients of x and of W


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model (over all ranks) by kind."""

    embedding: int  # V D
    attention: int  # L (2 D^2 + 2 D G d)
    norms: int  # (2 L + 1) D
    router: int  # M D N (linear) or M (8 N D + 8 N^2) (mlp), with gating residuals + M N^2
    ffn_experts: int  # M N_FFN 3 D F
    constant_experts: int  # M C 3 D
    registered_experts: int  # of kinds from outside the package
    dense_ffn: int  # (L - M) 3 D F_dense
    lm_head: int  # V D, or 0 where tied

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations per token of one forward, averaged over a sequence, by kind."""

    attention_projections: float  # 2 x attention parameters
    attention_scores: float  # L 4 S D: query x key and weights x value, over the full square
    router: float | None  # what the router counts, with gating residuals + M 2 N^2; None: unknown
    ffn_experts: float  # M A 6 D F
    constant_experts: float  # M C 4 D: the difference of their two logits, and v; for every token
    registered_experts: float | None  # what their kinds count; None: unknown
    dense_ffn: float  # 2 x dense_ffn parameters
    lm_head: float  # 2 V D

    @property
    def forward(self) -> float | None:
        """All of them; ``None`` if one is unknown."""
        parts = astuple(self)
        return None if None in parts else sum(parts)

    @property
    def forward_backward(self) -> float | None:
        """Forward and backward; operations that recompute stored activations are not counted."""
        return None if self.forward is None else (1 + BACKWARD_FACTOR) * self.forward


def count_parameters(cfg: ModelConfig) -> ParameterCounts:
    """Return every parameter, by kind."""
    moe, width, num_moe = cfg.moe, cfg.hidden_size, len(cfg.moe_layers)
    num_experts = moe.num_experts
    if moe.router in ("linear", "mlp"):
        router = width * num_experts if moe.router == "linear" else 8 * num_experts * (width + num_experts)
        router += num_experts**2 if moe.gating_residual else 0
    else:
        router = _size(_router(cfg))
    registered = [_size(module) for module in _registered_experts(cfg).values()]
    return ParameterCounts(
        embedding=cfg.vocab_size * width,
        attention=cfg.num_layers * 2 * width * (width + cfg.num_kv_heads * cfg.head_dim),
        norms=(2 * cfg.num_layers + 1) * width,
        router=num_moe * router,
        ffn_experts=num_moe * moe.num_ffn_experts * _swiglu_parameters(cfg, moe.ffn_hidden_size),
        constant_experts=num_moe * moe.num_constant_experts * 3 * width,
        registered_experts=num_moe * sum(registered),
        dense_ffn=(cfg.num_layers - num_moe) * _swiglu_parameters(cfg, cfg.dense_ffn_hidden_size or 0),
        lm_head=0 if cfg.tie_embeddings else cfg.vocab_size * width,
    )


def _router(cfg: ModelConfig) -> RegisteredModule:
    """Return the router of a layer; takes no memory."""
    with torch.device("meta"):
        return ROUTERS.get(cfg.moe.router)(cfg.moe, cfg.hidden_size)


def _registered_experts(cfg: ModelConfig) -> dict[str, RegisteredModule]:
    """Return the registered experts of a layer by kind; take no memory."""
    with torch.device("meta"):
        return {k: EXPERT_KINDS.get(k)(n, cfg.hidden_size) for k, n in cfg.moe.extra_experts.items() if n}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def activated_parameters(
    cfg: ModelConfig, ffn_per_token: float | None = None, *, include_embedding: bool = True
) -> float:
    """Return parameters that one token uses: all but the FFN experts that it does not choose.

    Args:
        ffn_per_token: A, averaged over the MoE layers; None: all K choices are FFN experts, the upper bound.
        include_embedding: count the input table (V D). The paper's "1.2B" for its 7B model leaves it out.
    """
    counts = count_parameters(cfg)
    used = max_ffn_per_token(cfg.moe) if ffn_per_token is None else ffn_per_token
    experts = len(cfg.moe_layers) * used * _swiglu_parameters(cfg, cfg.moe.ffn_hidden_size)
    # A tied table is the output matrix too, which every token uses.
    unused_embedding = 0 if include_embedding or cfg.tie_embeddings else counts.embedding
    return counts.total - counts.ffn_experts + experts - unused_embedding


def flops_per_token(cfg: ModelConfig, seq_len: int, ffn_per_token: float) -> FlopsPerToken:
    """Return operations per token when each computes ``ffn_per_token`` FFN experts in every MoE layer (A, on average).

    Observed cost: the ``ffn_per_token`` of the run. Active: :func:`max_ffn_per_token`, what a vanilla MoE of the
    same size computes. Expected under a perfect balance: :func:`balanced_ffn_per_token`. Total, every expert for
    every token: ``cfg.moe.num_ffn_experts``.

    Args:
        seq_len: S, tokens per sequence. Attention counts the full S x S square, causal or not, as is usual for the
            model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
    """
    counts, num_moe = count_parameters(cfg), len(cfg.moe_layers)
    router = known_flops(_router(cfg))
    residual = 2 * cfg.moe.num_experts**2 if cfg.moe.gating_residual else 0
    registered = [known_flops(module) for module in _registered_experts(cfg).values()]
    return FlopsPerToken(
        attention_projections=2 * counts.attention,
        attention_scores=cfg.num_layers * 4 * seq_len * cfg.hidden_size,
        router=None if router is None else num_moe * (router + residual),
        ffn_experts=num_moe * ffn_per_token * 2 * _swiglu_parameters(cfg, cfg.moe.ffn_hidden_size),
        constant_experts=len(cfg.moe_layers) * cfg.moe.num_constant_experts * 4 * cfg.hidden_size,
        registered_experts=None if None in registered else num_moe * sum(filter(None, registered)),
        dense_ffn=2 * counts.dense_ffn,
        lm_head=2 * cfg.vocab_size * cfg.hidden_size,
    )


def parts_without_flops(cfg: ModelConfig) -> list[str]:
    """Return the registered parts whose operations are unknown, as "key=value" for messages."""
    unknown = [f"extra_experts.{kind}" for kind, m in _registered_experts(cfg).items() if known_flops(m) is None]
    if known_flops(_router(cfg)) is None:
        unknown.append(f"router={cfg.moe.router}")
    return [f"model.moe.{part}" for part in unknown]


def max_ffn_per_token(moe: MoEConfig) -> int:
    """Return A when every choice that can be an FFN expert is one: min(K, N_FFN)."""
    return min(moe.top_k, moe.num_ffn_experts)


def balanced_ffn_per_token(moe: MoEConfig) -> float:
    """Return A at the optimum of the balance loss (arXiv 2410.07348, Eq. 7): K tau N_FFN / (tau N_FFN + N_ZC)."""
    weighted_ffn = moe.tau * moe.num_ffn_experts
    return moe.top_k * weighted_ffn / (weighted_ffn + moe.num_zero_computation_experts)


def _swiglu_parameters(cfg: ModelConfig, ffn_hidden_size: int) -> int:
    return 3 * cfg.hidden_size * ffn_hidden_size
