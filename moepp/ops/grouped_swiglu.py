"""SwiGLU experts over rows sorted by expert: ``down(silu(gate(x)) * up(x))`` with weights stacked over experts.

Where the accelerator has a native grouped matmul these are torch's grouped products, elsewhere a loop over experts; on
the CPU kernels for AMX or AVX2 do the same (:mod:`moepp.ops.expert_products`). An expert without rows gets zero
gradients, never None.

Shapes: R rows sorted by expert, D width, F expert width, G = 2F, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.chunks import WeightGradients, chunks, largest_chunk
from moepp.ops.cpu.amx_experts import AMXSwiGLU, supports_amx
from moepp.ops.cpu.avx2_experts import AVX2SwiGLU, supports_avx2
from moepp.ops.expert_products import GROUPED_BYTES, takes_device_counts
from moepp.ops.matmul import dense_transpose, mm
from moepp.ops.swiglu import swiglu, swiglu_backward


def grouped_swiglu(
    rows_RD: Tensor,
    counts_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    chunk_rows: int | None = None,
    host_counts: list[int] | None = None,
) -> Tensor:
    """Return outputs [R, D] of each expert's rows.

    Args:
        rows_RD: sorted by expert.
        counts_E: rows of each expert, int64, summing to R; to less than R only for grouped products, which leave
            anything at all in the outputs of further rows.
        gate_up_EGD: rows 0..F-1 gate, F..2F-1 up.
        down_EDF: back to the width.
        chunk_rows: hidden activations of at most this many rows exist at a time; they are not stored, and
            backward computes them again. None: all are stored.
        host_counts: ``counts_E`` where the host knows them already; else a loop waits for the device.
    """
    gate_up_EGD, down_EDF = gate_up_EGD.to(rows_RD.dtype), down_EDF.to(rows_RD.dtype)
    if takes_device_counts(rows_RD.device, rows_RD.dtype, rows_RD.shape[1], down_EDF.shape[2], chunk_rows):
        return _GroupedSwiGLU.apply(rows_RD, counts_E, gate_up_EGD, down_EDF)
    stores = torch.is_grad_enabled() and chunk_rows is None
    host_counts = counts_E.tolist() if host_counts is None else host_counts
    arguments = (rows_RD, gate_up_EGD, down_EDF, host_counts, chunk_rows, stores)
    if supports_amx(rows_RD, down_EDF.shape[2]):
        return AMXSwiGLU.apply(*arguments)
    if supports_avx2(rows_RD):
        return AVX2SwiGLU.apply(*arguments)
    return _LoopSwiGLU.apply(*arguments)


def grouped_mm(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply group by group: [R, M] by [E, M, N] gives [R, N], [M, R] by [R, N] gives [E, M, N]; no autograd.

    Args:
        left: rows of group e end before row (column) ``ends_E[e]``.
        right: in the second form the same rows.
        ends_E: int32, on the device.
    """
    # In the second form torch's kernel takes groups of any size, 0 included, where `left` is column-major and `right`
    # row-major, and only there: no rows have to be added for alignment.
    return F.grouped_mm(left, right, offs=ends_E)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where the grouped product takes its memory, else a copy.

    It wants dense rows and addresses that are multiples of 16 bytes. A parameter inside a flat buffer, as engines make
    them, may begin anywhere.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % GROUPED_BYTES == 0 else tensor.clone()


class _GroupedSwiGLU(torch.autograd.Function):
    """All experts in one product each; stores gate_up [R, 2F] and computes the activation again.

    Row counts stay on the device. Where they sum to less than R, the products leave the memory of further rows as it
    was.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
        ctx.is_empty = len(rows_RD) == 0 or len(counts_E) == 0
        if ctx.is_empty:
            ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF)
            return torch.zeros_like(rows_RD)
        rows_RD, gate_up_EGD, down_EDF = aligned(rows_RD), aligned(gate_up_EGD), aligned(down_EDF)
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        gate_up_RG = grouped_mm(rows_RD, gate_up_EGD.transpose(1, 2), ends_E)
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=1)
        act_RF = rows_RD.new_empty(gate_RF.shape)
        swiglu(gate_RF, up_RF, act_RF)
        out_RD = grouped_mm(act_RF, down_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, gate_up_RG, counts_E, ends_E)
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_empty:
            grad_rows_RD, grad_gate_up_EGD, grad_down_EDF = map(torch.zeros_like, ctx.saved_tensors)
            return grad_rows_RD, None, grad_gate_up_EGD, grad_down_EDF
        rows_RD, gate_up_EGD, down_EDF, gate_up_RG, counts_E, ends_E = ctx.saved_tensors
        wants_rows, _, wants_gate_up, wants_down = ctx.needs_input_grad
        grad_out_RD = aligned(grad_out_RD)
        grad_act_RF = grouped_mm(grad_out_RD, down_EDF, ends_E)
        grad_gate_up_RG, act_RF = torch.empty_like(gate_up_RG), torch.empty_like(grad_act_RF)
        swiglu_backward(gate_up_RG, grad_act_RF, grad_gate_up_RG, act_RF)
        no_rows_E11 = (counts_E == 0).view(-1, 1, 1)
        grad_rows_RD = grad_gate_up_EGD = grad_down_EDF = None
        if wants_down:
            grad_down_EDF = _weight_gradient(grad_out_RD, act_RF, ends_E, no_rows_E11)
        if wants_gate_up:
            grad_gate_up_EGD = _weight_gradient(grad_gate_up_RG, rows_RD, ends_E, no_rows_E11)
        if wants_rows:
            grad_rows_RD = grouped_mm(grad_gate_up_RG, gate_up_EGD, ends_E)
        return grad_rows_RD, None, grad_gate_up_EGD, grad_down_EDF


def _weight_gradient(grad_RM: Tensor, rows_RN: Tensor, ends_E: Tensor, no_rows_E11: Tensor) -> Tensor:
    """Return ``gradᵀ rows`` of each group, [E, M, N]; zeros for an expert without rows.

    On Blackwell torch's kernel leaves the memory of such an expert's result as it was (pytorch/pytorch#172439).
    """
    return grouped_mm(grad_RM.t(), rows_RN, ends_E).masked_fill_(no_rows_E11, 0)


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
