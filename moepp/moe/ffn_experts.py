"""The FFN experts of one rank: SwiGLU, no bias, weights stacked over experts.

One seam, four ways with the same results up to rounding: torch's grouped matmul where the device has it, compiled
kernels for a CPU's tile registers or else its vectors (AVX2), a loop over experts elsewhere. Between the products of
the grouped matmul and of the loop Triton may compute SwiGLU. An expert without rows gets zero gradients, never None.

Shapes: R rows ordered by expert, D width, F expert width, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import MoEConfig
from moepp.kernels import dense_transpose, mm
from moepp.moe.expert_chunks import WeightGradients, chunks, largest_chunk
from moepp.moe.kernels import TritonSwiGLU, swiglu, swiglu_backward
from moepp.moe.tile_experts import TileSwiGLU, has_tiles
from moepp.moe.vector_experts import VectorSwiGLU, has_vectors


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
        self.triton = cfg.triton_kernels

    def weights(self, num_parts: int) -> list[tuple[Tensor, Tensor]]:
        """``gate_up_proj`` and ``down_proj`` of each of so many equal parts of the experts."""
        if num_parts == 1:
            return [(self.gate_up_proj, self.down_proj)]
        size = len(self.down_proj) // num_parts
        return list(zip(self.gate_up_proj.split(size), self.down_proj.split(size), strict=True))

    def forward(
        self,
        rows_RD: Tensor,
        rows_per_expert: list[int],
        gate_up_EGD: Tensor | None = None,
        down_EDF: Tensor | None = None,
    ) -> Tensor:
        """Outputs [R, D] of rows [R, D] ordered by expert; ``rows_per_expert`` sums to R.

        The weights are those of all experts unless they are given, from :meth:`weights`.
        """
        if gate_up_EGD is None or down_EDF is None:
            [(gate_up_EGD, down_EDF)] = self.weights(1)
        gate_up_EGD, down_EDF = gate_up_EGD.to(rows_RD.dtype), down_EDF.to(rows_RD.dtype)
        if self.chunk_rows is None and has_grouped_mm(rows_RD):
            return _grouped_swiglu(rows_RD, gate_up_EGD, down_EDF, rows_per_expert, self.triton)
        stores = torch.is_grad_enabled() and self.chunk_rows is None
        arguments = (rows_RD, gate_up_EGD, down_EDF, rows_per_expert, self.chunk_rows, stores)
        if not self.triton and has_tiles(rows_RD, down_EDF.shape[2]):
            return TileSwiGLU.apply(*arguments)
        if not self.triton and has_vectors(rows_RD):
            return VectorSwiGLU.apply(*arguments)
        return _LoopSwiGLU.apply(*arguments, self.triton)


def has_grouped_mm(rows_RD: Tensor) -> bool:
    """Whether torch has a native grouped matmul for this device and dtype (bf16 on compute capability >= 8.0)."""
    if not hasattr(F, "grouped_mm") or rows_RD.dtype != torch.bfloat16 or not rows_RD.is_cuda:
        return False
    return torch.cuda.get_device_capability(rows_RD.device) >= (8, 0)


def _grouped_swiglu(
    rows_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rows_per_expert: list[int], triton: bool
) -> Tensor:
    ends_E = torch.tensor(rows_per_expert, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows_RD.device)
    gate_up_RG = F.grouped_mm(rows_RD, gate_up_EGD.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    act_RF = TritonSwiGLU.apply(gate_up_RG) if triton else F.silu(gate_RF) * up_RF
    return F.grouped_mm(act_RF, down_EDF.transpose(1, 2), offs=ends_E)


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
        triton: bool,
    ) -> Tensor:
        width, largest = down_EDF.shape[2], largest_chunk(counts, chunk_rows)
        hidden_RG = rows_RD.new_empty(len(rows_RD) if stores else largest, 2 * width)
        act_CF = rows_RD.new_empty(largest, width) if stores else hidden_RG[:, :width]  # else it takes gate's place
        out_RD = torch.empty_like(rows_RD)
        for chunk in chunks(counts, chunk_rows):
            gate_up_CG = hidden_RG[chunk.rows] if stores else hidden_RG[: chunk.num_rows]
            mm(rows_RD[chunk.rows], gate_up_EGD[chunk.expert].t(), gate_up_CG)
            swiglu(gate_up_CG[:, :width], gate_up_CG[:, width:], act_CF[: chunk.num_rows], triton)
            mm(act_CF[: chunk.num_rows], down_EDF[chunk.expert].t(), out_RD[chunk.rows])
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, hidden_RG if stores else None)
        ctx.counts, ctx.chunk_rows, ctx.triton = counts, chunk_rows, triton
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, stored_RG = ctx.saved_tensors
        grad_out_RD, width, largest = (
            grad_out_RD.contiguous(),
            down_EDF.shape[2],
            largest_chunk(ctx.counts, ctx.chunk_rows),
        )
        grad_rows_RD = torch.empty_like(rows_RD)
        grad_gate_up, grad_down = WeightGradients(gate_up_EGD, ctx.counts), WeightGradients(down_EDF, ctx.counts)
        hidden_CG = rows_RD.new_empty(largest if stored_RG is None else 0, 2 * width)
        grad_act_CF, act_CF = rows_RD.new_empty(2, largest, width)
        grad_gate_up_CG = rows_RD.new_empty(largest, 2 * width)
        for chunk in chunks(ctx.counts, ctx.chunk_rows):
            gate_up_GD, down_DF = gate_up_EGD[chunk.expert], down_EDF[chunk.expert]
            x_CD, grad_CD, part = rows_RD[chunk.rows], grad_out_RD[chunk.rows], slice(chunk.num_rows)
            gate_up_CG = hidden_CG[part] if stored_RG is None else stored_RG[chunk.rows]
            if stored_RG is None:
                mm(x_CD, gate_up_GD.t(), gate_up_CG)
            mm(grad_CD, down_DF, grad_act_CF[part])
            swiglu_backward(gate_up_CG, grad_act_CF[part], grad_gate_up_CG[part], act_CF[part], ctx.triton)
            grad_down.add(chunk, dense_transpose(grad_CD), act_CF[part])
            grad_gate_up.add(chunk, dense_transpose(grad_gate_up_CG[part]), x_CD)
            mm(grad_gate_up_CG[part], gate_up_GD, grad_rows_RD[chunk.rows])
        return grad_rows_RD, grad_gate_up.value_EMN, grad_down.value_EMN, None, None, None, None
