"""SwiGLU experts on AVX2: avx2_experts.c.

The compiled kernels do all products in float32, bfloat16 values too, which such processors cannot multiply: torch's
bfloat16 product takes ten times as long there. Weights are read where they lie, SwiGLU is computed on the way.

Shapes: R rows ordered by expert, D width, F expert width, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.chunks import Chunk, WeightGradients, chunks, largest_chunk
from moepp.ops.cpu.build import Library

_BLOCK = 16  # rows that the kernels handle at a time
_FORWARD_BYTES = 12_000_000  # of the last-level cache, for the rows that forward computes at a time


def supports_avx2(rows_RD: Tensor) -> bool:
    """Return whether the kernels support this processor, dtype and width."""
    kernels = cpu_kernels(rows_RD)
    return kernels is not None and kernels.has_avx2_experts


def backward_scratch_bytes(width_D: int, width_F: int, rows: int) -> int:
    """Return backward's temporary bytes for the longest chunk: rows, gradients of gate and up, activation."""
    return 4 * _padded(rows) * (_padded(width_D) + 2 * width_F + _padded(width_F))


def _padded(rows: int) -> int:
    return -(-rows // _BLOCK) * _BLOCK


class AVX2SwiGLU(torch.autograd.Function):
    """``down(silu(gate(x)) * up(x))`` for each expert; arguments as of ``grouped_swiglu._LoopSwiGLU``.

    Where ``stores``, gate and up [R, 2F] are kept in the kernels' own order, else they are computed again in backward.
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
        rows_RD, gate_up_EGD, down_EDF = rows_RD.contiguous(), gate_up_EGD.contiguous(), down_EDF.contiguous()
        kernels = cpu_kernels(rows_RD)
        assert kernels is not None
        (_, width_D, width_F), largest = down_EDF.shape, largest_chunk(counts, chunk_rows)
        most = _padded(min(largest, max(_FORWARD_BYTES // (4 * (width_D + width_F)), 1)))
        scratch = torch.empty(most * (width_D + width_F), dtype=torch.float32)
        hidden_RG = rows_RD.new_empty(sum(map(_padded, counts)) if stores else 0, 2 * width_F)
        out_RD, at = torch.empty_like(rows_RD), 0
        for chunk in chunks(counts, None):
            hidden_CG = hidden_RG[at : at + _padded(chunk.num_rows)] if stores else None
            _forward(kernels, rows_RD, gate_up_EGD, down_EDF, chunk, hidden_CG, out_RD[chunk.rows], scratch, most)
            at += _padded(chunk.num_rows)
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, hidden_RG if stores else None)
        ctx.counts, ctx.chunk_rows, ctx.kernels = counts, chunk_rows, kernels
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, hidden_RG = ctx.saved_tensors
        (_, width_D, width_F), kernels = down_EDF.shape, ctx.kernels
        grad_out_RD, grad_rows_RD = grad_out_RD.contiguous(), torch.empty_like(rows_RD)
        grad_gate_up, grad_down = WeightGradients(gate_up_EGD, ctx.counts), WeightGradients(down_EDF, ctx.counts)
        largest = largest_chunk(ctx.counts, ctx.chunk_rows)
        scratch = torch.empty(backward_scratch_bytes(width_D, width_F, largest) // 4, dtype=torch.float32)
        again_CG = rows_RD.new_empty(_padded(largest) if hidden_RG is None else 0, 2 * width_F)
        at = 0
        for chunk in chunks(ctx.counts, ctx.chunk_rows):
            padded = _padded(chunk.num_rows)
            hidden_CG = again_CG if hidden_RG is None else hidden_RG[at : at + padded]
            if hidden_RG is None:
                _forward(kernels, rows_RD, gate_up_EGD, down_EDF, chunk, hidden_CG, None, scratch, padded)
            weights = (gate_up_EGD[chunk.expert], down_EDF[chunk.expert])
            with grad_gate_up.open(chunk) as gate_up_results, grad_down.open(chunk) as down_results:
                values, sums = zip(gate_up_results, down_results, strict=True)
                inputs = (grad_out_RD[chunk.rows], rows_RD[chunk.rows], hidden_CG, *weights)
                results = (grad_rows_RD[chunk.rows], *values, *sums, scratch)
                kernels.call("avx2_expert_backward", *inputs, *results, chunk.num_rows, width_D, width_F)
            at += padded
        return grad_rows_RD, grad_gate_up.value_EMN, grad_down.value_EMN, None, None, None


def _forward(
    kernels: Library,
    rows_RD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    chunk: Chunk,
    hidden_CG: Tensor | None,
    out_CD: Tensor | None,
    scratch: Tensor,
    most: int,
) -> None:
    weights = (gate_up_EGD[chunk.expert], down_EDF[chunk.expert])
    sizes = (chunk.num_rows, *down_EDF.shape[1:], most)
    kernels.call("avx2_expert_forward", rows_RD[chunk.rows], *weights, hidden_CG, out_CD, scratch, *sizes)
