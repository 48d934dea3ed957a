"""Heterogeneous expert capacity (MoE++, arXiv 2410.07348, Eq. 8).

Shapes: T tokens of this rank, B sequences, S tokens each, K experts per token, A assignments, E experts of every kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.distributed.sequence import SequenceParallel
from moepp.ops import count_experts


def capacities(cfg: MoEConfig, num_assignments: int) -> tuple[int, int]:
    """Return assignments that one FFN expert and one zero-computation expert may keep, of ``num_assignments`` = K·T.

    ``C_FFN = ⌈γ τ A / (τ N_FFN + N_ZC)⌉``, ``C_ZC = ⌈γ A / (τ N_FFN + N_ZC)⌉``. A counts assignments: with A = T,
    as the paper prints it, almost half of them would drop at γ = 1.1.
    """
    assert cfg.capacity_factor is not None
    share = cfg.capacity_factor * num_assignments / (cfg.tau * cfg.num_ffn_experts + cfg.num_zero_computation_experts)
    # 1e-9: a product such as 1.1 * 10 must not round up to the next integer.
    return math.ceil(cfg.tau * share - 1e-9), math.ceil(share - 1e-9)


def keep_within_capacity(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    cfg: MoEConfig,
    sequence: SequenceParallel | None = None,
    batch_size: int = 1,
) -> Tensor:
    """Return which assignments fit into the capacities: bool [T, K].

    Each expert keeps its assignments with the highest gate weights (``drop_policy="weight"``; among equals the earlier
    token), or its earliest tokens (``"position"``). Every rank applies this to the tokens of its replica: its own, and
    those of the ranks that hold the rest of its sequences.

    Args:
        sequence: the ranks that share sequences (None: none do).
        batch_size: B; this rank's tokens are [B, T / B].
    """
    if sequence is None or sequence.size == 1:
        return _keep(topk_ids_TK.flatten(), weights_TK.detach().flatten(), cfg).view_as(topk_ids_TK)
    ids_BSK = sequence.whole(topk_ids_TK.unflatten(0, (batch_size, -1)))
    weights_BSK = sequence.whole(weights_TK.unflatten(0, (batch_size, -1)))
    kept_BSK = _keep(ids_BSK.flatten(), weights_BSK.flatten(), cfg).view_as(ids_BSK)
    return sequence.own(kept_BSK).flatten(0, 1)


def _keep(ids_A: Tensor, weights_A: Tensor, cfg: MoEConfig) -> Tensor:
    ffn_capacity, zc_capacity = capacities(cfg, ids_A.numel())
    if cfg.drop_policy == "weight":
        by_weight_A = torch.argsort(weights_A, descending=True, stable=True)
        order_A = by_weight_A[torch.argsort(ids_A[by_weight_A], stable=True)]
    else:
        order_A = torch.argsort(ids_A, stable=True)
    counts_E = count_experts(ids_A, cfg.num_experts)
    first_E = torch.cumsum(counts_E, 0) - counts_E
    sorted_ids_A = ids_A[order_A]
    rank_in_expert_A = torch.arange(ids_A.numel(), device=ids_A.device) - first_E[sorted_ids_A]
    capacity_A = torch.where(sorted_ids_A < cfg.num_ffn_experts, ffn_capacity, zc_capacity)
    kept_A = torch.empty_like(ids_A, dtype=torch.bool)
    kept_A[order_A] = rank_in_expert_A < capacity_A
    return kept_A
