"""Constant and copy experts: affine functions of their tokens (MoE++, arXiv 2410.07348, Eqs. 4 and 5).

With gate weights g, 0 where an expert was not chosen or was dropped:

    y_t = (g_copy + Σ_j g_const_j α_j) x_t + Σ_j g_const_j (1 - α_j) v_j,   [α_j, 1 - α_j] = softmax(W_j x_t)

Shapes: T tokens, D width, K experts of a token, C constant experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepp.ops.backend import require_row_kernels, row_kernels
from moepp.ops.matmul import linear_fp32
from moepp.ops.shared_gradient import SharedGradient, shared_gradient


def affine_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, alpha_C2D: Tensor, value_CD: Tensor, experts: range
) -> Tensor:
    """Return the weighted sum of these experts' outputs: [T, D] in x's dtype; 0 for a token that chose none of them.

    Args:
        x_TD: the tokens.
        ids_TK: chosen experts of every kind, int64.
        weights_TK: their gate weights, at least fp32, 0 where dropped. One of exactly 0 may get no gradient.
        alpha_C2D: W of every constant expert.
        value_CD: v of every constant expert.
        experts: numbers of the constant experts (the first C) and of the copy experts (the others).
    """
    if weights_TK.dtype == torch.float32 and row_kernels(x_TD):
        # A softmax of two depends on the difference of its logits alone.
        difference_CD = alpha_C2D.float().diff(dim=1).squeeze(1).neg()
        return _AffineExperts.apply(x_TD, ids_TK, weights_TK, difference_CD, value_CD, experts, shared_gradient(x_TD))
    num_constant, dtype = len(value_CD), weights_TK.dtype
    gates_TN = weights_TK.new_zeros(len(x_TD), len(experts) + 1).scatter_add(1, _local_ids(ids_TK, experts), weights_TK)
    gates_TC = gates_TN[:, :num_constant]
    scale_T = gates_TN[:, num_constant : len(experts)].sum(dim=1)
    if num_constant:
        logits_TC2 = linear_fp32(x_TD, alpha_C2D.flatten(0, 1)).unflatten(1, (num_constant, 2))
        alpha_TC = torch.sigmoid(logits_TC2[..., 0] - logits_TC2[..., 1]).to(dtype)
        scale_T = scale_T + (gates_TC * alpha_TC).sum(dim=1)
        gates_TC = gates_TC * (1 - alpha_TC)
    scaled_TD = x_TD * scale_T.to(x_TD.dtype).unsqueeze(-1)
    return torch.addmm(scaled_TD, gates_TC.to(x_TD.dtype), value_CD.to(x_TD.dtype))


def _local_ids(ids_TK: Tensor, experts: range) -> Tensor:
    """Numbers among ``experts``; one more than the last for all others."""
    inside_TK = (ids_TK >= experts.start) & (ids_TK < experts.stop)
    return torch.where(inside_TK, ids_TK - experts.start, len(experts))


class _AffineExperts(torch.autograd.Function):
    """The kernels compute α only for tokens that chose the expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        difference_CD: Tensor,
        value_CD: Tensor,
        experts: range,
        shared: SharedGradient | None,
    ) -> Tensor:
        ctx.shared = shared
        inputs = (x_TD, ids_TK, weights_TK, difference_CD, value_CD.to(x_TD.dtype))
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        ctx.value_dtype, ctx.kernels = value_CD.dtype, require_row_kernels(x_TD)
        ctx.sizes = (*x_TD.shape, ids_TK.shape[1], len(value_CD), experts.start, experts.stop)
        out_TD, alpha_TK = torch.empty_like(inputs[0]), torch.empty_like(inputs[2])
        ctx.kernels.call("affine_experts", *inputs, out_TD, alpha_TK, *ctx.sizes)
        ctx.save_for_backward(*inputs, alpha_TK)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors
        x_TD, _, weights_TK, difference_CD, value_CD, _ = inputs
        grad_difference_CD = torch.zeros_like(difference_CD)
        grad_value_CD = torch.zeros_like(value_CD, dtype=torch.float32)
        grad_weights_TK = torch.empty_like(weights_TK)
        sum_TD = None if ctx.shared is None else ctx.shared.take()
        grad_x_TD = torch.empty_like(x_TD) if sum_TD is None else sum_TD  # tokens without such an expert cost nothing
        results = (sum_TD, grad_x_TD, grad_weights_TK, grad_difference_CD, grad_value_CD)
        ctx.kernels.call("affine_experts_backward", grad_TD.contiguous(), *inputs, *results, *ctx.sizes)
        if ctx.shared is not None:
            ctx.shared.put(grad_x_TD)
            grad_x_TD = None
        return grad_x_TD, None, grad_weights_TK, grad_difference_CD, grad_value_CD.to(ctx.value_dtype), None, None
