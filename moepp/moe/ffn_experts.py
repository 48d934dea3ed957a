"""The FFN experts of one rank: SwiGLU, no bias, weights stacked over experts.

One seam, two ways with the same results: torch's grouped matmul where the device has it, a loop over experts
elsewhere. An expert without rows gets zero gradients, never None.

Shapes: R rows ordered by expert, D width, F expert width, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.kernels import matmul_transposed, repacks_right_factor, transpose
from moepp.moe.kernels import swiglu, swiglu_backward

_WEIGHTS_LEFT_BELOW = 1024  # rows of one expert; from here on repacking its weights does not show (measured)


class FFNExperts(nn.Module):
    """``down(silu(gate(x)) * up(x))`` for each of ``num_local_experts`` experts.

    Parameters: ``gate_up_proj`` [E, 2F, D] (rows 0..F-1 gate, F..2F-1 up) and ``down_proj`` [E, D, F].
    With ``cfg.expert_chunk_rows`` = C no more than C rows of hidden activations exist at a time: nothing of them is
    stored, and backward computes them again.
    """

    def __init__(self, cfg: MoEConfig, hidden_size: int, num_local_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * cfg.ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden_size, cfg.ffn_hidden_size))
        self.chunk_rows = cfg.expert_chunk_rows

    def forward(self, rows_RD: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Outputs [R, D] of rows [R, D] ordered by expert; ``rows_per_expert`` sums to R."""
        gate_up_EGD, down_EDF = self.gate_up_proj.to(rows_RD.dtype), self.down_proj.to(rows_RD.dtype)
        if self.chunk_rows is None and has_grouped_mm(rows_RD):
            return _grouped_swiglu(rows_RD, gate_up_EGD, down_EDF, rows_per_expert)
        stores = torch.is_grad_enabled() and self.chunk_rows is None
        return _LoopSwiGLU.apply(rows_RD, gate_up_EGD, down_EDF, rows_per_expert, self.chunk_rows, stores)


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


def _chunks(counts: list[int], chunk_rows: int | None) -> Iterator[tuple[int, slice]]:
    """(expert, its rows), one chunk after the other; experts without rows are left out."""
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, chunk_rows or max(count, 1)):
            yield expert, slice(first, min(first + (chunk_rows or count), end))


def _swiglu_weights_left(rows_RD: Tensor, rows: slice, gate_up_GD: Tensor, down_DF: Tensor, out_CD: Tensor) -> None:
    """One expert with few rows: weights as left factors, everything transposed, so that no weight is repacked.

    The rows are padded to a multiple of 32 with whatever follows them; what comes out of those is left out.
    """
    num_rows, width = rows.stop - rows.start, down_DF.shape[1]
    padded = -(-num_rows // 32) * 32
    x_CD = rows_RD[rows.start : rows.start + padded]
    if len(x_CD) < padded:
        x_CD = torch.cat((x_CD, x_CD.new_zeros(padded - len(x_CD), x_CD.shape[1])))
    hidden_GC = torch.mm(gate_up_GD, x_CD.t())
    swiglu(hidden_GC[:width], hidden_GC[width:], hidden_GC[:width])
    transpose(torch.mm(down_DF, hidden_GC[:width])[:, :num_rows], out_CD)


class _LoopSwiGLU(torch.autograd.Function):
    """One expert, or chunk of its rows, after the other.

    Stores gate_up [R, 2F] where ``stores``, else computes it again in backward. The activation is always computed
    again. Temporary memory is allocated once for the largest chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        counts: list[int],
        chunk_rows: int | None,
        stores: bool,
    ) -> Tensor:
        width, largest = down_EDF.shape[2], min(max(counts, default=0), chunk_rows or len(rows_RD))
        hidden_RG = rows_RD.new_empty(len(rows_RD) if stores else largest, 2 * width)
        act_CF = rows_RD.new_empty(largest, width) if stores else hidden_RG[:, :width]  # else it takes gate's place
        out_RD = torch.empty_like(rows_RD)
        weights_left = not stores and repacks_right_factor(rows_RD)
        for expert, rows in _chunks(counts, chunk_rows):
            num_rows = rows.stop - rows.start
            if weights_left and num_rows < _WEIGHTS_LEFT_BELOW:
                _swiglu_weights_left(rows_RD, rows, gate_up_EGD[expert], down_EDF[expert], out_RD[rows])
                continue
            gate_up_CG = hidden_RG[rows] if stores else hidden_RG[:num_rows]
            torch.mm(rows_RD[rows], gate_up_EGD[expert].t(), out=gate_up_CG)
            swiglu(gate_up_CG[:, :width], gate_up_CG[:, width:], act_CF[:num_rows])
            torch.mm(act_CF[:num_rows], down_EDF[expert].t(), out=out_RD[rows])
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, hidden_RG if stores else None)
        ctx.counts, ctx.chunk_rows, ctx.largest = counts, chunk_rows, largest
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, stored_RG = ctx.saved_tensors
        grad_out_RD, width = grad_out_RD.contiguous(), down_EDF.shape[2]
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                grad_gate_up_EGD[expert].zero_()
                grad_down_EDF[expert].zero_()
        hidden_CG = rows_RD.new_empty(ctx.largest if stored_RG is None else 0, 2 * width)
        grad_act_CF, act_CF = rows_RD.new_empty(2, ctx.largest, width)
        grad_gate_up_CG = rows_RD.new_empty(ctx.largest, 2 * width)
        for expert, rows in _chunks(ctx.counts, ctx.chunk_rows):
            chunk = slice(rows.stop - rows.start)
            gate_up_CG = hidden_CG[chunk] if stored_RG is None else stored_RG[rows]
            if stored_RG is None:
                torch.mm(rows_RD[rows], gate_up_EGD[expert].t(), out=gate_up_CG)
            torch.mm(grad_out_RD[rows], down_EDF[expert], out=grad_act_CF[chunk])
            swiglu_backward(gate_up_CG, grad_act_CF[chunk], grad_gate_up_CG[chunk], act_CF[chunk])
            matmul_transposed(grad_out_RD[rows], act_CF[chunk], grad_down_EDF[expert])
            matmul_transposed(grad_gate_up_CG[chunk], rows_RD[rows], grad_gate_up_EGD[expert])
            torch.mm(grad_gate_up_CG[chunk], gate_up_EGD[expert], out=grad_rows_RD[rows])
        return grad_rows_RD, grad_gate_up_EGD, grad_down_EDF, None, None, None
