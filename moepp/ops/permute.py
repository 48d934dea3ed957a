"""Gathering tokens into the order of experts, and summing the experts' outputs by token.

Shapes: T tokens, D width, K experts of a token, R rows (routed tokens), sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import require_row_kernels, row_kernels
from moepp.ops.shared_gradient import SharedGradient, shared_gradient

_DONATED = "_moepp_donated"


@dataclass(frozen=True)
class RowOrder:
    """Which assignment each row belongs to, and the row of each assignment, or -1 where it has none."""

    assignments_R: Tensor
    positions_TK: Tensor

    @cached_property
    def token_ids_R(self) -> Tensor:
        """The token of each row."""
        return self.assignments_R // self.positions_TK.shape[1]


def gather_rows(x_TD: Tensor, order: RowOrder) -> Tensor:
    """Return the token of every row: [R, D]."""
    return _Gather.apply(x_TD, order.token_ids_R, order.positions_TK, shared_gradient(x_TD))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_ids_R: Tensor, positions_TK: Tensor, shared: SharedGradient | None
    ) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(positions_TK)
        ctx.kernels, ctx.shape = row_kernels(x_TD), x_TD.shape
        return x_TD.index_select(0, token_ids_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positions_TK,) = ctx.saved_tensors
        if ctx.kernels is None:
            return _add_rows(grad_RD.new_zeros(ctx.shape), grad_RD, positions_TK), None, None, None
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
    if row_kernels(rows_RD):
        return _Combine.apply(rows_RD, order.positions_TK, weights_TK, start_TD)
    weights_R = weights_TK.flatten().index_select(0, order.assignments_R)
    weighted_RD = (rows_RD * weights_R.unsqueeze(-1)).to(rows_RD.dtype)
    start_TD = rows_RD.new_zeros(len(weights_TK), rows_RD.shape[1]) if start_TD is None else start_TD
    return _AddRows.apply(start_TD, weighted_RD, order.token_ids_R, order.positions_TK)


def _add_rows(start_TD: Tensor, rows_RD: Tensor, positions_TK: Tensor) -> Tensor:
    """Return each token's rows added to its start in a fixed order and rounded once: bitwise reproducible.

    ``index_add`` on an accelerator adds in the order in which its threads come, and rounds each time.
    """
    if not len(rows_RD):
        return start_TD.clone()
    total_TD = start_TD.to(torch.promote_types(rows_RD.dtype, torch.float32), copy=True)
    for position_T in positions_TK.unbind(1):
        rows_TD = rows_RD.index_select(0, position_T.clamp(min=0))
        total_TD += rows_TD.masked_fill((position_T < 0).unsqueeze(1), 0)
    return total_TD.to(rows_RD.dtype)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start_TD: Tensor, rows_RD: Tensor, token_ids_R: Tensor, positions_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids_R)
        return _add_rows(start_TD, rows_RD, positions_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (token_ids_R,) = ctx.saved_tensors
        return grad_TD, grad_TD.index_select(0, token_ids_R), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor, start_TD: Tensor | None) -> Tensor:
        rows_RD, weights_TK = rows_RD.contiguous(), weights_TK.contiguous()
        in_place = start_TD is not None and hasattr(start_TD, _DONATED) and start_TD.is_contiguous()
        ctx.save_for_backward(rows_RD, positions_TK, weights_TK)
        ctx.kernels, ctx.has_start = require_row_kernels(rows_RD), start_TD is not None
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
