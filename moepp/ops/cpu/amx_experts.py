"""SwiGLU experts on the tile registers of Intel AMX, bfloat16: amx_experts.c.

The compiled kernels do every product in which weights are a factor, without laying out the weights anew, and SwiGLU on
the way. The products of two activations (the weights' gradients) are torch's.

Shapes: R rows ordered by expert, D width, F expert width, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.chunks import Chunk, WeightGradients, chunks, largest_chunk
from moepp.ops.cpu.build import Library
from moepp.ops.matmul import dense_transpose

_BLOCK = 32  # rows that the kernels handle at a time; widths must be multiples of it


def supports_amx(rows_RD: Tensor, expert_width: int) -> bool:
    """Return whether the kernels support this processor, dtype and width."""
    kernels = cpu_kernels(rows_RD)
    multiples = rows_RD.shape[1] % _BLOCK == 0 and expert_width % _BLOCK == 0
    return kernels is not None and kernels.has_amx and multiples


def backward_buffer_elements(width_F: int, rows: int) -> int:
    """Return the elements of backward's buffer (gate's and up's gradients, activation) for the longest chunk."""
    stride = _leading_dimension(rows)
    return 2 * width_F * stride + stride * (width_F + _BLOCK)


def _padded(rows: int) -> int:
    return -(-rows // _BLOCK) * _BLOCK


def _leading_dimension(rows: int) -> int:
    """Return a padded stride for that many rows: whole cache lines, no large power of 2 (cache aliasing)."""
    padded = _padded(rows)
    return padded + _BLOCK if padded % (2 * _BLOCK) == 0 else padded


class AMXSwiGLU(torch.autograd.Function):
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
        stored = sum(map(_padded, counts)) if stores else 0
        hidden_RG = rows_RD.new_empty(stored, gate_up_EGD.shape[1])
        out_RD = torch.empty_like(rows_RD)
        at = 0
        for chunk in chunks(counts, None):
            hidden_CG = hidden_RG[at : at + _padded(chunk.num_rows)] if stores else None
            _forward(kernels, rows_RD, gate_up_EGD, down_EDF, chunk, hidden_CG, out_RD[chunk.rows])
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
        largest = _leading_dimension(largest_chunk(ctx.counts, ctx.chunk_rows))
        buffer = rows_RD.new_empty(2 * width_F * largest)
        act_CF = rows_RD.new_empty(largest, width_F + _BLOCK)
        again_CG = rows_RD.new_empty(largest if hidden_RG is None else 0, 2 * width_F)
        at = 0
        for chunk in chunks(ctx.counts, ctx.chunk_rows):
            num_rows, stride = chunk.num_rows, _leading_dimension(chunk.num_rows)
            hidden_CG = again_CG if hidden_RG is None else hidden_RG[at : at + _padded(num_rows)]
            if hidden_RG is None:
                _forward(kernels, rows_RD, gate_up_EGD, down_EDF, chunk, hidden_CG, None)
            grad_out_CD = grad_out_RD[chunk.rows]
            grad_hidden_GC = buffer[: 2 * width_F * stride].view(2 * width_F, stride)
            weights = (gate_up_EGD[chunk.expert], down_EDF[chunk.expert])
            results = (grad_hidden_GC, act_CF, grad_rows_RD[chunk.rows])
            sizes = (num_rows, width_D, width_F, stride, act_CF.stride(0))
            kernels.call("amx_expert_backward", grad_out_CD, hidden_CG, *weights, *results, *sizes)
            grad_gate_up.add(chunk, grad_hidden_GC[:, :num_rows], rows_RD[chunk.rows])
            grad_down.add(chunk, dense_transpose(grad_out_CD), act_CF[:num_rows, :width_F])
            at += _padded(num_rows)
        return grad_rows_RD, grad_gate_up.value_EMN, grad_down.value_EMN, None, None, None


def _forward(
    kernels: Library,
    rows_RD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    chunk: Chunk,
    hidden_CG: Tensor | None,
    out_CD: Tensor | None,
) -> None:
    weights = (gate_up_EGD[chunk.expert], down_EDF[chunk.expert])
    sizes = (chunk.num_rows, *down_EDF.shape[1:])
    kernels.call("amx_expert_forward", rows_RD[chunk.rows], *weights, hidden_CG, out_CD, *sizes)
