"""Auxiliary losses of the router, as pure functions; balance rules can be registered.

Shapes: T tokens, E = N experts of every kind (FFN experts first), K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.moe.registered import require_tensor, without_side_effects
from moepp.ops import constants
from moepp.registry import BALANCE_RULES


def balance_loss(*, probs_TE: Tensor, selection_share_E: Tensor, cfg: MoEConfig) -> Tensor:
    """Return the loss that ``cfg.balance_rule`` names.

    A balance rule is a function with these arguments in :data:`moepp.registry.BALANCE_RULES`.

    Args:
        probs_TE: scores of all experts (softmax of the router logits), local tokens.
        selection_share_E: f_i, choices of expert i (before capacity drops) per token of the chosen scope; it sums to
            K and carries no gradient.
        cfg: of the layer.

    Returns:
        Scalar in the scores' dtype, not multiplied by β; 0 for T = 0.
    """
    rule, what = BALANCE_RULES.get(cfg.balance_rule), f"balance rule {cfg.balance_rule}"
    with nullcontext() if rule is heterogeneous else without_side_effects(what, probs_TE):
        loss = rule(probs_TE=probs_TE, selection_share_E=selection_share_E.detach(), cfg=cfg)
    return require_tensor(loss, what, probs_TE, (), probs_TE.dtype)


@BALANCE_RULES.register("heterogeneous")
def heterogeneous(*, probs_TE: Tensor, selection_share_E: Tensor, cfg: MoEConfig) -> Tensor:
    """Heterogeneous load-balance loss (MoE++, arXiv 2410.07348, Eq. 7): ``Σ_i η_i f_i P_i``.

    η_i is 1 for FFN experts and τ for zero-computation experts; ``P_i`` is the mean of ``probs_TE`` over the local
    tokens (differentiable). Eq. 7 has no factor N; with ``cfg.balance_loss_switch_scale`` the sum is multiplied by
    N/K, as in Switch Transformer (arXiv 2101.03961, Eq. 4), so that perfect balance gives about 1 whatever N.
    """
    scale = cfg.num_experts / cfg.top_k if cfg.balance_loss_switch_scale else 1.0
    scale /= max(len(probs_TE), 1)
    kinds = (cfg.num_ffn_experts, cfg.num_experts - cfg.num_ffn_experts)
    eta_E = constants.blocks((scale, scale * cfg.tau), kinds, probs_TE, probs_TE.dtype)
    # Not the mean first: this gradient is one product.
    return (probs_TE * (selection_share_E * eta_E)).sum()


def router_z_loss(*, logits_TE: Tensor) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, Eq. 5): mean over tokens of ``logsumexp(logits)²``.

    Taken on the logits before any normalisation, whose growth it limits. Scalar; 0 for T = 0.
    """
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(logits_TE.shape[0], 1)
