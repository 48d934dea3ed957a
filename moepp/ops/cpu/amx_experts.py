"""SwiGLU experts on the tile registers of Intel AMX, bfloat16: amx_experts.c.

The compiled kernels do every product in which weights are a factor, without laying out the weights anew, and SwiGLU on
the way. The products of two activations (the weights' gradients) are torch's.

Shapes: D width, F expert width, G = 2F, C rows of one chunk.
"""

from __future__ import annotations

from torch import Tensor

from moepp.ops.backend import cpu_kernels
from moepp.ops.chunks import Chunk
from moepp.ops.cpu.compiled_products import CompiledProducts
from moepp.ops.expert_loop import Grads
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


def _leading_dimension(rows: int) -> int:
    """Return a padded stride for that many rows: whole cache lines, no large power of 2 (cache aliasing)."""
    padded = AMXProducts.padded(rows)
    return padded + _BLOCK if padded % (2 * _BLOCK) == 0 else padded


class AMXProducts(CompiledProducts):
    """Products on tile registers."""

    block = _BLOCK

    def allocate_forward(self, longest: int, stores: bool) -> None:
        pass  # the kernel allocates what it needs for as many rows as the cache holds

    def allocate_backward(self, longest: int) -> None:
        stride = _leading_dimension(longest)
        self._grad_hidden = self.down_EDF.new_empty(2 * self._width_F * stride)
        self._act_CF = self.down_EDF.new_empty(stride, self._width_F + _BLOCK)

    def forward(self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor | None, out_CD: Tensor | None) -> None:
        sizes = (chunk.num_rows, self._width_D, self._width_F)
        self._kernels.call("amx_expert_forward", x_CD, *self.weights(chunk), hidden_CG, out_CD, *sizes)

    def backward(
        self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor, grad_out_CD: Tensor, grad_x_CD: Tensor, grads: Grads
    ) -> None:
        rows, width_F, stride = chunk.num_rows, self._width_F, _leading_dimension(chunk.num_rows)
        grad_hidden_GC = self._grad_hidden[: 2 * width_F * stride].view(2 * width_F, stride)
        results = (grad_hidden_GC, self._act_CF, grad_x_CD)
        sizes = (rows, self._width_D, width_F, stride, self._act_CF.stride(0))
        self._kernels.call("amx_expert_backward", grad_out_CD, hidden_CG, *self.weights(chunk), *results, *sizes)
        grad_gate_up, grad_down = grads
        grad_gate_up.add(chunk, grad_hidden_GC[:, :rows], x_CD)
        grad_down.add(chunk, dense_transpose(grad_out_CD), self._act_CF[:rows, :width_F])
