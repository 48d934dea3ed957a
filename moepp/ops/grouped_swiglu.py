"""SwiGLU experts over rows sorted by expert: ``down(silu(gate(x)) * up(x))`` with weights stacked over experts.

On an accelerator these are torch's grouped matrix products. On the CPU kernels for AMX or AVX2 do the same, elsewhere
a loop over experts. An expert without rows gets zero gradients, never None.

Shapes: R rows sorted by expert, D width, F expert width, G = 2F, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.backend import row_kernels, uses_triton
from moepp.ops.chunks import WeightGradients, chunks, largest_chunk
from moepp.ops.cpu.amx_experts import AMXSwiGLU, supports_amx
from moepp.ops.cpu.avx2_experts import AVX2SwiGLU, supports_avx2
from moepp.ops.matmul import dense_transpose, mm
from moepp.ops.swiglu import swiglu, swiglu_backward


def grouped_swiglu(
    rows_RD: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Return outputs [R, D] of each expert's rows.

    Args:
        rows_RD: sorted by expert.
        counts_E: rows of each expert, int64, summing to R.
        gate_up_EGD: rows 0..F-1 gate, F..2F-1 up.
        down_EDF: back to the width.
        chunk_rows: hidden activations of at most this many rows exist at a time; they are not stored, and
            backward computes them again. None: all are stored.
    """
    gate_up_EGD, down_EDF = gate_up_EGD.to(rows_RD.dtype), down_EDF.to(rows_RD.dtype)
    if chunk_rows is None and has_grouped_mm(rows_RD):
        return _grouped(rows_RD, counts_E, gate_up_EGD, down_EDF)
    stores = torch.is_grad_enabled() and chunk_rows is None
    arguments = (rows_RD, gate_up_EGD, down_EDF, counts_E.tolist(), chunk_rows, stores)
    if supports_amx(rows_RD, down_EDF.shape[2]):
        return AMXSwiGLU.apply(*arguments)
    if supports_avx2(rows_RD):
        return AVX2SwiGLU.apply(*arguments)
    return _LoopSwiGLU.apply(*arguments)


def has_grouped_mm(rows_RD: Tensor) -> bool:
    """Return whether torch has a grouped matmul for this device and dtype (bf16, compute capability >= 8.0)."""
    if not hasattr(F, "grouped_mm") or rows_RD.dtype != torch.bfloat16 or not rows_RD.is_cuda:
        return False
    return torch.cuda.get_device_capability(rows_RD.device) >= (8, 0)


def _grouped(rows_RD: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    gate_up_RG = F.grouped_mm(rows_RD, gate_up_EGD.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    act_RF = _RowSwiGLU.apply(gate_up_RG) if uses_triton() else F.silu(gate_RF) * up_RF
    return F.grouped_mm(act_RF, down_EDF.transpose(1, 2), offs=ends_E)


class _RowSwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` [R, F] of gate_up [R, 2F] by one kernel; stores gate_up alone for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up_RG: Tensor) -> Tensor:
        gate_up_RG = gate_up_RG.contiguous()
        ctx.save_for_backward(gate_up_RG)
        act_RF = gate_up_RG.new_empty(len(gate_up_RG), gate_up_RG.shape[1] // 2)
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
        swiglu(gate_RF, up_RF, act_RF)
        ctx.kernels, ctx.shape = row_kernels(gate_up_RG), act_RF.shape
        return act_RF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_act_RF: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up_RG,) = ctx.saved_tensors
        grad_gate_up_RG = torch.empty_like(gate_up_RG)
        ctx.kernels.call("swiglu_backward", gate_up_RG, grad_act_RF.contiguous(), grad_gate_up_RG, None, *ctx.shape)
        return grad_gate_up_RG


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
        width, largest = down_EDF.shape[2], largest_chunk(counts, chunk_rows)
        hidden_RG = rows_RD.new_empty(len(rows_RD) if stores else largest, 2 * width)
        act_CF = rows_RD.new_empty(largest, width) if stores else hidden_RG[:, :width]  # else it takes gate's place
        out_RD = torch.empty_like(rows_RD)
        for chunk in chunks(counts, chunk_rows):
            gate_up_CG = hidden_RG[chunk.rows] if stores else hidden_RG[: chunk.num_rows]
            mm(rows_RD[chunk.rows], gate_up_EGD[chunk.expert].t(), gate_up_CG)
            swiglu(gate_up_CG[:, :width], gate_up_CG[:, width:], act_CF[: chunk.num_rows])
            mm(act_CF[: chunk.num_rows], down_EDF[chunk.expert].t(), out_RD[chunk.rows])
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, hidden_RG if stores else None)
        ctx.counts, ctx.chunk_rows = counts, chunk_rows
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, stored_RG = ctx.saved_tensors
        grad_out_RD, width = grad_out_RD.contiguous(), down_EDF.shape[2]
        largest = largest_chunk(ctx.counts, ctx.chunk_rows)
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
            swiglu_backward(gate_up_CG, grad_act_CF[part], grad_gate_up_CG[part], act_CF[part])
            grad_down.add(chunk, dense_transpose(grad_CD), act_CF[part])
            grad_gate_up.add(chunk, dense_transpose(grad_gate_up_CG[part]), x_CD)
            mm(grad_gate_up_CG[part], gate_up_GD, grad_rows_RD[chunk.rows])
        return grad_rows_RD, grad_gate_up.value_EMN, grad_down.value_EMN, None, None, None
