"""Gathering tokens into the order of experts, and summing the experts' outputs by token.

Shapes: T tokens, D width, K experts of a token, R rows (routed tokens), sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.backend import kernels_for, require_kernels_for, uses_triton
from moepp.ops.constants import numbers
from moepp.ops.shared_gradient import SharedGradient, shared_gradient

_DONATED = "_moepp_donated"


@dataclass(frozen=True)
class RowOrder:
    """Which assignment each row belongs to, and the row of each assignment, or -1 where it has none.

    With ``has_spare`` the last row stands for "no row": no assignment has it, and whatever it holds is read by nobody.
    """

    assignments_R: Tensor
    positions_TK: Tensor
    has_spare: bool = False

    @cached_property
    def token_ids_R(self) -> Tensor:
        """The token of each row."""
        return self.assignments_R // self.positions_TK.shape[1]

    def __len__(self) -> int:
        return len(self.assignments_R)

    def first(self, num_rows: int) -> RowOrder:
        """Return the order of the first rows, where the others belong to no assignment."""
        order = RowOrder(self.assignments_R[:num_rows], self.positions_TK)
        if "token_ids_R" in vars(self):  # computed already
            vars(order)["token_ids_R"] = self.token_ids_R[:num_rows]
        return order

    @cached_property
    def row_ids_A(self) -> Tensor:
        """The row of each assignment; where it has none the spare row, or R, one more than the last."""
        return self.positions_TK.flatten().remainder(len(self) + (not self.has_spare))  # -1 becomes the largest

    @cached_property
    def first_assignment_T(self) -> Tensor:
        """The first assignment of each token."""
        num_tokens, top_k = self.positions_TK.shape
        return numbers(num_tokens, self.positions_TK, step=top_k)


def wants_spare_row(x_TD: Tensor) -> bool:
    """Return whether sums of rows of these tokens copy them where there is no spare row."""
    return kernels_for(x_TD) is None and len(x_TD) > 0


def gather_rows(x_TD: Tensor, order: RowOrder, gathered_BD: Tensor | None = None) -> Tensor:
    """Return the token of every row: [R, D]; the first of ``gathered_BD``, if :func:`gather_ahead` has them already."""
    return _Gather.apply(x_TD, order, shared_gradient(x_TD), None if gathered_BD is None else gathered_BD[: len(order)])


@torch.no_grad()
def gather_ahead(x_TD: Tensor, order: RowOrder) -> Tensor:
    """Return the token of every row, for :func:`gather_rows`: before it is known where the rows end."""
    return _gather(x_TD, order)


def _gather(x_TD: Tensor, order: RowOrder) -> Tensor:
    kernels = kernels_for(x_TD) if uses_triton() else None
    if kernels is None:
        return x_TD.index_select(0, order.token_ids_R)
    rows_RD = x_TD.new_empty(len(order), x_TD.shape[1])
    kernels.call("gather", x_TD.contiguous(), order.assignments_R, rows_RD, *rows_RD.shape, order.positions_TK.shape[1])
    return rows_RD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, order: RowOrder, shared: SharedGradient | None, gathered_RD: Tensor | None
    ) -> Tensor:
        ctx.shared = shared
        ctx.kernels, ctx.shape = kernels_for(x_TD), x_TD.shape
        ctx.order = order if ctx.kernels is None else None
        ctx.save_for_backward(order.positions_TK)
        return _gather(x_TD, order) if gathered_RD is None else gathered_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positions_TK,) = ctx.saved_tensors
        if ctx.kernels is None:
            rows_XD = grad_RD if ctx.order.has_spare else F.pad(grad_RD, (0, 0, 0, 1))
            return _sum_rows(rows_XD, ctx.order), None, None, None
        grad_x_TD = grad_RD.new_empty(ctx.shape)
        sum_TD = None if ctx.shared is None else ctx.shared.take()
        inputs = (grad_RD.contiguous(), positions_TK, None, sum_TD)
        ctx.kernels.call("combine", *inputs, grad_x_TD, *ctx.shape, positions_TK.shape[1])
        if ctx.shared is not None:
            ctx.shared.put(grad_x_TD)
        return (grad_x_TD if ctx.shared is None else None), None, None, None


def donate(tensor: Tensor) -> Tensor:
    """Return the same tensor, which :func:`combine_rows` may overwrite: nothing else reads it, not even autograd."""
    setattr(tensor, _DONATED, True)
    return tensor


def combine_rows(rows_RD: Tensor, order: RowOrder, weights_TK: Tensor, start_TD: Tensor | None = None) -> Tensor:
    """Return each token's rows times their gate weights, added to ``start_TD`` if given: [T, D] in the rows' dtype.

    Gate weights are float32; a weighted row is rounded to the rows' dtype once, or only their sum is. Sums are always
    taken in the same order. The result may take the place of a donated ``start_TD``.
    """
    if kernels_for(rows_RD):
        return _Combine.apply(rows_RD, order.positions_TK, weights_TK, start_TD)
    return _CombineByTorch.apply(rows_RD, order, weights_TK, start_TD)


def _sum_rows(rows_XD: Tensor, order: RowOrder) -> Tensor:
    """Return the sum of each token's rows, [T, D], from rows the last one of which stands for "no row".

    Taken in a fixed order, in float32, and rounded once: always the same bits. ``index_add`` on an accelerator adds in
    the order in which its threads come, and rounds each time. Padding is left out of a bag, whatever it holds.
    """
    bags = {"offsets": order.first_assignment_T, "padding_idx": len(rows_XD) - 1}
    return F.embedding_bag(order.row_ids_A, rows_XD, mode="sum", **bags)


def _of_each_assignment(values_R: Tensor, order: RowOrder) -> Tensor:
    """Return the value of each assignment's row, [A]; 0 where it has none, whatever the spare row holds."""
    if not order.has_spare:
        return F.pad(values_R, (0, 1)).index_select(0, order.row_ids_A)
    bags = {"offsets": numbers(len(order.row_ids_A), values_R), "padding_idx": len(values_R) - 1}  # of one row each
    return F.embedding_bag(order.row_ids_A, values_R.unsqueeze(1), mode="sum", **bags).squeeze(1)


class _CombineByTorch(torch.autograd.Function):
    """Rows that no assignment has may hold anything: they meet the sums of no token."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder, weights_TK: Tensor, start_TD: Tensor | None) -> Tensor:
        weights_R = weights_TK.flatten().index_select(0, order.assignments_R)
        weighted_XD = rows_RD.new_empty(len(rows_RD) + (not order.has_spare), rows_RD.shape[1])
        torch.mul(rows_RD, weights_R.unsqueeze(1), out=weighted_XD[: len(rows_RD)])
        ctx.order, ctx.has_start, ctx.weights_dtype = order, start_TD is not None, weights_TK.dtype
        ctx.save_for_backward(rows_RD, weights_R)
        out_TD = _sum_rows(weighted_XD, order)
        return out_TD if start_TD is None else out_TD.add_(start_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows_RD, weights_R), order = ctx.saved_tensors, ctx.order
        grad_RD = grad_TD.index_select(0, order.token_ids_R)
        # Embedding bags have these dots as the gradient of their weights, but CUDA's kernel refuses bfloat16.
        dots_R = (grad_RD * rows_RD).sum(1, dtype=ctx.weights_dtype)
        grad_weights_A = _of_each_assignment(dots_R, order)
        grad_rows_RD = torch.mul(grad_RD, weights_R.unsqueeze(1), out=grad_RD)
        return grad_rows_RD, None, grad_weights_A.view_as(order.positions_TK), grad_TD if ctx.has_start else None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor, start_TD: Tensor | None) -> Tensor:
        rows_RD, weights_TK = rows_RD.contiguous(), weights_TK.contiguous()
        in_place = start_TD is not None and hasattr(start_TD, _DONATED) and start_TD.is_contiguous()
        ctx.save_for_backward(rows_RD, positions_TK, weights_TK)
        ctx.kernels, ctx.has_start = require_kernels_for(rows_RD), start_TD is not None
        ctx.sizes = (positions_TK.shape[0], rows_RD.shape[1], positions_TK.shape[1])
        if start_TD is not None and in_place:  # tokens without rows cost nothing
            ctx.mark_dirty(start_TD)
            out_TD = start_TD
        else:
            start_TD = None if start_TD is None else start_TD.contiguous()
            out_TD = rows_RD.new_empty(ctx.sizes[:2])
        ctx.kernels.call("combine", rows_RD, positions_TK, weights_TK, start_TD, out_TD, *ctx.sizes)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_RD, positions_TK, weights_TK = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        grad_rows_RD, grad_weights_TK = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
        inputs = (grad_TD, rows_RD, positions_TK, weights_TK)
        ctx.kernels.call("combine_backward", *inputs, grad_rows_RD, grad_weights_TK, *ctx.sizes)
        return grad_rows_RD, None, grad_weights_TK, grad_TD if ctx.has_start else None
