"""All zero-computation experts of a layer as one local expression (MoE++, arXiv 2410.07348, Eqs. 3-5).

Each of them is affine in x, so with gates g (0 where not selected or dropped)

    y_t = (g_copy + Σ_j g_const_j α1_j) x_t  +  Σ_j (g_const_j α2_j) v_j,   [α1_j, α2_j] = softmax(W_j x_t)

One row scaling and one [T, C] x [C, D] product; the zero experts cost nothing, nothing is gathered or sent. The two
numbers per token and constant expert are computed here, the pass over [T, D] is left to whoever sums the FFN experts'
outputs and would make it anyway. ``W_j x_t`` comes in with the router's own projection of x.

Shapes: T tokens, D width, C constant experts, Z zero-computation experts (order constant, copy, zero).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.moe.kernels import Affine


class ZeroComputation(nn.Module):
    """Constant (replace), copy (skip) and zero (discard) experts; replicated on every rank."""

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_constant = cfg.num_constant_experts
        self.num_copy = cfg.num_copy_experts
        self.hidden_size = hidden_size
        if self.num_constant:
            self.alpha_proj = nn.Parameter(torch.empty(self.num_constant, 2, hidden_size))
            self.value = nn.Parameter(torch.empty(self.num_constant, hidden_size))

    def forward(self, x_TD: Tensor, alpha_logits_TC2: Tensor, gates_TZ: Tensor) -> Affine | None:
        """The weighted sum of these experts' outputs as an affine function of ``x_TD``; coefficients in float32.

        ``None`` when the layer has neither constant nor copy experts: their sum is exactly 0.
        """
        if not self.num_constant and not self.num_copy:
            return None
        # Columns first: reductions over a handful of numbers per token are slow.
        gates_ZT = gates_TZ.t()
        scale_T = gates_ZT[self.num_constant : self.num_constant + self.num_copy].sum(dim=0)
        if not self.num_constant:
            return Affine(x_TD, scale_T, gates_TZ[:, :0], x_TD.new_empty(0, self.hidden_size))
        gates_CT = gates_ZT[: self.num_constant]
        alpha1_CT = torch.sigmoid((alpha_logits_TC2[..., 0] - alpha_logits_TC2[..., 1]).t())
        scale_T = scale_T + (gates_CT * alpha1_CT).sum(dim=0)
        return Affine(x_TD, scale_T, (gates_CT * (1 - alpha1_CT)).t(), self.value)
