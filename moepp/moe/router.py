"""The router: logits with gating residuals, gates, and the choice of experts.

Shapes: T tokens, D width, N = E experts of every kind, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import MoEConfig


def _linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32 at least, whatever the dtypes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


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

    def forward(self, x_TD: Tensor, prev_logits_TE: Tensor | None) -> Tensor:
        """Logits [T, N] after the residual, before any normalisation; fp32 (fp64 for fp64 input)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.kind == "linear":
                logits_TE = _linear_fp32(x_TD, self.weight)
            else:
                logits_TE = _linear_fp32(torch.tanh(_linear_fp32(x_TD, self.fc1.weight)), self.fc2.weight)
            if self.gate_map is not None:
                if prev_logits_TE is None:
                    prev_logits_TE = torch.zeros_like(logits_TE)
                logits_TE = logits_TE + _linear_fp32(prev_logits_TE, self.gate_map.weight)
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
    if cfg.logits_norm_std is not None:
        logits_TE = logits_TE / (logits_TE.std(dim=-1, keepdim=True) / cfg.logits_norm_std)
    probs_TE = torch.softmax(logits_TE, dim=-1)
    if cfg.gate_normalization == "topk_softmax":
        topk_logits_TK, topk_ids_TK = torch.topk(logits_TE, cfg.top_k, dim=-1)
        return Gates(probs_TE, topk_ids_TK, torch.softmax(topk_logits_TK, dim=-1))
    weights_TK, topk_ids_TK = torch.topk(probs_TE, cfg.top_k, dim=-1)
    if cfg.gate_normalization == "zero_masked":
        if cfg.num_zero_experts:
            weights_TK = weights_TK.masked_fill(topk_ids_TK >= cfg.kind_slices["zero"].start, 0.0)
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        # Only a token that chose zero experts alone sums to 0; dividing by 1 keeps its weights at 0 instead of NaN.
        weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1.0)
    return Gates(probs_TE, topk_ids_TK, weights_TK)
