"""Heterogeneous expert capacity (MoE++, arXiv 2410.07348, Eq. 8).

Shapes: T tokens, K experts per token, S = T·K slots, E experts of every kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.moe.kernels import count_experts


def capacities(cfg: MoEConfig, num_slots: int) -> tuple[int, int]:
    """Slots that one FFN expert and one zero-computation expert may keep, of ``num_slots`` = K·T routed ones.

    ``C_FFN = ⌈γ τ S / (τ N_FFN + N_ZC)⌉``, ``C_ZC = ⌈γ S / (τ N_FFN + N_ZC)⌉``. S counts routed slots: with S = T,
    as the paper prints it, almost half of the slots would drop at γ = 1.1.
    """
    assert cfg.capacity_factor is not None
    share = cfg.capacity_factor * num_slots / (cfg.tau * cfg.num_ffn_experts + cfg.num_zero_computation_experts)
    # 1e-9: a product such as 1.1 * 10 must not round up to the next integer.
    return math.ceil(cfg.tau * share - 1e-9), math.ceil(share - 1e-9)


def keep_within_capacity(topk_ids_TK: Tensor, weights_TK: Tensor, cfg: MoEConfig) -> Tensor:
    """Which slots survive: bool [T, K].

    Each expert keeps its slots with the highest gate weights (``drop_policy="weight"``; among equals the earlier
    token), or its earliest tokens (``"position"``). Every rank applies this to its own tokens.
    """
    ids_S = topk_ids_TK.flatten()
    ffn_capacity, zc_capacity = capacities(cfg, ids_S.numel())
    if cfg.drop_policy == "weight":
        by_weight_S = torch.argsort(weights_TK.detach().flatten(), descending=True, stable=True)
        order_S = by_weight_S[torch.argsort(ids_S[by_weight_S], stable=True)]
    else:
        order_S = torch.argsort(ids_S, stable=True)
    counts_E = count_experts(ids_S, cfg.num_experts)
    first_E = torch.cumsum(counts_E, 0) - counts_E
    sorted_ids_S = ids_S[order_S]
    rank_in_expert_S = torch.arange(ids_S.numel(), device=ids_S.device) - first_E[sorted_ids_S]
    capacity_S = torch.where(sorted_ids_S < cfg.num_ffn_experts, ffn_capacity, zc_capacity)
    kept_S = torch.empty_like(ids_S, dtype=torch.bool)
    kept_S[order_S] = rank_in_expert_S < capacity_S
    return kept_S.view_as(topk_ids_TK)
