"""All zero-computation experts of a layer as one local expression (MoE++, arXiv 2410.07348, Eqs. 3-5).

Each of them is affine in x, so with gates g (0 where not selected or dropped)

    y_t = (g_copy + Σ_j g_const_j α1_j) x_t  +  Σ_j (g_const_j α2_j) v_j,   [α1_j, α2_j] = softmax(W_j x_t)

One row scaling and one [T, C] x [C, D] product; the zero experts cost nothing, nothing is gathered or sent.

Shapes: T tokens, D width, C constant experts, Z zero-computation experts (order constant, copy, zero).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import MoEConfig


class ZeroComputation(nn.Module):
    """Constant (replace), copy (skip) and zero (discard) experts; replicated on every rank."""

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_constant = cfg.num_constant_experts
        self.num_copy = cfg.num_copy_experts
        if self.num_constant:
            self.alpha_proj = nn.Parameter(torch.empty(self.num_constant, 2, hidden_size))
            self.value = nn.Parameter(torch.empty(self.num_constant, hidden_size))

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor | None:
        """Weighted sum of the zero-computation experts' outputs, [T, D] in x's dtype; coefficients in the gates' fp32.

        ``None`` when the layer has neither constant nor copy experts: their sum is exactly 0.
        """
        if not self.num_constant and not self.num_copy:
            return None
        copy_TZ = gates_TZ[:, self.num_constant : self.num_constant + self.num_copy]
        scale_T1 = copy_TZ.sum(dim=-1, keepdim=True)
        if not self.num_constant:
            return x_TD * scale_T1.to(x_TD.dtype)
        gates_TC = gates_TZ[:, : self.num_constant]
        alpha_logits_TC2 = F.linear(x_TD, self.alpha_proj.flatten(0, 1).to(x_TD.dtype)).unflatten(-1, (-1, 2))
        alpha_TC2 = torch.softmax(alpha_logits_TC2.to(gates_TC.dtype), dim=-1)
        scale_T1 = scale_T1 + (gates_TC * alpha_TC2[..., 0]).sum(dim=-1, keepdim=True)
        value_weights_TC = (gates_TC * alpha_TC2[..., 1]).to(x_TD.dtype)
        return torch.addmm(x_TD * scale_T1.to(x_TD.dtype), value_weights_TC, self.value.to(x_TD.dtype))
