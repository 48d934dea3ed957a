"""The router: logits with gating residuals, gates, and the choice of experts.

Shapes: T tokens, D width, N = E experts of every kind, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.moe.kernels import gates, has_gates, linear_fp32


class Router(nn.Module):
    """Router logits with gating residual (MoE++, arXiv 2410.07348, Eq. 6), in fp32 even under autocast.

    ``logits_j = R_j(x) + W_g^j · logits_{j-1}``; R is linear (paper) or a two-layer tanh MLP (released code).
    The first MoE layer has no predecessor: its previous logits are zeros, so its W_g stays unused but is kept,
    as in the released checkpoints.
    """

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        n = cfg.num_experts
        if cfg.router == "linear":
            self.weight = nn.Parameter(torch.empty(n, hidden_size))
        else:
            self.fc1 = nn.Linear(hidden_size, 8 * n, bias=False)
            self.fc2 = nn.Linear(8 * n, n, bias=False)
        self.gate_map = nn.Linear(n, n, bias=False) if cfg.gating_residual else None
        self.kind = cfg.router
        self.num_experts = n

    @property
    def input_weight(self) -> Tensor:
        """[P, D]: what x is projected with first (P = N, or 8N for the MLP)."""
        return self.weight if self.kind == "linear" else self.fc1.weight

    def forward(self, projected_TP: Tensor, prev_logits_TE: Tensor | None) -> Tensor:
        """Logits [T, N] after the residual, before any normalisation; fp32 (fp64 for fp64 input).

        Args:
            projected_TP: ``x @ input_weight.T``, at least fp32.
            prev_logits_TE: ``router_logits`` of the previous MoE layer.
        """
        logits_TE = projected_TP
        if self.kind == "mlp":
            logits_TE = linear_fp32(torch.tanh(projected_TP), self.fc2.weight)
        if self.gate_map is not None:
            if prev_logits_TE is None:
                prev_logits_TE = logits_TE.new_zeros(1, self.num_experts)  # so that W_g gets a gradient: zeros
            logits_TE = logits_TE + linear_fp32(prev_logits_TE, self.gate_map.weight)
        return logits_TE


@dataclass(frozen=True)
class Gates:
    """The experts that each token chose.

    Attributes:
        probs_TE: softmax over all N experts, differentiable; P_i of the balance loss is its mean.
        topk_ids_TK: chosen experts, best first, int64.
        weights_TK: their final gate weights, differentiable, before capacity drops.
    """

    probs_TE: Tensor
    topk_ids_TK: Tensor
    weights_TK: Tensor


def compute_gates(logits_TE: Tensor, cfg: MoEConfig) -> Gates:
    """Softmax, top-K and gate normalisation (``cfg.gate_normalization``), in the logits' precision.

    - ``zero_masked`` (released code): softmax over all experts, top-K, the zero experts' weights set to 0 and the
      K weights renormalised to sum to 1. A token whose K weights are all 0 keeps zeros.
    - ``none`` (paper, Eq. 1): softmax over all experts, no renormalisation.
    - ``topk_softmax`` (Mixtral): softmax over the K chosen logits; a zero expert keeps its weight.
    """
    if cfg.logits_norm_std is None and has_gates(logits_TE, cfg.top_k):
        return Gates(*gates(logits_TE, cfg.top_k, cfg.kind_slices["zero"].start, cfg.gate_normalization))
    # Experts first: with [T, N], N of a dozen, the CPU spends ten times as long on a softmax.
    logits_ET = logits_TE.t().contiguous()
    if cfg.logits_norm_std is not None:
        logits_ET = logits_ET / (_std_over_experts(logits_ET) / cfg.logits_norm_std)
    probs_ET = torch.softmax(logits_ET, dim=0)
    scores_ET = logits_ET if cfg.gate_normalization == "topk_softmax" else probs_ET
    topk_ids_KT = torch.topk(scores_ET, cfg.top_k, dim=0).indices
    if cfg.gate_normalization == "topk_softmax":
        weights_KT = torch.softmax(logits_ET.gather(0, topk_ids_KT), dim=0)
    else:
        weights_KT = probs_ET.gather(0, topk_ids_KT)
    if cfg.gate_normalization == "zero_masked":
        if cfg.num_zero_experts:
            weights_KT = weights_KT.masked_fill(topk_ids_KT >= cfg.kind_slices["zero"].start, 0.0)
        total_T = weights_KT.sum(dim=0)
        # Only a token that chose zero experts alone sums to 0; dividing by 1 keeps its weights at 0 instead of NaN.
        weights_KT = weights_KT / torch.where(total_T > 0, total_T, 1.0)
    return Gates(probs_ET.t(), topk_ids_KT.t().contiguous(), weights_KT.t().contiguous())


def _std_over_experts(logits_ET: Tensor) -> Tensor:
    """``logits_ET.std(dim=0)``, unbiased, in whole rows: torch's own takes ten times as long over so few numbers."""
    centered_ET = logits_ET - logits_ET.mean(dim=0)
    return (centered_ET.square().sum(dim=0) / (logits_ET.shape[0] - 1)).sqrt()
