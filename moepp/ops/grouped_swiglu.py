"""SwiGLU experts over rows sorted by expert: ``down(silu(gate(x)) * up(x))`` with weights stacked over experts.

Where the accelerator has a native grouped matmul these are torch's grouped products, elsewhere a loop over experts
(:mod:`moepp.ops.expert_loop`) with torch's products, or on the CPU with kernels for AMX or AVX2.
:mod:`moepp.ops.expert_products` says which. An expert without rows gets zero gradients, never None.

Shapes: R rows sorted by expert, D width, F expert width, G = 2F, E local experts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.cpu.amx_experts import AMXProducts, supports_amx
from moepp.ops.cpu.avx2_experts import AVX2Products, supports_avx2
from moepp.ops.expert_loop import ChunkProducts, LoopSwiGLU, TorchProducts
from moepp.ops.expert_products import GROUPED_BYTES, takes_device_counts
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
    return LoopSwiGLU.apply(
        rows_RD, gate_up_EGD, down_EDF, host_counts, chunk_rows, stores, _backend(rows_RD, down_EDF.shape[2])
    )


def _backend(rows_RD: Tensor, expert_width: int) -> type[ChunkProducts]:
    """Return the products of the loop over experts for this processor, dtype and width."""
    if supports_amx(rows_RD, expert_width):
        return AMXProducts
    return AVX2Products if supports_avx2(rows_RD) else TorchProducts


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
        no_rows_E11 = (counts_E == 0).view(-1, 1, 1) if leaves_empty_groups(rows_RD.device) else None
        grad_rows_RD = grad_gate_up_EGD = grad_down_EDF = None
        if wants_down:
            grad_down_EDF = _weight_gradient(grad_out_RD, act_RF, ends_E, no_rows_E11)
        if wants_gate_up:
            grad_gate_up_EGD = _weight_gradient(grad_gate_up_RG, rows_RD, ends_E, no_rows_E11)
        if wants_rows:
            grad_rows_RD = grouped_mm(grad_gate_up_RG, gate_up_EGD, ends_E)
        return grad_rows_RD, None, grad_gate_up_EGD, grad_down_EDF


def _weight_gradient(grad_RM: Tensor, rows_RN: Tensor, ends_E: Tensor, no_rows_E11: Tensor | None) -> Tensor:
    """Return ``gradᵀ rows`` of each group, [E, M, N]; zeros for an expert without rows."""
    gradient_EMN = grouped_mm(grad_RM.t(), rows_RN, ends_E)
    return gradient_EMN if no_rows_E11 is None else gradient_EMN.masked_fill_(no_rows_E11, 0)


@functools.cache
def leaves_empty_groups(device: torch.device) -> bool:
    """Return whether torch's kernel may leave the memory of a group without rows as it was, and not fill in zeros.

    A B200 was reported to do so and Hopper not to (pytorch/pytorch#172439, open), and on Hopper one product on poisoned
    memory has to agree before anybody relies on it. To set zeros anyway costs a pass over all experts' gradients.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return True
    return not _fills_empty_groups(device)


def _fills_empty_groups(device: torch.device) -> bool:
    """Whether the second of two groups, which has no rows, gets zeros in memory that held none."""
    rows_RN = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    ends_E = torch.full((2,), 64, dtype=torch.int32, device=device)
    poison_EMN = torch.full((2, 64, 64), float("nan"), dtype=torch.bfloat16, device=device)
    address = poison_EMN.data_ptr()
    del poison_EMN  # the next tensor of this size gets its memory
    product_EMN = grouped_mm(rows_RN.t(), rows_RN, ends_E)
    return product_EMN.data_ptr() == address and not product_EMN[1].count_nonzero()
