"""SwiGLU experts on AVX2: avx2_experts.c.

The compiled kernels do all products in float32, bfloat16 values too, which such processors cannot multiply: torch's
bfloat16 product takes ten times as long there. Weights are read where they lie, SwiGLU is computed on the way.

Shapes: D width, F expert width, G = 2F, C rows of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.chunks import Chunk
from moepp.ops.cpu.compiled_products import CompiledProducts
from moepp.ops.expert_loop import Grads

_BLOCK = 16  # rows that the kernels handle at a time
_FORWARD_BYTES = 12_000_000  # of the last-level cache, for the rows that forward computes at a time


def supports_avx2(rows_RD: Tensor) -> bool:
    """Return whether the kernels support this processor, dtype and width."""
    kernels = cpu_kernels(rows_RD)
    return kernels is not None and kernels.has_avx2_experts


def backward_scratch_bytes(width_D: int, width_F: int, rows: int) -> int:
    """Return backward's temporary bytes for the longest chunk: rows, gradients of gate and up, activation."""
    padded = AVX2Products.padded
    return 4 * padded(rows) * (padded(width_D) + 2 * width_F + padded(width_F))


class AVX2Products(CompiledProducts):
    """Products on vector registers."""

    block = _BLOCK

    def allocate_forward(self, longest: int, stores: bool) -> None:
        elements = self._width_D + self._width_F
        self._rows_at_a_time = self.padded(min(longest, max(_FORWARD_BYTES // (4 * elements), 1)))
        self._scratch = torch.empty(self._rows_at_a_time * elements, dtype=torch.float32)

    def allocate_backward(self, longest: int) -> None:
        size = backward_scratch_bytes(self._width_D, self._width_F, longest) // 4
        self._rows_at_a_time, self._scratch = self.padded(longest), torch.empty(size, dtype=torch.float32)

    def forward(self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor | None, out_CD: Tensor | None) -> None:
        sizes = (chunk.num_rows, self._width_D, self._width_F, self._rows_at_a_time)
        self._kernels.call("avx2_expert_forward", x_CD, *self.weights(chunk), hidden_CG, out_CD, self._scratch, *sizes)

    def backward(
        self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor, grad_out_CD: Tensor, grad_x_CD: Tensor, grads: Grads
    ) -> None:
        grad_gate_up, grad_down = grads
        with grad_gate_up.open(chunk) as gate_up_results, grad_down.open(chunk) as down_results:
            values, sums = zip(gate_up_results, down_results, strict=True)
            inputs = (grad_out_CD, x_CD, hidden_CG, *self.weights(chunk))
            sizes = (chunk.num_rows, self._width_D, self._width_F)
            self._kernels.call("avx2_expert_backward", *inputs, grad_x_CD, *values, *sums, self._scratch, *sizes)
