"""The FFN experts of one rank: SwiGLU, no bias, weights stacked over experts.

One seam, two kernels with the same results: torch's grouped matmul where the device has it, a loop over experts
elsewhere. An expert without rows gets zero gradients, never None.

Shapes: R rows ordered by expert, D width, F expert width, E local experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import MoEConfig


class FFNExperts(nn.Module):
    """``down(silu(gate(x)) * up(x))`` for each of ``num_local_experts`` experts.

    Parameters: ``gate_up_proj`` [E, 2F, D] (rows 0..F-1 gate, F..2F-1 up) and ``down_proj`` [E, D, F].
    """

    def __init__(self, cfg: MoEConfig, hidden_size: int, num_local_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * cfg.ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden_size, cfg.ffn_hidden_size))

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Outputs [R, D] of rows [R, D] ordered by expert; ``rows_per_expert`` sums to R."""
        gate_up_EGD, down_EDF = self.gate_up_proj.to(rows_RD.dtype), self.down_proj.to(rows_RD.dtype)
        if has_grouped_mm(rows_RD):
            return _grouped_swiglu(rows_RD, gate_up_EGD, down_EDF, rows_per_expert)
        return _LoopSwiGLU.apply(rows_RD, gate_up_EGD, down_EDF, rows_per_expert)


def has_grouped_mm(rows_RD: Tensor) -> bool:
    """Whether torch has a native grouped matmul for this device and dtype (bf16 on compute capability >= 8.0)."""
    if not hasattr(F, "grouped_mm") or rows_RD.dtype != torch.bfloat16 or not rows_RD.is_cuda:
        return False
    return torch.cuda.get_device_capability(rows_RD.device) >= (8, 0)


def _grouped_swiglu(rows_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows_per_expert: list[int]) -> Tensor:
    ends_E = torch.tensor(rows_per_expert, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows_RD.device)
    gate_up_RG = F.grouped_mm(rows_RD, gate_up_EGD.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)


class _LoopSwiGLU(torch.autograd.Function):
    """One expert after the other. Stores gate_up [R, 2F] and recomputes the activation in backward."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, counts: list[int]) -> Tensor:
        gate_up_RG = rows_RD.new_empty(rows_RD.shape[0], gate_up_EGD.shape[1])
        out_RD = torch.empty_like(rows_RD)
        start = 0
        for expert, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            if count == 0:
                continue
            torch.mm(rows_RD[rows], gate_up_EGD[expert].t(), out=gate_up_RG[rows])
            gate_RF, up_RF = gate_up_RG[rows].chunk(2, dim=-1)
            torch.mm(F.silu(gate_RF).mul_(up_RF), down_EDF[expert].t(), out=out_RD[rows])
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, gate_up_RG)
        ctx.counts = counts
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, gate_up_RG = ctx.saved_tensors
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            start += count
            if count == 0:
                grad_gate_up_EGD[expert].zero_()
                grad_down_EDF[expert].zero_()
                continue
            gate_RF, up_RF = gate_up_RG[rows].chunk(2, dim=-1)
            sigmoid_RF = torch.sigmoid(gate_RF)
            silu_RF = gate_RF * sigmoid_RF
            torch.mm(grad_out_RD[rows].t(), silu_RF * up_RF, out=grad_down_EDF[expert])
            grad_act_RF = torch.mm(grad_out_RD[rows], down_EDF[expert])
            grad_gate_RF = grad_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
            grad_gate_up_RG = torch.cat((grad_gate_RF, grad_act_RF.mul_(silu_RF)), dim=-1)
            torch.mm(grad_gate_up_RG.t(), rows_RD[rows], out=grad_gate_up_EGD[expert])
            torch.mm(grad_gate_up_RG, gate_up_EGD[expert], out=grad_rows_RD[rows])
        return grad_rows_RD, grad_gate_up_EGD, grad_down_EDF, None
