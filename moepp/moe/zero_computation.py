"""All zero-computation experts of a layer as one local expression (MoE++, arXiv 2410.07348, Eqs. 3-5).

Each of them is affine in x, so with gates g (0 where not selected or dropped)

    y_t = (g_copy + Σ_j g_const_j α1_j) x_t  +  Σ_j (g_const_j α2_j) v_j,   [α1_j, α2_j] = softmax(W_j x_t)

One row scaling and one [T, C] x [C, D] product; the zero experts cost nothing, nothing is gathered or sent. The two
numbers per token and constant expert are computed here, the pass over [T, D] is left to whoever sums the FFN experts'
outputs and would make it anyway. ``W_j x_t`` comes in with the router's own projection of x.

Shapes: T tokens, D width, K experts per token, E experts of every kind (FFN, constant, copy, zero), C constant ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.moe.kernels import Affine, affine_coefficients, has_gates


class ZeroComputation(nn.Module):
    """Constant (replace), copy (skip) and zero (discard) experts; replicated on every rank."""

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_constant = cfg.num_constant_experts
        self.num_copy = cfg.num_copy_experts
        self.hidden_size = hidden_size
        self.num_experts = cfg.num_experts
        self.first_constant, self.first_zero = cfg.kind_slices["constant"].start, cfg.kind_slices["zero"].start
        if self.num_constant:
            self.alpha_proj = nn.Parameter(torch.empty(self.num_constant, 2, hidden_size))
            self.value = nn.Parameter(torch.empty(self.num_constant, hidden_size))

    def forward(self, x_TD: Tensor, alpha_logits_TC2: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Affine | None:
        """The weighted sum of these experts' outputs as an affine function of ``x_TD``; coefficients in float32.

        ``ids_TK`` are the chosen experts of every kind and ``weights_TK`` their gate weights, 0 where dropped. ``None``
        when the layer has neither constant nor copy experts: their sum is exactly 0.
        """
        if not self.num_constant and not self.num_copy:
            return None
        values_CD = self.value if self.num_constant else x_TD.new_empty(0, self.hidden_size)
        if has_gates(weights_TK, ids_TK.shape[1]):
            firsts = (self.first_constant, self.first_zero)
            return Affine(x_TD, *affine_coefficients(ids_TK, weights_TK, alpha_logits_TC2, *firsts), values_CD)
        gates_TE = weights_TK.new_zeros(ids_TK.shape[0], self.num_experts).scatter(1, ids_TK, weights_TK)
        gates_ET = gates_TE.t()  # columns first: reductions over a handful of numbers per token are slow
        gates_CT = gates_ET[self.first_constant : self.first_constant + self.num_constant]
        alpha1_CT = torch.sigmoid((alpha_logits_TC2[..., 0] - alpha_logits_TC2[..., 1]).t())
        scale_T = gates_ET[self.first_constant + self.num_constant : self.first_zero].sum(dim=0)
        scale_T = scale_T + (gates_CT * alpha1_CT).sum(dim=0)
        return Affine(x_TD, scale_T, (gates_CT * (1 - alpha1_CT)).t(), values_CD)
