"""SwiGLU experts one after the other: one loop over experts and chunks, whatever computes the products of a chunk.

The loop cuts rows into chunks, stores gate and up or has them computed again, and gives every weight a gradient. A
backend says how one chunk is multiplied: :class:`ChunkProducts`; here by torch's products, in ``ops/cpu`` by compiled
kernels.

Shapes: R rows sorted by expert, D width, F expert width, G = 2F, E local experts, C rows of one chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from moepp.ops.chunks import Chunk, WeightGradients, chunks, largest_chunk
from moepp.ops.matmul import dense_transpose, mm
from moepp.ops.swiglu import swiglu, swiglu_backward

Grads = tuple[WeightGradients, WeightGradients]
"""Of gate_up and down."""


class ChunkProducts(ABC):
    """The products of one chunk of one expert's rows; an object serves one forward or one backward pass.

    Attributes:
        block: stored gate and up take memory for a multiple of this many rows.
        chunks_forward: whether forward too takes at most ``chunk_rows`` rows at a time; else it takes all of an
            expert's rows and limits its temporary memory itself.
        gate_up_EGD: weights of all experts, dense.
        down_EDF: weights of all experts, dense.
    """

    block: ClassVar[int] = 1
    chunks_forward: ClassVar[bool] = False

    def __init__(self, gate_up_EGD: Tensor, down_EDF: Tensor) -> None:
        self.gate_up_EGD, self.down_EDF = gate_up_EGD, down_EDF

    @classmethod
    def padded(cls, rows: int) -> int:
        """Return that many rows, rounded up to whole blocks."""
        return -(-rows // cls.block) * cls.block

    def weights(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return gate_up [G, D] and down [D, F] of the chunk's expert."""
        return self.gate_up_EGD[chunk.expert], self.down_EDF[chunk.expert]

    @abstractmethod
    def allocate_forward(self, longest: int, stores: bool) -> None:
        """Allocate temporary memory for forward.

        Args:
            longest: rows of the longest chunk.
            stores: whether :meth:`forward` gets memory for gate and up.
        """

    @abstractmethod
    def allocate_backward(self, longest: int) -> None:
        """Allocate temporary memory for backward and for gate and up computed again; ``longest`` as in forward."""

    @abstractmethod
    def forward(self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor | None, out_CD: Tensor | None) -> None:
        """Write the outputs to ``out_CD``, and to ``hidden_CG`` gate and up in an order of the backend's own.

        None: that result is not wanted.
        """

    @abstractmethod
    def backward(
        self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor, grad_out_CD: Tensor, grad_x_CD: Tensor, grads: Grads
    ) -> None:
        """Write the gradient of x to ``grad_x_CD`` and add the chunk's share to those of gate_up and down."""


class LoopSwiGLU(torch.autograd.Function):
    """``down(silu(gate(x)) * up(x))`` for each expert, by the products of ``backend``.

    Where ``stores``, gate and up [R, 2F] are kept, else they are computed again in backward; the activation is always
    computed again. Temporary memory is allocated once, for the longest chunk.
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
        backend: type[ChunkProducts],
    ) -> Tensor:
        rows_RD, gate_up_EGD, down_EDF = rows_RD.contiguous(), gate_up_EGD.contiguous(), down_EDF.contiguous()
        products = backend(gate_up_EGD, down_EDF)
        products.allocate_forward(largest_chunk(counts, chunk_rows), stores)
        stored_rows = sum(map(backend.padded, counts)) if stores else 0
        hidden_RG, out_RD = rows_RD.new_empty(stored_rows, gate_up_EGD.shape[1]), torch.empty_like(rows_RD)
        start = 0
        for chunk in chunks(counts, chunk_rows if backend.chunks_forward else None):
            stop = start + backend.padded(chunk.num_rows)
            products.forward(chunk, rows_RD[chunk.rows], hidden_RG[start:stop] if stores else None, out_RD[chunk.rows])
            start = stop
        ctx.save_for_backward(rows_RD, gate_up_EGD, down_EDF, hidden_RG if stores else None)
        ctx.counts, ctx.chunk_rows, ctx.backend = counts, chunk_rows, backend
        return out_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, gate_up_EGD, down_EDF, hidden_RG = ctx.saved_tensors
        grad_out_RD, grad_rows_RD = grad_out_RD.contiguous(), torch.empty_like(rows_RD)
        grads = WeightGradients(gate_up_EGD, ctx.counts), WeightGradients(down_EDF, ctx.counts)
        products, longest = ctx.backend(gate_up_EGD, down_EDF), largest_chunk(ctx.counts, ctx.chunk_rows)
        products.allocate_backward(longest)
        again_CG = rows_RD.new_empty(products.padded(longest) if hidden_RG is None else 0, gate_up_EGD.shape[1])
        start = 0
        for chunk in chunks(ctx.counts, ctx.chunk_rows):
            x_CD, padded = rows_RD[chunk.rows], products.padded(chunk.num_rows)
            if hidden_RG is None:
                hidden_CG = again_CG[:padded]
                products.forward(chunk, x_CD, hidden_CG, None)
            else:
                hidden_CG = hidden_RG[start : start + padded]
            products.backward(chunk, x_CD, hidden_CG, grad_out_RD[chunk.rows], grad_rows_RD[chunk.rows], grads)
            start += padded
        return grad_rows_RD, *(grad.value_EMN for grad in grads), None, None, None, None


class TorchProducts(ChunkProducts):
    """Torch's products, for every device and type."""

    chunks_forward = True

    def allocate_forward(self, longest: int, stores: bool) -> None:
        width = self.down_EDF.shape[2]
        # Where gate and up are not stored, the activation takes gate's place.
        self._hidden_CG = self.down_EDF.new_empty(0 if stores else longest, 2 * width)
        self._act_CF = self.down_EDF.new_empty(longest, width) if stores else self._hidden_CG[:, :width]

    def allocate_backward(self, longest: int) -> None:
        width = self.down_EDF.shape[2]
        self._grad_act_CF, self._act_CF = self.down_EDF.new_empty(2, longest, width)
        self._grad_hidden_CG = self.down_EDF.new_empty(longest, 2 * width)

    def forward(self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor | None, out_CD: Tensor | None) -> None:
        (gate_up_GD, down_DF), part = self.weights(chunk), slice(chunk.num_rows)
        hidden_CG = self._hidden_CG[part] if hidden_CG is None else hidden_CG
        mm(x_CD, gate_up_GD.t(), hidden_CG)
        if out_CD is None:
            return
        gate_CF, up_CF = hidden_CG.chunk(2, dim=1)
        swiglu(gate_CF, up_CF, self._act_CF[part])
        mm(self._act_CF[part], down_DF.t(), out_CD)

    def backward(
        self, chunk: Chunk, x_CD: Tensor, hidden_CG: Tensor, grad_out_CD: Tensor, grad_x_CD: Tensor, grads: Grads
    ) -> None:
        (gate_up_GD, down_DF), (grad_gate_up, grad_down), part = self.weights(chunk), grads, slice(chunk.num_rows)
        act_CF, grad_act_CF, grad_hidden_CG = self._act_CF[part], self._grad_act_CF[part], self._grad_hidden_CG[part]
        mm(grad_out_CD, down_DF, grad_act_CF)
        swiglu_backward(hidden_CG, grad_act_CF, grad_hidden_CG, act_CF)
        grad_down.add(chunk, dense_transpose(grad_out_CD), act_CF)
        grad_gate_up.add(chunk, dense_transpose(grad_hidden_CG), x_CD)
        mm(grad_hidden_CG, gate_up_GD, grad_x_CD)
