"""Heterogeneous expert capacity (MoE++, arXiv 2410.07348, Eq. 8).

Shapes: T tokens of this rank, B sequences, S tokens each, K experts per token, A assignments, E experts of every kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.distributed.sequence import SequenceParallel
from moepp.ops import constants, count_experts, places_by_expert


def capacities(cfg: MoEConfig, num_assignments: int) -> tuple[int, int]:
    """Return assignments that one FFN expert and one zero-computation expert may keep, of ``num_assignments`` = K·T.

    ``C_FFN = ⌈γ τ A / (τ N_FFN + N_ZC)⌉``, ``C_ZC = ⌈γ A / (τ N_FFN + N_ZC)⌉``. A counts assignments: with A = T,
    as the paper prints it, almost half of them would drop at γ = 1.1.
    """
    assert cfg.capacity_factor is not None
    share = cfg.capacity_factor * num_assignments / (cfg.tau * cfg.num_ffn_experts + cfg.num_zero_computation_experts)
    # 1e-9: a product such as 1.1 * 10 must not round up to the next integer.
    return math.ceil(cfg.tau * share - 1e-9), math.ceil(share - 1e-9)


def drop_beyond_capacity(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    cfg: MoEConfig,
    sequence: SequenceParallel | None = None,
    batch_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return which assignments do not fit into the capacities, bool [T, K], and the choices of each expert [E].

    Each expert keeps its assignments with the highest gate weights (``drop_policy="weight"``; among equals the earlier
    token), or its earliest tokens (``"position"``). Every rank applies this to the tokens of its replica: its own, and
    those of the ranks that hold the rest of its sequences. The choices are of its own tokens, before drops.

    Args:
        topk_ids_TK: chosen experts.
        weights_TK: their gate weights.
        cfg: capacities and policy.
        sequence: the ranks that share sequences (None: none do).
        batch_size: B; this rank's tokens are [B, T / B].
    """
    if sequence is None or sequence.size == 1:
        dropped_A, load_E = _drop(topk_ids_TK.flatten(), weights_TK.detach().flatten(), cfg)
        return dropped_A.view_as(topk_ids_TK), load_E
    ids_BSK = sequence.whole(topk_ids_TK.unflatten(0, (batch_size, -1)))
    weights_BSK = sequence.whole(weights_TK.unflatten(0, (batch_size, -1)))
    dropped_A, _ = _drop(ids_BSK.flatten(), weights_BSK.flatten(), cfg)
    dropped_TK = sequence.own(dropped_A.view_as(ids_BSK)).flatten(0, 1)
    return dropped_TK, count_experts(topk_ids_TK.flatten(), cfg.num_experts)


@torch.no_grad()
def _drop(ids_A: Tensor, weights_A: Tensor, cfg: MoEConfig) -> tuple[Tensor, Tensor]:
    by_weight_A = torch.argsort(weights_A, descending=True, stable=True) if cfg.drop_policy == "weight" else None
    places_A, starts_E1 = places_by_expert(ids_A, cfg.num_experts, by_weight_A)
    kinds = (cfg.num_ffn_experts, cfg.num_zero_computation_experts)
    capacity_E = constants.blocks(capacities(cfg, ids_A.numel()), kinds, ids_A, torch.int64)
    ends_E = starts_E1[:-1] + capacity_E  # where in this order an expert's capacity ends
    return places_A >= ends_E.index_select(0, ids_A), starts_E1.diff()
