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
from moepp.ops.matmul import without_autocast
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
    return _AffineByTorch.apply(x_TD, ids_TK, weights_TK, alpha_C2D, value_CD, experts)


class _AffineByTorch(torch.autograd.Function):
    """Keeps x as it is, not its float32 copy; the gradient is written out, in fewer launches than autograd's.

    X = all experts up to the last one here, and one place for the others.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, alpha_C2D: Tensor, value_CD: Tensor, experts: range
    ) -> Tensor:
        ctx.experts, ctx.alpha_dtype, ctx.value_dtype = experts, alpha_C2D.dtype, value_CD.dtype
        num_constant, places_TK = len(value_CD), ids_TK.clamp(max=experts.stop)
        gates_TX = weights_TK.new_zeros(len(x_TD), experts.stop + 1).scatter_(1, places_TK, weights_TK)
        gates_TC, copy_TX = gates_TX[:, experts.start : experts.stop].tensor_split([num_constant], dim=1)
        diff_CD = alpha_TC = beta_TC = None
        with without_autocast(x_TD.device.type):
            scale_T = copy_TX.squeeze(1) if copy_TX.shape[1] == 1 else copy_TX.sum(1)
            scale_T1 = x_TD.new_empty(len(x_TD), 1)
            if num_constant:
                wide_C2D = alpha_C2D.to(weights_TK.dtype)
                diff_CD = wide_C2D[:, 0] - wide_C2D[:, 1]  # a softmax of two depends on the difference alone
                alpha_TC = torch.mm(x_TD.to(weights_TK.dtype), diff_CD.t()).sigmoid_()
                own_TC = gates_TC * alpha_TC
                torch.add(own_TC.sum(1), scale_T, out=scale_T1.squeeze(1))
                beta_TC = torch.sub(gates_TC, own_TC, out=x_TD.new_empty(own_TC.shape))
            else:
                scale_T1.squeeze(1).copy_(scale_T)
            out_TD = x_TD * scale_T1
            if beta_TC is not None:
                torch.addmm(out_TD, beta_TC, value_CD.to(x_TD.dtype), out=out_TD)
        ctx.save_for_backward(x_TD, places_TK, gates_TC, scale_T1, value_CD, diff_CD, alpha_TC, beta_TC)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, places_TK, gates_TC, scale_T1, value_CD, diff_CD, alpha_TC, beta_TC = ctx.saved_tensors
        experts, dtype = ctx.experts, gates_TC.dtype
        first_copy = experts.start + len(value_CD)
        grad_scale_T1 = (grad_TD * x_TD).sum(1, keepdim=True, dtype=dtype)
        grad_x_TD = grad_TD * scale_T1
        grad_gates_TX = gates_TC.new_zeros(len(x_TD), experts.stop + 1)
        if first_copy < experts.stop:
            grad_gates_TX[:, first_copy : experts.stop] = grad_scale_T1
        grad_alpha_C2D = grad_value_CD = None
        if beta_TC is None:
            grad_alpha_C2D, grad_value_CD = x_TD.new_zeros(0, 2, x_TD.shape[1]), torch.zeros_like(value_CD)
        else:
            grad_beta_TC = torch.mm(grad_TD, value_CD.to(grad_TD.dtype).t())
            slope_TC = grad_scale_T1 - grad_beta_TC  # by alpha, with a gate of 1
            torch.addcmul(grad_beta_TC, alpha_TC, slope_TC, out=grad_gates_TX[:, experts.start : first_copy])
            grad_logits_TC = torch.ops.aten.sigmoid_backward(slope_TC.mul_(gates_TC), alpha_TC)
            grad_x_TD.add_(torch.mm(grad_logits_TC, diff_CD))
            grad_diff_CD = torch.mm(grad_logits_TC.t(), x_TD.to(dtype))
            grad_alpha_C2D = grad_diff_CD.new_empty(len(value_CD), 2, x_TD.shape[1], dtype=ctx.alpha_dtype)
            grad_alpha_C2D[:, 0] = grad_diff_CD
            torch.mul(grad_diff_CD, -1, out=grad_alpha_C2D[:, 1])
            grad_value_CD = torch.mm(beta_TC.t(), grad_TD).to(ctx.value_dtype)
        grad_weights_TK = grad_gates_TX.gather(1, places_TK)
        return grad_x_TD, None, grad_weights_TK, grad_alpha_C2D, grad_value_CD, None


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
